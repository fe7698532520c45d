"""While a tracer runs, what code reads off modules (train flags, lists of tensors) comes from the tracer."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

TRACERS: list[Any] = []
"""The tracers that are running, the innermost last."""


@contextlib.contextmanager
def training_property() -> Iterator[None]:
    """While tracing, ``module.training`` asks the innermost tracer instead of the instance."""

    def read(module: nn.Module) -> Any:
        return TRACERS[-1].training_of(module)

    def write(module: nn.Module, value: bool) -> None:
        TRACERS[-1].refuse_new_mode(module)
        vars(module)["training"] = value

    if isinstance(vars(nn.Module).get("training"), property):
        yield
        return
    nn.Module.training = property(read, write)  # type: ignore[assignment]
    try:
        yield
    finally:
        del nn.Module.training


@contextlib.contextmanager
def listed_tensors() -> Iterator[None]:
    """While tracing, ``module.parameters()`` and ``buffers()`` yield graph values, as access by name does.

    Networks ask the first one for its device and dtype (``next(self.parameters()).device``).
    """
    plain = {name: vars(nn.Module)[name] for name in ("parameters", "buffers")}
    if any(hasattr(function, "__wrapped__") for function in plain.values()):
        yield
        return
    for name, function in plain.items():
        setattr(nn.Module, name, _as_values(function))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(nn.Module, name, function)


def _as_values(function: Callable[..., Iterator[Tensor]]) -> Callable[..., Iterator[Any]]:
    @functools.wraps(function)
    def listed(self: nn.Module, recurse: bool = True) -> Iterator[Any]:
        tracer = TRACERS[-1]
        return (tracer.getattr("", tensor, tracer._cache) for tensor in function(self, recurse))

    return listed
