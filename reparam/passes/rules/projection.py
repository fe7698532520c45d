"""The projections of queries, keys and values of different tokens by one packed weight, or by three."""

from __future__ import annotations

import math

from torch import fx

from reparam.ops.maps import Maps, ReplicaMap
from reparam.passes.call import Call, Name
from reparam.passes.records import record_layer
from reparam.passes.registry import rule
from reparam.passes.rules.indexing import part
from reparam.passes.rules.linear import output_map
from reparam.passes.streams import produced
from reparam.passes.torch_modules import in_projection
from reparam.passes.values import Refuse, Value, student

_INPUTS = ("query", "key", "value")


@rule(in_projection, mixing=True)
def project(call: Call, query: Value, key: Value, value: Value, weights: Value, bias: Value = None) -> Value:
    """Three linear layers; where they share one weight, they share the map of its inputs too."""
    rows: list[ReplicaMap] = []
    for k in range(len(weights)):
        place: Name = ("weights", k)
        names = _INPUTS if len(weights) == 1 else (_INPUTS[k],)
        channels = {name: call.pair(name).ndim - 1 for name in names}
        found = [m for name, d in channels.items() if (m := call.pair(name).maps.get(d)) is not None]
        out = output_map(call, student(weights[k]).shape[0], place)
        weight = call.weight(place, {0: out, **({1: max(found, key=len)} if found else {})}, 0, 1)
        for name, d in channels.items():
            call.align(name, d, weight.maps.get(1))
        rows.append(produced(call, place, weight.maps.get(0) or ReplicaMap.identity(weight.s.shape[0])))
    if len(weights) == 1:
        if rows[0].same_blocks(3) is None:
            raise Refuse("its weight is used elsewhere too, in another layout")
        size = rows[0].size // 3
        rows = [part(rows[0], k * size, (k + 1) * size)[0] for k in range(3)]
    if bias is not None:
        call.match("bias", {0: ReplicaMap.joined(rows)})
    maps = iter([_with_channel(call, name, phi) for name, phi in zip(_INPUTS, rows, strict=True)])
    result = call.result(lambda _s, _t: next(maps))
    for k, name in enumerate(_INPUTS):
        _record(call, name, k if len(weights) == 3 else 0, 1 if len(weights) == 3 else 3)
    return result


def _with_channel(call: Call, name: str, phi: ReplicaMap) -> Maps:
    x = call.pair(name)
    return {**{d: m for d, m in x.maps.items() if d != x.ndim - 1}, x.ndim - 1: phi}


def _record(call: Call, name: str, k: int, shares: int) -> None:
    """Tell the plan what became of a weight, or of its share for this input; the first dimension is the batch."""
    x, weight, data = call.pair(name), call.pair(("weights", k)), call.source(name)
    if isinstance(data, fx.Node):
        positions = math.prod(x.s.shape[1:-1]) if x.ndim > 1 else 1
        counts = (positions * weight.s.numel() // shares, positions * weight.t.numel() // shares)
        record_layer(call.planner, call.node, data, call.source(("weights", k)), weight, (0, 1), counts)
