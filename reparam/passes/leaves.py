"""Leaf modules: kept as they are, with wider parameters, where the graph inside them needs no edits.

Modules whose forward branches on the training flag (batch norm, drop path) or on sizes are leaves of the graph. The
planner reads the graph inside for both train modes; if every rule in it only assigns parameters, the module itself,
with wider parameters, does the right thing in both modes and for every size.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from reparam.passes.call import NodeEdit
from reparam.passes.registry import find_rule
from reparam.passes.state import operator_name
from reparam.passes.tracer import trace_inner
from reparam.passes.values import Free, Int, Pair, Refuse, Value, student, walk

if TYPE_CHECKING:
    from reparam.passes.planner import Planner


def keep_leaf(planner: Planner, node: fx.Node, args: Value, kwargs: Value) -> Value:
    """Keep a leaf module as it is, with wider parameters, where the graph inside it needs no edits."""
    results = []
    for training in (False, True):
        graph = _inner_graph(planner, node, training, args, kwargs)
        results.append(_run_inner(planner, node, graph, args, kwargs))
    first, second = ([_summary(leaf) for _path, leaf in walk(result)] for result in results)
    if first != second:
        raise Refuse("its train and eval mode need different layouts")
    return results[0]


def _inner_graph(planner: Planner, node: fx.Node, training: bool, args: Value, kwargs: Value) -> fx.Graph:
    key = (node, training)
    if key not in planner.inner_graphs:
        module = planner.capture.root.get_submodule(planner.full_name(node, str(node.target)))
        try:
            planner.inner_graphs[key] = _trace_inner(planner, node, module, training, args, kwargs)
        except Exception as error:
            planner.inner_graphs[key] = error
    graph = planner.inner_graphs[key]
    if isinstance(graph, Exception):
        raise Refuse(f"its forward cannot be recorded ({type(graph).__name__}: {graph})")
    return graph


def _trace_inner(
    planner: Planner, node: fx.Node, module: nn.Module, training: bool, args: Value, kwargs: Value
) -> fx.Graph:
    graph = trace_inner(module, student(args), student(kwargs), training)
    prefix = planner.full_name(node, str(node.target))
    for inner in graph.nodes:
        inner.meta["prefix"] = prefix
        inner.meta["module"] = planner.full_name(inner, inner.meta.get("module", ""))
        if inner.op == "call_module":
            raise Refuse(f"{inner.target} inside it cannot be recorded")
    nodes = list(graph.nodes)
    if all(n in planner.from_input for n in node.all_input_nodes):
        planner.mark_inputs(nodes)
    after = node in planner.reaches_mixing
    for inner in reversed(nodes):
        if after or any(planner.is_mixing(u) or u in planner.reaches_mixing for u in inner.users):
            planner.reaches_mixing.add(inner)
    return graph


def _run_inner(planner: Planner, node: fx.Node, graph: fx.Graph, args: Value, kwargs: Value) -> Value:
    flat = iter([v for v in [*args, *kwargs.values()] if any(isinstance(leaf, (Pair, Free)) for _p, leaf in walk(v))])
    result: Value = None
    for inner in graph.nodes:
        if inner.op == "placeholder":
            planner.state.env[inner] = next(flat)
            continue
        planner.visit(inner)
        edit = planner.state.edits.pop(inner, None)
        if edit:
            _edit_attributes(planner, inner, edit)
        if inner.op == "output":
            result = planner.state.env[inner]
    return result


def _edit_attributes(planner: Planner, node: fx.Node, edit: NodeEdit) -> None:
    """Turn edits of constants inside a leaf into edits of the module's attributes they were read from."""
    if edit.steps or edit.out:
        raise Refuse(f"{operator_name(node)} inside it would need its values rearranged")
    entry = find_rule(node.op, node.target)
    owners = [str(n.target).rpartition(".")[0] for n in node.all_input_nodes if n.op == "get_attr"]
    for path, value in edit.constants.items():
        name = _parameter_at(entry.signature, path) if entry else None
        for owner in owners:
            full = planner.full_name(node, owner) if owner else node.meta["prefix"]
            module = planner.capture.root.get_submodule(full)
            if name is not None and hasattr(module, name):
                planner.state.attributes[f"{full}.{name}" if full else name] = value
                break
        else:
            raise Refuse(f"{operator_name(node)} inside it would need another constant")


def _summary(leaf: Any) -> Any:
    if isinstance(leaf, Pair):
        return ("tensor", tuple(leaf.s.shape), tuple(leaf.maps.items()))
    if isinstance(leaf, Free):
        return ("free", leaf.node.target)
    if isinstance(leaf, Int):
        return ("int", leaf.s, leaf.t)
    return ("plain", type(leaf))


def _parameter_at(signature: inspect.Signature, path: tuple[Any, ...]) -> str | None:
    if path[0] == "kwargs":
        return str(path[1])
    names = list(signature.parameters)
    return names[path[1]] if len(path) == 2 and path[1] < len(names) else None
