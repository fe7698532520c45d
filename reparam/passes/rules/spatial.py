"""Pooling, padding and resizing: operators on the last dimensions that treat every channel by itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from reparam.ops.maps import Maps, ReplicaMap
from reparam.passes.call import Call
from reparam.passes.registry import rule
from reparam.passes.rules.indexing import boundary
from reparam.passes.values import Free, Pair, Refuse, Value, student

_SPACE = "replicas along the dimensions that it slides over"


def _targets(dims: int, *names: str) -> list[Any]:
    found: dict[Any, None] = {}
    for name in names:
        for holder in (F, torch, torch._C._nn):
            for ending in (f"{dims}d", f"{dims}d_with_indices"):
                found[getattr(holder, name + ending, None)] = None
    return [function for function in found if callable(function)]


_POOLS = ("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool")


def _pool(call: Call, dims: int, reason: str = _SPACE) -> Value:
    """Contract mapped spatial dimensions; the others pass."""
    x = call.pair("input")
    first = x.ndim - dims
    maps = dict(call.narrow("input", [d for d in x.maps if d >= first], reason).maps)
    return call.result(lambda _s, _t: maps)


@rule(*_targets(1, *_POOLS))
def pool1d(call: Call, input: Value, *args: Value, **kwargs: Value) -> Value:
    """1-D pooling."""
    return _pool(call, 1)


@rule(*_targets(2, *_POOLS))
def pool2d(call: Call, input: Value, *args: Value, **kwargs: Value) -> Value:
    """2-D pooling."""
    return _pool(call, 2)


@rule(*_targets(3, *_POOLS))
def pool3d(call: Call, input: Value, *args: Value, **kwargs: Value) -> Value:
    """3-D pooling."""
    return _pool(call, 3)


@rule(*_targets(2, "fractional_max_pool"), *_targets(3, "fractional_max_pool"))
def fractional_pool(call: Call, *args: Value, **kwargs: Value) -> Value:
    """Its regions are random for every channel: drawn at student width, so that replicas agree."""
    raise Refuse("random regions for every channel")


@rule(*_targets(1, "max_unpool"), *_targets(2, "max_unpool"), *_targets(3, "max_unpool"))
def unpool(call: Call, input: Value, indices: Value, *args: Value, **kwargs: Value) -> Value:
    """The inverse of a pooling; indices count inside one channel."""
    x = call.pair("input")
    dims = next(d for d in (1, 2, 3) if f"{d}d" in str(getattr(call.node.target, "__name__", "")))
    maps = dict(call.narrow("input", [d for d in x.maps if d >= x.ndim - dims], _SPACE).maps)
    call.match("indices", maps)
    return call.result(maps)


@rule(F.interpolate, F.upsample, F.upsample_bilinear, F.upsample_nearest)
def interpolate(call: Call, input: Value, *args: Value, **kwargs: Value) -> Value:
    """Resizing of all dimensions behind the channels."""
    return _pool(call, call.pair("input").ndim - 2, "replicas along the dimensions that it resizes")


# -- padding -------------------------------------------------------------------------------------------------------


@rule(F.pad, *[f for f in [getattr(torch._C._nn, "pad", None)] if f is not None])
def pad(call: Call, input: Value, pad: Value, mode: Value = "constant", value: Value = None) -> Value:
    """Padding: replicas of new channels are new channels, cropped ones go with all their replicas."""
    x = call.pair("input")
    if isinstance(value, (Pair, Free)):
        raise Refuse("padding with a computed value")
    call.narrow_int("value")
    widths = [student(w) for w in pad]
    maps: Maps = dict(x.maps)
    for k in range(len(widths) // 2):
        dim = x.ndim - 1 - k
        before, after = widths[2 * k], widths[2 * k + 1]
        if dim not in maps or not (before or after):
            call.narrow_int(("pad", 2 * k))
            call.narrow_int(("pad", 2 * k + 1))
            continue
        if mode != "constant":
            raise Refuse(f"{mode} padding along a widened dimension")
        maps[dim], wide = _padded(call.even("input", [dim]).maps[dim], before, after)
        call.resize(("pad", 2 * k), wide[0])
        call.resize(("pad", 2 * k + 1), wide[1])
    return call.result(maps)


def _padded(phi: ReplicaMap, before: int, after: int) -> tuple[ReplicaMap, tuple[int, int]]:
    """Return the map of a padded (or, with negative widths, cropped) dimension and the teacher's widths."""
    start, stop = max(-before, 0), phi.size - max(-after, 0)
    a, b = boundary(phi, start), boundary(phi, stop)
    ratio = phi.uniform or 1
    head, tail = max(before, 0), max(after, 0)
    size = head + stop - start + tail
    index = np.concatenate(
        [
            np.repeat(np.arange(head), ratio),
            phi.index[a:b] - start + head,
            np.repeat(np.arange(size - tail, size), ratio),
        ]
    )
    return ReplicaMap(index, size), (head * ratio - a, tail * ratio - (len(phi) - b))


# -- windows -------------------------------------------------------------------------------------------------------


@rule(F.unfold, torch._C._nn.im2col)
def unfold(call: Call, input: Value, kernel_size: Value, *args: Value, **kwargs: Value) -> Value:
    """Windows as columns: channel c owns the rows c k ... c k + k - 1."""
    x = call.pair("input")
    channel = x.ndim - 3
    x = call.narrow("input", [d for d in x.maps if d > channel], _SPACE)
    maps = dict(x.maps)
    if channel in maps:
        maps[channel] = maps[channel].outputs(_area(kernel_size))
    return call.result(maps)


@rule(F.fold, torch._C._nn.col2im)
def fold(call: Call, input: Value, output_size: Value, kernel_size: Value, *args: Value, **kwargs: Value) -> Value:
    """The transpose of unfold: the replicas must lie channel by channel."""
    x = call.pair("input")
    channel, area = x.ndim - 2, _area(kernel_size)
    x = call.narrow("input", [x.ndim - 1], _SPACE)
    maps = dict(x.maps)
    phi = maps.pop(channel, None)
    if phi is not None:
        maps[channel] = ReplicaMap.repeat(phi.size // area, int(phi.counts.max()))
        call.align("input", channel, maps[channel].outputs(area))
    return call.result(maps)


def _area(kernel_size: Any) -> int:
    return math.prod(kernel_size) if isinstance(kernel_size, (tuple, list)) else int(kernel_size) ** 2


@rule(F.grid_sample, torch.grid_sampler)
def grid_sample(call: Call, input: Value, grid: Value, *args: Value, **kwargs: Value) -> Value:
    """Sampling at positions: the grid at student width, the channels of the input pass."""
    x = call.pair("input")
    call.narrow("input", [d for d in x.maps if d >= 2], _SPACE)
    call.narrow("grid", None, "positions")
    return call.result(dict(call.pair("input").maps))
