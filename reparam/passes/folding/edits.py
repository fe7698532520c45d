"""What folding changes in a recorded graph: values that pass, and values that come from new operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from reparam.errors import ModelError
from reparam.ops import algebra
from reparam.ops.kernels import Kernel
from reparam.passes.folding.affine import Movement
from reparam.passes.folding.borders import move_borders
from reparam.passes.folding.constants import Constants, Probes, constants_of, device_of
from reparam.passes.folding.linear import read_operators
from reparam.passes.folding.ops import Op, Region, value_of
from reparam.passes.folding.record import Call, Recording, call_of, common_call
from reparam.passes.folding.regions import Regions
from reparam.passes.folding.values import is_query


@dataclass(eq=False)
class Edit:
    """A node that is no longer computed as before.

    Args:
        node: the node.
        source: the value that its result now is, or is computed from.
        scope: the call whose code changes.
        kernel: the new operator, in the layer's dtype; None if the value passes.
        main: the operator of the model that gives the new one its place.
        covered: other nodes that are not computed any more.
        probe: the new operator for other weights, which tells whether two are the same whatever the weights are.
    """

    node: fx.Node
    source: fx.Node
    scope: Call
    kernel: Kernel | None = None
    main: fx.Node | None = None
    covered: frozenset[fx.Node] = frozenset()
    probe: Callable[[], Kernel] | None = None


@dataclass
class Analysis:
    """What was found in a graph.

    Args:
        ops: its linear operators, after norms have moved.
        movement: how they moved.
        regions: the search for regions.
        edits: what changes.
        live: the nodes that are still computed.
        originals: the kernels of convolutions and linear layers as they were, on the meta device.
        groups: nodes that are exact only together, as one changed because of the others.
    """

    ops: dict[fx.Node, Op]
    movement: Movement
    regions: Regions
    edits: list[Edit] = field(default_factory=list)
    live: set[fx.Node] = field(default_factory=set)
    originals: dict[fx.Node, Kernel] = field(default_factory=dict)
    groups: list[set[fx.Node]] = field(default_factory=list)


def analyse(recording: Recording, model: nn.Module, allow_growth: bool) -> Analysis:
    """Find everything that folds.

    Raises:
        ModelError: a folded weight is not finite.
    """
    move_borders(recording, model)
    ops = read_operators(recording.graph, constants_of(recording.graph))
    shapes = Constants(None, recording.skeleton)
    originals = {n: op.kernel(shapes) for n, op in ops.items() if op.kind == "kernel" and op.kernel is not None}
    movement = Movement(ops, shapes)
    movement.run()
    regions = Regions(ops, shapes, allow_growth)
    found = Analysis(ops, movement, regions, originals=originals)
    chosen = regions.run(recording.graph)
    found.groups = movement.groups + [regions.between(region) for region in chosen]
    edits = [Edit(node, ops[node].inputs[0], call_of(node)) for node in movement.gone]
    for region in chosen:
        edits += _edits_of(region, regions)
    by_node = {edit.node: edit for edit in edits}
    found.live = _live(recording.graph, by_node, regions)
    found.edits = [edit for edit in by_node.values() if edit.node in found.live]
    made = {region.sink: region for region in chosen}
    values, probes = Constants(model, recording.skeleton), Probes(model, recording.skeleton)
    for edit in found.edits:
        if edit.main is not None:
            region = next(r for r in made.values() if edit.main in r.covered and edit.node in r.covered)
            edit.kernel = _finished(region, edit.main, values, model)
            edit.probe = partial(region.build, probes)
    return found


def _edits_of(region: Region, regions: Regions) -> list[Edit]:
    ops = regions.ops
    kernels = [n for n in region.covered if ops[n].kind == "kernel"]
    main = max(kernels, key=lambda n: (value_weights(ops[n]), -len(call_of(n).path), n.name))
    chain = _chain(region, regions)
    early = chain[: chain.index(main)] if chain else []
    shape = value_of(region.source).shape
    if not chain or any(n in regions.asked and value_of(n).shape != shape for n in early):
        place = common_call(list(region.covered))
        return [Edit(region.sink, region.source, place, main=main, covered=region.covered)]
    edits = [Edit(n, ops[n].inputs[0], call_of(n)) for n in chain if n is not main]
    return [*edits, Edit(main, ops[main].inputs[0], call_of(main), main=main)]


def _chain(region: Region, regions: Regions) -> list[fx.Node]:
    """Return the operators of a region in order if each takes only the one before; else nothing."""
    chain = [region.sink]
    while len(chain) < len(region.covered):
        op = regions.ops[chain[-1]]
        if op.kind in ("add", "cat"):
            return []
        chain.append(regions.value(op.inputs[0]))
    return [] if regions.ops[chain[-1]].kind in ("add", "cat") else chain[::-1]


def value_weights(op: Op) -> int:
    """Return how many weights an operator has."""
    weight = _weight(op.node)
    value = value_of(weight) if isinstance(weight, fx.Node) else None
    return value.numel() if isinstance(value, Tensor) else 0


def _weight(node: fx.Node) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")


def _live(graph: fx.Graph, edits: dict[fx.Node, Edit], regions: Regions) -> set[fx.Node]:
    """Return the nodes that the output still needs."""
    dropped = {n for edit in edits.values() for n in edit.covered if n is not edit.node}
    todo = [next(iter(reversed(graph.nodes)))]
    live: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node in live:
            continue
        live.add(node)
        edit = edits.get(node)
        if edit is not None and node not in dropped:
            todo.append(edit.source)
            # The modules between a region and what it acts on still run.
            given = (n for inner in edit.covered for n in inner.all_input_nodes)
            todo += [n for n in given if regions.value(n) is edit.source]
        else:
            todo += [n for n in node.all_input_nodes if not (is_query(node) and n in dropped)]
    return live


def _finished(region: Region, main: fx.Node, values: Constants, model: nn.Module) -> Kernel:
    """Compute a kernel in float64 and bring it to dtype and device of the layer it replaces.

    Raises:
        ModelError: it is not finite.
    """
    kernel = region.build(values)
    if not kernel.dims:
        kernel = algebra.regroup(kernel, 1)
    dtype = value_of(main).dtype
    device = device_of(model, _weight(main))
    finished = {
        name: None if tensor is None else tensor.detach().to(device=device, dtype=dtype).contiguous()
        for name, tensor in (("weight", kernel.weight), ("bias", kernel.bias))
    }
    for tensor in finished.values():
        if tensor is not None and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            where = call_of(main).path or type(model).__name__
            raise ModelError(
                f"{where}: folding gives NaN or Inf in {dtype}: a norm with a variance of about 0, or weights that are "
                "too large for that type; fold in a wider one (model.float(), model.double())"
            )
    return replace(kernel, **finished)  # type: ignore[arg-type]
