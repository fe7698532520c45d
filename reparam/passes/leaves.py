"""Leaf modules: kept as they are, with wider parameters, where the graph inside them needs no edits.

Modules whose forward branches on the training flag (batch norm, drop path) or on sizes are leaves of the graph. The
planner reads the graph inside for both train modes and for both answers to every branch on a size; if every rule in it
only assigns parameters, the module itself, with wider parameters, does the right thing in both modes, for every size.
"""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from reparam.passes.call import NodeEdit
from reparam.passes.capture import trace_branches
from reparam.passes.modes import told
from reparam.passes.registry import find_rule
from reparam.passes.state import operator_name
from reparam.passes.values import Free, Int, Pair, Refuse, Value, student, walk

if TYPE_CHECKING:
    from reparam.passes.planner import Planner


def keep_leaf(planner: Planner, node: fx.Node, args: Value, kwargs: Value) -> Value:
    """Keep a leaf module, or a function that was not traced into, where the graph inside it needs no edits."""
    if any(isinstance(leaf, Int) for _path, leaf in walk([args, kwargs])):
        raise Refuse("it takes a number that comes from a widened dimension")
    results = []
    for training in (False, True):
        given, named = args, kwargs
        if node.op == "call_function":
            given, named = _with_mode(node.args, args, training), _with_mode(node.kwargs, kwargs, training)
        graph, *others = _inner_graphs(planner, node, training, given, named)
        results.append(_run_inner(planner, node, graph, given, named))
        for other in others:
            if _layout(_run_inner(planner, node, other, given, named)) != _layout(results[-1]):
                raise Refuse("it branches on a size, and its branches need different layouts")
    first, second = ([_summary(leaf) for _path, leaf in walk(result)] for result in results)
    if first != second:
        raise Refuse("its train and eval mode need different layouts")
    return results[0]


def is_opaque_function(node: fx.Node) -> bool:
    """Whether a node calls a Python function (one that ``fx.wrap`` or a library kept from being traced into)."""
    is_function = node.op == "call_function" and isinstance(node.target, FunctionType)
    return is_function and not hasattr(node.target, "reparam_conditional")


class _Body(nn.Module):
    """A function as a module, for the tracer."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)


def _with_mode(nodes: Any, values: Any, training: bool) -> Any:
    """Replace arguments that are a module's training flag by ``training``."""
    if isinstance(values, dict):
        return {key: _with_mode(nodes[key], value, training) for key, value in values.items()}
    if isinstance(values, (list, tuple)) and isinstance(nodes, (list, tuple)):
        items = [_with_mode(n, v, training) for n, v in zip(nodes, values, strict=True)]
        return items if isinstance(values, list) else tuple(items)
    is_flag = isinstance(nodes, fx.Node) and nodes.op == "get_attr" and str(nodes.target).endswith("training")
    return training if is_flag and isinstance(values, bool) else values


def _inner_graphs(planner: Planner, node: fx.Node, training: bool, args: Value, kwargs: Value) -> list[fx.Graph]:
    """The graph inside, and those of its other branches."""
    key = (node, training)
    if key not in planner.inner_graphs:
        try:
            planner.inner_graphs[key] = _trace_inner(planner, node, training, args, kwargs)
        except Exception as error:
            planner.inner_graphs[key] = error
    graphs = planner.inner_graphs[key]
    if isinstance(graphs, Refuse):
        raise graphs
    if isinstance(graphs, Exception):
        raise Refuse(f"its forward cannot be recorded ({told(graphs)})")
    return graphs


def _trace_inner(planner: Planner, node: fx.Node, training: bool, args: Value, kwargs: Value) -> list[fx.Graph]:
    if node.op == "call_function":
        module: nn.Module = _Body(node.target)
        prefix = node.meta.get("prefix", "")
    else:
        prefix = planner.full_name(node, str(node.target))
        module = planner.capture.root.get_submodule(prefix)
    graphs = trace_branches(module, student(args), student(kwargs), training, planner.capture.memory)
    for graph in graphs:
        _prepare(planner, node, graph, prefix, training)
    return graphs


def _prepare(planner: Planner, node: fx.Node, graph: fx.Graph, prefix: str, training: bool) -> None:
    """Let the nodes inside know where they are."""
    for inner in graph.nodes:
        inner.meta["prefix"] = prefix
        inner.meta["train"] = training or node.meta.get("train", False)
        if "part" in node.meta:
            inner.meta["part"] = node.meta["part"]
        inner.meta["module"] = planner.full_name(inner, inner.meta.get("module", ""))
        if inner.op == "call_module":
            raise Refuse(f"{inner.target} inside it cannot be recorded")
        if inner.target is node.target:
            raise Refuse("no rule for this operator")  # torch records the function as itself
    nodes = list(graph.nodes)
    if all(n in planner.from_input for n in node.all_input_nodes):
        planner.mark_inputs(nodes)
    after = node in planner.reaches_mixing
    for inner in reversed(nodes):
        if after or any(planner.is_mixing(u) or u in planner.reaches_mixing for u in inner.users):
            planner.reaches_mixing.add(inner)


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


def _layout(result: Value) -> list[Any]:
    """Of a result, whatever its sizes are."""
    return [tuple(leaf.maps.items()) if isinstance(leaf, Pair) else type(leaf) for _path, leaf in walk(result)]


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
