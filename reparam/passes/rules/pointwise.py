"""Operators that act on every element by itself: the maps of the input are the maps of the result."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from reparam.ops.maps import Maps
from reparam.passes.call import Call
from reparam.passes.registry import rule
from reparam.passes.values import Refuse, Value

_FUNCTIONS = """
    relu relu6 elu selu celu gelu silu mish softplus softsign tanh sigmoid logsigmoid hardsigmoid hardswish
    hardtanh hardshrink softshrink tanhshrink leaky_relu threshold rrelu dropout alpha_dropout relu_ elu_ selu_
    celu_ hardtanh_ leaky_relu_ rrelu_ threshold_
""".split()

_TORCH = """
    abs absolute neg negative exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sin cos tan asin
    acos atan sinh cosh asinh acosh atanh erf erfc erfinv sigmoid tanh relu selu celu rrelu dropout
    alpha_dropout hardshrink floor ceil round trunc frac fix sign sgn positive nan_to_num isnan isinf isfinite
    logical_not bitwise_not clone detach lgamma digamma sinc logit deg2rad rad2deg signbit i0 conj real
    zeros_like ones_like full_like empty_like prelu_ threshold softsign dropout_ relu_ abs_ neg_ exp_ sqrt_
    square_ sigmoid_ tanh_ celu_ selu_ rrelu_ alpha_dropout_ clamp_min clamp_max clamp_min_ clamp_max_
""".split()

_METHODS = """
    abs absolute neg negative exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sin cos tan asin
    acos atan sinh cosh asinh acosh atanh erf erfc erfinv sigmoid tanh relu hardshrink floor ceil round trunc
    frac fix sign sgn positive nan_to_num isnan isinf isfinite logical_not bitwise_not clone detach lgamma
    digamma sinc logit float double half bfloat16 long int bool contiguous to type cpu cuda requires_grad_ relu_
    abs_ neg_ exp_ sqrt_ square_ sigmoid_ tanh_ floor_ round_ zero_ fill_ clamp_min clamp_max clamp_min_
    clamp_max_ reciprocal_ rsqrt_ log_
""".split()


def _targets() -> list[Any]:
    found: dict[Any, None] = {}
    for holder, names in ((F, _FUNCTIONS), (torch, _TORCH), (torch.special, _TORCH), (torch._C._nn, _FUNCTIONS)):
        for name in names:
            function = getattr(holder, name, None)
            if callable(function):
                found[function] = None
    return [*found, *dict.fromkeys(_METHODS), torch.ops.aten.silu_ if False else None]


@rule(*_targets())
def pointwise(call: Call, input: Value, *args: Value, **kwargs: Value) -> Value:
    """Any operator whose further arguments are plain numbers or dtypes."""
    maps = call.pair("input").maps
    _plain_numbers(args, kwargs)
    return call.result(lambda s, _t: dict(maps) if s.shape == call.pair("input").s.shape else {})


def _plain_numbers(args: Any, kwargs: Any) -> None:
    from reparam.passes.values import Free, Pair, walk

    for path, leaf in walk([list(args), dict(kwargs)]):
        if isinstance(leaf, (Pair, Free)):
            raise Refuse(f"a tensor as argument {path} of an operator on single elements")


@rule("to", "type_as", "view_as_real") if False else rule("type_as")
def convert_like(call: Call, input: Value, other: Value) -> Value:
    """Convert to the dtype of another tensor."""
    return call.result(dict(call.pair("input").maps)) if call.pair("other") else None


@rule(F.prelu, torch.prelu, torch._C._nn.prelu if hasattr(torch._C._nn, "prelu") else None, "prelu")
def prelu(call: Call, input: Value, weight: Value) -> Value:
    """PReLU: one slope for all, or one per channel (dimension 1), which is gathered."""
    x = call.pair("input")
    channel = 1 if x.ndim > 1 else 0
    from reparam.passes.values import student

    wanted: Maps = {}
    if student(weight).numel() > 1 and channel in x.maps:
        wanted = {0: x.maps[channel]}
    call.match("weight", wanted)
    return call.result(dict(x.maps))


@rule(F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout, torch.feature_dropout)
def channel_dropout(call: Call, input: Value, *args: Value, **kwargs: Value) -> Value:
    """Dropout of whole channels: acts on every channel by itself."""
    return call.result(dict(call.pair("input").maps))


@rule(F.glu, torch._C._nn.glu)
def glu(call: Call, input: Value, dim: Value = -1) -> Value:
    """Gated linear unit: the two halves of ``dim`` must have the same map."""
    x = call.pair("input")
    axis = dim % x.ndim
    phi = x.maps.get(axis)
    maps = dict(x.maps)
    if phi is not None:
        inner = phi.same_blocks(2)
        if inner is None:
            raise Refuse("the two halves of its input have different layouts")
        maps[axis] = inner
    return call.result(maps)


__all__ = """
    glu nn pointwise prelu
""".split()
