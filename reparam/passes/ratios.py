"""Ratios: the argument, its form in files, and what was decided for each layer (by ``reparam.passes.layers``)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reparam.errors import InputError

Ratio = int | Mapping[str, int]
"""One ratio for all layers, or name, glob or ``re:`` pattern -> ratio; the first entry that matches a layer decides."""

_EXAMPLE = "for example ratio=2, or ratio={'layer4.*': 4, '*': 2}"


@dataclass(frozen=True)
class Choice:
    """The ratio of one layer.

    Args:
        ratio: replicas of each of its outputs.
        entry: the entry of the mapping that says so, or None.
        leader: the layer of its stream whose ratio it took over, or None.
    """

    ratio: int = 1
    entry: str | None = None
    leader: str | None = None


@dataclass(frozen=True)
class Ratios:
    """The ratio of every layer: of those in ``layers`` what stands there, of all others ``default``."""

    default: int = 1
    layers: Mapping[str, Choice] = field(default_factory=dict)

    def of(self, name: str | None) -> int:
        """Return the number of replicas of the outputs of the layer with this weight."""
        choice = self.layers.get(name) if name is not None else None
        return self.default if choice is None else choice.ratio

    def note(self, name: str, count: int | None) -> str:
        """Return what the plan says about a layer that got ``count`` replicas of each output, or unequal numbers."""
        choice = self.layers.get(name)
        if choice is None:
            return ""
        if count != choice.ratio:
            wanted = f"ratio {choice.ratio} by entry {choice.entry!r}"
            return "" if choice.entry is None else f"what it is connected to does not allow {wanted}"
        if choice.leader is not None:
            return f"ratio {choice.ratio} as {choice.leader}, in whose stream it is"
        if choice.entry is None:
            return "no ratio entry matches it"
        return f"ratio 1 by entry {choice.entry!r}" if choice.ratio == 1 else ""


# -- the argument --------------------------------------------------------------------------------------------------


def check_ratio(ratio: Any) -> Ratio:
    """Return the ratio, a mapping as a plain dict.

    Raises:
        InputError: neither an int >= 1 nor a mapping of names and patterns to such ints.
    """
    if not isinstance(ratio, Mapping):
        return _check_number(ratio, "ratio", _EXAMPLE, "ratio=2 doubles the channels")
    if not ratio:
        raise InputError(f"ratio is an empty mapping, which widens nothing; {_EXAMPLE}")
    for entry, value in ratio.items():
        _check_entry(entry)
        way = f"{{{entry!r}: 1}} keeps the channels, {{{entry!r}: 2}} doubles them"
        _check_number(value, f"ratio entry {entry!r}", f"for example {{{entry!r}: 2}}", way)
    return dict(ratio)


def _check_number(value: Any, what: str, example: str, meaning: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{what} must be an int >= 1, not {value!r} ({type(value).__name__}); {example}")
    if value < 1:
        raise InputError(f"{what} must be an int >= 1, not {value}; {meaning}")
    return value


def _check_entry(entry: Any) -> None:
    if not isinstance(entry, str):
        raise InputError(
            f"a ratio entry is a name, a glob, or 're:' and a regular expression, not {entry!r} "
            f"({type(entry).__name__})"
        )
    try:
        re.compile(entry.removeprefix("re:") if entry.startswith("re:") else "")
    except re.error as error:
        raise InputError(f"ratio entry {entry!r} is no regular expression: {error}") from error


# -- in files ------------------------------------------------------------------------------------------------------


def ratio_to_json(ratio: Ratio) -> Any:
    """Return a JSON value; a mapping is a list of pairs, whose order counts."""
    return [[entry, value] for entry, value in ratio.items()] if isinstance(ratio, Mapping) else ratio


def ratio_from_json(data: Any) -> Ratio:
    """Inverse of :func:`ratio_to_json`.

    Raises:
        TypeError: something else.
    """
    if type(data) is int:
        return data
    if isinstance(data, list) and data and all(isinstance(pair, list) and len(pair) == 2 for pair in data):
        result = {entry: value for entry, value in data}
        if all(isinstance(entry, str) and type(value) is int for entry, value in data):
            return result
    raise TypeError(f"ratio is {data!r:.40}, neither an int nor a list of entries")
