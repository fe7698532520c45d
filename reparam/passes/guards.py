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

    A recording that holds for some batch sizes only would be of little use. That two batch sizes are equal may well
    be asked: it is so for every batch.
    """
    return {path for other in other_batches(inputs) for path in broken_at(capture, resized(inputs, other))}


def other_batches(inputs: Inputs) -> tuple[int, ...]:
    """Return numbers of samples to try; none where the inputs have no common one."""
    batch = batch_of(inputs)
    return () if batch is None else (1, batch + 1, _LARGE)


_LARGE = 1009
"""A number of samples that no code is written for; on the meta device it costs nothing."""


def resized(inputs: Inputs, batch: int) -> Inputs:
    """Return the inputs with another number of samples."""
    other: Inputs = pytree.tree_map(
        lambda v: v.new_empty((batch, *v.shape[1:])) if isinstance(v, Tensor) else v, inputs
    )
    return other


def broken_at(capture: Capture, inputs: Inputs) -> set[str]:
    """Return the specialised modules whose guards do not hold for these inputs."""
    args, kwargs = inputs
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
            elif node in guards and not _holds(node, env):
                broken.add(node.meta["specialised"])
    return broken


def _holds(guard: fx.Node, env: dict[fx.Node, Any]) -> bool:
    value, expected, _message = fx.node.map_arg(guard.args, lambda n: env[n])
    return bool(value == expected)


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
