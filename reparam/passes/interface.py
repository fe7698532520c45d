"""What a teacher is called with: the student's signature, and the constants that its graph was recorded for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from reparam.errors import InputError
from reparam.passes.example import Inputs
from reparam.passes.meta import has_tensor

_ABSENT = inspect.Parameter.empty


class Interface:
    """The student's call, for a graph that takes the tensors of the example and knows everything else.

    Inputs without tensors (flags, modes, None) are constants of a recorded graph: those of the example, and the
    defaults of what it left out. They may be given all the same, and have to be the same.

    Args:
        forward: the student's forward, bound.
        inputs: the example input.
        model: the student's class, for messages.
    """

    def __init__(self, forward: Callable[..., Any], inputs: Inputs, model: str) -> None:
        self.model = model
        self.signature: inspect.Signature | None = _signature(forward)
        parameters = list((self.signature or inspect.Signature()).parameters.values())
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._names = [p.name for p in parameters if p.kind in positional]
        self._example = {self._key(k): value for k, value in enumerate(inputs[0])} | inputs[1]
        self._defaults = {p.name: p.default for p in parameters if p.default is not _ABSENT}
        variadic = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
        named = {name for name in self._names if name in self._example}
        self.plain = self.signature is None or (
            all(has_tensor(value) for value in self._example.values())
            and (variadic or named == {p.name for p in parameters})
        )
        """Whether the graph takes just what the student takes."""

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the graph's inputs.

        Raises:
            InputError: another constant than the recorded one, an unknown input, or one is missing or given twice.
        """
        given: dict[Any, Any] = {self._key(k): value for k, value in enumerate(args)}
        for name, value in kwargs.items():
            if name in given:
                raise InputError(f"the teacher of {self.model} got its input {name!r} twice")
            given[name] = value
        tensors = []
        for key, example in self._example.items():
            value = given.pop(key, self._defaults.get(key, _ABSENT))
            if value is _ABSENT:
                raise InputError(f"the teacher of {self.model} needs its input {key!r}, as the student does")
            if not has_tensor(example):
                self._same(key, example, value)
            elif isinstance(value, Tensor) or has_tensor(value):
                tensors.append(value)
            else:
                self._refuse(key, "a tensor", value)
        for key, value in given.items():
            if key not in self._defaults:
                raise InputError(f"the teacher of {self.model} takes no input {key!r}; the example_input had none")
            self._same(key, self._defaults[key], value)
        return tensors

    def _key(self, position: int) -> Any:
        return self._names[position] if position < len(self._names) else position

    def _same(self, key: Any, expected: Any, value: Any) -> None:
        if value is expected:
            return
        alike = isinstance(value, type(expected)) or isinstance(expected, type(value))
        if has_tensor(value) or not alike or value != expected:
            self._refuse(key, repr(expected), value)

    def _refuse(self, key: Any, expected: str, value: Any) -> None:
        shown = "a tensor" if has_tensor(value) else repr(value)
        raise InputError(
            f"the teacher of {self.model} was recorded with {key}={expected} (example_input, or forward's default) "
            f"and got {shown}: only tensors are inputs of its graph. Expand again with an example_input that has it; "
            "the student and student_view take both"
        )


def _signature(forward: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(forward)
    except (TypeError, ValueError):
        return None
