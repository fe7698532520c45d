"""Modules whose own code branches around operators that folded: kept as it is, it would run only some of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import fx

from reparam.passes.folding.edits import Analysis
from reparam.passes.folding.emit import nodes_in, parameters_of
from reparam.passes.folding.record import Call, Recording, call_of, common_call
from reparam.passes.modes import require


def branching_calls(recording: Recording, analysis: Analysis) -> list[Call]:
    """Return the calls whose code may take another way between operators that are exact only together.

    Their code is written anew, with guards on the sizes and arguments that it was recorded for.
    """
    found: dict[Call, bool] = {}
    edited = {node for edit in analysis.edits for node in (edit.node, *edit.covered)}
    for group in analysis.groups:
        if len(group) > 1 and group & edited:
            for call in _around(group):
                if call not in found:
                    found[call] = _branches(call, recording, analysis)
    return [call for call, branches in found.items() if branches]


def _around(group: set[fx.Node]) -> Iterator[Call]:
    """Yield the calls whose code runs between the nodes of a group."""
    common = common_call(list(group))
    for node in group:
        for call in call_of(node).outward():
            yield call
            if call is common:
                break


def _branches(call: Call, recording: Recording, analysis: Analysis) -> bool:
    module = recording.skeleton.get_submodule(call.path)
    if type(module).__module__.startswith("torch.nn."):
        return False
    guards = [n for n in call.items if isinstance(n, fx.Node) and n.target is require]
    if guards and not _only_prepares(call, guards[-1], analysis):
        return True
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values()):
        return True
    return any(not nodes_in(value) for _, value, _ in parameters_of(module, call))


def _only_prepares(call: Call, last: fx.Node, analysis: Analysis) -> bool:
    """Whether a layer asks for sizes before it runs its operator, as convolutions do that pad by size."""
    op = analysis.ops.get(call.result) if isinstance(call.result, fx.Node) else None
    if op is None or op.kind != "kernel" or call_of(op.node) is not call:
        return False
    return call.items.index(last) < call.items.index(op.node)


__all__ = ["branching_calls"]
