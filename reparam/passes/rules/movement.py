"""Operators that only move elements: one proof serves them all.

Every element of the student's arguments gets a unique label, the teacher's arguments get the labels of the elements
they replicate, and both go through the operator. The result's labels either are the student's under some replica
map, which is then the result's map, or prove that there is none.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reparam.ops.maps import Maps, ReplicaMap, clean
from reparam.passes.call import At, Call, Name
from reparam.passes.functionalize import setitem
from reparam.passes.registry import rule
from reparam.passes.values import Free, Int, Pair, Refuse, Value, join, student, teacher, transform, walk


def move(call: Call) -> Value:
    """Push labels through the operator in both worlds and read off the maps of the results."""
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
        args = transform([list(call.args), dict(call.kwargs)], lambda leaf, w=world: _labelled(leaf, labels, w))
        try:
            outs.append(_run(call, *view(args)))
        except Exception as error:
            raise Refuse(f"the operator refuses the wider arguments ({type(error).__name__}: {error})") from error
    found = iter([find_maps(s, t) for s, t in zip(_tensors(outs[0]), _tensors(outs[1]), strict=True)])
    return call.result(lambda _s, _t: next(found))


def _label(pair: Pair, base: int) -> tuple[Tensor, Tensor]:
    # float64, starting at 1: some operators refuse integers, and padding adds zeros.
    s = torch.arange(base, base + pair.s.numel(), dtype=torch.float64).view(pair.s.shape)
    t = s
    for dim, replica_map in pair.maps.items():
        t = t.index_select(dim, torch.tensor(replica_map.index))
    return s, t


def _labelled(leaf: Any, labels: dict[int, tuple[Tensor, Tensor]], world: int) -> Any:
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
    torch.flip, "flip", torch.roll, "roll", torch.rot90, "rot90", torch.repeat_interleave, "repeat_interleave",
    F.pixel_shuffle, torch.pixel_shuffle, F.pixel_unshuffle, torch.pixel_unshuffle, F.channel_shuffle,
    torch.channel_shuffle, F.unfold, torch._C._nn.im2col, "unfold", torch.diagonal, "diagonal", torch.fliplr,
    torch.flipud, torch.native_channel_shuffle, torch.atleast_1d, torch.atleast_2d, torch.atleast_3d,
    torch.tril, torch.triu, "tril", "triu", torch.hstack, torch.vstack, torch.dstack, torch.block_diag,
    torch.combinations, torch.broadcast_tensors, torch.meshgrid, "masked_select", "index_fill",
)  # fmt: skip
def moved(call: Call, *args: Value, **kwargs: Value) -> Value:
    """Any operator that only moves elements."""
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
    call.narrow("input", [d for d in gone if d in x.maps])
    x = call.pair("input")
    return call.result({d - sum(g < d for g in gone): m for d, m in x.maps.items()})


@rule(torch.unsqueeze, "unsqueeze", "unsqueeze_")
def unsqueeze(call: Call, input: Value, dim: Value) -> Value:
    """A new dimension of size 1."""
    x = call.pair("input")
    at = dim % (x.ndim + 1)
    return call.result({d + (d >= at): m for d, m in x.maps.items()})


# -- several tensors -----------------------------------------------------------------------------------------------


@rule(torch.cat, torch.concat, torch.concatenate)
def cat(call: Call, tensors: Value, dim: Value = 0, *, axis: Value = None) -> Value:
    """Concatenation: the maps follow each other; in all other dimensions they must agree."""
    places: list[Name] = [("tensors", k) for k in range(len(tensors))]
    rank = max(student(v).dim() for v in tensors)
    along = (dim if axis is None else axis) % rank
    _agree_all(call, places, [d for d in range(rank) if d != along])
    pairs = [call.pair(place) for place in places]
    maps = {d: m for d, m in pairs[0].maps.items() if d != along}
    parts = [p.maps.get(along) or ReplicaMap.identity(p.s.shape[along]) for p in pairs if p.ndim == rank]
    starts = np.cumsum([0, *(p.size for p in parts)])
    index = np.concatenate([p.index + start for p, start in zip(parts, starts, strict=False)])
    return call.result({**maps, along: ReplicaMap(index, int(starts[-1]))})


@rule(torch.stack)
def stack(call: Call, tensors: Value, dim: Value = 0) -> Value:
    """Stacking: all maps must agree."""
    places: list[Name] = [("tensors", k) for k in range(len(tensors))]
    rank = student(tensors[0]).dim()
    _agree_all(call, places, list(range(rank)))
    at = dim % (rank + 1)
    return call.result({d + (d >= at): m for d, m in call.pair(places[0]).maps.items()})


def _agree_all(call: Call, places: list[Name], dims: list[int]) -> None:
    """Bring all tensors to the widest map that one of them has, in these dimensions."""
    for d in dims:
        found = [v.maps[d] for p in places if isinstance(v := call.get(p), Pair) and d in v.maps]
        target = max(found, key=len) if found else None
        for place in places:
            if isinstance(call.get(place), Pair) and student(call.get(place)).dim() > d:
                call.align(place, d, target)
    wanted = next((call.get(p).maps for p in places if isinstance(call.get(p), Pair)), {})
    for place in places:
        if isinstance(call.get(place), Free):
            call.match(place, {d: m for d, m in wanted.items() if d in dims})


# -- pieces --------------------------------------------------------------------------------------------------------


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


@rule(torch.chunk, "chunk", torch.tensor_split, "tensor_split")
def chunk(call: Call, input: Value, chunks: Value, dim: Value = 0) -> Value:
    """Equal pieces, cut at the student's boundaries."""
    return _pieces(call, dim)


def _pieces(call: Call, dim: int) -> Value:
    """Check that the pieces of the teacher are the student's."""
    x = call.pair("input")
    axis = dim % x.ndim
    phi = x.maps.get(axis)
    rest = {d: m for d, m in x.maps.items() if d != axis}
    if phi is None:
        return call.result(rest)
    starts = np.cumsum([0, *(piece.shape[axis] for piece in call.s)])
    cuts = [boundary(phi, int(start)) for start in starts]
    parts = [
        ReplicaMap(phi.index[a:b] - s, int(e - s))
        for a, b, s, e in zip(cuts, cuts[1:], starts, starts[1:], strict=False)
    ]
    found = iter(parts)
    return call.result(lambda _s, _t: {**rest, axis: next(found)})


@rule(torch.split, "split", "split_with_sizes", torch.split_with_sizes)
def split(call: Call, tensor: Value, split_size_or_sections: Value, dim: Value = 0) -> Value:
    """Pieces of given sizes, cut at the student's boundaries."""
    x = call.pair("tensor")
    phi = x.maps.get(dim % x.ndim)
    if phi is not None:
        starts = np.cumsum([0, *(piece.shape[dim % x.ndim] for piece in call.s)])
        cuts = [boundary(phi, int(start)) for start in starts]
        sizes = [b - a for a, b in zip(cuts, cuts[1:], strict=False)]
        one = not isinstance(split_size_or_sections, (tuple, list))
        if [*map(teacher, _as_list(split_size_or_sections, sizes, one))] != sizes:
            call.set("split_size_or_sections", sizes)
    call.paths["input"] = call.paths["tensor"]
    return _pieces(call, dim)


def _as_list(value: Any, sizes: list[int], one: bool) -> list[Any]:
    if not one:
        return list(value)
    size = teacher(value)
    return [size] * (len(sizes) - 1) + [min(size, sizes[-1])] if sizes else []


@rule(torch.unbind, "unbind")
def unbind(call: Call, input: Value, dim: Value = 0) -> Value:
    """All slices along a dimension: that one must be narrow."""
    x = call.pair("input")
    axis = dim % x.ndim
    x = call.narrow("input", ([axis] if axis in x.maps else []))
    maps = {d - (d > axis): m for d, m in x.maps.items()}
    return call.result(lambda _s, _t: maps)


@rule(torch.select, "select")
def select(call: Call, input: Value, dim: Value, index: Value) -> Value:
    """One index of a dimension: of a widened one its first replica."""
    x = call.pair("input")
    axis = dim % x.ndim
    phi = x.maps.get(axis)
    if phi is not None:
        call.set("index", int(phi.first[student(index) % phi.size]))
    return call.result({d - (d > axis): m for d, m in x.maps.items() if d != axis})


@rule(torch.narrow, "narrow")
def narrow(call: Call, input: Value, dim: Value, start: Value, length: Value) -> Value:
    """A range of a dimension."""
    x = call.pair("input")
    axis = dim % x.ndim
    phi = x.maps.get(axis)
    if phi is None:
        return call.result(dict(x.maps))
    first = student(start) % phi.size if student(start) < 0 else student(start)
    piece, a, b = _range(phi, first, first + student(length))
    if (teacher(start), teacher(length)) != (a, b - a):
        call.set("start", a)
        call.set("length", b - a)
    return call.result({**x.maps, axis: piece})


def _range(phi: ReplicaMap, start: int, stop: int) -> tuple[ReplicaMap, int, int]:
    a, b = boundary(phi, start), boundary(phi, stop)
    return ReplicaMap(phi.index[a:b] - start, stop - start), a, b


@rule(torch.index_select, "index_select")
def index_select(call: Call, input: Value, dim: Value, index: Value) -> Value:
    """Selection by an index tensor: along a narrow dimension."""
    x = call.pair("input")
    axis = dim % x.ndim
    call.narrow("input", ([axis] if axis in x.maps else []))
    call.narrow("index")
    return call.result(dict(call.pair("input").maps))


@rule(F.embedding, torch.embedding, mixing=True)
def embedding(call: Call, input: Value, weight: Value, *args: Value, **kwargs: Value) -> Value:
    """Look-up of rows: the columns of the table are the choice of this producer."""
    from reparam.passes.rules.linear import output_map

    call.narrow("input")
    table = student(weight)
    phi = output_map(call, table.shape[1])
    w = call.match("weight", {} if phi.is_identity else {1: phi})
    rank = student(input).dim()
    return call.result({rank: w.maps[1]} if 1 in w.maps else {})


@rule(operator.getitem, "__getitem__")
def getitem(call: Call, value: Value, index: Value) -> Value:
    """An item of a tuple or dict, or basic slicing of a tensor."""
    if not isinstance(value, Pair):
        if isinstance(value, Free):
            raise Refuse("an item of a free value")
        return value[index] if not isinstance(index, Int) else value[index.s]
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    if any(isinstance(leaf, (Pair, Free)) for _p, leaf in walk(items)) or any(isinstance(i, list) for i in items):
        return _tensor_index(call, value, items)
    return _slices(call, value, items, isinstance(index, tuple))


def _slices(call: Call, x: Pair, items: list[Any], is_tuple: bool) -> Value:
    taken = sum(i is not None and i is not Ellipsis and not isinstance(i, bool) for i in items)
    if any(isinstance(i, bool) for i in items):
        raise Refuse("indexing by a truth value")
    maps: Maps = {}
    source = target = 0
    for k, item in enumerate(items):
        if item is None:
            target += 1
        elif item is Ellipsis:
            for _ in range(x.ndim - taken):
                _copy_map(maps, x.maps, source, target)
                source, target = source + 1, target + 1
        elif isinstance(item, slice):
            _cut(call, x, item, k, source, target, maps, is_tuple)
            source, target = source + 1, target + 1
        else:
            if source in x.maps:
                phi = x.maps[source]
                _set_item(call, k, int(phi.first[student(item) % phi.size]), is_tuple)
            source += 1
    for d in range(source, x.ndim):
        _copy_map(maps, x.maps, d, target + d - source)
    return call.result(maps)


def _copy_map(maps: Maps, source: Maps, old: int, new: int) -> None:
    if old in source:
        maps[new] = source[old]


def _set_item(call: Call, k: int, value: Any, is_tuple: bool) -> None:
    call.set(("index", k) if is_tuple else "index", value)


def _cut(call: Call, x: Pair, item: slice, k: int, source: int, target: int, maps: Maps, is_tuple: bool) -> None:
    """One slice of a (possibly mapped) dimension."""
    phi = x.maps.get(source)
    if phi is None:
        return
    start, stop, step = student(item).indices(phi.size)
    if step != 1:
        raise Refuse("slicing with a step along a widened dimension")
    piece, a, b = _range(phi, start, max(start, stop))
    wide = teacher(item).indices(len(phi))
    if (wide[0], wide[1]) != (a, b):
        for name, new in (("start", a), ("stop", b)):
            _set_item(call, k, slice(a, b), is_tuple) if not isinstance(getattr(item, name), Int) else None
            del new
            break
    maps[target] = piece


def _tensor_index(call: Call, x: Pair, items: list[Any]) -> Value:
    """Indexing by tensors: along narrow dimensions only, the index itself at student width."""
    if any(i is None or i is Ellipsis for i in items):
        raise Refuse("indexing by tensors together with new dimensions")
    places = [k for k, i in enumerate(items) if not isinstance(i, slice)]
    if any(student(items[k]).dtype == torch.bool for k in places if isinstance(items[k], (Pair, Free))):
        raise Refuse("indexing by a mask")
    single = not isinstance(call.get("index"), (tuple, list))
    for k in places:
        if isinstance(items[k], (Pair, Free)):
            call.match("index" if single else ("index", k), {})
        if k in x.maps:
            call.narrow("value", [k])
    if places != list(range(places[0], places[-1] + 1)) or any(
        isinstance(i, slice) and i != slice(None) for i in items
    ):
        raise Refuse("indexing by tensors at several separate dimensions")
    shift = call.s.dim() - x.ndim
    maps = {d + (shift if d > places[-1] else 0): m for d, m in call.pair("value").maps.items()}
    return call.result(maps)


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
        wanted = len(maps[k]) if k in maps else call.s.shape[k]
        if student(value) == -1:
            continue
        if isinstance(value, Int) and k not in maps:
            # The new dimension repeats one value as often as a widened dimension is long.
            maps[k] = _spread(value)
        elif teacher(value) != wanted and k in maps:
            call.set(place, wanted)
    return call.result(maps)


def _expand_as(call: Call, maps: Maps) -> Value:
    other = call.pair(At(("args", 1)))
    for d, m in other.maps.items():
        maps.setdefault(d, m)
        if maps[d] != m:
            raise Refuse("two layouts of one dimension")
    return call.result(maps)


def _spread(value: Int) -> ReplicaMap:
    """Any map fits a dimension whose values are all the same; the default layout is the likeliest."""
    if value.s <= 0 or value.t % value.s:
        raise Refuse("a repetition that does not divide")
    return ReplicaMap.repeat(value.s, value.t // value.s)


@rule("repeat", torch.tile, "tile")
def repeat(call: Call, input: Value, *repeats: Value) -> Value:
    """Repetition of whole dimensions."""
    return move(call)


@rule(setitem)
def set_items(call: Call, value: Value, index: Value, new: Value) -> Value:
    """Assignment into a slice: where index and maps leave it alone, the widened dimensions pass."""
    x = call.pair("value")
    items = list(index) if isinstance(index, tuple) else [index]
    plain = all(isinstance(i, slice) and i == slice(None) for d, i in enumerate(items) if d in x.maps)
    simple = all(isinstance(i, (slice, int)) for i in items)
    if not plain or not simple:
        raise Refuse("assignment into a widened dimension")
    if isinstance(new, (Pair, Free)):
        probe = torch.empty(x.s.shape, device="meta")[tuple(items)]
        kept = [d for d in range(x.ndim) if d >= len(items) or isinstance(items[d], slice)]
        size = student(new).dim()
        wanted = {kept.index(d) - probe.dim() + size: m for d, m in x.maps.items()}
        call.match("new", {d: m for d, m in wanted.items() if d >= 0 and student(new).shape[d] == m.size})
    return call.result(dict(x.maps))


__all__ = ["boundary", "join", "move", "moved"]
