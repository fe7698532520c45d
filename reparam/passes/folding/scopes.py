"""Whose code an edit changes: the innermost module for which it is the same in every call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from reparam.passes.folding.branching import branching_calls
from reparam.passes.folding.edits import Analysis, Edit
from reparam.passes.folding.record import Call, Recording, call_of, common_call
from reparam.passes.folding.values import is_query
from reparam.passes.modes import require


class Scopes:
    """Moves edits outwards until every module that changes does so in the same way in all its calls.

    Args:
        recording: the graph and its calls.
        analysis: the edits.
    """

    def __init__(self, recording: Recording, analysis: Analysis) -> None:
        self.recording, self.analysis = recording, analysis
        self.calls: dict[str, list[Call]] = {}
        for call in recording.root.calls():
            self.calls.setdefault(call.path, []).append(call)
        self.inlined: set[Call] = set()
        # Calls that branch -> whose code their guards go to.
        self.guarded = {call: call for call in branching_calls(recording, analysis)}
        self.readers = list(self._readers())

    def settle(self) -> None:
        """Move edits outwards where they have to be."""
        while self._lift_inner() or self._lift_unequal() or self._lift_read():
            pass

    def lift(self, path: str) -> None:
        """Move the edits in a module's code to the code that calls it."""
        for edit in self.analysis.edits:
            if edit.scope.path == path and edit.scope.parent is not None:
                edit.scope = edit.scope.parent
        for call, scope in self.guarded.items():
            if scope.path == path and scope.parent is not None:
                self.guarded[call] = scope.parent

    def all(self) -> list[Call]:
        """Return the calls whose code changes."""
        return list(dict.fromkeys([*(edit.scope for edit in self.analysis.edits), *self.guarded.values()]))

    def to_root(self) -> None:
        """Move everything to the network's own code."""
        for edit in self.analysis.edits:
            edit.scope = self.recording.root
        self.guarded = dict.fromkeys(self.guarded, self.recording.root)

    def _lift_inner(self) -> bool:
        """An edit in a call whose code becomes part of another's belongs there."""
        self.inlined = {call for edit in self.analysis.edits for call in self._between(edit)}
        for call, scope in self.guarded.items():
            self.inlined |= set(_outward(call, scope))
        for call, scope in self.guarded.items():
            if scope in self.inlined:
                assert scope.parent is not None
                self.guarded[call] = scope.parent
                return True
        inner = [edit for edit in self.analysis.edits if edit.scope in self.inlined]
        for edit in inner:
            assert edit.scope.parent is not None
            edit.scope = edit.scope.parent
        return bool(inner)

    def _between(self, edit: Edit) -> Iterator[Call]:
        yield from _up_to(edit.node, edit.scope)
        for node in edit.covered:
            for call in _up_to(node, edit.scope):
                if any(self._is_needed(n) for n in call.nodes()):
                    yield call

    def _is_needed(self, node: fx.Node) -> bool:
        return node in self.analysis.live and node.op != "get_attr" and not is_query(node)

    def _lift_unequal(self) -> bool:
        by_call: dict[Call, list[Edit]] = {call: [] for call in self.guarded.values()}
        for edit in self.analysis.edits:
            by_call.setdefault(edit.scope, []).append(edit)
        for path in {call.path for call in by_call}:
            calls = self.calls[path]
            first = _signature(calls[0], by_call)
            if any(not _equal(first, _signature(call, by_call)) for call in calls[1:]):
                self.lift(path)
                return True
        return False

    def _lift_read(self) -> bool:
        """A module whose tensors other code reads keeps them; that code gets the new operator beside it."""
        for path, node in self.readers:
            for edit in self.analysis.edits:
                if edit.scope.path == path and edit.scope.parent is not None:
                    edit.scope = edit.scope.parent
                    return True
                inside = edit.scope.path == path or edit.scope.path.startswith(f"{path}.")
                if inside and call_of(node) not in set(edit.scope.outward()):
                    edit.scope = common_call([edit.node, node])
                    return True
        return False

    def _readers(self) -> Iterator[tuple[str, fx.Node]]:
        """Yield modules whose tensors code outside reads, and the nodes that do."""
        owners: dict[int, set[str]] = {}
        for path, module in self.recording.skeleton.named_modules(remove_duplicate=False):
            for tensor in [*module._parameters.values(), *module._buffers.values()]:
                if tensor is not None:
                    owners.setdefault(id(tensor), set()).add(path)
        for node in self.recording.graph.nodes:
            if node.op != "get_attr":
                continue
            holder, _, name = str(node.target).rpartition(".")
            tensor = getattr(self.recording.skeleton.get_submodule(holder), name, None)
            mine = owners.get(id(tensor), {holder})
            for user in node.users:
                around = {call.path for call in call_of(user).outward()}
                if not any(path in around for path in mine):
                    yield holder, user


def _up_to(node: fx.Node, scope: Call) -> Iterator[Call]:
    return _outward(call_of(node), scope)


def _outward(first: Call, scope: Call) -> Iterator[Call]:
    for call in first.outward():
        if call is scope:
            return
        yield call


def _signature(call: Call, edits: dict[Call, list[Edit]]) -> tuple[Any, list[tuple[int, Edit]]]:
    """Return what a call runs, and what changes in it."""
    nodes = [n for n in call.nodes() if n.op != "get_attr"]
    order = {node: k for k, node in enumerate(nodes)}
    changed = [(order[edit.node], edit) for edit in edits.get(call, [])]
    guards = [n.args[1:] for n in nodes if n.target is require]
    return ([n.target for n in nodes], guards), sorted(changed, key=lambda pair: pair[0])


def _equal(a: Any, b: Any) -> bool:
    if a[0] != b[0] or [k for k, _ in a[1]] != [k for k, _ in b[1]]:
        return False
    return all(_same(x, y) for (_, x), (_, y) in zip(a[1], b[1], strict=True))


def _same(first: Edit, second: Edit) -> bool:
    """Whether two edits are the same whatever the weights are: structure must not depend on values."""
    if first.probe is None or second.probe is None:
        return first.probe is second.probe
    a, b = first.probe(), second.probe()
    names = ("stride", "padding", "dilation", "output_padding", "groups", "transposed")
    tensors = ((a.weight, b.weight), (a.bias, b.bias))
    if any(getattr(a, name) != getattr(b, name) for name in names) or (a.bias is None) != (b.bias is None):
        return False
    return all(x is None or (x.shape == y.shape and torch.equal(x, y)) for x, y in tensors if y is not None)
