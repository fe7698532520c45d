"""Attention: products of queries and keys, softmax along tokens (or channels), products with values."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from reparam.ops.maps import Maps, ReplicaMap
from reparam.passes.call import Call, counts_scale
from reparam.passes.registry import rule
from reparam.passes.rules.broadcast import common_map
from reparam.passes.values import Free, Pair, Refuse, Value, student

_TENSORS = ("query", "key", "value", "attn_mask")


@rule(F.scaled_dot_product_attention, mixing=True)
def attention(
    call: Call,
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Value = None,
    dropout_p: Value = 0.0,
    is_causal: Value = False,
    scale: Value = None,
    enable_gqa: Value = False,
) -> Value:
    """Softmax(q k^T * scale + mask) v; q [..., L, E], k [..., S, E], v [..., S, V].

    Over r replicas of E the products are r times the student's: ``scale`` takes the division. Tokens keep their
    number; heads and batch dimensions have one map, grouped queries have the map that their key heads lead to.
    """
    names = [name for name in _TENSORS if call.get(name) is not None]
    rank = call.s.dim()
    for name in names:
        if isinstance(call.get(name), Free):
            call.match(name, _maps_of_others(call, name, names))
    for name in names:
        x = call.pair(name)
        tokens = [x.ndim - 2] if name != "attn_mask" else [x.ndim - 2, x.ndim - 1]
        call.narrow(name, [d for d in tokens if d in x.maps], "replicas along its tokens")
    maps = _leading(call, names, rank, bool(enable_gqa))
    _scaled(call, scale)
    own = call.pair("value").maps.get(call.pair("value").ndim - 1)
    return call.result({**maps, **({} if own is None else {rank - 1: own})})


def _maps_of_others(call: Call, name: str, names: list[str]) -> Maps:
    """What a tensor that comes from parameters alone (learned queries, biases) is asked for: the maps it will meet."""
    own = student(call.get(name))
    maps: Maps = {}
    for other in names:
        x = call.get(other)
        shared = own.dim() if {name, other} == {"query", "key"} else own.dim() - 2
        for dim in range(shared) if isinstance(x, Pair) else ():
            phi = x.maps.get(dim - own.dim() + x.ndim)
            if phi is not None and dim != own.dim() - 2 and phi.size == own.shape[dim]:
                maps.setdefault(dim, phi)
    return maps


def _scaled(call: Call, scale: Value) -> None:
    """Give queries and keys one map of their channels, and divide the products by its counts."""
    size = student(call.get("query")).shape[-1]
    found = [m for name in ("query", "key") if (m := _last(call.pair(name))) is not None]
    if not found:
        call.narrow_int("scale")
        return
    phi = max(found, key=len)
    if phi.uniform is None:
        phi = ReplicaMap.repeat(phi.size, int(phi.counts.max()))
    for name in ("query", "key"):
        call.align(name, call.pair(name).ndim - 1, phi)
    if isinstance(call.get("scale"), (Pair, Free)):
        raise Refuse("its scale is a tensor")
    own = student(scale)
    call.set("scale", (1 / math.sqrt(size) if own is None else own) / float(phi.uniform or 1))


def _last(x: Pair) -> ReplicaMap | None:
    return x.maps.get(x.ndim - 1)


def _leading(call: Call, names: list[str], rank: int, grouped: bool) -> Maps:
    """Bring all tensors to one map in every dimension in front of the tokens."""
    maps: Maps = {}
    for dim in range(rank - 2):
        if grouped and dim == rank - 3:
            continue
        chosen = common_map(call, names, dim - rank)
        if chosen is not None:
            maps[dim] = chosen
        _follow(call, names, dim - rank, chosen)
    if grouped and rank > 2:
        phi = _grouped_heads(call, names)
        if phi is not None:
            maps[rank - 3] = phi
    return maps


def _follow(call: Call, names: list[str], axis: int, chosen: ReplicaMap | None) -> None:
    for name in names:
        x = call.pair(name)
        if x.ndim >= -axis:
            broadcasts = chosen is not None and x.s.shape[axis] != chosen.size
            call.align(name, x.ndim + axis, None if broadcasts else chosen)


def _grouped_heads(call: Call, names: list[str]) -> ReplicaMap | None:
    """Query head h meets key head h // g: in the teacher too, or all heads keep their number."""
    heads = [student(call.get(name)).shape[-3] for name in ("query", "key")]
    wide = [call.pair(name).maps.get(call.pair(name).ndim - 3) for name in ("query", "key", "value")]
    q, k, v = (m or ReplicaMap.identity(n) for m, n in zip(wide, (*heads, heads[1]), strict=True))
    fits = k == v and len(q) % len(k) == 0
    if fits:
        group = len(q) // len(k)
        fits = np.array_equal(k.index[np.arange(len(q)) // group], q.index // (heads[0] // heads[1]))
    if not fits:
        q = ReplicaMap.identity(heads[0])
        for name in ("query", "key", "value"):
            call.narrow(name, [call.pair(name).ndim - 3], "query heads would meet other key heads")
    if "attn_mask" in names:
        _follow(call, ["attn_mask"], -3, None if q.is_identity else q)
    return None if q.is_identity else q


@rule(torch.softmax, F.softmax, "softmax", torch.special.softmax, F.softmin)
def softmax(call: Call, input: Value, dim: Value = None, *args: Value, **kwargs: Value) -> Value:
    """Softmax; over r replicas of every index each has one r-th of the student's weight."""
    x = call.pair("input")
    if dim is None:
        raise Refuse("no dimension is named")
    axis = dim % x.ndim
    x = call.even("input", [axis])
    value = call.result(dict(x.maps))
    if axis in x.maps:
        call.scale_out(counts_scale(x.maps[axis], axis, 1.0))
    return value
