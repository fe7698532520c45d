"""Assignment into a part of a tensor: a basic index, or where a mask is true."""

from __future__ import annotations

from typing import Any

from reparam.passes.call import Call
from reparam.passes.functionalize import assign, setitem
from reparam.passes.registry import rule
from reparam.passes.rules.indexing import basic_index, is_mask
from reparam.passes.values import Free, Int, Pair, Refuse, Value, student


@rule(setitem, assign)
def set_items(call: Call, value: Value, index: Value, new: Value) -> Value:
    """Assignment into a basic index; what is assigned gets the maps of the place it goes to."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(is_mask(item) for item in items):
        return _fill(call, items, isinstance(index, tuple), new)
    if any(not isinstance(i, (slice, int, Int, type(None), type(Ellipsis))) for i in items):
        raise Refuse("assignment by tensors")
    x, maps = basic_index(call, "value", items, isinstance(index, tuple))
    if any(d in x.maps and not isinstance(i, slice) for d, i in enumerate(items)) or Ellipsis in items:
        raise Refuse("assignment to one index of a widened dimension")
    if isinstance(new, (Pair, Free)):
        rank = x.s[student(index)].dim()
        size = student(new).dim()
        wanted = {d - rank + size: m for d, m in maps.items() if d - rank + size >= 0}
        call.match("new", {d: m for d, m in wanted.items() if student(new).shape[d] == m.size})
    return call.result(dict(x.maps))


def _fill(call: Call, items: list[Any], is_tuple: bool, new: Value) -> Value:
    """One number goes to where a mask is true: the mask follows the dimensions that it covers."""
    x = call.pair("value")
    place = next(k for k, item in enumerate(items) if is_mask(item))
    rest = [item for k, item in enumerate(items) if k != place]
    if any(item is not Ellipsis and not (isinstance(item, slice) and item == slice(None)) for item in rest):
        raise Refuse("assignment by a mask together with other parts")
    if isinstance(new, (Pair, Free)) and student(new).dim():
        raise Refuse("assignment of a tensor by a mask")
    rank = student(items[place]).dim()
    axis = place if Ellipsis not in items[:place] else x.ndim - rank - (len(items) - 1 - place)
    covered = {d - axis: m for d, m in x.maps.items() if axis <= d < axis + rank}
    call.match(("index", place) if is_tuple else "index", covered)
    if isinstance(new, Free):
        call.demand("new", {})
    call.narrow_int("new")
    return call.result(dict(x.maps))
