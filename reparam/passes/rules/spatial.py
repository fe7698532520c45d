"""Pooling, padding and resizing: operators on the last dimensions that treat every channel by itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from reparam.passes.call import Call
from reparam.passes.registry import rule
from reparam.passes.values import Refuse, Value, student


def _targets(dims: int) -> list[Any]:
    names = [
        "avg_pool",
        "max_pool",
        "adaptive_avg_pool",
        "adaptive_max_pool",
        "lp_pool",
        "fractional_max_pool",
        "max_unpool",
    ]
    names = [f"{name}{dims}d" for name in names] + [
        f"max_pool{dims}d_with_indices",
        f"adaptive_max_pool{dims}d_with_indices",
    ]
    names += [f"fractional_max_pool{dims}d_with_indices"]
    found: dict[Any, None] = {}
    for name in names:
        for holder in (F, torch, torch._C._nn):
            function = getattr(holder, name, None)
            if callable(function):
                found[function] = None
    return list(found)


def _pool(call: Call, dims: int) -> Value:
    """Contract mapped spatial dimensions; the others pass."""
    x = call.pair("input")
    first = x.ndim - dims
    call.narrow("input", [d for d in x.maps if d >= first])
    maps = dict(call.pair("input").maps)
    return call.result(lambda _s, _t: maps)


@rule(*_targets(1))
def pool1d(call: Call, input: Value, *args: Value, **kwargs: Value) -> Value:
    """1-D pooling."""
    return _pool(call, 1)


@rule(*_targets(2))
def pool2d(call: Call, input: Value, *args: Value, **kwargs: Value) -> Value:
    """2-D pooling."""
    return _pool(call, 2)


@rule(*_targets(3))
def pool3d(call: Call, input: Value, *args: Value, **kwargs: Value) -> Value:
    """3-D pooling."""
    return _pool(call, 3)


@rule(F.interpolate, F.upsample, F.upsample_bilinear, F.upsample_nearest)
def interpolate(call: Call, input: Value, *args: Value, **kwargs: Value) -> Value:
    """Resizing of all dimensions behind the channels."""
    return _pool(call, call.pair("input").ndim - 2)


@rule(F.pad, torch._C._nn.pad if hasattr(torch._C._nn, "pad") else None)
def pad(call: Call, input: Value, pad: Value, mode: Value = "constant", value: Value = None) -> Value:
    """Padding; a mapped dimension that is padded is contracted."""
    x = call.pair("input")
    widths = [student(w) for w in pad]
    padded = {x.ndim - 1 - k for k in range(len(widths) // 2) if widths[2 * k] or widths[2 * k + 1]}
    from reparam.passes.rules.movement import move

    if padded & set(x.maps):
        if mode != "constant" or value not in (None, 0, 0.0):
            raise Refuse("padding of a widened dimension with other values than zero")
        return pad_channels(call, widths)
    del move
    return call.result(dict(x.maps))


def pad_channels(call: Call, widths: list[int]) -> Value:
    """Zero padding of a mapped dimension: the new channels get replicas of their own."""
    import numpy as np

    from reparam.ops.maps import ReplicaMap

    x = call.pair("input")
    maps = dict(x.maps)
    wide = list(widths)
    for k in range(len(widths) // 2):
        dim = x.ndim - 1 - k
        before, after = widths[2 * k], widths[2 * k + 1]
        phi = maps.get(dim)
        if phi is None or not (before or after):
            continue
        if before < 0 or after < 0 or phi.uniform is None:
            raise Refuse("cropping of a widened dimension by padding")
        ratio = phi.uniform
        head = np.repeat(np.arange(before), ratio)
        tail = np.repeat(np.arange(after), ratio) + before + phi.size
        maps[dim] = ReplicaMap(np.concatenate([head, phi.index + before, tail]), before + phi.size + after)
        wide[2 * k], wide[2 * k + 1] = before * ratio, after * ratio
    call.set("pad", wide)
    return call.result(maps)


@rule(F.grid_sample, torch.grid_sampler)
def grid_sample(call: Call, input: Value, grid: Value, *args: Value, **kwargs: Value) -> Value:
    """Sampling at positions: the grid at student width, the channels of the input pass."""
    x = call.pair("input")
    call.narrow("input", [d for d in x.maps if d >= 2])
    call.narrow("grid")
    return call.result(dict(call.pair("input").maps))
