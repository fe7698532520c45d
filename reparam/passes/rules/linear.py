"""Convolutions and linear layers: ``W~[o, i] = W[phi_o(o), phi_i(i)] / n_i``, ``b~ = b[phi_o]``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from reparam.ops.maps import ReplicaMap
from reparam.passes.call import Call, Name
from reparam.passes.records import note_attribute, record_layer, weight_name
from reparam.passes.registry import rule
from reparam.passes.streams import follows, produced, ratio_of
from reparam.passes.values import Pair, Refuse, Value, student


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _meta(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def _mixes_conv(node: fx.Node) -> bool:
    weight = _meta(_argument(node, 1, "weight", None))
    groups = _meta(_argument(node, 6, "groups", 1))
    return not (isinstance(weight, Tensor) and isinstance(groups, int) and groups > 1 and weight.shape[1] == 1)


def _mixes_transposed(node: fx.Node) -> bool:
    weight = _meta(_argument(node, 1, "weight", None))
    groups = _meta(_argument(node, 6, "groups", 1))
    return not (isinstance(weight, Tensor) and isinstance(groups, int) and groups > 1 and weight.shape[0] == groups)


def output_map(call: Call, size: int, weight: Name = "weight") -> ReplicaMap:
    """Return the free choice of phi_o: narrow where only the network's output follows, else the default layout.

    Args:
        call: the call.
        size: the student's number of outputs.
        weight: which argument is the weight: its layer's ratio is asked for.
    """
    ratio = ratio_of(call, weight)
    if call.ends:
        return ReplicaMap.identity(size)
    name = weight_name(call.planner, call.source(weight)) if call.planner.layouts else None
    layout = call.planner.layouts.get(name or "")
    fits = layout is not None and (layout.size, layout.uniform) == (size, ratio)
    return layout if layout is not None and fits else ReplicaMap.repeat(size, ratio)


def _channel_dim(call: Call, spatial: int) -> int:
    """The channel dimension of a batched or unbatched input; contracts other mapped dimensions that it slides over."""
    x = call.pair("input")
    channel = x.ndim - spatial - 1
    kernel = student(call.get("weight")).shape[2:]
    apart = {channel + 1 + k for k, size in enumerate(kernel) if size == 1 and _one_by_one(call, k)}
    slides = [d for d in x.maps if d > channel and d not in apart]
    call.narrow("input", slides, "replicas along the dimensions that it slides over")
    return channel


def _one_by_one(call: Call, k: int) -> bool:
    """Whether a kernel of size 1 acts on each place of spatial dimension k by itself."""
    for name, plain in (("stride", 1), ("padding", 0), ("output_padding", 0)):
        value = student(call.get(name))
        if isinstance(value, (tuple, list)):
            value = value[k if len(value) > 1 else 0]
        if value not in (None, plain, "valid", "same"):
            return False
    return True


@rule(torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d, mixing=_mixes_conv)
def conv(
    call: Call,
    input: Value,
    weight: Value,
    bias: Value = None,
    stride: Value = 1,
    padding: Value = 0,
    dilation: Value = 1,
    groups: Value = 1,
) -> Value:
    """Convolution, weight [O, I / groups, ...]."""
    shape, groups = student(weight).shape, student(groups)
    channel = _channel_dim(call, len(shape) - 2)
    if groups > 1 and shape[1] == 1:
        return _depthwise(call, channel, groups, shape[0] // groups, weight_dim=0)
    call.narrow_int("groups")
    phi_in = _group_inputs(call, channel, groups)
    return _dense(call, channel, groups, out_dim=0, in_dim=1, inner=phi_in, outputs=shape[0])


@rule(
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    mixing=_mixes_transposed,
)
def conv_transpose(
    call: Call,
    input: Value,
    weight: Value,
    bias: Value = None,
    stride: Value = 1,
    padding: Value = 0,
    output_padding: Value = 0,
    groups: Value = 1,
    dilation: Value = 1,
) -> Value:
    """Transposed convolution, weight [I, O / groups, ...]."""
    shape, groups = student(weight).shape, student(groups)
    channel = _channel_dim(call, len(shape) - 2)
    if groups > 1 and shape[0] == groups:
        return _depthwise(call, channel, groups, shape[1], weight_dim=0)
    call.narrow_int("groups")
    _group_inputs(call, channel, groups)
    return _dense(call, channel, groups, out_dim=1, in_dim=0, inner=None, outputs=shape[1] * groups)


@rule(F.linear, torch._C._nn.linear, mixing=True)
def linear(call: Call, input: Value, weight: Value, bias: Value = None) -> Value:
    """Linear layer, weight [O, I], acting on the last dimension."""
    x = call.pair("input")
    channel = x.ndim - 1
    if student(weight).dim() == 1:
        raise Refuse("a linear operator with a vector as its weight")
    return _dense(call, channel, 1, out_dim=0, in_dim=1, inner=x.maps.get(channel), outputs=student(weight).shape[0])


@rule(F.bilinear, mixing=True)
def bilinear(call: Call, input1: Value, input2: Value, weight: Value, bias: Value = None) -> Value:
    """Bilinear form, weight [O, I1, I2], of the last dimensions of two inputs.

    The weight is divided by the replica counts of the first input; the second input by its own.
    """
    last = call.pair("input1").ndim - 1
    for name in ("input1", "input2"):
        call.narrow(name, [d for d in call.pair(name).maps if d != last])
    found = [call.pair(name).maps.get(last) for name in ("input1", "input2")]
    wanted = {0: output_map(call, student(weight).shape[0]), **{d: m for d, m in enumerate(found, 1) if m is not None}}
    chosen = call.weight("weight", wanted, 0, 1)
    for dim, name in enumerate(("input1", "input2"), 1):
        call.align(name, last, chosen.maps.get(dim))
    if 2 in chosen.maps:
        call.scale("input2", chosen.maps[2], last, -1.0)
    phi_out = produced(call, "weight", chosen.maps.get(0) or ReplicaMap.identity(chosen.s.shape[0]))
    _bias(call, phi_out)
    value = call.result({last: phi_out})
    _record(call, chosen, last, 0, 1, position=2)
    return value


def _group_inputs(call: Call, channel: int, groups: int) -> ReplicaMap | None:
    """Give the input a map that is the same in every group; returns the map inside a group."""
    x = call.pair("input")
    phi = x.maps.get(channel)
    if phi is None or groups == 1:
        return phi
    inner = phi.same_blocks(groups)
    if inner is None:
        phi = ReplicaMap.repeat(phi.size, int(phi.counts.max()))
        call.align("input", channel, phi)
        inner = phi.same_blocks(groups)
    if inner is None:
        raise Refuse(f"the replicas of its input are not the same in each of the {groups} groups")
    return inner


def _dense(
    call: Call, channel: int, groups: int, *, out_dim: int, in_dim: int, inner: ReplicaMap | None, outputs: int
) -> Value:
    """The linear law for a weight whose dimensions are those of one group where that is how torch stores it."""
    x = call.pair("input")
    phi_in = x.maps.get(channel)
    phi_out = output_map(call, outputs)
    transposed = out_dim == 1
    # conv stores [O, I / groups], transposed conv [I, O / groups].
    weight_in = phi_in if transposed else inner
    weight_out = phi_out.same_blocks(groups) if transposed and groups > 1 else phi_out
    wanted = {d: m for d, m in ((in_dim, weight_in), (out_dim, weight_out)) if m is not None}
    weight = call.weight("weight", wanted, out_dim, in_dim)
    _follow_weight(call, weight, channel, groups, in_dim, transposed)
    phi_out = produced(call, "weight", _ungrouped(weight.maps.get(out_dim), groups if transposed else 1, outputs))
    _bias(call, phi_out)
    value = call.result(lambda s, _t: {channel: phi_out, **{d: m for d, m in _others(call, channel).items()}})
    _record(call, weight, channel, out_dim, in_dim)
    return value


def _others(call: Call, channel: int) -> dict[int, ReplicaMap]:
    return {d: m for d, m in call.pair("input").maps.items() if d != channel}


def _follow_weight(call: Call, weight: Pair, channel: int, groups: int, in_dim: int, transposed: bool) -> None:
    """Bring the input into the layout that the weight has."""
    target = weight.maps.get(in_dim)
    if target is not None and groups > 1 and not transposed:
        target = _ungrouped(target, groups, target.size * groups)
    call.align("input", channel, target)


def _ungrouped(inner: ReplicaMap | None, groups: int, size: int) -> ReplicaMap:
    """Return the map of a whole dimension from the map inside each of its equal groups."""
    if inner is None:
        return ReplicaMap.identity(size)
    if groups == 1:
        return inner
    return ReplicaMap(np.concatenate([inner.index + g * inner.size for g in range(groups)]), size)


def _bias(call: Call, phi_out: ReplicaMap) -> None:
    if call.get("bias") is not None:
        call.match("bias", {} if phi_out.is_identity else {0: phi_out})


def _depthwise(call: Call, channel: int, groups: int, multiplier: int, weight_dim: int) -> Value:
    """Channel c owns ``multiplier`` outputs; the weight is gathered, the groups follow the input's width."""
    x = call.pair("input")
    if call.ends and channel in x.maps:
        # Only the network's output follows: its width is the student's.
        x = call.narrow("input", [channel])
    phi = x.maps.get(channel)
    weight_is_per_input = student(call.get("weight")).shape[0] == groups
    phi_weight = None if phi is None else phi if weight_is_per_input else phi.outputs(multiplier)
    follows(call, "weight", phi)
    weight = call.match("weight", {} if phi_weight is None else {weight_dim: phi_weight})
    phi_out = ReplicaMap.identity(groups * multiplier) if phi is None else phi.outputs(multiplier)
    _bias(call, phi_out)
    if phi is None:
        call.narrow_int("groups")
    else:
        call.resize("groups", len(phi))
        note_attribute(call.planner, _argument(call.node, 1, "weight", None), "groups", len(phi))
    value = call.result({channel: phi_out, **_others(call, channel)})
    _record(call, weight, channel, weight_dim, weight_dim)
    return value


def _record(call: Call, weight: Pair, channel: int, out_dim: int, in_dim: int, position: int = 1) -> None:
    """Tell the planner what became of this layer: a multiply-add per weight and output (transposed: input) place."""
    node = call.node
    transposed = "transpose" in str(getattr(node.target, "__name__", node.target))
    places = node.all_input_nodes[0].meta["val"] if transposed else call.s
    batch = places.shape[0] if channel > 0 else 1
    positions = places.numel() // max(places.shape[channel] * batch, 1)
    counts = (positions * weight.s.numel(), positions * weight.t.numel())
    source = _argument(node, position, "weight", None)
    record_layer(call.planner, node, node.all_input_nodes[0], source, weight, (out_dim, in_dim), counts)
