"""Reductions over dimensions that may be mapped."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F

from reparam.ops.maps import Maps
from reparam.ops.steps import Scale, Shift
from reparam.passes.call import At, Call
from reparam.passes.registry import rule
from reparam.passes.rules.broadcast import agree, broadcast
from reparam.passes.values import Free, Pair, Refuse, Value


def _axes(dim: Any, rank: int) -> list[int]:
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return list(range(rank))
    return sorted({d % rank for d in (dim if isinstance(dim, (tuple, list)) else [dim])})


def _kept(maps: Maps, axes: list[int], keepdim: bool) -> Maps:
    """Maps of the result of a reduction over ``axes``."""
    return {d if keepdim else d - sum(a < d for a in axes): m for d, m in maps.items() if d not in axes}


def _even(call: Call, axes: list[int]) -> int:
    """Contract reduced dimensions with uneven counts; returns the product of the counts of the others."""
    x = call.pair("input")
    call.narrow("input", [d for d in axes if d in x.maps and x.maps[d].uniform is None])
    ratio = 1
    for d in axes:
        replica_map = call.pair("input").maps.get(d)
        if replica_map is not None:
            ratio *= replica_map.uniform or 1
    return ratio


def _reduce(call: Call, dim: Any, keepdim: bool, power: float = 0.0) -> Value:
    """Reduce; the result over r replicas is r**power times the student's."""
    x = call.pair("input")
    axes = _axes(dim, x.ndim) if x.ndim else []
    ratio = _even(call, axes)
    maps = _kept(call.pair("input").maps, axes, keepdim)
    value = call.result(lambda _s, _t: maps)
    if ratio > 1 and power:
        call.scale_out(Scale((float(ratio) ** -power,)))
    return value


@rule(
    torch.mean,
    "mean",
    torch.amax,
    torch.amin,
    "amax",
    "amin",
    torch.nanmean,
    "nanmean",
    torch.all,
    torch.any,
    "all",
    "any",
)
def mean(call: Call, input: Value, dim: Value = None, keepdim: Value = False, *, dtype: Value = None) -> Value:
    """Mean, maximum, minimum, all, any: the same over replicas as over the student's values."""
    return _reduce(call, dim, keepdim)


@rule(torch.sum, "sum", torch.nansum, "nansum")
def sum_(call: Call, input: Value, dim: Value = None, keepdim: Value = False, *, dtype: Value = None) -> Value:
    """Sum: r times too large over r replicas."""
    if not call.s.is_floating_point():
        return _indexed(call, dim, keepdim, "a sum of integers over replicas")
    return _reduce(call, dim, keepdim, power=1.0)


@rule(torch.max, torch.min, "max", "min")
def max_(call: Call, input: Value, *args: Value, **kwargs: Value) -> Value:
    """Maximum of all values, of two tensors, or along a dimension: contracted there where its indices are used."""
    others = [*args, *kwargs.values()]
    if any(isinstance(value, (Pair, Free)) for value in others):
        return broadcast(call, input, *args, **kwargs)
    if not others:
        return _reduce(call, None, False)
    dim = args[0] if args else kwargs["dim"]
    keepdim = args[1] if len(args) > 1 else kwargs.get("keepdim", False)
    return _reduce(call, dim, keepdim) if _values_only(call) else _indexed(call, dim, keepdim)


def _values_only(call: Call) -> bool:
    """Whether nobody asks at which positions the values are."""
    wanted = (operator.getitem, 0), (getattr, "values")
    return all((user.target, *user.args[1:]) in wanted for user in call.node.users)


def _indexed(call: Call, dim: Any, keepdim: bool, reason: str = "positions along a widened dimension") -> Value:
    x = call.pair("input")
    axes = _axes(dim, x.ndim)
    call.narrow("input", [d for d in axes if d in x.maps], reason)
    maps = _kept(call.pair("input").maps, axes, keepdim)
    return call.result(lambda _s, _t: maps)


@rule(torch.argmax, torch.argmin, "argmax", "argmin", torch.median, "median")
def argmax(call: Call, input: Value, dim: Value = None, keepdim: Value = False) -> Value:
    """Positions and order statistics along a dimension: contracted there."""
    return _indexed(call, dim, keepdim)


@rule(
    torch.cumsum, "cumsum", torch.cumprod, "cumprod", torch.logcumsumexp, "logcumsumexp", torch.diff, "diff",
)  # fmt: skip
def along(call: Call, input: Value, dim: Value = None, *args: Value, **kwargs: Value) -> Value:
    """Operators along one dimension whose replicas would change the result: contracted there."""
    x = call.pair("input")
    if dim is None:
        raise Refuse("no dimension is named")
    call.narrow("input", [dim % x.ndim], "replicas along its dimension would change the result")
    return call.result(dict(call.pair("input").maps))


@rule(torch.sort, "sort", torch.argsort, "argsort", torch.cummax, "cummax", torch.cummin, "cummin")
def order(call: Call, input: Value, dim: Value = -1, *args: Value, **kwargs: Value) -> Value:
    """Orders along one dimension: contracted there."""
    return _kept_off(call, [dim], "positions along a widened dimension")


@rule(torch.kthvalue, "kthvalue")
def kthvalue(call: Call, input: Value, k: Value, dim: Value = -1, keepdim: Value = False) -> Value:
    """An order statistic along one dimension: contracted there."""
    call.narrow_int("k")
    return _indexed(call, dim, keepdim)


@rule(torch.topk, "topk")
def largest(call: Call, input: Value, k: Value, dim: Value = -1, *args: Value, **kwargs: Value) -> Value:
    """The largest values along one dimension: contracted there."""
    call.narrow_int("k")
    return _kept_off(call, [dim], "positions along a widened dimension")


@rule(torch.fft.fft, torch.fft.ifft, torch.fft.rfft, torch.fft.irfft, torch.fft.hfft, torch.fft.ihfft)
def transform_1d(call: Call, input: Value, n: Value = None, dim: Value = -1, norm: Value = None) -> Value:
    """Fourier transforms along one dimension: contracted there."""
    return _kept_off(call, [dim], "a transform along a widened dimension")


@rule(torch.fft.fft2, torch.fft.ifft2, torch.fft.rfft2, torch.fft.irfft2)
def transform_2d(call: Call, input: Value, s: Value = None, dim: Value = (-2, -1), norm: Value = None) -> Value:
    """Fourier transforms along two dimensions: contracted there."""
    return _kept_off(call, dim, "a transform along a widened dimension")


@rule(torch.fft.fftn, torch.fft.ifftn, torch.fft.rfftn, torch.fft.irfftn)
def transform_nd(call: Call, input: Value, s: Value = None, dim: Value = None, norm: Value = None) -> Value:
    """Fourier transforms along all dimensions, the last ones, or those that are named: contracted there."""
    dim = range(-len(s), 0) if dim is None and s is not None else dim
    return _kept_off(call, dim, "a transform along a widened dimension")


def _kept_off(call: Call, dim: Any, reason: str) -> Value:
    """Contract the dimensions that an operator works along; the others keep their maps."""
    x = call.pair("input")
    axes = range(x.ndim) if dim is None else _axes(list(dim) if not isinstance(dim, int) else dim, x.ndim)
    maps = call.narrow("input", axes, reason).maps
    return call.result(lambda _s, _t: maps)


@rule(torch.log_softmax, F.log_softmax, "log_softmax", torch.special.log_softmax)
def log_softmax(call: Call, input: Value, dim: Value = None, *args: Value, **kwargs: Value) -> Value:
    """Logarithm of a softmax, which has one r-th of the student's weight in each of r replicas."""
    x = call.pair("input")
    if dim is None:
        raise Refuse("no dimension is named")
    phi = call.even("input", [dim % x.ndim]).maps.get(dim % x.ndim)
    value = call.result(dict(call.pair("input").maps))
    if phi is not None:
        call.scale_out(Shift(math.log(phi.uniform or 1)))
    return value


@rule(torch.logsumexp, "logsumexp", torch.special.logsumexp)
def logsumexp(call: Call, input: Value, dim: Value, keepdim: Value = False) -> Value:
    """Logarithm of a sum over r replicas of everything."""
    axes = _axes(dim, call.pair("input").ndim)
    call.even("input", axes)
    ratio = _even(call, axes)
    maps = _kept(call.pair("input").maps, axes, keepdim)
    value = call.result(lambda _s, _t: maps)
    if ratio > 1:
        call.scale_out(Shift(-math.log(ratio)))
    return value


@rule(torch.aminmax, "aminmax")
def aminmax(call: Call, input: Value, *, dim: Value = None, keepdim: Value = False) -> Value:
    """Minimum and maximum: the same over replicas."""
    return _reduce(call, dim, keepdim)


@rule(torch.linalg.vecdot)
def vecdot(call: Call, x: Value, y: Value, *, dim: Value = -1) -> Value:
    """Products summed along one dimension: r times too large over r replicas."""
    maps = agree(call, [At(call.path("x")), At(call.path("y"))])
    axis = dim % (call.s.dim() + 1)
    phi = maps.pop(axis, None)
    if phi is not None and phi.uniform is None:
        raise Refuse("a product over unequally many replicas")
    value = call.result({d - (d > axis): m for d, m in maps.items()})
    if phi is not None:
        call.scale_out(Scale((1.0 / (phi.uniform or 1),)))
    return value


@rule(F.cross_entropy, F.kl_div, F.nll_loss)
def loss_of_classes(call: Call, input: Value, target: Value, *args: Value, **kwargs: Value) -> Value:
    """Losses that compare distributions: classes are no channels."""
    raise Refuse("a loss over the classes of a distribution")


@rule(torch.prod, "prod", torch.count_nonzero, "count_nonzero")
def narrow_reduction(call: Call, input: Value, dim: Value = None, keepdim: Value = False, **kwargs: Value) -> Value:
    """Reductions that count the replicas in a nonlinear way: contracted first."""
    return _indexed(call, dim, keepdim, "replicas along its dimension would change the result")


@rule(torch.var, "var", torch.std, "std", torch.var_mean, torch.std_mean)
def var(
    call: Call,
    input: Value,
    dim: Value = None,
    unbiased: Value = None,
    keepdim: Value = False,
    *,
    correction: Value = None,
) -> Value:
    """Variance and standard deviation; over r replicas the sum of squares is r times the student's.

    ``r S / (r N - r c)`` is the student's ``S / (N - c)``: the correction c becomes r c, for every number N of values.
    """
    x = call.pair("input")
    flag = dim if isinstance(dim, bool) else unbiased
    axes = _axes(None if isinstance(dim, bool) else dim, x.ndim)
    ratio = _even(call, axes)
    degrees = correction if correction is not None else int(flag is not False)
    if ratio > 1 and degrees:
        if flag is None:
            call.set("correction", degrees * ratio)
        else:
            mapped = [d for d in axes if d in call.pair("input").maps]
            call.narrow("input", mapped, "an unbiased variance over replicas")
    maps = _kept(call.pair("input").maps, axes, keepdim)
    return call.result(lambda _s, _t: maps)


@rule(torch.norm, "norm", torch.functional.norm)
def norm(
    call: Call,
    input: Value,
    p: Value = 2,
    dim: Value = None,
    keepdim: Value = False,
    dtype: Value = None,
    out: Value = None,
) -> Value:
    """p-norm: over r replicas r**(1/p) times the student's."""
    return _reduce(call, dim, keepdim, power=_norm_power(p))


@rule(torch.linalg.vector_norm, torch.linalg.norm)
def vector_norm(
    call: Call, input: Value, ord: Value = 2, dim: Value = None, keepdim: Value = False, *, dtype: Value = None
) -> Value:
    """Vector norm (of ``linalg.norm`` only the vector form)."""
    if call.node.target is torch.linalg.norm and (dim is None or isinstance(dim, (tuple, list))):
        raise Refuse("a matrix norm")
    return _reduce(call, dim, keepdim, power=_norm_power(2 if ord is None else ord))


def _norm_power(p: Any) -> float:
    if p in ("fro", None):
        return 0.5
    if not isinstance(p, (int, float)) or p == 0:
        raise Refuse(f"a norm of order {p!r}")
    return 0.0 if p in (float("inf"), float("-inf")) else 1.0 / p


@rule(F.normalize)
def normalize(call: Call, input: Value, p: Value = 2.0, dim: Value = 1, eps: Value = 1e-12, out: Value = None) -> Value:
    """Division by the p-norm along ``dim``: eps and result have the factor r**(1/p)."""
    x = call.pair("input")
    axes = _axes(dim, x.ndim)
    ratio = _even(call, axes)
    if ratio > 1:
        factor = float(ratio) ** _norm_power(p)
        call.set("eps", eps * factor)
        call.scale_out(Scale((factor,)))
    return call.result(dict(call.pair("input").maps))


@rule(F.cosine_similarity, torch.cosine_similarity)
def cosine_similarity(call: Call, x1: Value, x2: Value, dim: Value = 1, eps: Value = 1e-8) -> Value:
    """Product over the norms: r over sqrt(r) sqrt(r); the smallest norm has the factor sqrt(r)."""
    places = [At(call.path("x1")), At(call.path("x2"))]
    maps = agree(call, places)
    rank = call.s.dim() + 1
    axis = dim % rank
    phi = maps.pop(axis, None)
    if phi is not None:
        if phi.uniform is None:
            raise Refuse("a product over unequally many replicas")
        call.set("eps", eps * float(phi.uniform) ** 0.5)
    return call.result({d - (d > axis): m for d, m in maps.items()})


@rule(F.pairwise_distance, torch.pairwise_distance)
def pairwise_distance(
    call: Call, x1: Value, x2: Value, p: Value = 2.0, eps: Value = 1e-6, keepdim: Value = False
) -> Value:
    """p-norm of a difference along the last dimension: over r replicas r**(1/p) times the student's."""
    maps = agree(call, [At(call.path("x1")), At(call.path("x2"))])
    rank = call.s.dim() + (not keepdim)
    phi = maps.pop(rank - 1, None)
    if phi is not None and phi.uniform is None:
        raise Refuse("a distance over unequally many replicas")
    power = _norm_power(p)
    value = call.result(lambda _s, _t: maps)
    if phi is not None and phi.uniform is not None and power:
        call.scale_out(Scale((float(phi.uniform) ** -power,)))
    return value


@rule(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
def difference(
    call: Call, input: Value, target: Value, *args: Value, reduction: Value = "mean", **kwargs: Value
) -> Value:
    """Losses of single elements: their mean does not see replicas, their sum counts them."""
    tensors = any(isinstance(v, (Pair, Free)) for v in kwargs.values())
    if args or tensors or any(kwargs.get(name) is not None for name in _OLD_REDUCTIONS):
        raise Refuse("an elementwise loss with weights, or a reduction in the old form")
    maps = agree(call, [At(call.path("input")), At(call.path("target"))])
    if reduction == "none":
        return call.result(dict(maps))
    if any(phi.uniform is None for phi in maps.values()):
        raise Refuse("a loss over unequally many replicas")
    value = call.result()
    ratio = math.prod(phi.uniform or 1 for phi in maps.values())
    if reduction == "sum" and ratio > 1:
        call.scale_out(Scale((1.0 / ratio,)))
    return value


_OLD_REDUCTIONS = ("size_average", "reduce")
