"""Operators on several tensors that broadcast against each other."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from reparam.ops.maps import Maps, ReplicaMap
from reparam.passes.call import At, Call, Name
from reparam.passes.registry import rule
from reparam.passes.streams import meet
from reparam.passes.values import Free, Int, Pair, Value, student, walk

_NAMES = """
    add sub subtract mul multiply div divide true_divide floor_divide remainder fmod pow float_power maximum
    minimum fmax fmin eq ne lt le gt ge equal_ not_equal less less_equal greater greater_equal logical_and
    logical_or logical_xor bitwise_and bitwise_or bitwise_xor atan2 hypot copysign heaviside lerp addcmul
    addcdiv where clamp clip masked_fill xlogy rsub ldexp logaddexp logaddexp2 polar complex copy
""".split()

_OPERATORS = [
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow,
    operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_,
    operator.xor, operator.neg, operator.pos, operator.abs, operator.invert, operator.iadd, operator.isub,
    operator.imul, operator.itruediv, operator.ipow, operator.ifloordiv, operator.imod, operator.iand, operator.ior,
]  # fmt: skip


def _targets() -> list[Any]:
    found: dict[Any, None] = dict.fromkeys(_OPERATORS)
    for name in _NAMES:
        for holder in (torch, torch.special):
            function = getattr(holder, name, None)
            if callable(function):
                found[function] = None
        for method in (name, name + "_"):
            if hasattr(torch.Tensor, method):
                found[method] = None
    return list(found)


@rule(*_targets())
def broadcast(call: Call, *args: Value, **kwargs: Value) -> Value:
    """Bring all tensors to the same map in every dimension of the result; gather parameters and constants."""
    places = [At(("args", *p)) for p, leaf in walk(list(call.args)) if isinstance(leaf, (Pair, Free))]
    places += [At(("kwargs", *p)) for p, leaf in walk(call.kwargs) if isinstance(leaf, (Pair, Free))]
    if not places:
        if call.node.target not in _PROPORTIONAL and not isinstance(call.s, bool):
            narrow_numbers(call)  # a condition that differs is refused, and then asked about student values
        return call.result()
    for holder, values in (("args", list(call.args)), ("kwargs", call.kwargs)):
        for path, leaf in list(walk(values)):
            if isinstance(leaf, Int):
                # A number of channels is the student's where it meets values.
                call.narrow_int(At((holder, *path)))
    maps = agree(call, places)
    return call.result(lambda s, _t: maps)


_PROPORTIONAL = {
    operator.mul, operator.imul, operator.floordiv, operator.ifloordiv, operator.truediv, operator.itruediv,
    operator.neg,
}  # fmt: skip
"""Arithmetic under which a width stays a multiple of the student's at every size."""


def narrow_numbers(call: Call) -> None:
    """Give numbers their student values, unless all of them are the same multiple of those (``c1 + c2``)."""
    places = [At((holder, *p)) for holder in ("args", "kwargs") for p, _leaf in walk(getattr(call, holder))]
    values = [call.get(place) for place in places]
    ratios = {v.t / v.s if isinstance(v, Int) and v.s else 1.0 for v in values if isinstance(v, (Int, int, float))}
    if len(ratios) == 1 and call.node.target in (operator.add, operator.sub, operator.iadd, operator.isub):
        return
    for place in places:
        call.narrow_int(place)


def agree(call: Call, places: list[At]) -> Maps:
    """Choose the result's maps and give each tensor its part of them."""
    rank = max(student(call.get(place)).dim() for place in places)
    chosen: Maps = {}
    for dim in range(rank):
        choice = common_map(call, places, dim - rank)
        if choice is not None:
            chosen[dim] = meet(call, places, dim - rank, choice)
    for place in places:
        value = student(call.get(place))
        own: Maps = {}
        for dim, replica_map in chosen.items():
            axis = dim - rank + value.dim()
            if (
                axis >= 0
                and value.shape[axis] == replica_map.size
                and not _stretched(call, places, axis - value.dim(), value)
            ):
                own[axis] = replica_map
        call.match(place, own)
    return chosen


def _stretched(call: Call, places: list[At], axis: int, value: Any) -> bool:
    """Whether this tensor has one index here and another one has more: it broadcasts."""
    return value.shape[axis] == 1 and any(_size(student(call.get(p)), axis) > 1 for p in places)


def _size(value: Any, axis: int) -> int:
    return int(value.shape[axis]) if value.dim() >= -axis else 1


def common_map(call: Call, places: Sequence[Name], axis: int) -> ReplicaMap | None:
    """The map of one result dimension (negative ``axis``): the widest among those that do not broadcast there."""
    size = max(_size(student(call.get(place)), axis) for place in places)
    found: list[ReplicaMap] = []
    narrow = False
    for place in places:
        value = call.get(place)
        if not isinstance(value, Pair) or _size(value.s, axis) != size or value.ndim < -axis:
            continue
        replica_map = value.maps.get(value.ndim + axis)
        if replica_map is None:
            narrow = True
        else:
            found.append(replica_map)
    # A narrow dimension of one index may have more at another resolution: it is not repeated.
    if not found or (narrow and (call.ends or size == 1)):
        return None
    return max(found, key=len)
