"""Code that branches: guards on what a graph was recorded for; both train modes, merged where only constants differ.

timm's attention passes ``dropout_p=self.attn_drop.p if self.training else 0.0``: two recordings of the same operators
with another number. They become one, whose number is chosen by the flag when the graph runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from reparam.errors import GuardError
from reparam.passes.functionalize import is_query
from reparam.passes.values import plain


def told(error: Exception) -> str:
    """Return what an error says; with its type where the code of a network raised it, not the recording."""
    own = isinstance(error, fx.proxy.TraceError)
    return str(error) if own else f"{type(error).__name__}: {error}"


class BranchOnTraining(fx.proxy.TraceError):
    """Control flow asks for the training flag of a module.

    Args:
        target: path of the flag, ``"blocks.0.attn.training"``.
        message: what happened, for people.
    """

    def __init__(self, target: str, message: str) -> None:
        super().__init__(message)
        self.target = target


def choose(training: bool, in_train: Any, in_eval: Any) -> Any:
    """Return ``in_train`` in train mode, ``in_eval`` in eval mode."""
    return in_train if training else in_eval


def pick(condition: bool, wanted: bool, first: Any, second: Any) -> Any:
    """Return ``first`` where a condition is the wanted one, else ``second``."""
    return first if bool(condition) is wanted else second


def require(value: Any, expected: Any, message: str) -> None:
    """Stop where a value that decides the graph is another one.

    Raises:
        GuardError: it is.
    """
    if value != expected:
        raise GuardError(message)


def refuse(value: Any, expected: Any, message: str) -> None:
    """Stop where the student's code raises an error of its own.

    Raises:
        RuntimeError: it does.
    """
    if bool(value) is not expected:
        raise RuntimeError(message)


def require_mode(training: bool, mode: bool, path: str) -> None:
    """Stop where a module is not in the mode that its part of the graph was recorded for.

    Raises:
        RuntimeError: it is in the other mode.
    """
    if training is not mode:
        raise RuntimeError(
            f"{path or 'the network'} is in {'train' if training else 'eval'} mode and the network as a whole in the "
            "other one; it does different things in both modes, so a teacher needs it in the mode of the whole network"
        )


Place = tuple[Any, ...]


@dataclass
class Difference:
    """A constant argument that differs between two recordings."""

    node: fx.Node
    place: Place
    first: Any
    second: Any


def differences(
    first: Sequence[fx.Node], second: Sequence[fx.Node], results: tuple[Any, Any]
) -> list[Difference] | None:
    """Return the constants in which two recordings of one program differ; None where they differ in more.

    Args:
        first: nodes of a recording, in order.
        second: nodes of the other one.
        results: what the two returned, as structures of nodes.
    """
    # Parameters are read once and kept by the tracer: the second recording may read them off the first.
    first, second = ([n for n in _alive(nodes) if n.op != "get_attr"] for nodes in (first, second))
    if len(first) != len(second):
        return None
    same: dict[fx.Node, fx.Node] = {}
    found: list[Difference] = []
    for a, b in zip(first, second, strict=True):
        if (a.op, a.target, a.meta["around"]) != (b.op, b.target, b.meta["around"]):
            return None
        for holder, left, right in (("args", a.args, b.args), ("kwargs", a.kwargs, b.kwargs)):
            unlike = _compare(plain(left), plain(right), (holder,), same)
            if unlike is None or any(_decides_layout(x, y) for _place, x, y in unlike):
                return None
            found += [Difference(a, place, x, y) for place, x, y in unlike]
        if _sizes(a) != _sizes(b):
            return None
        same[b] = a
    return found if _compare(*results, (), same) == [] else None


def _decides_layout(first: Any, second: Any) -> bool:
    """Whether another constant may mean another rule: a whole number can be a dimension or a size, a flag anything."""
    return not (isinstance(first, float) or isinstance(second, float))


def _sizes(node: fx.Node) -> list[Any]:
    """The sizes of a node's result: a scale may change them."""
    return [tuple(v.shape) if isinstance(v, Tensor) else type(v) for v in pytree.tree_leaves(node.meta.get("val"))]


def _alive(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Leave out queries that nothing uses: a device that only one mode asks for."""
    dead: set[fx.Node] = set()
    for node in reversed(nodes):
        if is_query(node) and all(user in dead for user in node.users):
            dead.add(node)
    return [node for node in nodes if node not in dead]


def _compare(a: Any, b: Any, place: Place, same: dict[fx.Node, fx.Node]) -> list[tuple[Place, Any, Any]] | None:
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        read = a.op == b.op == "get_attr" and a.target == b.target
        return [] if read or same.get(b, b) is a else None
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return [] if a == b and type(a) is type(b) else [(place, a, b)]
    if type(a) is not type(b):
        return None
    if isinstance(a, slice):
        ends, others = (a.start, a.stop, a.step), (b.start, b.stop, b.step)  # sizes that the graph computes among them
        return [] if _compare(ends, others, place, same) == [] else None
    if isinstance(a, dict):
        keys = list(a) if list(a) == list(b) else None
    elif isinstance(a, (tuple, list)):
        keys = list(range(len(a))) if len(a) == len(b) else None
    else:
        return [] if a is b or a == b else None
    if keys is None:
        return None
    found: list[tuple[Place, Any, Any]] = []
    for key in keys:
        part = _compare(a[key], b[key], (*place, key), same)
        if part is None:
            return None
        found += part
    return found


def put(node: fx.Node, place: Place, value: fx.Node) -> None:
    """Replace the argument of a node at ``place``."""
    holder, *path = place

    def changed(current: Any, rest: Sequence[Any]) -> Any:
        if not rest:
            return value
        if isinstance(current, dict):
            return {**current, rest[0]: changed(current[rest[0]], rest[1:])}
        items = list(current)
        items[rest[0]] = changed(items[rest[0]], rest[1:])
        return items if isinstance(current, list) else tuple(items)

    setattr(node, holder, changed(plain(getattr(node, holder)), path))
