"""Small networks around one operator, for the rows of ``rule_table``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {0: [(), ()], 1: [(12,), (16,)], 2: [(8, 8), (12, 10)], 3: [(4, 6, 4), (6, 4, 8)]}
"""Resolutions by rank: the example's, and another one."""


@dataclass(frozen=True)
class Row:
    """One operator and what must become of it.

    Args:
        name: of the test.
        make: builds the network.
        expect: ``"wide"`` (no contraction, the layer behind is widened on its input side), ``"reduced"`` (no
            contraction; the channels end here), else the reason (a part of it) of the contraction in the plan.
        inputs: shapes of the inputs without batch: the example's and others.
        kind: what the inputs hold, ``"float"`` or ``"int"``.
    """

    name: str
    make: Callable[[], nn.Module]
    expect: str = "wide"
    inputs: tuple[tuple[tuple[int, ...], ...], ...] = ()
    kind: str = "float"
    marks: tuple[Any, ...] = ()


class Op(nn.Module):
    """A function of x and of this module, which holds parameters (shapes), buffers (tensors) and modules."""

    def __init__(self, function: Callable[..., Any], **things: Any) -> None:
        super().__init__()
        self.function = function
        for name, thing in things.items():
            if isinstance(thing, tuple):
                setattr(self, name, nn.Parameter(torch.randn(thing)))
            elif isinstance(thing, Tensor) and not isinstance(thing, nn.Parameter):
                self.register_buffer(name, thing)
            else:
                setattr(self, name, thing)

    def forward(self, *xs: Any) -> Any:
        return self.function(*xs, self)


class Net(nn.Module):
    """A wide layer, the operator, a wide layer."""

    def __init__(self, op: nn.Module, dims: int, width: int, tail: str, sample: tuple[int, ...]) -> None:
        super().__init__()
        self.first = CONVS[dims](3, width, 3, padding=1) if dims else nn.Linear(3, width)
        self.op = op
        with torch.no_grad():
            shape = op.eval()(self.first(torch.randn(2, 3, *sample) if dims else torch.randn(2, *sample))).shape
        if tail == "conv":
            self.tail: nn.Module = CONVS[len(shape) - 2](shape[1], 4, 1)
        else:
            self.tail = nn.Linear(shape[-1], 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.op(self.first(x)))


def net(op: Callable[[], nn.Module], dims: int, width: int, tail: str, sample: tuple[int, ...]) -> Net:
    return Net(op(), dims, width, tail, sample)


def around(
    name: str, make: Callable[[], nn.Module], expect: str = "wide", *, dims: int = 2, width: int = 8,
    tail: str = "conv", fixed: bool = False, shape: tuple[int, ...] | None = None, marks: tuple[Any, ...] = (),
) -> Row:  # fmt: skip
    """A row whose operator stands between two layers; ``fixed``: it accepts one resolution only."""
    sizes = SIZES[dims] if shape is None else [shape, shape]
    head = (3,) if dims else ()
    inputs = tuple(((*head, *size),) for size in (sizes[:1] * 2 if fixed else sizes))
    return Row(name, lambda: net(make, dims, width, tail, sizes[0]), expect, inputs, marks=marks)


def op(name: str, function: Callable[..., Any], expect: str = "wide", **options: Any) -> Row:
    """A row of a function ``f(x, module)``; options that ``around`` does not know are the module's things."""
    known = {k: options.pop(k) for k in ("dims", "width", "tail", "fixed", "shape", "marks") if k in options}

    def make() -> nn.Module:
        return Op(function, **{k: v() if callable(v) else v for k, v in options.items()})

    return around(name, make, expect, **known)


def tokens(name: str, function: Callable[..., Any], expect: str = "wide", **options: Any) -> Row:
    """A row between linear layers on [B, N, C]."""
    return op(name, function, expect, dims=0, tail="linear", shape=(6, 3), **options)


def whole(
    name: str, make: Callable[[], nn.Module], *inputs: tuple[tuple[int, ...], ...], expect: str = "reduced",
    kind: str = "float", marks: tuple[Any, ...] = (),
) -> Row:  # fmt: skip
    """A row that is a network of its own."""
    return Row(name, make, expect, inputs, kind, marks)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """float64, eval mode, random norm statistics and affine parameters."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        constant = bool((tensor == tensor.flatten()[0]).all())
        if constant or "running" in name:
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.data = 0.5 + noise if "var" in name or bool(tensor.flatten()[0] == 1) else noise - 0.5
    return model


def leaves(value: Any) -> list[Tensor]:
    """All tensors of an output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in leaves(item)]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in leaves(item)]
    if hasattr(value, "__dataclass_fields__"):
        return [t for name in value.__dataclass_fields__ for t in leaves(getattr(value, name))]
    return []


__all__ = ["F", "Net", "Op", "Row", "around", "leaves", "net", "op", "randomise", "tokens", "whole"]
