"""Normalisation: parameters and running statistics are gathered."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from reparam.ops.maps import Maps, ReplicaMap
from reparam.passes.call import Call, counts_scale
from reparam.passes.intrinsics import spectral_normalize
from reparam.passes.records import note_statistic
from reparam.passes.registry import rule, statistics_of
from reparam.passes.values import Free, Pair, Refuse, Value, student, teacher


def _per_channel(call: Call, maps: Maps, *names: str) -> None:
    for name in names:
        if call.get(name) is not None:
            call.match(name, maps)


def _follow_statistics(call: Call) -> Maps:
    """Give the running statistics the input's channel map, or the input theirs: a copy of them would not be updated.

    Returns:
        The map of the parameters.
    """
    for name in _RUNNING:
        if call.get(name) is None:
            continue
        phi = call.pair("input").maps.get(1)
        if isinstance(call.get(name), Free):
            call.demand(name, {} if phi is None else {0: phi})
        call.align("input", 1, call.pair(name).maps.get(0))
    phi = call.pair("input").maps.get(1)
    if any(call.get(name) is not None and call.pair(name).maps.get(0) != phi for name in _RUNNING):
        raise Refuse("its running mean and variance have different layouts")
    return {} if phi is None else {0: phi}


def _note_statistics(call: Call) -> None:
    """Mark buffers that training changes: the student keeps its own."""
    for source in statistics_of(call.node):
        note_statistic(call.planner, source)


def _with_statistics(call: Call) -> Value:
    """Gather parameters and running statistics for the channels of the input, and run the norm."""
    _per_channel(call, _follow_statistics(call), "weight", "bias")
    _note_statistics(call)
    return call.result(dict(call.pair("input").maps))


_RUNNING = ("running_mean", "running_var")


@rule(F.batch_norm, torch.batch_norm, statistics=_RUNNING)
def batch_norm(
    call: Call,
    input: Value,
    running_mean: Value = None,
    running_var: Value = None,
    weight: Value = None,
    bias: Value = None,
    training: Value = False,
    momentum: Value = 0.1,
    eps: Value = 1e-5,
) -> Value:
    """Batch norm over dimension 1."""
    x = call.pair("input")
    keeps = running_mean is not None
    # The unbiased running variance depends on the number of values, so replicas on other dimensions may not
    # reach it; without running statistics mean and biased variance are the same over replicas.
    inner = [d for d in x.maps if d != 1 and (keeps or x.maps[d].uniform is None)]
    call.narrow("input", inner, "replicas along dimensions that it takes statistics of")
    return _with_statistics(call)


@rule(F.instance_norm, torch.instance_norm, statistics=_RUNNING)
def instance_norm(
    call: Call,
    input: Value,
    running_mean: Value = None,
    running_var: Value = None,
    weight: Value = None,
    bias: Value = None,
    use_input_stats: Value = True,
    momentum: Value = 0.1,
    eps: Value = 1e-5,
) -> Value:
    """Instance norm over dimension 1."""
    x = call.pair("input")
    call.narrow("input", [d for d in x.maps if d > 1], "replicas along dimensions that it takes statistics of")
    return _with_statistics(call)


def _last(call: Call, normalized_shape: Value) -> Maps:
    """Normalise over the last dimensions: equal counts there; returns the maps of the parameters."""
    count = len(normalized_shape)
    x = call.pair("input")
    first = x.ndim - count
    x = call.even("input", range(first, x.ndim))
    inner = {d - first: m for d, m in x.maps.items() if d >= first}
    shape = tuple(len(inner[d]) if d in inner else student(n) for d, n in enumerate(normalized_shape))
    if tuple(teacher(normalized_shape)) != shape:
        call.set("normalized_shape", shape)
    return inner


@rule(F.layer_norm, torch.layer_norm)
def layer_norm(
    call: Call, input: Value, normalized_shape: Value, weight: Value = None, bias: Value = None, eps: Value = 1e-5
) -> Value:
    """Layer norm: mean and variance over equally many replicas are the student's."""
    _per_channel(call, _last(call, normalized_shape), "weight", "bias")
    return call.result(dict(call.pair("input").maps))


@rule(F.rms_norm, torch.rms_norm)
def rms_norm(call: Call, input: Value, normalized_shape: Value, weight: Value = None, eps: Value = None) -> Value:
    """RMS norm."""
    _per_channel(call, _last(call, normalized_shape), "weight")
    return call.result(dict(call.pair("input").maps))


@rule(F.group_norm, torch.group_norm)
def group_norm(
    call: Call,
    input: Value,
    num_groups: Value,
    weight: Value = None,
    bias: Value = None,
    eps: Value = 1e-5,
    cudnn_enabled: Value = True,
) -> Value:
    """Group norm: the groups are kept; inside each group every channel must have equally many replicas."""
    x = call.pair("input")
    call.narrow("input", [d for d in x.maps if d != 1 and x.maps[d].uniform is None], "replicas in unequal numbers")
    call.narrow_int("num_groups")
    x = call.even("input", [1])
    phi = x.maps.get(1)
    if phi is not None:
        blocks = phi.grouped(student(num_groups))
        if blocks is None or any(block.uniform is None for block in blocks):
            raise Refuse("its groups would mix replicas of several groups, or hold unequally many")
    _per_channel(call, {0: phi} if phi is not None else {}, "weight", "bias")
    return call.result(dict(x.maps))


@rule(F.local_response_norm)
def local_response_norm(call: Call, input: Value, *args: Value, **kwargs: Value) -> Value:
    """A window of neighbouring channels: contracted there."""
    x = call.pair("input")
    call.narrow("input", [d for d in x.maps if d == 1], "a window of neighbouring channels")
    return call.result(dict(call.pair("input").maps))


@rule(torch._weight_norm)
def weight_norm(call: Call, v: Value, g: Value, dim: Value = 0) -> Value:
    """``g v / ||v||``, the norm over all dimensions but ``dim``: over r replicas sqrt(r) times the student's."""
    if isinstance(call.get("v"), Free):
        raise Refuse("both parameters are free")
    x = call.pair("v")
    axis = None if dim is None or dim == -1 else dim % x.ndim
    reduced = [d for d in x.maps if d != axis]
    call.narrow("v", [d for d in reduced if x.maps[d].uniform is None])
    x = call.pair("v")
    own: Maps = {axis: x.maps[axis]} if axis is not None and axis in x.maps else {}
    if student(call.get("g")).dim() < x.ndim:
        own = {}
    call.match("g", own)
    value = call.result(dict(x.maps))
    for d in reduced:
        if d in x.maps:
            call.scale_out(counts_scale(x.maps[d], d, 0.5))
    return value


@rule(spectral_normalize, statistics=("u", "v"))
def spectral(
    call: Call,
    weight: Value,
    u: Value,
    v: Value,
    training: Value,
    dim: Value,
    iterations: Value,
    eps: Value,
    u_first: Value,
) -> Value:
    """Spectral norm: over r_o x r_i replicas the largest singular value is sqrt(r_o r_i) times the student's."""
    w = call.pair("weight")
    if any(m.uniform is None for m in w.maps.values()):
        raise Refuse("a spectral norm over unequally many replicas")
    rest = [d for d in range(w.ndim) if d != dim]
    columns = np.arange(math.prod(w.s.shape[d] for d in rest)).reshape([w.s.shape[d] for d in rest])
    for k, d in enumerate(rest):
        if d in w.maps:
            columns = columns.take(w.maps[d].index, axis=k)
    rows = w.maps.get(dim) or ReplicaMap.identity(w.s.shape[dim])
    for name, index, phi in (
        ("u", 1, rows),
        ("v", 2, ReplicaMap(columns.reshape(-1), columns.size // _product(w, rest))),
    ):
        call.planner.assign_vector(call.node.args[index], phi)
        call.demand(name, {})
    _note_statistics(call)
    value = call.result(dict(w.maps))
    for d, m in w.maps.items():
        call.scale_out(counts_scale(m, d, 0.5))
    return value


def _product(w: Pair, dims: list[int]) -> int:
    return math.prod(w.maps[d].uniform or 1 for d in dims if d in w.maps)
