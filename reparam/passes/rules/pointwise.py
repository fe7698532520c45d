"""Operators that act on every element by itself: the maps of the input are the maps of the result."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from reparam.ops.maps import Maps
from reparam.passes.call import At, Call
from reparam.passes.registry import rule
from reparam.passes.values import Free, Int, Pair, Refuse, Value, student, walk

_FUNCTIONS = """
    relu relu6 elu selu celu gelu silu mish softplus softsign tanh sigmoid logsigmoid hardsigmoid hardswish
    hardtanh hardshrink softshrink tanhshrink leaky_relu threshold relu_ elu_ selu_ celu_ hardtanh_ leaky_relu_
    threshold_
""".split()

_METHODS = """
    abs absolute neg negative exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sin cos tan asin
    acos atan sinh cosh asinh acosh atanh erf erfc erfinv sigmoid tanh relu hardshrink floor ceil round trunc
    frac fix sign sgn positive nan_to_num isnan isinf isfinite logical_not bitwise_not clone detach lgamma
    digamma sinc logit deg2rad rad2deg signbit i0 clamp_min clamp_max abs_ neg_ exp_ sqrt_ square_ sigmoid_
    tanh_ relu_ floor_ round_ clamp_min_ clamp_max_ reciprocal_ rsqrt_ log_ angle
""".split()

_TORCH = [
    *_METHODS,
    *"selu celu threshold selu_ celu_ zeros_like ones_like full_like empty_like conj real expit".split(),
]

_CONVERSIONS = """
    float double half bfloat16 long int bool contiguous cpu cuda requires_grad_ type to type_as zero_ fill_
""".split()

_DROPOUTS = """
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout rrelu dropout_
    alpha_dropout_ feature_dropout_ rrelu_
""".split()

_RANDOM = """
    bernoulli rand_like randn_like randint_like normal poisson multinomial bernoulli_ normal_ uniform_ random_
    exponential_ cauchy_ log_normal_ geometric_ trunc_normal_
""".split()


def _functions(holders: tuple[Any, ...], names: list[str]) -> list[Any]:
    found = {getattr(holder, name, None): None for holder in holders for name in names}
    return [function for function in found if callable(function)]


@rule(
    *_functions((F, torch._C._nn), _FUNCTIONS),
    *_functions((torch, torch.special), _TORCH),
    *_METHODS,
)
def pointwise(call: Call, input: Value, *args: Value, **kwargs: Value) -> Value:
    """Any operator whose further arguments are plain numbers or dtypes."""
    maps = call.pair("input").maps
    for place, leaf in _others(call):
        if isinstance(leaf, (Pair, Free)):
            raise Refuse(f"a tensor as argument {place[1:]} of an operator on single elements")
        if isinstance(leaf, Int):
            call.narrow_int(place)
    return call.result(dict(maps))


@rule(torch.bucketize)
def bucketize(call: Call, input: Value, boundaries: Value, **kwargs: Value) -> Value:
    """The interval that each element lies in; the boundaries are no channels."""
    x = call.pair("input")
    call.match("boundaries", {})
    return call.result(dict(x.maps))


def _others(call: Call) -> list[tuple[At, Any]]:
    """Places and values of all arguments but the first."""
    positional = [(At(("args", *path)), leaf) for path, leaf in walk(call.args) if path[0] != 0]
    return positional + [(At(("kwargs", *p)), leaf) for p, leaf in walk(call.kwargs) if p[0] != "input"]


@rule(*_CONVERSIONS)
def convert(call: Call, input: Value, *args: Value, **kwargs: Value) -> Value:
    """Another dtype, device or memory layout; a tensor among the arguments only names one."""
    maps = dict(call.pair("input").maps)
    for place, leaf in _others(call):
        if isinstance(leaf, Free):
            call.demand(place, {})
    return call.result(maps)


@rule(*_functions((F, torch), _DROPOUTS))
def dropout(call: Call, input: Value, *args: Value, **kwargs: Value) -> Value:
    """Dropout obeys the training flag; without one it is random in eval mode too and replicas would differ."""
    inside = "prefix" in call.node.meta
    if not inside and _always_on(call):
        raise Refuse("random values also in eval mode")
    return call.result(dict(call.pair("input").maps))


def _always_on(call: Call) -> bool:
    name = str(getattr(call.node.target, "__name__", "")).rstrip("_")
    position, default = (3, False) if name == "rrelu" else (2, True)
    flag = call.node.args[position] if len(call.node.args) > position else call.node.kwargs.get("training")
    flag = call.node.kwargs.get("train", flag)
    return default if flag is None else flag is True


@rule(*_functions((torch, F), _RANDOM), *_RANDOM, F.gumbel_softmax)
def random(call: Call, *args: Value, **kwargs: Value) -> Value:
    """Random values of the shape of a tensor: drawn at student width, so that replicas agree."""
    raise Refuse("random values")


@rule(*_functions((F, torch, torch._C._nn), ["prelu"]), "prelu")
def prelu(call: Call, input: Value, weight: Value) -> Value:
    """PReLU: one slope for all, or one per channel (dimension 1), which is gathered."""
    x = call.pair("input")
    channel = 1 if x.ndim > 1 else 0
    wanted: Maps = {}
    if student(weight).numel() > 1 and channel in x.maps:
        wanted = {0: x.maps[channel]}
    call.match("weight", wanted)
    return call.result(dict(x.maps))


@rule(F.glu, torch._C._nn.glu)
def glu(call: Call, input: Value, dim: Value = -1) -> Value:
    """Gated linear unit: the two halves of ``dim`` must have the same map."""
    axis = dim % call.pair("input").ndim
    x = call.even("input", [axis])
    phi = x.maps.get(axis)
    maps = dict(x.maps)
    if phi is not None:
        inner = phi.same_blocks(2)
        if inner is None:
            raise Refuse("the two halves of its input have different layouts")
        maps[axis] = inner
    return call.result(maps)
