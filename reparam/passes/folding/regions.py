"""Regions of linear operators with one source and one sink, and which of them become one operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx

from reparam.errors import KernelError
from reparam.ops import algebra, kernels
from reparam.ops.kernels import Kernel
from reparam.passes.folding.affine import affine_kernel
from reparam.passes.folding.constants import Constants
from reparam.passes.folding.ops import Build, Cost, Op, Region, total, value_of
from reparam.passes.folding.values import asks_size, is_query


@dataclass
class Regions:
    """Finds regions.

    Args:
        ops: the linear operators.
        shapes: evaluates constants on the meta device.
        allow_growth: whether a region may have more weights as one operator than as several.
    """

    ops: dict[fx.Node, Op]
    shapes: Constants
    allow_growth: bool = False
    grown: dict[fx.Node, Region] = field(default_factory=dict)
    reasons: dict[fx.Node, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.found: dict[fx.Node, list[Region]] = {}
        self.plans: dict[fx.Node, dict[fx.Node, Cost]] = {}
        self.choice: dict[fx.Node, Region | None] = {}
        self.users: dict[fx.Node, set[fx.Node]] = {}
        self.asked: set[fx.Node] = set()

    # -- values --------------------------------------------------------------------------------------------------------

    def value(self, node: fx.Node) -> fx.Node:
        """Return the value that a node is the same as."""
        while (op := self.ops.get(node)) is not None and op.kind == "same":
            node = op.inputs[0]
        return node

    def _read_users(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            value = self.value(node)
            for user in node.users:
                if "needed" not in user.meta:
                    continue
                if asks_size(user, node):
                    self.asked.add(value)
                elif not ((op := self.ops.get(user)) is not None and op.kind == "same"):
                    self.users.setdefault(value, set()).add(user)

    # -- search --------------------------------------------------------------------------------------------------------

    def run(self, graph: fx.Graph) -> list[Region]:
        """Return the regions to replace."""
        self._read_users(graph)
        for op in list(self.ops.values()):
            if op.kind not in ("same", "move"):
                self._read(op)
        return self._needed(graph)

    def _read(self, op: Op) -> None:
        node = op.node
        regions = {region.source: region for region in self._own(op)}
        todo = list(regions.values())
        while todo:
            region = todo.pop()
            for longer in self._extended(region):
                if longer.source not in regions:
                    regions[longer.source] = longer
                    todo.append(longer)
        self.found[node] = list(regions.values())
        self._decide(op)

    def _own(self, op: Op) -> list[Region]:
        """Return the regions that end with an operator and hold only it, or only it and what it joins."""
        if op.kind in ("add", "cat"):
            return self._joined(op)
        build = op.kernel
        if op.kind == "affine":
            if value_of(op.node).dim() < 2:
                return []  # a loss, or a number per sample: no kernel has such values
            build = affine_kernel(op, self._dims(op))
        assert build is not None
        source = self.value(op.inputs[0])
        region = self._region(op.node, source, frozenset([op.node]), build, lambda: build(self.shapes))
        return [] if region is None else [region]

    def _dims(self, op: Op) -> int:
        """Spatial dimensions of an affine operator: those of the kernels around it."""
        rank = value_of(op.node).dim()
        assert op.affine is not None
        if op.affine.dim is not None:
            return rank - 2 if op.affine.dim == 1 and rank > 2 else 0
        near = [*self.users.get(op.node, ()), self.value(op.inputs[0])]
        kinds = [self.ops[n].kernel for n in near if n in self.ops and self.ops[n].is_kernel]
        return next((k(self.shapes).dims for k in kinds if k is not None), rank - 2)

    def _region(
        self, sink: fx.Node, source: fx.Node, covered: frozenset[fx.Node], build: Build, shape: Callable[[], Kernel]
    ) -> Region | None:
        try:
            return Region(sink, source, covered, build, shape())
        except KernelError as error:
            self.reasons[sink] = str(error)
        except RuntimeError:
            pass  # a channel dimension that no kernel has
        return None

    def _joined(self, op: Op) -> list[Region]:
        choices = []
        for value in map(self.value, op.inputs):
            own = {value: None, **{region.source: region for region in self.found.get(value, ())}}
            choices.append(own)
        shared = [s for s in choices[0] if all(s in other for other in choices[1:])]
        found = []
        for source in shared:
            parts: list[Region | None] = [own[source] for own in choices]
            covered = frozenset([op.node]).union(*(p.covered for p in parts if p is not None))
            if not self._closed(op.node, covered) or not any(parts):
                continue
            region = self._join(op, source, parts, covered)
            found += [] if region is None else [region]
        return found

    def _join(self, op: Op, source: fx.Node, parts: list[Region | None], covered: frozenset[fx.Node]) -> Region | None:
        dims = next(p.shape.dims for p in parts if p is not None)
        value = value_of(source)
        channels = value.shape[1] if dims else value.shape[-1]
        if op.kind == "cat" and op.dim != (1 if dims else value_of(op.node).dim() - 1):
            return None

        def build(constants: Constants, shapes: bool = False) -> Kernel:
            found = []
            like = torch.empty((), dtype=torch.float64, device=constants.device)
            for part in parts:
                if part is None:
                    found.append(kernels.identity(channels, dims, like, channels))
                else:
                    found.append(part.shape if shapes else part.build(constants))
            if op.kind == "cat":
                return algebra.concatenate(*found)
            return algebra.add(*(k if s > 0 else _minus(k) for k, s in zip(found, op.signs, strict=True)))

        return self._region(op.node, source, covered, build, lambda: build(self.shapes, True))

    def between(self, region: Region) -> set[fx.Node]:
        """Return the operators of a region, and those without effect between them."""
        found = set(region.covered)
        for node in region.covered:
            for value in self.ops[node].inputs:
                if self.value(value) in region.covered:
                    while value not in found:
                        found.add(value)
                        value = self.ops[value].inputs[0]
        return found

    def _closed(self, sink: fx.Node, covered: frozenset[fx.Node]) -> bool:
        """Whether nothing outside uses what lies inside."""
        shape = value_of(sink).shape
        return all(
            self.users.get(node, set()) <= covered and (node not in self.asked or value_of(node).shape == shape)
            for node in covered
            if node is not sink
        )

    def _extended(self, region: Region) -> list[Region]:
        source = region.source
        found = []
        for first in self.found.get(source, ()):
            covered = region.covered | first.covered
            if not self._closed(region.sink, covered):
                continue
            made = self._sequence(first, region, covered)
            found += [] if made is None else [made]
        return found

    def _sequence(self, first: Region, second: Region, covered: frozenset[fx.Node]) -> Region | None:
        def build(constants: Constants) -> Kernel:
            return algebra.then(first.build(constants), second.build(constants))

        def shape() -> Kernel:
            return algebra.then(first.shape, second.shape)

        return self._region(second.sink, first.source, covered, build, shape)

    # -- decisions -----------------------------------------------------------------------------------------------------

    def _decide(self, op: Op) -> None:
        """Choose between the operator as it is and the regions that end with it.

        What it costs counts every operator once that is needed for the value, up to where linear operators begin.
        """
        node = op.node
        kept = {node: self._own_cost(op)}
        for value in map(self.value, op.inputs):
            kept |= self.plans.get(value, {})
        plans = {r: {**self.plans.get(r.source, {}), node: self._cost(r)} for r in self.found[node] if self._is_any(r)}
        costs = {r: total(plan) for r, plan in plans.items()}
        good = [r for r in plans if self.allow_growth or costs[r].within(total(kept))]
        if len(good) < len(plans):
            self.grown[node] = next(r for r in plans if r not in good)
        best = max(good, key=lambda r: self._rank(r, costs[r]), default=None)
        self.choice[node] = best
        self.plans[node] = kept if best is None else plans[best]

    def _rank(self, region: Region, cost: Cost) -> tuple[int, ...]:
        if self.allow_growth:
            return len(region.covered), -cost.weights, -cost.multiply_adds
        return -cost.weights, -cost.multiply_adds, len(region.covered)

    def _is_any(self, region: Region) -> bool:
        """Whether several operators become one, among them a convolution or a linear layer."""
        return len(region.covered) > 1 and any(self.ops[n].kind == "kernel" for n in region.covered)

    def _own_cost(self, op: Op) -> Cost:
        """Cost of an operator by itself."""
        if op.kind in ("add", "cat"):
            return Cost()
        return self._affine_cost(op) if op.kind == "affine" else self._cost(self._alone(op.node))

    def _alone(self, node: fx.Node) -> Region | None:
        return next((r for r in self.found[node] if len(r.covered) == 1), None)

    def _affine_cost(self, op: Op) -> Cost:
        value = value_of(op.node)
        assert op.affine is not None
        dim = op.affine.dim
        return Cost(1 if dim is None else value.shape[dim], value.numel())

    def _cost(self, region: Region | None) -> Cost:
        """Weights and multiply-adds of a region as one operator; biases do not count."""
        if region is None:
            return Cost()
        kernel = region.shape
        out, given = value_of(region.sink), value_of(region.source)
        only = self.ops[region.sink]
        fixed = len(region.covered) == 1 and only.kind in ("pool", "pad")
        if fixed:
            return Cost(0, out.numel() * math.prod(kernel.size) if only.kind == "pool" else 0)
        weights = kernel.weight.numel() * (1 if kernel.dims else kernel.groups)
        places = given.numel() // kernel.inputs if kernel.transposed else out.numel() // kernel.outputs
        return Cost(weights, weights * places)

    def _needed(self, graph: fx.Graph) -> list[Region]:
        """Return the chosen regions of all values that something reads."""
        order = {node: k for k, node in enumerate(graph.nodes)}
        found: dict[fx.Node, Region] = {}
        readers = [n for n in graph.nodes if n not in self.ops and "needed" in n.meta and not is_query(n)]
        todo = [self.value(n) for node in readers for n in node.all_input_nodes]
        todo += [self.value(n) for op in self.ops.values() if op.kind == "move" for n in op.inputs]
        seen: set[fx.Node] = set()
        while todo:
            node = todo.pop()
            if node in seen or node not in self.ops:
                continue
            seen.add(node)
            region = self.choice.get(node)
            if region is None and self.ops[node].changed:
                region = self._alone(node)
            if region is None:
                todo += map(self.value, self.ops[node].inputs)
                continue
            found[node] = region
            todo.append(region.source)
        return sorted(found.values(), key=lambda r: order[r.sink])


def _minus(kernel: Kernel) -> Kernel:
    ones = torch.ones(kernel.outputs, dtype=kernel.weight.dtype, device=kernel.weight.device)
    return algebra.scale(kernel, -ones)
