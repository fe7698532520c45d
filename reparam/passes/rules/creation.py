"""Tensors made from sizes: their values do not depend on any tensor."""

from __future__ import annotations

import torch

from reparam.ops.maps import Maps, ReplicaMap
from reparam.passes.call import At, Call
from reparam.passes.registry import rule
from reparam.passes.values import Int, Pair, Refuse, Value, join, narrow_value, walk


@rule(torch.zeros, torch.ones, torch.empty, "new_zeros", "new_ones", "new_empty")
def constant(call: Call, *args: Value, **kwargs: Value) -> Value:
    """The same value everywhere: as wide as the sizes say."""
    return _filled(call)


@rule(torch.full, "new_full")
def full(call: Call, *args: Value, **kwargs: Value) -> Value:
    """A given value everywhere; the value itself is the student's."""
    place = At(("kwargs", "fill_value")) if "fill_value" in call.kwargs else At(("args", len(call.args) - 1))
    if isinstance(call.get(place), Pair):
        raise Refuse("a tensor among plain numbers")
    call.narrow_int(place)
    return _filled(call)


def _filled(call: Call) -> Value:
    return join(call.s, call.run(), _repeated)


def _repeated(s: torch.Tensor, t: torch.Tensor) -> Maps:
    """Any map fits values that are all the same; the default layout is the likeliest."""
    maps: Maps = {}
    for d, (size, wide) in enumerate(zip(s.shape, t.shape, strict=True)):
        if size != wide:
            if size == 0 or wide % size:
                raise Refuse("a size that is no multiple of the student's")
            maps[d] = ReplicaMap.repeat(size, wide // size)
    return maps


@rule(torch.arange, torch.linspace, torch.eye, torch.rand, torch.randn, torch.randint, torch.randperm, torch.tensor)
def sequence(call: Call, *args: Value, **kwargs: Value) -> Value:
    """Values that depend on the position: made at student width."""
    for place, holder in (("args", call.args), ("kwargs", call.kwargs)):
        for path, leaf in list(walk(holder)):
            if isinstance(leaf, Int):
                call.narrow_int(At((place, *path)))
            elif isinstance(leaf, Pair):
                raise Refuse("a tensor among plain numbers")
    return narrow_value(call.s)


@rule(torch.as_tensor)
def as_tensor(call: Call, data: Value, *args: Value, **kwargs: Value) -> Value:
    """A tensor stays what it is; numbers are the student's."""
    if isinstance(data, Pair):
        return call.result(dict(data.maps))
    return sequence(call, data, *args, **kwargs)
