"""Guards of a recorded graph: what it was recorded for, and whether that leaves the batch free."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from reparam.passes.capture import Capture
from reparam.passes.example import Inputs, batch_of
from reparam.passes.meta import Unknown, has_tensor, run_leaf_on_meta, run_on_meta
from reparam.passes.modes import require
from reparam.passes.skeleton import to_meta
from reparam.passes.values import plain


def broken_guards(capture: Capture, inputs: Inputs) -> set[str]:
    """Return the specialised modules and functions whose guards depend on the number of samples.

    A recording that holds for some batch sizes only would be of little use.
    """
    batch = batch_of(inputs)
    if batch is None:
        return set()
    args, kwargs = pytree.tree_map(
        lambda v: v.new_empty((batch + 1, *v.shape[1:])) if isinstance(v, Tensor) else v, inputs
    )
    values = [v for v in (*args, *kwargs.values()) if has_tensor(v)]
    broken: set[str] = set()
    for mode in capture.modes:
        guards = [node for node in mode.graph.nodes if node.target is require]
        needed = _behind(guards)
        feeds = iter(values)
        env: dict[fx.Node, Any] = {}
        for node in mode.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(feeds)
            elif node in needed:
                env[node] = _run(mode, node, env)
            elif node in guards and any(env.get(n) != n.meta.get("val") for n in _numbers(node)):
                broken.add(node.meta["specialised"])
    return broken


def _behind(guards: list[fx.Node]) -> set[fx.Node]:
    """Everything that the guards are computed from."""
    return with_inputs(n for guard in guards for n in guard.all_input_nodes)


def with_inputs(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return nodes and everything that they are computed from."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


def _numbers(guard: fx.Node) -> set[fx.Node]:
    """The numbers that a guard is computed from, up to the sizes that they are read from."""
    found: set[fx.Node] = set()
    stack = list(guard.all_input_nodes)
    while stack:
        node = stack.pop()
        if node not in found and isinstance(node.meta.get("val"), (int, float)):
            found.add(node)
            stack += node.all_input_nodes
    return found


def _run(capture: Capture, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    args, kwargs = plain(fx.node.map_arg((node.args, node.kwargs), lambda n: env[n]))
    try:
        if node.op == "get_attr":
            return node.meta["val"]
        if node.op == "call_module":
            return run_leaf_on_meta(capture.root.get_submodule(str(node.target)), args, kwargs)
        return pytree.tree_map(to_meta, run_on_meta(node.op, node.target, args, kwargs))
    except Exception as error:
        return Unknown(str(error))
