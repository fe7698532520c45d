"""Operators that only move elements: one proof serves them all.

Every element of the student's arguments gets a unique label, the teacher's arguments get the labels of the elements
they replicate, and both go through the operator. The result's labels either are the student's under some replica
map, which is then the result's map, or prove that there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reparam.ops.maps import Maps, ReplicaMap, clean
from reparam.passes.call import At, Call, Name
from reparam.passes.memory import shapes_of
from reparam.passes.registry import rule
from reparam.passes.streams import meet
from reparam.passes.values import Free, Int, Pair, Refuse, Value, student, teacher, transform, walk


def move(call: Call) -> Value:
    """Push labels through the operator in both worlds and read off the maps of the results."""
    proofs = call.planner.capture.memory.proofs
    key = None if call.planner.streams is not None else _proof_key(call)
    if key is not None and key in proofs:
        known = iter(proofs[key])
        return call.result(lambda _s, _t: next(known))
    maps = _prove(call)
    if key is not None:
        proofs[key] = maps
    found = iter(maps)
    return call.result(lambda _s, _t: next(found))


def _proof_key(call: Call) -> Any:
    """What a proof depends on: the operator, sizes, maps, constants, and which arguments are the same value."""
    numbers: dict[int, int] = {}

    def plain(leaf: Any) -> Any:
        if isinstance(leaf, Pair):
            return numbers.setdefault(id(leaf), len(numbers)), tuple(leaf.s.shape), tuple(leaf.maps.items())
        return (leaf.s, leaf.t) if isinstance(leaf, Int) else leaf

    shapes = shapes_of(transform([list(call.args), dict(call.kwargs)], plain))
    return None if shapes is None else (call.node.target, shapes)


def _prove(call: Call) -> list[Maps]:
    base = 1
    labels: dict[int, tuple[Tensor, Tensor]] = {}
    for _path, leaf in walk([call.args, call.kwargs]):
        if isinstance(leaf, Free):
            raise Refuse("a free parameter among moved values")
        if isinstance(leaf, Pair) and id(leaf) not in labels:
            labels[id(leaf)] = _label(leaf, base)
            base += leaf.s.numel()
    outs = []
    for world, view in ((0, student), (1, teacher)):
        args = transform([list(call.args), dict(call.kwargs)], partial(_labelled, labels, world))
        try:
            outs.append(_run(call, *view(args)))
        except Exception as error:
            raise Refuse(f"the operator refuses the wider arguments ({type(error).__name__}: {error})") from error
    return [find_maps(s, t) for s, t in zip(_tensors(outs[0]), _tensors(outs[1]), strict=True)]


def _label(pair: Pair, base: int) -> tuple[Tensor, Tensor]:
    # float64, starting at 1: some operators refuse integers, and padding adds zeros.
    s = torch.arange(base, base + pair.s.numel(), dtype=torch.float64).view(pair.s.shape)
    t = s
    for dim, replica_map in pair.maps.items():
        t = t.index_select(dim, torch.tensor(replica_map.index))
    return s, t


def _labelled(labels: dict[int, tuple[Tensor, Tensor]], world: int, leaf: Any) -> Any:
    return labels[id(leaf)][world] if isinstance(leaf, Pair) else leaf


def _run(call: Call, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if call.node.op == "call_method":
        return getattr(args[0], str(call.node.target))(*args[1:], **kwargs)
    return call.node.target(*args, **kwargs)  # type: ignore[operator]


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for _path, leaf in walk(value) if isinstance(leaf, Tensor)]


def find_maps(s: Tensor, t: Tensor) -> Maps:
    """Return the maps under which ``t`` is ``s``.

    Raises:
        Refuse: there are none.
    """
    if s.dim() != t.dim():
        raise Refuse("the results have different ranks")
    if s.shape == t.shape and torch.equal(s, t):
        return {}
    if not s.numel():
        raise Refuse("an empty result")
    origin = (s == t.flatten()[0]).nonzero()
    if not len(origin):
        raise Refuse("the results hold different elements")
    maps: Maps = {}
    for dim in range(s.dim()):
        line_s = s[tuple(slice(None) if d == dim else int(origin[0][d]) for d in range(s.dim()))]
        line_t = t[tuple(slice(None) if d == dim else 0 for d in range(s.dim()))]
        maps[dim] = _match_lines(line_s.numpy(), line_t.numpy())
    expected = s
    for dim, replica_map in clean(maps).items():
        expected = expected.index_select(dim, torch.tensor(replica_map.index))
    if not torch.equal(expected, t):
        raise Refuse("it mixes replicas in a way that is no replica map")
    return clean(maps)


def _match_lines(s: np.ndarray[Any, Any], t: np.ndarray[Any, Any]) -> ReplicaMap:
    """Find the student position of each teacher element along one line; repeated labels are dealt out in order."""
    if len(s) == len(t) and (s == t).all():
        return ReplicaMap.identity(len(s))
    mine, theirs = np.argsort(s, kind="stable"), np.argsort(t, kind="stable")
    labels, first, counts = np.unique(s[mine], return_index=True, return_counts=True)
    wide_labels, wide_first, wide_counts = np.unique(t[theirs], return_index=True, return_counts=True)
    at = np.minimum(np.searchsorted(labels, wide_labels), len(labels) - 1)
    if not (labels[at] == wide_labels).all():
        raise Refuse("the results hold different elements")
    group = np.repeat(np.arange(len(wide_labels)), wide_counts)
    replica = np.arange(len(t)) - wide_first[group]
    index = np.empty(len(t), dtype=np.int64)
    index[theirs] = mine[first[at[group]] + replica * counts[at[group]] // wide_counts[group]]
    try:
        return ReplicaMap(index, len(s))
    except ValueError as error:
        raise Refuse(str(error)) from error


@rule(
    torch.flip, "flip", torch.rot90, "rot90", torch.repeat_interleave, "repeat_interleave", F.pixel_unshuffle,
    torch.pixel_unshuffle, F.channel_shuffle, torch.channel_shuffle, torch.native_channel_shuffle, "unfold",
    torch.diagonal, "diagonal", torch.fliplr, torch.flipud, torch.atleast_1d, torch.atleast_2d, torch.atleast_3d,
    torch.tril, torch.triu, "tril", "triu", torch.hstack, torch.vstack, torch.dstack, torch.broadcast_tensors,
    torch.meshgrid,
)  # fmt: skip
def moved(call: Call, *args: Value, **kwargs: Value) -> Value:
    """Any operator that only moves elements."""
    return move(call)


@rule(F.pixel_shuffle, torch.pixel_shuffle)
def pixel_shuffle(call: Call, input: Value, upscale_factor: Value) -> Value:
    """Blocks of f x f channels become pixels: the replicas must lie block by block."""
    x = call.pair("input")
    channel, block = x.ndim - 3, student(upscale_factor) ** 2
    call.narrow("input", [d for d in x.maps if d > channel], "replicas along the dimensions that it interleaves")
    maps = dict(call.pair("input").maps)
    phi = maps.pop(channel, None)
    if phi is not None:
        maps[channel] = ReplicaMap.repeat(phi.size // block, int(phi.counts.max()))
        call.align("input", channel, maps[channel].outputs(block))
    return call.result(maps)


@rule(torch.roll, "roll")
def roll(call: Call, input: Value, shifts: Value, dims: Value = None) -> Value:
    """Rotation: along a widened dimension by as many replicas."""
    x = call.pair("input")
    for k, d in enumerate(dims if isinstance(dims, (tuple, list)) else [dims]):
        phi = None if d is None else x.maps.get(d % x.ndim)
        if phi is not None and phi.innermost is not None:
            place: Name = ("shifts", k) if isinstance(call.get("shifts"), (tuple, list)) else "shifts"
            call.resize(place, student(call.get(place)) * phi.innermost)
    return move(call)


# -- dimensions in another order: no proof needed ------------------------------------------------------------------


def _dims(call: Call, values: Sequence[Any]) -> list[int]:
    flat = [v for item in values for v in (item if isinstance(item, (tuple, list)) else [item])]
    return [int(v) for v in flat]


@rule(torch.permute, "permute")
def permute(call: Call, input: Value, *dims: Value, **kwargs: Value) -> Value:
    """Permutation of the dimensions."""
    x = call.pair("input")
    order = [d % x.ndim for d in _dims(call, dims or [kwargs["dims"]])]
    return call.result({new: x.maps[old] for new, old in enumerate(order) if old in x.maps})


@rule(torch.transpose, "transpose", "transpose_", torch.swapaxes, "swapaxes", torch.swapdims, "swapdims")
def transpose(call: Call, input: Value, dim0: Value, dim1: Value) -> Value:
    """Exchange of two dimensions."""
    x = call.pair("input")
    swap = {dim0 % x.ndim: dim1 % x.ndim, dim1 % x.ndim: dim0 % x.ndim}
    return call.result({swap.get(d, d): m for d, m in x.maps.items()})


@rule(torch.t, "t")
def t(call: Call, input: Value) -> Value:
    """Matrix transpose."""
    x = call.pair("input")
    return call.result({x.ndim - 1 - d: m for d, m in x.maps.items()})


@rule(torch.movedim, "movedim", torch.moveaxis, "moveaxis")
def movedim(call: Call, input: Value, source: Value, destination: Value) -> Value:
    """Dimensions moved to other places."""
    return move(call)


@rule(torch.squeeze, "squeeze", "squeeze_")
def squeeze(call: Call, input: Value, dim: Value = None) -> Value:
    """Removal of dimensions of size 1; a widened one is contracted first."""
    x = call.pair("input")
    axes = range(x.ndim) if dim is None else [d % x.ndim for d in (dim if isinstance(dim, (tuple, list)) else [dim])]
    gone = [d for d in axes if x.s.shape[d] == 1]
    x = call.narrow("input", gone)
    return call.result({d - sum(g < d for g in gone): m for d, m in x.maps.items()})


@rule(torch.unsqueeze, "unsqueeze", "unsqueeze_")
def unsqueeze(call: Call, input: Value, dim: Value) -> Value:
    """A new dimension of size 1."""
    x = call.pair("input")
    at = dim % (x.ndim + 1)
    return call.result({d + (d >= at): m for d, m in x.maps.items()})


@rule(torch.view_as_complex)
def view_as_complex(call: Call, input: Value) -> Value:
    """Pairs of real numbers as complex ones: the pairs keep their two numbers."""
    x = call.pair("input")
    x = call.narrow("input", [x.ndim - 1], "its real and imaginary parts would be repeated")
    return call.result(dict(x.maps))


@rule(torch.view_as_real)
def view_as_real(call: Call, input: Value) -> Value:
    """Complex numbers as pairs of real ones."""
    return call.result(dict(call.pair("input").maps))


# -- several tensors -----------------------------------------------------------------------------------------------


@rule(torch.cat, torch.concat, torch.concatenate)
def cat(call: Call, tensors: Value, dim: Value = 0, *, axis: Value = None) -> Value:
    """Concatenation: the maps follow each other; in all other dimensions they must agree."""
    places: list[Name] = [("tensors", k) for k in range(len(tensors))]
    rank = max(student(v).dim() for v in tensors)
    along = (dim if axis is None else axis) % rank
    _agree_all(call, places, [d for d in range(rank) if d != along], rank)
    pairs = [call.pair(place) for place in places]
    maps = {d: m for d, m in pairs[0].maps.items() if d != along}
    parts = [p.maps.get(along) or ReplicaMap.identity(p.s.shape[along]) for p in pairs if p.ndim == rank]
    return call.result({**maps, along: ReplicaMap.joined(parts)})


@rule(torch.stack)
def stack(call: Call, tensors: Value, dim: Value = 0) -> Value:
    """Stacking: all maps must agree."""
    places: list[Name] = [("tensors", k) for k in range(len(tensors))]
    rank = student(tensors[0]).dim()
    _agree_all(call, places, list(range(rank)), rank)
    at = dim % (rank + 1)
    return call.result({d + (d >= at): m for d, m in call.pair(places[0]).maps.items()})


def _agree_all(call: Call, places: list[Name], dims: list[int], rank: int) -> None:
    """Bring all tensors of a rank to the widest map that one of them has, in these dimensions."""
    for d in dims:
        found = [v.maps[d] for p in places if isinstance(v := call.get(p), Pair) and d in v.maps]
        target = meet(call, places, d - rank, max(found, key=len)) if found else None
        for place in places:
            if isinstance(call.get(place), Pair) and student(call.get(place)).dim() > d:
                call.align(place, d, target)
    wanted: Maps = next((call.get(p).maps for p in places if isinstance(call.get(p), Pair)), {})
    for place in places:
        if isinstance(call.get(place), Free):
            call.match(place, {d: m for d, m in wanted.items() if d in dims})


# -- repetition ----------------------------------------------------------------------------------------------------


@rule("expand", torch.broadcast_to, "broadcast_to", "expand_as")
def expand(call: Call, input: Value, *sizes: Value, **kwargs: Value) -> Value:
    """Repetition of dimensions of size 1; sizes given for a mapped dimension are rewritten."""
    x = call.pair("input")
    name = str(getattr(call.node.target, "__name__", call.node.target))
    rank = call.s.dim()
    maps = {d + rank - x.ndim: m for d, m in x.maps.items() if call.s.shape[d + rank - x.ndim] == m.size}
    for d in list(x.maps):
        if call.s.shape[d + rank - x.ndim] != x.s.shape[d]:
            call.narrow("input", [d])
    if name == "expand_as" or (sizes and isinstance(sizes[0], (Pair, Free))):
        return _expand_as(call, maps)
    nested = isinstance(call.args[1], (tuple, list))
    for k in range(rank):
        place = At(("args", 1, k)) if nested else At(("args", 1 + k))
        value = call.get(place)
        if student(value) == -1:
            continue
        if isinstance(value, Int) and k not in maps:
            # The new dimension repeats one value as often as a widened dimension is long.
            maps[k] = _spread(value)
        elif k in maps:
            call.resize(place, len(maps[k]))
    return call.result(maps)


def _expand_as(call: Call, maps: Maps) -> Value:
    place = At(("args", 1))
    for d, m in maps.items():
        call.align(place, d, m)
    x, other = call.pair("input"), call.pair(place)
    for d, m in other.maps.items():
        axis = d - other.ndim + x.ndim
        if axis >= 0 and axis not in x.maps and x.s.shape[axis] == m.size:
            call.align("input", axis, m)
    return call.result({**call.pair(place).maps, **maps})


def _spread(value: Int) -> ReplicaMap:
    """Any map fits a dimension whose values are all the same; the default layout is the likeliest."""
    if value.s <= 0 or value.t % value.s:
        raise Refuse("a repetition that does not divide")
    return ReplicaMap.repeat(value.s, value.t // value.s)


@rule("repeat", torch.tile, "tile")
def repeat(call: Call, input: Value, *repeats: Value) -> Value:
    """Repetition of whole dimensions."""
    return move(call)
