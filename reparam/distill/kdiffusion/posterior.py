"""The numbers of Kdiffusion: how much signal is left at each time, and what a step back in time is made of.

In Kdiffusion's notation ``x_n = A_n x_0 + B_n noise`` with ``A_n^2 + B_n^2 = 1`` (``A_n = sqrt(alpha_bar_n)`` of DDPM),
where the noise has the variance of the student's features.
"""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass

from reparam.errors import InputError, near_matches

SCHEDULES = ("linear", "cosine")
"""Names of noise schedules."""

_DDPM = (1000, 1e-4, 0.02)
"""Steps, first and last beta of DDPM's linear schedule."""

_OFFSET = 0.008
"""The small offset of the cosine schedule."""

_LARGEST_BETA = 0.999
"""Of a step of the cosine schedule, which would end without any signal."""


@dataclass(frozen=True)
class Diffusion:
    """A chain of ``m`` steps from the noisiest time back to the data.

    Attributes:
        times: ``T = n_0 > n_1 > ... > n_m = 0``, ``m + 1`` numbers.
        signal: ``A`` at these times, ``m + 1`` numbers.
        noise: ``B`` at these times.
        u: of each of the ``m`` steps, how much of the value before it is kept.
        v: how much of the data enters.
        w: the variance of the step, in units of the noise.
    """

    times: tuple[int, ...]
    signal: tuple[float, ...]
    noise: tuple[float, ...]
    u: tuple[float, ...]
    v: tuple[float, ...]
    w: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.u)


def coefficients(schedule: str, steps: int, features: int) -> tuple[list[float], list[float]]:
    """The coefficients ``(u, v)`` of the steps of a chain, from the noisiest to the last; see `diffusion`.

    Args:
        schedule: "linear" or "cosine".
        steps: ``T``.
        features: ``m``.

    Returns:
        Two lists of length ``features``; the last step has ``u = 0`` and ``v = 1``.

    Raises:
        InputError: see `diffusion`.
    """
    found = diffusion(schedule, steps, features)
    return list(found.u), list(found.v)


def diffusion(schedule: str, steps: int, features: int) -> Diffusion:
    """The chain of ``features`` steps through a noise schedule, at equally spaced times.

    A step from time ``n`` to ``s < n`` draws ``x_s`` from the posterior ``N(u x_n + v x_0, w sigma^2)`` with
    ``a = A_n / A_s``, ``b^2 = 1 - a^2`` and

    ``u = a B_s^2 / B_n^2``, ``v = A_s b^2 / B_n^2``, ``w = B_s^2 b^2 / B_n^2``.

    The paper prints one expression for both ``u`` and ``v`` (equation 10); these are the ones that its equations 5 to 9
    lead to. ``u + v`` is not 1, but ``u A_n + v = A_s``: means stay in place. The last step has ``u = w = 0, v = 1``.

    Times are ``n_k = floor(T (m - k) / m)``. The paper does not name a schedule:

    * ``linear``: DDPM, betas from 1e-4 to 0.02 in 1000 steps. Other numbers of steps cut the same way into other
      pieces: time ``t`` of ``T`` has the signal of DDPM's time ``1000 t / T``, with ``log A`` linear between two of
      DDPM's steps. So the chain hardly depends on ``T``, and no beta leaves [0, 1] for small ``T``, as betas that grow
      with ``1000 / T`` would.
    * ``cosine``: ``A_t = f(t) / f(0)``, ``f(t) = cos(pi / 2 (t / T + 0.008) / 1.008)``, with no beta above 0.999.

    Args:
        schedule: "linear" or "cosine".
        steps: ``T``, at least ``features``.
        features: ``m``, at least 2: a chain of one step is a plain difference, which ``hint`` is for.

    Raises:
        InputError: an unknown schedule, fewer than two features, or fewer steps than features.

    Source: Kdiffusion, equations 4 to 10, corrected; Ho et al., "Denoising Diffusion Probabilistic Models" (NeurIPS
    2020), section 4; Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (ICML 2021), equation 17.
    """
    _check(schedule, steps, features)
    times = tuple(steps * (features - k) // features for k in range(features + 1))
    kept = _linear(steps, times) if schedule == "linear" else _cosine(steps, times)
    rows = [_step(before, after) for before, after in itertools.pairwise(kept)]
    u, v, w = zip(*rows, strict=True)
    return Diffusion(times, tuple(kept), tuple(math.sqrt(1 - a * a) for a in kept), u, v, w)


def _step(before: float, after: float) -> tuple[float, float, float]:
    """``(u, v, w)`` of a step between two times, from the signal at both."""
    a = before / after
    fresh, variance_before, variance_after = 1 - a * a, 1 - before * before, 1 - after * after
    return (
        a * variance_after / variance_before,
        after * fresh / variance_before,
        (variance_after * fresh / variance_before),
    )


def _linear(steps: int, times: tuple[int, ...]) -> list[float]:
    count, first, last = _DDPM
    betas = [first + (last - first) * k / (count - 1) for k in range(count)]
    logs = [0.0, *itertools.accumulate(0.5 * math.log1p(-beta) for beta in betas)]
    grid = list(range(count + 1))
    found = []
    for time in times:
        place = count * time / steps
        left = min(bisect.bisect_right(grid, place) - 1, count - 1)
        found.append(math.exp(logs[left] + (place - left) * (logs[left + 1] - logs[left])))
    return found


def _cosine(steps: int, times: tuple[int, ...]) -> list[float]:
    ideal = [math.cos(math.pi / 2 * (t / steps + _OFFSET) / (1 + _OFFSET)) for t in range(steps + 1)]
    smallest = math.sqrt(1 - _LARGEST_BETA)
    ratios = (max(after / before, smallest) for before, after in itertools.pairwise(ideal))
    kept = [1.0, *itertools.accumulate(ratios, lambda a, b: a * b)]
    return [kept[time] for time in times]


def _check(schedule: str, steps: int, features: int) -> None:
    if schedule not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise InputError(f"unknown noise schedule {schedule!r}{near_matches(str(schedule), SCHEDULES)}; known: {known}")
    for name, value in (("steps", steps), ("features", features)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{name} must be a whole number, got {value!r}")
    if features < 2:
        raise InputError(
            f"a chain needs at least 2 features, got {features}: one alone is compared with the teacher's directly "
            "(reparam.distill.losses.hint)"
        )
    if steps < features:
        raise InputError(f"a chain of {features} features needs at least as many diffusion steps, got {steps}")


__all__ = ["SCHEDULES", "Diffusion", "coefficients", "diffusion"]
