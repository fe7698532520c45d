"""Norms and other affine operators move to a linear operator above or below them, which takes them in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from reparam.errors import KernelError
from reparam.ops import algebra, kernels
from reparam.passes.folding.constants import Constants
from reparam.passes.folding.ops import Affine, Op, Vector, value_of
from reparam.passes.folding.values import follow, users_of
from reparam.passes.state import operator_name

Action = Callable[[], None]


class Refused(Exception):
    """An affine operator finds nothing that takes it in; the message is the reason."""


class Movement:
    """Moves affine operators.

    Args:
        ops: the linear operators; changed.
        shapes: evaluates constants on the meta device.
    """

    def __init__(self, ops: dict[fx.Node, Op], shapes: Constants) -> None:
        self.ops, self.shapes = ops, shapes
        self.gone: set[fx.Node] = set()
        self.groups: list[set[fx.Node]] = []  # what moved, what it passed, and what took it in
        self._passed: list[fx.Node] = []
        self.reasons: dict[fx.Node, str] = {}
        self._carried: dict[Any, tuple[int, Tensor] | None] = {}

    def run(self) -> None:
        """Move what can be moved, until nothing changes."""
        while self._sweep(self._up, False) | self._sweep(self._down, True):
            pass

    def _sweep(self, move: Callable[[fx.Node, fx.Node, Affine], list[Action]], backwards: bool) -> bool:
        changed = False
        todo = [op for op in self.ops.values() if op.kind == "affine"]
        for op in reversed(todo) if backwards else todo:
            assert op.affine is not None
            self._passed = [op.node]
            try:
                start = op.node if backwards else op.inputs[0]
                actions = move(start, op.node, op.affine)
            except Refused as reason:
                said = self.reasons.get(op.node) if backwards else None
                self.reasons[op.node] = f"{said}; {reason}" if said else str(reason)
                continue
            for action in actions:
                action()
            op.kind, changed = "same", True
            self.gone.add(op.node)
            self.groups.append(set(self._passed))
        return changed

    # -- up ------------------------------------------------------------------------------------------------------------

    def _up(self, value: fx.Node, user: fx.Node, affine: Affine) -> list[Action]:
        """Return what to do so that ``value`` comes scaled and shifted.

        Raises:
            Refused: it cannot.
        """
        op = self.ops.get(value)
        if op is None or op.kind in ("pad", "affine"):
            raise Refused(f"it follows {describe(value)}")
        if users_of(value) != {user}:
            raise Refused(f"the result of {describe(value)} is used elsewhere")
        self._passed.append(value)
        if op.kind == "kernel":
            self._check_channel(op, value, affine)
            return [lambda: _scale(op, affine)]
        if op.kind == "same":
            return self._up(op.inputs[0], value, affine)
        if op.kind == "add":
            return self._up_sum(op, affine)
        if op.kind == "cat":
            return self._up_cat(op, affine)
        return self._up(op.inputs[0], value, self._before(op, affine))

    def _up_sum(self, op: Op, affine: Affine) -> list[Action]:
        first, *others = op.inputs
        if first in others:
            raise Refused("it follows a value that is added to itself")
        if affine.scale is None:
            if op.signs[0] == 1:
                passed = len(self._passed)
                try:
                    return self._up(first, op.node, affine)
                except Refused:
                    del self._passed[passed:]
            if op.signs[1] != 1:
                raise Refused("it follows a difference")
            return self._up(others[0], op.node, affine)
        found = self._up(first, op.node, affine)
        for value in others:
            found += self._up(value, op.node, replace(affine, shift=None))
        return found

    def _up_cat(self, op: Op, affine: Affine) -> list[Action]:
        if len(set(op.inputs)) < len(op.inputs):
            raise Refused("it follows a value that is concatenated with itself")
        found: list[Action] = []
        start = 0
        for value in op.inputs:
            size = value_of(value).shape[op.dim]
            part = affine
            if affine.dim == op.dim:
                places = torch.arange(start, start + size)
                part = Affine(op.dim, _select(affine.scale, places), _select(affine.shift, places))
            found += self._up(value, op.node, part)
            start += size
        return found

    def _before(self, op: Op, affine: Affine) -> Affine:
        """Return the affine operator in front of one that moves elements, for one behind it."""
        if affine.dim is None:
            if affine.shift is not None and self._carry(op, 1) is None:
                raise Refused(f"it follows {describe(op.node)}")
            return affine
        for dim in range(1, value_of(op.inputs[0]).dim()):
            carried = self._carry(op, dim)
            if carried is not None and carried[0] == affine.dim:
                index = carried[1]
                if len(index.unique()) == len(index) == value_of(op.inputs[0]).shape[dim]:
                    places = index.argsort()
                    return Affine(dim, _select(affine.scale, places), _select(affine.shift, places))
        raise Refused(f"it follows {describe(op.node)}, which does not leave the channels whole")

    # -- down ----------------------------------------------------------------------------------------------------------

    def _down(self, value: fx.Node, _user: fx.Node, affine: Affine) -> list[Action]:
        """Return what to do so that all users of ``value`` scale and shift it themselves.

        Raises:
            Refused: they cannot.
        """
        found: list[Action] = []
        users = users_of(value)
        if not users:
            raise Refused("nothing uses it")
        for user in users:
            op = self.ops.get(user)
            if op is None or op.kind in ("add", "cat", "affine", "pad"):
                raise Refused(f"{describe(user)} follows")
            self._passed.append(user)
            if op.kind == "kernel":
                self._check_behind(op, affine)
                found.append(lambda op=op: _behind(op, affine))  # type: ignore[misc]
            elif op.kind == "same":
                found += self._down(user, value, affine)
            else:
                found += self._down(user, value, self._after(op, affine))
        return found

    def _after(self, op: Op, affine: Affine) -> Affine:
        carried = self._carry(op, 1 if affine.dim is None else affine.dim)
        if affine.dim is None and (affine.shift is None or carried is not None):
            return affine
        if carried is None:
            raise Refused(f"{describe(op.node)} follows, which does not leave the channels whole")
        return Affine(carried[0], _select(affine.scale, carried[1]), _select(affine.shift, carried[1]))

    def _check_behind(self, op: Op, affine: Affine) -> None:
        self._check_channel(op, op.inputs[0], affine)
        assert op.kernel is not None
        kernel = op.kernel(self.shapes)
        factors, shift = _vectors(affine, kernel.inputs, self.shapes)
        try:
            algebra.behind(kernel, factors, shift)
        except KernelError as error:
            reason = "which pads with zeros: a shift in front of it is something else at the border"
            raise Refused(f"{describe(op.node)} follows, {reason if any(kernel.padding) else error}") from error

    def _check_channel(self, op: Op, value: fx.Node, affine: Affine) -> None:
        assert op.kernel is not None
        kernel = op.kernel(self.shapes)
        channel = 1 if kernel.dims else value_of(value).dim() - 1
        if affine.dim not in (None, channel):
            raise Refused(f"it acts on another dimension than {describe(op.node)}")

    # -- operators that move elements ----------------------------------------------------------------------------------

    def _carry(self, op: Op, dim: int) -> tuple[int, Tensor] | None:
        """Follow the channels along ``dim`` through an operator.

        Returns:
            The dimension they are along behind it, and the channel at each of its places; None if they do not stay
            whole, or if what is the same all over a channel would not stay so.
        """
        key = (op.node, dim)
        if key not in self._carried:
            self._carried[key] = follow(op.node, op.inputs[0], dim)
        return self._carried[key]


# -- vectors -----------------------------------------------------------------------------------------------------------


def _select(vector: Vector | None, places: Tensor) -> Vector | None:
    if vector is None:
        return None
    return lambda constants: vector(constants).index_select(0, places.to(constants.device))


def _vectors(affine: Affine, count: int, constants: Constants) -> tuple[Tensor, Tensor | None]:
    """Return factors and shift of an affine operator, one per channel."""
    ones = torch.ones(count, dtype=torch.float64, device=constants.device)
    scale = ones if affine.scale is None else affine.scale(constants) * ones
    return scale, None if affine.shift is None else affine.shift(constants) * ones


def _scale(op: Op, affine: Affine) -> None:
    inner = op.kernel
    assert inner is not None

    def build(constants: Constants) -> Any:
        kernel = inner(constants)
        return algebra.scale(kernel, *_vectors(affine, kernel.outputs, constants))

    op.kernel, op.changed = build, True


def _behind(op: Op, affine: Affine) -> None:
    inner = op.kernel
    assert inner is not None

    def build(constants: Constants) -> Any:
        kernel = inner(constants)
        return algebra.behind(kernel, *_vectors(affine, kernel.inputs, constants))

    op.kernel, op.changed = build, True


def affine_kernel(op: Op, dims: int) -> Callable[[Constants], Any]:
    """Return an affine operator as a kernel of one tap."""
    affine = op.affine
    assert affine is not None
    value = value_of(op.inputs[0])
    count = value.shape[1 if dims else value.dim() - 1]

    def build(constants: Constants) -> Any:
        return kernels.affine(*_vectors(affine, count, constants), dims)

    return build


def describe(node: fx.Node) -> str:
    """Return the name of what a node calls, and where."""
    if node.op == "output":
        return "the end of the network"
    if node.op == "placeholder":
        return "the input"
    name = operator_name(node)
    path = node.meta.get("module") or ""
    return f"{name} in {path}" if path else name
