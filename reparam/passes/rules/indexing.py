"""Parts of a dimension: pieces, slices, single positions and look-ups, cut at the student's boundaries."""

from __future__ import annotations

import operator
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from reparam.ops.maps import Maps, ReplicaMap
from reparam.ops.steps import Positions
from reparam.passes.call import At, Call, Name
from reparam.passes.functionalize import chunk
from reparam.passes.registry import rule
from reparam.passes.values import Free, Int, Pair, Refuse, Value, student, teacher, walk


def boundary(replica_map: ReplicaMap, position: int) -> int:
    """Return where the student's boundary in front of index ``position`` lies in the teacher.

    Raises:
        Refuse: the replicas of both sides are mixed.
    """
    before = replica_map.index < position
    count = int(before.sum())
    if not before[:count].all():
        raise Refuse("the replicas on both sides of a cut are mixed")
    return count


def part(phi: ReplicaMap, start: int, stop: int) -> tuple[ReplicaMap, int, int]:
    """Return the map of student range [start, stop) and the teacher's range."""
    a, b = boundary(phi, start), boundary(phi, stop)
    return phi.part(start, stop, a, b), a, b


# -- pieces --------------------------------------------------------------------------------------------------------


@rule(chunk)
def chunks(call: Call, input: Value, chunks: Value, dim: Value = 0, sizes: Value = None) -> Value:
    """Equal pieces; uneven ones need not be torch's where the dimension is wider."""
    cuts = _cuts(call, "input", dim)
    wanted = [b - a for a, b in pairwise(cuts)]
    if cuts and wanted != [piece.shape[dim] for piece in call.run()]:
        call.set("sizes", wanted)
    return _pieces(call, "input", dim)


@rule(torch.split, "split", "split_with_sizes", torch.split_with_sizes)
def split(call: Call, tensor: Value, split_size_or_sections: Value, dim: Value = 0) -> Value:
    """Pieces of given sizes."""
    name = "split_size_or_sections"
    cuts = _cuts(call, "tensor", dim)
    if cuts and isinstance(split_size_or_sections, (tuple, list)):
        for k, (a, b) in enumerate(pairwise(cuts)):
            call.resize((name, k), b - a)
    elif cuts:
        sizes = [b - a for a, b in pairwise(cuts)]
        even = all(size == sizes[0] for size in sizes[:-1]) and sizes[-1] <= sizes[0]
        call.resize(name, sizes[0]) if even else call.set(name, sizes)
    return _pieces(call, "tensor", dim)


@rule(torch.tensor_split, "tensor_split")
def tensor_split(
    call: Call,
    input: Value,
    indices_or_sections: Value = None,
    dim: Value = 0,
    *,
    indices: Value = None,
    sections: Value = None,
) -> Value:
    """Pieces of nearly equal sizes, or between given positions."""
    given = {"indices_or_sections": indices_or_sections, "indices": indices, "sections": sections}
    return _split_at(call, next(name for name, value in given.items() if value is not None), dim)


@rule(torch.hsplit, "hsplit", torch.vsplit, "vsplit", torch.dsplit, "dsplit")
def split_along(call: Call, input: Value, indices_or_sections: Value) -> Value:
    """Pieces along the second, first or third dimension."""
    name = str(getattr(call.node.target, "__name__", call.node.target))
    dim = {"hsplit": min(1, call.pair("input").ndim - 1), "vsplit": 0, "dsplit": 2}[name]
    return _split_at(call, "indices_or_sections", dim)


def _split_at(call: Call, name: Name, dim: int) -> Value:
    cuts = _cuts(call, "input", dim)
    if cuts and name == "sections":
        if len({b - a for a, b in pairwise(cuts)}) > 1:
            raise Refuse("uneven pieces of a widened dimension")
    elif cuts and isinstance(call.source(name), (tuple, list, int)):
        call.set(name, cuts[1:-1])
    return _pieces(call, "input", dim)


def _cuts(call: Call, name: Name, dim: int) -> list[int]:
    """Return the teacher's boundaries of the pieces; empty where the dimension is narrow."""
    x = call.pair(name)
    axis = dim % x.ndim
    phi = x.maps.get(axis)
    if phi is None:
        return []
    starts = np.cumsum([0, *(piece.shape[axis] for piece in call.s)])
    return [boundary(phi, int(start)) for start in starts]


def _pieces(call: Call, name: Name, dim: int) -> Value:
    """Run the operator; its pieces must be the student's."""
    x = call.pair(name)
    axis = dim % x.ndim
    phi = x.maps.get(axis)
    rest = {d: m for d, m in x.maps.items() if d != axis}
    if phi is None:
        return call.result(rest)
    cuts = _cuts(call, name, dim)
    starts = np.cumsum([0, *(piece.shape[axis] for piece in call.s)])
    parts = iter(phi.part(int(s), int(e), a, b) for a, b, s, e in zip(cuts, cuts[1:], starts, starts[1:], strict=False))
    return call.result(lambda _s, _t: {**rest, axis: next(parts)})


@rule(torch.unbind, "unbind")
def unbind(call: Call, input: Value, dim: Value = 0) -> Value:
    """All slices along a dimension: that one must be narrow."""
    axis = dim % call.pair("input").ndim
    x = call.narrow("input", [axis], "it takes the channels apart")
    maps = {d - (d > axis): m for d, m in x.maps.items()}
    return call.result(lambda _s, _t: maps)


# -- positions and ranges ------------------------------------------------------------------------------------------


@rule(torch.select, "select")
def select(call: Call, input: Value, dim: Value, index: Value) -> Value:
    """One index of a dimension: of a widened one its first replica."""
    x = call.pair("input")
    axis = dim % x.ndim
    phi = x.maps.get(axis)
    if phi is None:
        call.narrow_int("index")
    else:
        call.resize("index", first_replica(phi, student(index)))
    return call.result({d - (d > axis): m for d, m in x.maps.items() if d != axis})


def first_replica(phi: ReplicaMap, index: int) -> int:
    """Return the teacher's position of a student index; negative ones count from the end in both worlds."""
    if phi.innermost is not None:
        return index * phi.innermost
    return int(phi.first[index % phi.size])


@rule(torch.narrow, "narrow")
def narrow(call: Call, input: Value, dim: Value, start: Value, length: Value) -> Value:
    """A range of a dimension."""
    x = call.pair("input")
    axis = dim % x.ndim
    phi = x.maps.get(axis)
    if phi is None:
        call.narrow_int("start")
        call.narrow_int("length")
        return call.result(dict(x.maps))
    first = student(start) % phi.size if student(start) < 0 else student(start)
    piece, a, b = part(phi, first, first + student(length))
    call.resize("start", a)
    call.resize("length", b - a)
    return call.result({**x.maps, axis: piece})


@rule(torch.index_select, "index_select")
def index_select(call: Call, input: Value, dim: Value, index: Value) -> Value:
    """Selection by an index tensor."""
    x = call.pair("input")
    axis = dim % x.ndim
    chosen = _positions(call, "input", axis, "index")
    maps = {d: m for d, m in call.pair("input").maps.items() if d != axis}
    return call.result({**maps, **({} if chosen is None else {axis: chosen})})


def _positions(call: Call, name: Name, axis: int, index: Name) -> ReplicaMap | None:
    """Let a 1-D tensor of positions select all replicas; returns the map of what it selects, None where narrow."""
    phi = call.pair(name).maps.get(axis)
    place = call.pair(index)
    call.narrow(index, None, "positions")
    if phi is None:
        return None
    if place.ndim != 1 or place.s.dtype not in (torch.int64, torch.int32) or phi.uniform is None:
        call.narrow(name, [axis], "a look-up along the channels")
        return None
    call.align(name, axis, ReplicaMap.repeat(phi.size, phi.uniform))
    wide = place.t.new_empty(place.s.shape[0] * phi.uniform)
    chosen = ReplicaMap.repeat(place.s.shape[0], phi.uniform)
    call.insert(index, Positions(phi.uniform), Pair(place.s, wide, {0: chosen}))
    return chosen


@rule(torch.gather, "gather")
def gather(call: Call, input: Value, dim: Value, index: Value, *, sparse_grad: Value = False) -> Value:
    """A look-up along one dimension, for each place of the others: those of the index follow the input's."""
    return call.result(_looked_up(call, dim, ["input", "index"]))


@rule(
    torch.scatter, "scatter", "scatter_", torch.scatter_add, "scatter_add", "scatter_add_", torch.scatter_reduce,
    "scatter_reduce", "scatter_reduce_",
)  # fmt: skip
def scatter(call: Call, input: Value, dim: Value, index: Value, src: Value, *args: Value, **kwargs: Value) -> Value:
    """The reverse of ``gather``: values, or one number, go to positions along one dimension."""
    names: list[Name] = ["input", "index", *(["src"] if isinstance(src, (Pair, Free)) else [])]
    return call.result(_looked_up(call, dim, names))


@rule(torch.index_add, "index_add", "index_add_", torch.index_copy, "index_copy", "index_copy_")
def index_add(call: Call, input: Value, dim: Value, index: Value, source: Value, *, alpha: Value = 1) -> Value:
    """Slices go to positions along one dimension: those of the source follow the input's."""
    maps = _looked_up(call, dim, ["input", "source"])
    call.narrow("index", None, "positions")
    return call.result(maps)


def _looked_up(call: Call, dim: int, names: list[Name]) -> Maps:
    """Give all tensors one map in every dimension but ``dim``, where positions count."""
    pairs = [student(call.get(name)) for name in names]
    axis = dim % pairs[0].dim()
    found: Maps = {}
    for d in range(pairs[0].dim()):
        maps = [v.maps[d] for n in names if isinstance(v := call.get(n), Pair) and d in v.maps]
        if d != axis and maps and len({pair.shape[d] for pair in pairs}) == 1:
            found[d] = max(maps, key=len)
        elif maps:
            for name in names:
                call.narrow(name, [d], "a look-up along the channels")
    for name in names:
        call.match(name, found)
    return found


# -- indexing ------------------------------------------------------------------------------------------------------


@rule(operator.getitem, "__getitem__")
def getitem(call: Call, value: Value, index: Value) -> Value:
    """An item of a tuple or dict, or basic slicing of a tensor."""
    if isinstance(value, Free):
        # The index is wide or the value would stay free: the parameter is narrow.
        value = call.demand("value", {})
    if not isinstance(value, Pair):
        return value[index] if not isinstance(index, Int) else value[index.s]
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    if isinstance(index, list) and not any(isinstance(i, (Pair, Free)) for i in index):
        items = [index]
    if any(isinstance(leaf, (Pair, Free)) for _p, leaf in walk(items)) or any(isinstance(i, list) for i in items):
        return _tensor_index(call, value, items, isinstance(index, tuple))
    _x, maps = basic_index(call, "value", items, isinstance(index, tuple))
    return call.result(maps)


def basic_index(call: Call, name: Name, items: list[Any], is_tuple: bool) -> tuple[Pair, Maps]:
    """Rewrite the constants of a basic index for the teacher; returns the maps of what it selects."""
    if any(isinstance(i, bool) for i in items):
        raise Refuse("indexing by a truth value")
    x = call.pair(name)
    taken = sum(i is not None and i is not Ellipsis for i in items)
    maps: Maps = {}
    source = target = 0
    for k, item in enumerate(items):
        place: Name = ("index", k) if is_tuple else "index"
        if item is None:
            target += 1
        elif item is Ellipsis:
            for _ in range(x.ndim - taken):
                _copy_map(maps, call.pair(name).maps, source, target)
                source, target = source + 1, target + 1
        elif isinstance(item, slice):
            piece = _cut(call, name, source, place, item)
            if piece is not None:
                maps[target] = piece
            source, target = source + 1, target + 1
        else:
            _pick(call, x, source, place, item)
            source += 1
    x = call.pair(name)
    for d in range(source, x.ndim):
        _copy_map(maps, x.maps, d, target + d - source)
    return x, maps


def _copy_map(maps: Maps, source: Maps, old: int, new: int) -> None:
    if old in source:
        maps[new] = source[old]


def _pick(call: Call, x: Pair, dim: int, place: Name, item: Value) -> None:
    if dim in x.maps:
        call.resize(place, first_replica(x.maps[dim], student(item)))
    else:
        call.narrow_int(place)


def _cut(call: Call, name: Name, dim: int, place: Name, item: slice) -> ReplicaMap | None:
    """One slice of a dimension; returns the map of the piece, None where it is narrow."""
    phi = call.pair(name).maps.get(dim)
    if phi is None:
        for end in ("start", "stop"):
            call.narrow_int(At((*call.path(place), end)))
        return None
    start, stop, step = student(item).indices(phi.size)
    if step != 1:
        return _strided(call, name, dim, item)
    piece, a, b = part(phi, start, max(start, stop))
    if phi.innermost is None:
        if teacher(item).indices(len(phi))[:2] != (a, b):
            call.set(place, slice(a, b))
        return piece
    for end in ("start", "stop"):
        value = getattr(item, end)
        if value is not None:
            call.resize(At((*call.path(place), end)), student(value) * phi.innermost)
    return piece


def _strided(call: Call, name: Name, dim: int, item: slice) -> ReplicaMap:
    """Every k-th channel: with whole copies of the channels behind each other the slice itself stays as it is."""
    phi = call.pair(name).maps[dim]
    start, _stop, step = student(item).indices(phi.size)
    plain = item.stop is None and not isinstance(item.start, Int) and 0 <= start < step
    if step < 1 or not plain or phi.size % step or phi.uniform is None:
        raise Refuse("slicing with a step along a widened dimension")
    call.align(name, dim, ReplicaMap(np.tile(np.arange(phi.size), phi.uniform), phi.size))
    count = phi.size // step
    return ReplicaMap(np.tile(np.arange(count), phi.uniform), count)


def _tensor_index(call: Call, x: Pair, items: list[Any], is_tuple: bool) -> Value:
    """Indexing by tensors or lists, otherwise slices: full ones along widened dimensions."""
    spread = _spread(items, x.ndim)
    if any(item is None for item, _k in spread):
        raise Refuse("indexing by tensors together with new dimensions")
    if any(isinstance(i, slice) and i != slice(None) and d in x.maps for d, (i, _k) in enumerate(spread)):
        raise Refuse("indexing by tensors together with a part of a widened dimension")
    axes = [d for d, (item, _k) in enumerate(spread) if not isinstance(item, slice)]
    places: list[Name] = [("index", spread[d][1]) if is_tuple else "index" for d in axes]
    if len(axes) == 1:
        chosen = _one_index(call, axes[0], spread[axes[0]][0], places[0])
        if chosen is not None:
            return chosen
    if any(is_mask(spread[d][0]) for d in axes):
        raise Refuse("indexing by a mask")
    for d, place in zip(axes, places, strict=True):
        if isinstance(spread[d][0], (Pair, Free)):
            call.match(place, {})
    call.narrow("value", axes, "a look-up along the channels")
    if axes != list(range(axes[0], axes[-1] + 1)):
        raise Refuse("indexing by tensors at several separate dimensions")
    shift = call.s.dim() - x.ndim
    maps = {d + (shift if d > axes[-1] else 0): m for d, m in call.pair("value").maps.items()}
    return call.result(maps)


def _spread(items: list[Any], rank: int) -> list[tuple[Any, int]]:
    """Return each item with its place in the index; an ellipsis as the full slices that it stands for."""
    filled = rank - sum(i is not None and i is not Ellipsis for i in items)
    spread: list[tuple[Any, int]] = []
    for k, item in enumerate(items):
        spread += [(slice(None), k)] * filled if item is Ellipsis else [(item, k)]
    return spread


def is_mask(item: Any) -> bool:
    """Whether an item of an index is a tensor of truth values."""
    return isinstance(item, (Pair, Free)) and student(item).dtype == torch.bool


def _one_index(call: Call, axis: int, item: Any, place: Name) -> Value | None:
    """One list or 1-D tensor of positions along a widened dimension; None where this is something else."""
    phi = call.pair("value").maps.get(axis)
    if phi is None or phi.uniform is None or is_mask(item):
        return None
    if isinstance(item, list):
        if not all(type(i) is int for i in item):
            return None
        call.align("value", axis, ReplicaMap.repeat(phi.size, phi.uniform))
        call.set(place, [i * phi.uniform + k for i in item for k in range(phi.uniform)])
        chosen: ReplicaMap | None = ReplicaMap.repeat(len(item), phi.uniform)
    else:
        if not isinstance(item, (Pair, Free)) or student(item).dim() != 1:
            return None
        chosen = _positions(call, "value", axis, place)
    maps = {d: m for d, m in call.pair("value").maps.items() if d != axis}
    return call.result({**maps, **({} if chosen is None else {axis: chosen})})
