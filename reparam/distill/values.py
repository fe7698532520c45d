"""A value and the type that a setting declares."""

from __future__ import annotations

import numbers
import types
import typing
from typing import Any

from reparam.errors import InputError

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list of numbers",
}
_LARGEST = 1e300


def converted(value: Any, annotation: Any, where: str) -> Any:
    """Return a value as an annotation has it: ``T``, ``T | None``, or ``tuple[T, ...]``.

    An int is a float as well, and NumPy's numbers are numbers.

    Raises:
        InputError: it is of another type; the message begins with ``where``.
    """
    is_union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    allowed = typing.get_args(annotation) if is_union else (annotation,)
    if value is None and type(None) in allowed:
        return None
    wanted = next(kind for kind in allowed if kind is not type(None))
    kind = typing.get_origin(wanted) or wanted
    if kind is tuple and isinstance(value, (list, tuple)):
        return tuple(converted(entry, typing.get_args(wanted)[0], f"{where}, an entry") for entry in value)
    if kind is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = value if isinstance(value, int) else float(value)  # no float holds every int
        if abs(number) <= _LARGEST:
            return float(number)
    if kind is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if kind in (bool, str) and type(value) is kind:
        return value
    raise InputError(f"{where} must be {_WORDS[kind]}, got {shown(value)}{_way_out(value, kind)}")


def _way_out(value: Any, kind: type) -> str:
    if kind is str:
        return f"; write '{str(value).lower() if isinstance(value, bool) else value}', with quotes"
    if isinstance(value, str) and kind in (int, float):
        try:
            kind(value)
        except ValueError:
            return ""
        return f"; write {value}, without quotes"
    return "; leave the line out for the default" if value is None else ""


def shown(value: Any) -> str:
    """Return a value as messages show it."""
    kinds: dict[type, str] = {bool: "", int: "the number ", float: "the number ", str: "the text "}
    if value is None:
        return "nothing"
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    return f"{kinds.get(type(value), '')}{shown if len(shown) <= 80 else shown[:77] + '...'}"
