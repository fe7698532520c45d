"""Lengths of tensors that Python code iterates over: known where no size of an input changes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

Evaluate = Callable[[fx.Node, Callable[[fx.Node], Any]], Any]
"""Computes a node on the meta device from the values of the nodes in front of it."""


def inputs_behind(node: fx.Node) -> list[fx.Node]:
    """Return the inputs of the graph that a value is computed from."""
    return [n for n in _behind(node) if n.op == "placeholder"]


def is_fixed(node: fx.Node, evaluate: Evaluate) -> bool:
    """Whether the length of a tensor is the same for every number of samples and every resolution.

    What it is computed from is run again with sizes of the inputs doubled: first the number of samples, then each
    other size wherever it stands. A size that the operators refuse when it is doubled cannot change, for all that can
    be known here; who relies on it checks the length when the graph runs.
    """
    nodes, length = _behind(node), node.meta["val"].shape[0]
    values = [n.meta["val"] for n in node.graph.nodes if n.op == "placeholder"]
    for k, resize in enumerate(_doublings(values)):
        env: dict[fx.Node, Any] = {}
        for current in nodes:
            if current.op == "placeholder":
                env[current] = pytree.tree_map(resize, current.meta["val"])
            elif current.op == "get_attr":
                env[current] = current.meta["val"]
            else:
                env[current] = evaluate(current, env.__getitem__)
        found = env[node]
        if found.shape[0] != length if isinstance(found, Tensor) else k == 0:
            return False
    return True


def _behind(node: fx.Node) -> list[fx.Node]:
    """Everything that a value is computed from, and itself, in the order of the graph."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in found:
            found.add(current)
            stack += current.all_input_nodes
    return [n for n in node.graph.nodes if n in found]


def _doublings(values: Any) -> Iterator[Callable[[Any], Any]]:
    """Ways to change the sizes of inputs: the number of samples comes first."""
    tensors = [v for v in pytree.tree_leaves(values) if isinstance(v, Tensor) and v.dim()]
    batch = tensors[0].shape[0] if tensors else 0
    yield _doubled(lambda dim, size: dim == 0 and size == batch)
    others = {s for v in tensors for dim, s in enumerate(v.shape) if (dim, s) != (0, batch)}
    for other in sorted(others):
        yield _doubled(lambda dim, size, other=other: (dim, size) != (0, batch) and size == other)  # type: ignore[misc]


def _doubled(chosen: Callable[[int, int], bool]) -> Callable[[Any], Any]:
    def resize(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.new_empty([size * (2 if chosen(dim, size) else 1) for dim, size in enumerate(value.shape)])

    return resize
