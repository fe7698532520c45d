"""Notes that rules leave for the plan: layers, running statistics, module attributes."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from reparam.passes.functionalize import written
from reparam.passes.registry import statistics_of
from reparam.passes.rows import LayerPlan
from reparam.passes.state import operator_name
from reparam.passes.values import Free, Pair, holds_tensor

if TYPE_CHECKING:
    from reparam.passes.planner import Planner


def note_statistic(planner: Planner, source: Any) -> None:
    """Mark the buffers of the module that owns a running statistic: the student keeps its own."""
    name = planner.name_of(source) if isinstance(source, fx.Node) else None
    if name is None:
        return
    path = name.rpartition(".")[0]
    for buffer, _tensor in planner.capture.root.get_submodule(path).named_buffers(recurse=False):
        planner.state.statistics.add(f"{path}.{buffer}" if path else buffer)


def note_statistics(planner: Planner) -> None:
    """Mark what a forward changes: also statistics of norms that keep their width, and buffers of the network's code.

    Teacher and student each have their own, as each of them runs.
    """
    for node in (n for graph in planner.capture.graphs for n in graph.nodes):
        buffer = written(node)
        name = None if buffer is None else planner.name_of(buffer)
        if name is not None:
            planner.state.statistics.add(name)
        for source in statistics_of(node):
            note_statistic(planner, source)
        if node.op != "call_module":
            continue
        for path, module in planner.capture.root.get_submodule(str(node.target)).named_modules():
            own = dict(module.named_buffers(recurse=False))
            if "running_mean" in own or "running_var" in own:
                prefix = "".join(f"{part}." for part in (str(node.target), path) if part)
                planner.state.statistics |= {planner.names[prefix + name] for name in own}


def note_attribute(planner: Planner, source: Any, attribute: str, value: Any) -> None:
    """Note that the module which owns a parameter states another constant now (``groups``)."""
    name = planner.name_of(source) if isinstance(source, fx.Node) else None
    if name is None:
        return
    path = name.rpartition(".")[0]
    if hasattr(planner.capture.root.get_submodule(path), attribute):
        planner.state.attributes[f"{path}.{attribute}" if path else attribute] = value


def weight_name(planner: Planner, source: Any) -> str | None:
    """Return the name of the (largest) parameter behind the weight of a linear operator, else of the largest buffer."""
    if not isinstance(source, fx.Node):
        return None
    found: dict[str, tuple[bool, int]] = {}
    stack, seen = [source], set()
    while stack:
        node = stack.pop()
        seen.add(node)
        name = planner.name_of(node)
        if name is not None:
            parameter = isinstance(attrgetter(name)(planner.capture.root), nn.Parameter)
            found[name] = parameter, node.meta["val"].numel()
        given = planner.state.env.get(node) if node.op == "placeholder" else None
        # Inside a function that was not traced into, a weight may be an argument: go on where it comes from.
        behind = [given.node] if isinstance(given, Free) else node.all_input_nodes
        # A table that is cut to the size of a value does not come from that value's weights.
        stack += [n for n in behind if n not in seen and holds_tensor(n.meta.get("val"))]
    return max(found, key=lambda n: found[n]) if found else None


def _narrow_output(last: bool) -> str:
    return "its output goes to code without a graph" if last else "its output is at student width"


def record_layer(
    planner: Planner,
    node: fx.Node,
    data: fx.Node,
    source: Any,
    weight: Pair,
    dims: tuple[int, int],
    multiply_adds: tuple[int, int],
) -> None:
    """Note what became of the weight of a linear operator (several calls of one weight count once).

    Args:
        planner: the planner.
        node: the operator.
        data: its data input.
        source: the graph argument that is its weight.
        weight: the weight in both worlds.
        dims: output and input dimension of the weight.
        multiply_adds: of one sample, in the student and in the teacher.
    """
    name = weight_name(planner, source)
    if name is None or not isinstance(attrgetter(name)(planner.capture.root), nn.Parameter):
        return
    # The ends of a part are not those of the network: other code follows, at student width.
    last, part = node not in planner.reaches_mixing, node.meta.get("part")
    ends = last and part is None
    outputs, inputs = (d in weight.maps for d in dims)
    outside = data in planner.from_input
    reasons = [] if inputs else ["input of the network" if outside else "its input is at student width"]
    count = weight.maps[dims[0]].uniform if dims[0] in weight.maps else 1
    note = planner.ratios.note(name, count)
    reasons += [note] if outputs and note else []
    reasons += [] if outputs else ["output of the network" if ends else note or _narrow_output(last)]
    if name in planner.ignored:
        reasons = [planner.ignored[name]]
    earlier = planner.state.layers.get(name)
    counted = (earlier.multiply_adds, earlier.wide_multiply_adds) if earlier else (0, 0)
    inputs = (inputs or outside) and (earlier is None or earlier.inputs)
    outputs = (outputs or ends) and (earlier is None or earlier.outputs)
    if earlier and not (inputs and outputs):
        reasons = list(dict.fromkeys([*filter(None, earlier.reason.split("; ")), *reasons]))
    if earlier and node.meta.get("train"):
        multiply_adds = (0, 0)  # the eval mode of the same code has counted them
    planner.state.layers[name] = LayerPlan(
        name=name,
        operator=earlier.operator if earlier else operator_name(node),
        source=earlier.source if earlier else node.meta.get("source", ""),
        shape=tuple(weight.s.shape),
        wide_shape=tuple(weight.t.shape),
        inputs=inputs,
        outputs=outputs,
        reason="; ".join(reasons),
        multiply_adds=counted[0] + multiply_adds[0],
        wide_multiply_adds=counted[1] + multiply_adds[1],
    )
