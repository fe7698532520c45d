"""The algebra of kernels: sum, sequence, scale, norm, zero-pad, concatenation.

Every function returns a kernel that computes what its arguments compute together, exactly (up to rounding), or raises
:class:`~reparam.errors.KernelError` where there is none. *Law of padding*: in a sequence only the first operator pads.
Zeros that a second one adds are not what the first would have put there, unless that has no bias and sees nothing but
zeros beyond its border: because it has one tap, or pads as far as its taps reach. A transposed convolution must not
need what the one before it cuts off.

Source: DBB (CVPR 2021), transforms I to VI; OREPA (CVPR 2022), online squeezing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from reparam.errors import KernelError
from reparam.ops.kernels import Kernel, Sizes, affine

_WORDS = {
    "dims": "the number of spatial dimensions",
    "inputs": "the number of inputs",
    "outputs": "the number of outputs",
    "transposed": "kind: one is transposed",
    "output_padding": "output padding",
}
"""Attributes of a kernel as error messages call them."""


def scale(kernel: Kernel, factors: Tensor, shift: Tensor | None = None) -> Kernel:
    """Return ``factors * kernel(x) + shift``; factors and shift have one value per output, [O]."""
    column = factors.reshape(-1, *(1,) * (kernel.dims + 1))
    if kernel.transposed:
        column = factors.reshape(kernel.groups, -1, *(1,) * (kernel.dims + 1))
        result = kernel.with_blocks(kernel.blocks() * column)
    else:
        result = replace(kernel, weight=kernel.weight * column)
    bias = None if kernel.bias is None else kernel.bias * factors
    return replace(result, bias=_plus(bias, shift))


def normalise(
    kernel: Kernel, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Kernel:
    """Return batch norm in eval mode behind the kernel (DBB, transform I); every tensor is [O]."""
    return scale(kernel, *affine_of(mean, var, weight, bias, eps))


def affine_of(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return batch norm in eval mode as factor and shift per channel: ``y = factor x + shift``."""
    factor = torch.rsqrt(var + eps) if weight is None else weight / torch.sqrt(var + eps)
    shift = -mean * factor
    return factor, shift if bias is None else shift + bias


def resize(kernel: Kernel, size: Sequence[int]) -> Kernel:
    """Zero-pad the taps on either side to ``size`` (DBB, transform VI); the padding grows along.

    Raises:
        KernelError: it cannot stay in the middle (one size is even, the other odd), or ``size`` is smaller.
    """
    extra = [new - old for new, old in zip(size, kernel.size, strict=False)]
    if len(size) != kernel.dims or any(n < 0 or n % 2 for n in extra):
        raise KernelError(
            f"{kernel} has no place in the middle of {_text(size)} taps: every size must grow by an even number"
        )
    sides = [side for n in reversed(extra) for side in (n // 2, n // 2)]
    padding = tuple(p + d * n // 2 for p, d, n in zip(kernel.padding, kernel.dilation, extra, strict=True))
    return replace(kernel, weight=F.pad(kernel.weight, sides), padding=padding)


def regroup(kernel: Kernel, groups: int) -> Kernel:
    """Return the same operator written with fewer groups; the weight between old groups is 0."""
    if kernel.groups == groups:
        return kernel
    if kernel.groups % groups:
        raise KernelError(f"{kernel} cannot be written with {groups} groups")
    merged = kernel.blocks().unflatten(0, (groups, -1))
    eye = torch.eye(merged.shape[1], dtype=merged.dtype, device=merged.device)
    wide = torch.einsum("gaoi...,ab->gaobi...", merged, eye)
    return kernel.with_blocks(wide.flatten(3, 4).flatten(1, 2))


def add(*kernels: Kernel) -> Kernel:
    """Return the sum of the outputs (DBB, transform II); kernels of different size are aligned at their middle.

    Raises:
        KernelError: the outputs are not of one shape, or are taken at different places.
    """
    for kernel in kernels[1:]:
        _check_places(kernels[0], kernel, "added", "dims", "inputs", "outputs")
    return functools.reduce(_add, kernels)


def _check_places(a: Kernel, b: Kernel, done: str, *same: str) -> None:
    """The outputs of two kernels must be taken at the same places, and the named attributes be the same."""
    for name in (*same, "transposed", "stride", "output_padding"):
        if getattr(a, name) != getattr(b, name):
            raise KernelError(f"{a} and {b} differ in {_WORDS.get(name, name)}; their outputs cannot be {done}")
    for dim in range(a.dims):
        if a.span[dim] - 2 * a.padding[dim] != b.span[dim] - 2 * b.padding[dim]:
            raise KernelError(f"the outputs of {a} and {b} differ in size; they cannot be {done}")
    _common(a, b)


def _add(a: Kernel, b: Kernel) -> Kernel:
    groups = math.gcd(a.groups, b.groups)
    padding = tuple(map(max, a.padding, b.padding))
    dilation = _common(a, b)
    first, second = (_spread(regroup(kernel, groups), dilation, padding) for kernel in (a, b))
    return replace(first, weight=first.weight + second.weight, bias=_plus(a.bias, b.bias))


def _common(a: Kernel, b: Kernel) -> Sizes:
    """The distance of taps on which both kernels have theirs."""
    dilation = []
    for dim in range(a.dims):
        own = [k.dilation[dim] for k in (a, b) if k.size[dim] > 1]
        apart = math.gcd(*own, a.padding[dim] - b.padding[dim])
        dilation.append(apart or max(a.dilation[dim], b.dilation[dim]))
    _check_room(f"{a} and {b}", a.output_padding, a.stride, tuple(dilation))
    return tuple(dilation)


def _spread(kernel: Kernel, dilation: Sizes, padding: Sizes) -> Kernel:
    """Write a kernel with taps at this distance and this padding, which are multiples of its own."""
    weight = kernel.weight
    for dim, (apart, pad) in enumerate(zip(dilation, padding, strict=True)):
        count = weight.shape[2 + dim]
        side = (pad - kernel.padding[dim]) // apart
        step = kernel.dilation[dim] // apart if count > 1 else 1
        if step > 1 or side:
            length = step * (count - 1) + 1 + 2 * side
            place = torch.arange(count, device=weight.device) * step + side
            shape = [*weight.shape[: 2 + dim], length, *weight.shape[3 + dim :]]
            weight = weight.new_zeros(shape).index_add(2 + dim, place, weight)
    return replace(kernel, weight=weight, dilation=dilation, padding=padding)


def then(*kernels: Kernel) -> Kernel:
    """Return the sequence: the first kernel acts first (DBB, transform III, for any sizes, strides and groups).

    Raises:
        KernelError: the sequence is no single kernel, or breaks the law of padding.
    """
    return functools.reduce(_then, kernels)


def _then(a: Kernel, b: Kernel) -> Kernel:
    names = f"{a}, then {b}"
    if a.dims != b.dims or a.outputs != b.inputs:
        raise KernelError(f"{names}: the second does not take what the first returns")
    a, b = _as_conv(a), _as_conv(b)
    if a.transposed != b.transposed and not (a.pointwise or b.pointwise):
        raise KernelError(f"{names}: a convolution and a transposed one are no single kernel")
    if b.transposed:
        _check_crop(names, a, b)
    else:
        _check_padding(names, a, b)
    blocks, dilation = _compose_taps(_compose_channels(a, b), a, b)
    steps = tuple(s * t for s, t in zip(a.stride, b.stride, strict=True))
    # Padding counts in the places between which a kernel moves: those before a convolution, behind a transposed one.
    frame, inner = (b, a) if b.transposed else (a, b)
    padding, output_padding = (
        tuple(p + s * q for p, s, q in zip(outer, frame.stride, own, strict=True))
        for outer, own in ((frame.padding, inner.padding), (frame.output_padding, inner.output_padding))
    )
    _check_room(names, output_padding, steps, dilation)
    result = replace(frame, stride=steps, padding=padding, dilation=dilation, output_padding=output_padding)
    return result.with_blocks(blocks, bias=_plus(_carried(a, b), b.bias))


def _as_conv(kernel: Kernel) -> Kernel:
    """Write a transposed convolution that is pointwise as a plain one."""
    if not (kernel.transposed and kernel.pointwise):
        return kernel
    return replace(kernel, transposed=False).with_blocks(kernel.blocks())


def _check_padding(names: str, a: Kernel, b: Kernel) -> None:
    """The law of padding for a convolution that comes second."""
    wide = any(p and q < span for p, q, span in zip(b.padding, a.padding, a.span, strict=True))
    if wide or (any(b.padding) and a.bias is not None):
        why = "more than one tap" if a.bias is None else "its bias"
        raise KernelError(
            f"{names}: the second pads with zeros, where the first would have put something else ({why}); the border "
            "would be wrong. Pad in front of the first only"
        )


def _check_crop(names: str, a: Kernel, b: Kernel) -> None:
    """The law of padding for a transposed convolution that comes second."""
    for dim in range(a.dims):
        cut, kept = a.padding[dim], a.output_padding[dim]
        # The nearest value that is cut off would be one step beyond the border.
        left = b.span[dim] - b.padding[dim] - b.stride[dim]
        if (cut and left >= 0) or (cut > kept and left + b.output_padding[dim] >= 0):
            raise KernelError(
                f"{names}: what the first cuts off (its padding) is missing at the border of the second; cut off in "
                "the last only"
            )
    geometry = zip(b.stride, b.padding, b.output_padding, b.span, strict=True)
    if a.bias is not None and any(s > 1 or p - o < span for s, p, o, span in geometry):
        raise KernelError(f"{names}: the second does not bring the bias of the first to every place alike")


def _check_room(names: str, output_padding: Sizes, stride: Sizes, dilation: Sizes) -> None:
    """Torch wants an output padding that is smaller than stride or dilation."""
    if any(n >= max(s, d) for n, s, d in zip(output_padding, stride, dilation, strict=True)):
        raise KernelError(f"{names}: an output padding of {output_padding} has no place in a single kernel")


def _carried(a: Kernel, b: Kernel) -> Tensor | None:
    """What the bias of ``a`` becomes behind ``b``, [O]."""
    if a.bias is None:
        return None
    sums = b.blocks().flatten(3).sum(-1) if b.dims else b.blocks()
    return torch.einsum("goi,gi->go", sums, a.bias.unflatten(0, (b.groups, -1))).flatten()


def _compose_channels(a: Kernel, b: Kernel) -> Tensor:
    """Contract the channels between two kernels: [groups, O / groups, I / groups, taps of a, taps of b]."""
    if a.groups % b.groups and b.groups % a.groups:
        groups = math.gcd(a.groups, b.groups)
        a, b = regroup(a, groups), regroup(b, groups)
    first, second = (k.blocks().reshape(*k.blocks().shape[:3], -1) for k in (a, b))
    if a.groups >= b.groups:
        # Each block of b meets q blocks of a, which share no inputs.
        q = a.groups // b.groups
        first = first.unflatten(0, (b.groups, q))
        second = second.unflatten(2, (q, -1))
        return torch.einsum("gqmik,goqml->goqikl", first, second).flatten(2, 3)
    q = b.groups // a.groups
    first = first.unflatten(1, (q, -1))
    second = second.unflatten(0, (a.groups, q))
    return torch.einsum("gqmik,gqoml->gqoikl", first, second).flatten(1, 2)


def _compose_taps(products: Tensor, a: Kernel, b: Kernel) -> tuple[Tensor, Sizes]:
    """Put every pair of taps where it acts: [groups, O / groups, I / groups, *size], and the distance of taps."""
    # A tap of the second operator counts in steps of the first; transposed it is the other way round.
    frames = [
        (p * d, q * e, k, m)
        for p, q, d, e, k, m in zip(
            b.stride if b.transposed else (1,) * a.dims,
            (1,) * a.dims if b.transposed else a.stride,
            a.dilation,
            b.dilation,
            a.size,
            b.size,
            strict=True,
        )
    ]
    if a.transposed and not b.transposed:  # b is pointwise
        frames = [(d, 1, k, 1) for d, k in zip(a.dilation, a.size, strict=True)]
    device = products.device
    index = torch.zeros((1, 1), dtype=torch.long, device=device)
    sizes, dilation = [], []
    for step_a, step_b, k, m in frames:
        apart = math.gcd(*([step_a] if k > 1 else []), *([step_b] if m > 1 else [])) or 1
        length = (step_a * (k - 1) + step_b * (m - 1)) // apart + 1
        rows = torch.arange(k, device=device) * step_a // apart
        columns = torch.arange(m, device=device) * step_b // apart
        places = rows[:, None] + columns
        index = (index[:, None, :, None] * length + places[None, :, None, :]).flatten(2).flatten(0, 1)
        sizes.append(length)
        dilation.append(apart)
    flat = products.flatten(-2)
    if flat.shape[-1] != math.prod(sizes) or 1 not in products.shape[-2:]:
        flat = flat.new_zeros((*flat.shape[:-1], math.prod(sizes))).index_add(-1, index.flatten(), flat)
    return flat.reshape(*flat.shape[:-1], *sizes), tuple(dilation)


def concatenate(*kernels: Kernel) -> Kernel:
    """Return the kernel whose outputs are those of all kernels, one behind the other (DBB, transform IV).

    Kernels with groups become dense: their outputs would not be in the order of one operator's groups.

    Raises:
        KernelError: their outputs differ in size or place.
    """
    for kernel in kernels[1:]:
        _check_places(kernels[0], kernel, "concatenated", "dims", "inputs")
    dense = [regroup(k, 1) for k in kernels]
    outputs = sum(k.outputs for k in dense)
    padded = []
    start = 0
    for k in dense:
        shape = [outputs - k.outputs, *k.blocks().shape[2:]]
        blocks = torch.cat([k.blocks()[0], k.weight.new_zeros(shape)]).roll(start, 0)
        bias = None
        if k.bias is not None:
            bias = F.pad(k.bias, (start, outputs - start - k.outputs))
        padded.append(k.with_blocks(blocks[None], bias=bias))
        start += k.outputs
    return add(*padded)


def behind(kernel: Kernel, factors: Tensor, shift: Tensor | None = None) -> Kernel:
    """Return ``kernel(factors * x + shift)``; factors and shift have one value per input, [I].

    Raises:
        KernelError: a shift in front of an operator that pads with zeros.
    """
    return then(affine(factors, shift, kernel.dims), kernel)


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _text(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
