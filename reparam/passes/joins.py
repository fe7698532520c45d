"""Recordings for two batch sizes that differ in a few operators become one, which chooses these when it runs.

Code branches on the number of samples to save work: language models expand positions to the batch unless there is one
sample. Both ways are recorded, each for a batch that takes it. Operators of one way only run where the branch goes
that way; what comes after them reads the value of the way that was taken.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from reparam.errors import CaptureError
from reparam.passes.capture import Capture, mark_train, trace
from reparam.passes.example import Inputs
from reparam.passes.functionalize import is_inplace
from reparam.passes.guards import broken_at, other_batches, resized
from reparam.passes.meta import run_on_meta
from reparam.passes.modes import Place, pick, put, require, require_mode
from reparam.passes.proxies import iter_nodes
from reparam.passes.values import plain

_APART = 16
"""Operators that the two ways of a branch may have of their own, together."""

_ENDS = ("placeholder", "output", "call_module")


def join_batches(capture: Capture, inputs: Inputs) -> None:
    """Record for the numbers of samples that guards refuse, and join what was recorded where that is possible.

    Args:
        capture: changed in place.
        inputs: what it was recorded for, on the meta device.
    """
    for batch in other_batches(inputs):
        other = resized(inputs, batch)
        if not broken_at(capture, other):
            continue
        try:
            again = trace(capture.root, *other, specialised=capture.specialised)
        except CaptureError:
            return
        if not _join(capture, again):
            return
        capture.batches += (batch,)


def _join(capture: Capture, again: Capture) -> bool:
    """Let a capture do what another one does where its branches go that way; returns whether that was possible."""
    if len(capture.modes) != len(again.modes) or capture.eval_only != again.eval_only:
        return False
    found = [Alignment(a.graph, b.graph, a.outputs, b.outputs) for a, b in zip(capture.modes, again.modes, strict=True)]
    if not all(alignment.run() for alignment in found):
        return False
    for mode, alignment in zip(capture.modes, found, strict=True):
        if alignment.branches:
            mode.outputs = _Joiner(mode.graph, alignment).run()
        if mode.in_train_mode:
            mark_train(mode.graph)
    return any(alignment.branches for alignment in found)


@functools.cache
def conditional(kind: str, target: Any) -> Callable[..., Any]:
    """Return an operator, ``(condition, wanted, args, kwargs)``, that runs where a condition is the wanted one."""

    def run(condition: bool, wanted: bool, args: Any, kwargs: Any) -> Any:
        if bool(condition) is not wanted:
            return None
        return getattr(args[0], target)(*args[1:], **kwargs) if kind == "call_method" else target(*args, **kwargs)

    run.reparam_conditional = True  # type: ignore[attr-defined]
    run.__name__ = run.__qualname__ = f"{getattr(target, '__name__', target)}_if"
    return run


@dataclass
class _Branch:
    """A branch that goes two ways: its guards, and the operators of each way."""

    guards: tuple[fx.Node, fx.Node]
    first: list[fx.Node]
    second: list[fx.Node]


@dataclass
class Alignment:
    """Which nodes of two graphs are the same operators, and where their branches go other ways.

    Args:
        one: graph of the first recording.
        two: graph of the second one.
        returned: what modules return in the first recording.
        others: what they return in the second one.
        same: node of the second graph -> node of the first one.
        branches: in order.
        chosen: arguments whose value depends on the way: user and place, its value in the first graph and in the
            second one.
        results: values that modules return, where they depend on the way, in both graphs.
    """

    one: fx.Graph
    two: fx.Graph
    returned: dict[str, list[Any]]
    others: dict[str, list[Any]]
    same: dict[fx.Node, fx.Node] = field(default_factory=dict)
    branches: list[_Branch] = field(default_factory=list)
    chosen: list[tuple[fx.Node, Place, fx.Node, fx.Node]] = field(default_factory=list)
    results: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def run(self) -> bool:
        """Compare the graphs; returns whether they can be joined."""
        # Parameters are read once and kept by the tracer: the first reader may lie in one way of a branch.
        first, second = ([n for n in graph.nodes if n.op != "get_attr"] for graph in (self.one, self.two))
        i = j = 0
        while i < len(first) and j < len(second):
            a, b = first[i], second[j]
            if not _turned(a, b):
                if not self._alike(a, b):
                    return False
                i, j = i + 1, j + 1
                continue
            if not self._compare(a.args[0], b.args[0], a, ("args", 0)):
                return False
            i, j = i + 1, j + 1
            lengths = _apart(first[i:], second[j:])
            if lengths is None:
                return False
            branch = _Branch((a, b), first[i : i + lengths[0]], second[j : j + lengths[1]])
            if any(_is_fixed(node) for node in (*branch.first, *branch.second)):
                return False
            self.branches.append(branch)
            i, j = i + lengths[0], j + lengths[1]
        return (i, j) == (len(first), len(second)) and self._compare(self.returned, self.others)

    def _alike(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether two nodes are the same operator; their values may have other sizes."""
        if _key(a) != _key(b) or not _same_kind(a.meta.get("val"), b.meta.get("val")):
            return False
        for holder, left, right in (("args", a.args, b.args), ("kwargs", a.kwargs, b.kwargs)):
            if not self._compare(plain(left), plain(right), a, (holder,)):
                return False
        self.same[b] = a
        return True

    def _compare(self, a: Any, b: Any, user: fx.Node | None = None, place: Place = ()) -> bool:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            if self.same.get(b) is a or (a.op == b.op == "get_attr" and a.target == b.target):
                return True
            fits = bool(self.branches) and _same_kind(a.meta.get("val"), b.meta.get("val"), numbers=True)
            if user is None:
                self.results[a] = b
            else:
                self.chosen.append((user, place, a, b))
            return fits
        if type(a) is not type(b):
            return False
        if isinstance(a, slice):
            return all(
                self._compare(getattr(a, n), getattr(b, n), user, (*place, n)) for n in ("start", "stop", "step")
            )
        if isinstance(a, dict):
            return list(a) == list(b) and all(self._compare(a[k], b[k], user, (*place, k)) for k in a)
        if isinstance(a, (tuple, list)):
            pairs = enumerate(zip(a, b, strict=False))
            return len(a) == len(b) and all(self._compare(x, y, user, (*place, k)) for k, (x, y) in pairs)
        return a is b or bool(a == b)


def _turned(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes are the guards of a branch that goes two ways."""
    if not a.target is b.target is require:
        return False
    return isinstance(a.args[1], bool) and isinstance(b.args[1], bool) and a.args[1:] == (not b.args[1], a.args[2])


def _is_fixed(node: fx.Node) -> bool:
    """Whether an operator cannot run on one way only."""
    return node.op in _ENDS or node.target in (require, require_mode) or is_inplace(node)


def _key(node: fx.Node) -> Any:
    """What an operator is, without the values that it reads."""
    constants = plain(fx.node.map_arg((node.args, node.kwargs), lambda _n: "a value"))
    return node.op, node.name if node.op == "placeholder" else node.target, constants, node.meta.get("around")


def _same_kind(a: Any, b: Any, numbers: bool = False) -> bool:
    """Whether two values have the same structure, ranks and types; with ``numbers`` only if they can be chosen."""
    (one, first), (two, second) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    if first != second or (numbers and not isinstance(a, (Tensor, int))):
        return False
    kinds = [[(v.dim(), v.dtype) if isinstance(v, Tensor) else type(v) for v in values] for values in (one, two)]
    return kinds[0] == kinds[1]


def _apart(first: list[fx.Node], second: list[fx.Node]) -> tuple[int, int] | None:
    """Return how many operators each way has of its own: as few as possible, so that the rest is the same."""
    for total in range(_APART + 1):
        for mine in range(total + 1):
            if _follow(first[mine:], second[total - mine :]):
                return mine, total - mine
    return None


def _follow(first: list[fx.Node], second: list[fx.Node]) -> bool:
    """Whether two sequences are the same operators up to the next branch, or the end."""
    if not first or not second:
        return not first and not second
    for a, b in zip(first, second, strict=False):
        if _turned(a, b) or a.op == b.op == "output":
            return True
        if _key(a) != _key(b):
            return False
    return False


class _Joiner:
    """Writes what an alignment found into the first graph."""

    def __init__(self, graph: fx.Graph, found: Alignment) -> None:
        self.graph, self.found = graph, found
        guard = found.branches[0].guards[0]
        self.condition, self.wanted = guard.args[0], bool(guard.args[1])
        self.moved: dict[fx.Node, fx.Node] = dict(found.same)
        self.picked: dict[tuple[fx.Node, fx.Node], fx.Node] = {}

    def run(self) -> dict[str, list[Any]]:
        """Change the graph; returns what modules return now."""
        for branch in self.found.branches:
            self._write(branch)
        for user, place, a, b in self.found.chosen:
            put(user, place, self._pick(a, b))
        for branch in self.found.branches[1:]:
            self._tie(*branch.guards)
        self.graph.erase_node(self.found.branches[0].guards[0])
        chosen = {a: self._pick(a, b) for a, b in self.found.results.items()}
        return {path: [self._returned(call, chosen) for call in calls] for path, calls in self.found.returned.items()}

    def _returned(self, value: Any, chosen: dict[fx.Node, fx.Node]) -> Any:
        """Replace nodes that are others now in what a module returns."""
        if isinstance(value, fx.Node):
            return chosen.get(value) or self.moved.get(value, value)
        if isinstance(value, dict):
            return {key: self._returned(item, chosen) for key, item in value.items()}
        return tuple(self._returned(item, chosen) for item in value) if isinstance(value, tuple) else value

    def _write(self, branch: _Branch) -> None:
        here = branch.first[-1] if branch.first else branch.guards[0]
        for node in branch.first:
            if self._is_plain(node, node.args):
                continue
            with self.graph.inserting_before(node):
                new = self._conditional(node, self.wanted, node.args, node.kwargs)
            node.replace_all_uses_with(new)
            self.moved[node] = new
            if node is here:
                here = new
            self.graph.erase_node(node)
        for node in branch.second:
            for source in node.all_input_nodes:
                if source.op == "get_attr" and source not in self.moved:
                    here = self._attribute(source, here)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.moved.__getitem__)
            with self.graph.inserting_after(here):
                if self._is_plain(node, args):
                    here = self.graph.create_node(node.op, node.target, args, kwargs)
                    here.meta = _meta(node.meta)
                else:
                    here = self._conditional(node, not self.wanted, args, kwargs)
            here.meta["val"] = _value(node, args, kwargs)
            self.moved[node] = here

    def _is_plain(self, node: fx.Node, args: Any) -> bool:
        """Whether a node only asks a value for its sizes, which that has on both ways."""
        asks = node.target in (getattr, "size", "dim") or (
            node.target is operator.getitem and not isinstance(node.meta.get("val"), Tensor)
        )
        return asks and not any(hasattr(n.target, "reparam_conditional") for n in iter_nodes(tuple(args)))

    def _conditional(self, node: fx.Node, wanted: bool, args: Any, kwargs: Any) -> fx.Node:
        function = conditional(node.op, node.target)
        new = self.graph.call_function(function, (self.condition, wanted, tuple(args), dict(kwargs)))
        new.meta = _meta(node.meta)
        return new

    def _attribute(self, node: fx.Node, here: fx.Node) -> fx.Node:
        with self.graph.inserting_after(here):
            new = self.graph.create_node("get_attr", node.target)
        new.meta = _meta(node.meta)
        self.moved[node] = new
        return new

    def _pick(self, first: fx.Node, second: fx.Node) -> fx.Node:
        a, b = self.moved.get(first, first), self.moved[second]
        if (a, b) not in self.picked:
            last = next(node for node in reversed(self.graph.nodes) if node in (a, b))
            with self.graph.inserting_after(last):
                new = self.graph.call_function(pick, (self.condition, self.wanted, a, b))
            new.meta = _meta(a.meta)
            self.picked[a, b] = new
        return self.picked[a, b]

    def _tie(self, guard: fx.Node, other: fx.Node) -> None:
        """Both branches have to go the ways that were recorded together."""
        with self.graph.inserting_before(guard):
            expected = self.graph.call_function(pick, (self.condition, self.wanted, guard.args[1], other.args[1]))
        expected.meta = {**_meta(guard.meta), "val": guard.args[1]}
        put(guard, ("args", 1), expected)


def _meta(meta: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in meta.items() if name != "key"}


def _value(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """The value of an operator of the second way for the first one's number of samples, where it has one."""
    given, named = fx.node.map_arg((args, kwargs), lambda n: n.meta.get("val"))
    try:
        return run_on_meta(node.op, node.target, plain(given), plain(named))
    except Exception:
        return node.meta.get("val")
