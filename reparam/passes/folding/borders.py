"""Norms in front of a border that is filled with what they make of zero: the same as zeros in front of the norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from reparam.ops import algebra
from reparam.passes.folding.constants import Probes, constants_of
from reparam.passes.folding.ops import value_of
from reparam.passes.folding.record import Call, Recording, call_of
from reparam.passes.functionalize import is_inplace, setitem
from reparam.passes.modes import require


def move_borders(recording: Recording, model: nn.Module) -> None:
    """Write ``pad(norm(x))``, with the norm of zero assigned to the border, as ``norm(pad(x))`` (DBB, CVPR 2021).

    Args:
        recording: changed.
        model: whose shapes random weights get: the assigned values are the norm of zero whatever the weights are.
    """
    graph = recording.graph
    ends = [n for n in graph.nodes if n.target is setitem and not any(u.target is setitem for u in n.users)]
    if not ends:
        return
    constant, probes = constants_of(graph), Probes(model, recording.skeleton)
    for end in ends:
        chain = _chain(end)
        if chain is not None and _is_border(*chain) and _fills(*chain, constant, probes):
            _move(recording, *chain)


def _chain(end: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """Return a pad and all assignments to its result, each of which is used by the next one only."""
    assigned = [end]
    while True:
        before: Any = assigned[-1].args[0]
        if not isinstance(before, fx.Node) or len(before.users) != 1:
            return None
        if before.target is F.pad:
            return before, assigned[::-1]
        if before.target is not setitem:
            return None
        assigned.append(before)


def _is_border(pad: fx.Node, assigned: list[fx.Node]) -> bool:
    """Whether the assignments are to all sides that were padded, and to nothing else."""
    sides: Any = pad.args[1] if len(pad.args) > 1 else pad.kwargs.get("pad")
    given = {
        "mode": "constant",
        "value": None,
        **pad.kwargs,
        **dict(zip(("mode", "value"), pad.args[2:], strict=False)),
    }
    rank = value_of(pad).dim()
    if given["mode"] != "constant" or given["value"] not in (None, 0) or not isinstance(sides, (list, tuple)):
        return False
    if len(sides) != 2 * (rank - 2) or not all(isinstance(p, int) and p > 0 for p in sides):
        return False
    wanted = {(rank - 1 - k // 2, k % 2, size) for k, size in enumerate(sides)}
    return {_side(node.args[1]) for node in assigned} == wanted


def _side(index: Any) -> tuple[int, int, int] | None:
    """Return dimension, end and width of a border, given as an index."""
    if not isinstance(index, tuple) or not all(isinstance(part, slice) for part in index):
        return None
    cut = [(dim, part) for dim, part in enumerate(index) if part != slice(None)]
    if len(cut) != 1 or cut[0][1].step not in (None, 1):
        return None
    dim, part = cut[0]
    if part.start in (None, 0) and isinstance(part.stop, int) and part.stop > 0:
        return dim, 0, part.stop
    return (dim, 1, -part.start) if isinstance(part.start, int) and part.start < 0 and part.stop is None else None


def _fills(pad: fx.Node, assigned: list[fx.Node], constant: set[fx.Node], probes: Probes) -> bool:
    """Whether what is assigned is the norm in front of the pad of zero."""
    norm, values = pad.args[0], {node.args[2] for node in assigned}
    if not isinstance(norm, fx.Node) or norm.target is not F.batch_norm or set(norm.users) != {pad}:
        return False
    value = values.pop()
    if values or not isinstance(value, fx.Node) or value not in constant:
        return False
    names = "input running_mean running_var weight bias training momentum eps".split()
    given: dict[str, Any] = {**dict(zip(names, norm.args, strict=False)), **norm.kwargs}
    tensors = [given.get(name) for name in names[1:5]]
    if given.get("training", False) is not False or not all(t is None or t in constant for t in tensors):
        return False
    if tensors[0] is None or tensors[1] is None or value_of(value).shape[1:] != (value_of(pad).shape[1], *_ones(pad)):
        return False
    mean, var, weight, bias = map(probes, tensors)
    shift = algebra.affine_of(mean, var, weight, bias, given.get("eps", 1e-5))[1]
    filled: Tensor = probes(value)
    return torch.allclose(filled.reshape(-1), shift.to(filled.device), rtol=1e-9, atol=1e-12)


def _ones(pad: fx.Node) -> tuple[int, ...]:
    return (1,) * (value_of(pad).dim() - 2)


def _move(recording: Recording, pad: fx.Node, assigned: list[fx.Node]) -> None:
    norm: Any = pad.args[0]
    source, end, call = norm.args[0], assigned[-1], call_of(pad)
    pad.replace_input_with(norm, source)
    with recording.graph.inserting_after(end):
        moved = recording.graph.create_node("call_function", norm.target, (pad, *norm.args[1:]), dict(norm.kwargs))
    moved.meta.update({**norm.meta, "val": value_of(end), "call": call})
    call.items[call.items.index(end)] = moved
    end.replace_all_uses_with(moved)
    _replace(recording, {end: moved, norm: source}.get)
    for node in (*reversed(assigned), norm):
        _erase(recording.graph, node)
    for node in reversed(list(recording.graph.nodes)):
        computes = node.op in ("call_function", "call_method", "get_attr") and not is_inplace(node)
        if computes and not node.users and node.target is not require:
            _erase(recording.graph, node)


def _replace(recording: Recording, other: Callable[[fx.Node, fx.Node], fx.Node]) -> None:
    """Replace nodes in what calls were given and returned."""

    def new(value: Any) -> Any:
        return fx.node.map_arg(value, lambda node: other(node, node))

    for call in recording.root.calls():
        call.args, call.kwargs, call.result = new(call.args), new(call.kwargs), new(call.result)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    call: Call = call_of(node)
    if node in call.items:
        call.items.remove(node)
    graph.erase_node(node)


__all__ = ["move_borders"]
