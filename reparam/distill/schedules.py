"""The temperature of distillation by epoch: Gap-KD's dynamic temperature module, and what its table 7 compares."""

from __future__ import annotations

import math
from collections.abc import Callable

from reparam.errors import InputError, near_matches

SCHEDULES = ("dtm", "constant", "linear", "exponential", "log", "sigmoid", "piecewise")
"""Names of ``temperature``."""


def temperature(name: str, tau_max: float, tau_min: float, epochs: int) -> list[float]:
    """The temperature of every epoch, in order.

    With ``e`` the epoch from 1 to ``N = epochs``:

    | name | temperature | in the last epoch |
    |---|---|---|
    | ``dtm`` | ``tau_max (tau_min / tau_max)^((e - 1) / (N - 1))``, the paper's module | ``tau_min`` |
    | ``constant`` | ``tau_max`` | ``tau_max`` |
    | ``linear`` | ``tau_max - (tau_max - tau_min) e / N`` | ``tau_min`` |
    | ``exponential`` | ``tau_max (tau_min / tau_max)^(e / N)`` | ``tau_min`` |
    | ``log`` | ``tau_max - (tau_max - tau_min) ln(e + 1) / ln(N + 1)`` | ``tau_min`` |
    | ``sigmoid`` | ``tau_min + (tau_max - tau_min) / (1 + exp((e - N / 2) / (0.1 N)))`` | 0.7% of the way above |
    | ``piecewise`` | linear to ``tau_min`` in epoch ``N / 2``, constant from there | ``tau_min`` |

    ``tau_min`` is reached to the last bit. Only ``dtm`` starts at ``tau_max``: the others count from epoch 0, which is
    never trained. Falling schedules fall in every epoch, ``piecewise`` in the first half. Each stage of a run has a
    schedule of its own (the paper's algorithm forgets to start again in its second stage).

    Args:
        name: one of ``SCHEDULES``.
        tau_max: the highest temperature.
        tau_min: the lowest temperature, ``0 < tau_min <= tau_max``.
        epochs: of the stage, at least 1. With a single one ``dtm`` would have to be at both ends at once, and is
            refused unless these are equal; the other formulas hold for it.

    Raises:
        InputError: an unknown name, temperatures that are not positive or in the wrong order, no epochs, or ``dtm``
            over one epoch.

    Source: Gap-KD, section 3 (dynamic temperature module) and table 7, whose formulas are those of its code.
    """
    _check(name, tau_max, tau_min, epochs)
    share = _SHARES[name]
    geometric = name in ("dtm", "exponential")
    return [_between(tau_max, tau_min, share(epoch, epochs), geometric) for epoch in range(1, epochs + 1)]


def _between(tau_max: float, tau_min: float, share: float, geometric: bool) -> float:
    """Go a share of the way from one temperature to the other; exact at both ends."""
    if share == 0:
        return float(tau_max)
    if geometric:
        return float(tau_min * (tau_max / tau_min) ** (1 - share))
    return float(tau_min + (tau_max - tau_min) * (1 - share))


_SHARES: dict[str, Callable[[int, int], float]] = {
    "dtm": lambda e, n: (e - 1) / (n - 1) if n > 1 else 1.0,
    "constant": lambda e, n: 0.0,
    "linear": lambda e, n: e / n,
    "exponential": lambda e, n: e / n,
    "log": lambda e, n: math.log(e + 1) / math.log(n + 1),
    "sigmoid": lambda e, n: 1 - 1 / (1 + math.exp((e - n / 2) / (0.1 * n))),
    "piecewise": lambda e, n: min(2 * e / n, 1.0),
}
"""How much of the way is behind after an epoch."""


def _check(name: str, tau_max: float, tau_min: float, epochs: int) -> None:
    if name not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise InputError(f"unknown temperature schedule {name!r}{near_matches(str(name), SCHEDULES)}; known: {known}")
    for label, value in (("tau_max", tau_max), ("tau_min", tau_min)):
        if not (isinstance(value, (int, float)) and value > 0 and math.isfinite(value)):
            raise InputError(f"{label} must be a positive temperature, got {value!r}")
    if name != "constant" and tau_min > tau_max:
        raise InputError(f"temperatures fall from tau_max to tau_min, got tau_max={tau_max} < tau_min={tau_min}")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise InputError(f"a schedule needs a whole number of epochs, at least 1, got {epochs!r}")
    if name == "dtm" and epochs == 1 and tau_min < tau_max:
        raise InputError(
            f"the schedule 'dtm' starts at tau_max={tau_max} and ends at tau_min={tau_min}, which one epoch cannot do; "
            "train for two epochs or more (an assistant: --assistant-epochs), or use the schedule 'constant'"
        )


__all__ = ["SCHEDULES", "temperature"]
