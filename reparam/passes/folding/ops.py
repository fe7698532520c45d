"""Linear operators of a recorded graph as values, regions of them, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from reparam.ops.kernels import Kernel
from reparam.passes.folding.constants import Constants

Vector = Callable[[Constants], Tensor]
"""A constant vector, computed when it is asked for."""

Build = Callable[[Constants], Kernel]
"""A kernel, computed when it is asked for."""


@dataclass(frozen=True)
class Affine:
    """``scale * x + shift`` along one dimension.

    Args:
        dim: the dimension, or None for numbers.
        scale: [C], or one number; None for 1.
        shift: the same; None for 0.
    """

    dim: int | None
    scale: Vector | None
    shift: Vector | None


@dataclass(eq=False)
class Op:
    """A linear operator of the graph.

    Args:
        node: its node.
        kind: "kernel" (convolution, linear layer), "pool" and "pad" (kernels without weights), "affine", "add",
            "cat", "same" (the identity) or "move" (elements change their place, or are averaged).
        inputs: the values that it is linear in.
        kernel: of kernel, pool, pad, and of an affine operator.
        affine: of an affine operator.
        signs: of the inputs of a sum.
        dim: of a concatenation.
        norm: whether it is a norm.
        changed: whether the kernel holds more than this operator.
    """

    node: fx.Node
    kind: str
    inputs: tuple[fx.Node, ...]
    kernel: Build | None = None
    affine: Affine | None = None
    signs: tuple[int, ...] = ()
    dim: int = 0
    norm: bool = False
    changed: bool = False

    @property
    def is_kernel(self) -> bool:
        """Whether it has a kernel of its own."""
        return self.kind in ("kernel", "pool", "pad")


def value_of(node: fx.Node) -> Any:
    """Return the meta value of a node."""
    return node.meta.get("val")


@dataclass(frozen=True, eq=False)
class Region:
    """A value as one kernel on an earlier value.

    Args:
        sink: the operator whose result it is.
        source: the value that it acts on.
        covered: the operators that it replaces.
        build: makes the kernel.
        shape: the kernel on the meta device.
    """

    sink: fx.Node
    source: fx.Node
    covered: frozenset[fx.Node]
    build: Build
    shape: Kernel


@dataclass(frozen=True)
class Cost:
    """Weights and multiply-adds."""

    weights: int = 0
    multiply_adds: int = 0

    def within(self, other: Cost) -> bool:
        """Whether neither number is larger."""
        return self.weights <= other.weights and self.multiply_adds <= other.multiply_adds


def total(plan: dict[fx.Node, Cost]) -> Cost:
    """Return the sum of the costs of operators."""
    return Cost(sum(c.weights for c in plan.values()), sum(c.multiply_adds for c in plan.values()))
