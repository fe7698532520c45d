"""Make in-place code explicit: users after an in-place operator read its result."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn


def setitem(value: Tensor, index: Any, new: Any) -> Tensor:
    """Return a copy of ``value`` with ``value[index] = new``."""
    result = value.clone()
    result[index] = new
    return result


def assign(value: Tensor, index: Any, new: Any) -> Tensor:
    """Set ``value[index] = new``, for all who share the memory of ``value``."""
    value[index] = new
    return value


def chunk(input: Tensor, chunks: int, dim: int = 0, sizes: list[int] | None = None) -> tuple[Tensor, ...]:
    """Return ``torch.chunk``, or pieces of these sizes: a teacher's where the chunks are uneven."""
    return torch.chunk(input, chunks, dim) if sizes is None else torch.split(input, sizes, dim)


_INPLACE_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
    operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul, setitem, assign,
}  # fmt: skip


def is_inplace(node: fx.Node) -> bool:
    """Whether the node changes its first argument in place (or stands for code that did)."""
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op != "call_function":
        return False
    if node.target in _INPLACE_OPERATORS or node.kwargs.get("inplace") is True:
        return True
    name = getattr(node.target, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def refuse_new_weights(node: fx.Node) -> None:
    """Refuse code that changes a parameter in place: the teacher's has other values.

    Raises:
        TraceError: it does.
    """
    changed = node.args[0] if node.args else None
    if isinstance(changed, fx.Node) and is_inplace(node):
        if changed.target is getattr and changed.args[1] == "data":
            changed = changed.args[0]
        if isinstance(changed, fx.Node) and isinstance(changed.meta.get("val"), nn.Parameter):
            raise fx.proxy.TraceError(f"{node.meta.get('source')}: {changed.target} is changed in place")


def functionalize(graph: fx.Graph) -> None:
    """Make users that come after an in-place operator read its result instead of the value it changed."""
    order = {node: k for k, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not is_inplace(node) or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        changed = node.args[0]
        if node.target is setitem and (written(node) or _is_shared(changed, node, order)):
            node.target = assign
        if changed.op == "get_attr" or not isinstance(changed.meta.get("val"), Tensor):
            continue
        for user in list(changed.users):
            if order[user] > order[node]:
                user.replace_input_with(changed, node)


def _is_shared(changed: fx.Node, node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether a view of ``changed``, or what it is a view of, is used after ``node``."""
    shared = storage(changed)
    return shared is not None and any(
        storage(other) == shared and other is not changed and any(order[user] > order[node] for user in other.users)
        for other in order
        if order[other] < order[node] and not is_inplace(other)
    )


def written(node: fx.Node) -> fx.Node | None:
    """Return the node that reads the tensor of the network that an operator changes in place; None if it does not."""
    memory, current = storage(node.args[0]) if is_inplace(node) and isinstance(node.args[0], fx.Node) else None, node
    while current.args and isinstance(current.args[0], fx.Node):
        current = current.args[0]
    return current if current.op == "get_attr" and memory is not None and storage(current) == memory else None


def storage(node: fx.Node) -> int | None:
    """Return what tells the memory of a value from others; None where it is no tensor."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def drop_unused(graph: fx.Graph) -> None:
    """Remove what nothing uses: queries (training flags, shapes), and what is computed from parameters alone.

    An operator that would decide the maps of such a value does not come.
    """
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (is_pure(node) and constant.issuperset(node.all_input_nodes)):
            constant.add(node)
    for node in reversed(list(graph.nodes)):
        if (is_query(node) or node in constant) and not node.users:
            graph.erase_node(node)


def is_pure(node: fx.Node) -> bool:
    """Whether a node is an operator of torch or Python that only computes a value from others."""
    home = getattr(node.target, "__module__", None) or "torch"
    known = node.op == "call_method" or (node.op == "call_function" and home.partition(".")[0] in _HOMES)
    return known and bool(node.all_input_nodes) and not is_inplace(node)


_HOMES = ("torch", "_operator", "builtins")


def is_query(node: fx.Node) -> bool:
    """Whether a node only reads something: an attribute, a shape, an item."""
    return node.op == "get_attr" or node.target in (getattr, operator.getitem) or node.target in ("size", "dim")
