"""Kernels: linear operators on feature maps as values.

A kernel is what a convolution, a transposed convolution or a linear layer is apart from where it stands: weight, bias
and geometry. ``reparam.ops.algebra`` adds and composes kernels; the results are kernels again, differentiable with
respect to the weights they were made from, in their dtype, and know no batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reparam.errors import KernelError

Sizes = tuple[int, ...]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True, eq=False)
class Kernel:
    """A linear operator: convolution over 0 (a linear layer) to 3 dimensions, or transposed convolution.

    Args:
        weight: [O, I / groups, *size], transposed [I, O / groups, *size], as torch stores them.
        bias: [O], or None.
        stride: per spatial dimension, as are the next three.
        padding: zeros on either side (transposed: what is cut off on either side).
        dilation: distance between taps.
        output_padding: of a transposed convolution.
        groups: blocks of channels that do not mix.
        transposed: whether it is a transposed convolution.
    """

    weight: Tensor
    bias: Tensor | None
    stride: Sizes
    padding: Sizes
    dilation: Sizes
    output_padding: Sizes
    groups: int = 1
    transposed: bool = False

    @property
    def dims(self) -> int:
        """Number of spatial dimensions."""
        return self.weight.dim() - 2

    @property
    def size(self) -> Sizes:
        """Taps per spatial dimension."""
        return tuple(self.weight.shape[2:])

    @property
    def inputs(self) -> int:
        """Number of input channels I."""
        return self.weight.shape[0] if self.transposed else self.weight.shape[1] * self.groups

    @property
    def outputs(self) -> int:
        """Number of output channels O."""
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]

    @property
    def span(self) -> Sizes:
        """Distance of the first tap from the last, per dimension."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.size, strict=True))

    @property
    def pointwise(self) -> bool:
        """Whether it acts on every place by itself: one tap, stride 1, no padding."""
        return {*self.size, *self.stride} <= {1} and not any((*self.padding, *self.output_padding))

    def __call__(self, x: Tensor) -> Tensor:
        """Run the operator on ``x`` [N, I, ...] (a linear layer: [..., I])."""
        if not self.dims:
            return self._linear(x)
        if self.transposed:
            return _TRANSPOSED[self.dims](
                x, self.weight, self.bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
            )
        return _CONV[self.dims](x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def _linear(self, x: Tensor) -> Tensor:
        """The operator without spatial dimensions; torch knows no linear layer with groups."""
        if self.groups == 1 and not self.transposed:
            return F.linear(x, self.weight, self.bias)
        y = torch.einsum("...gi,goi->...go", x.unflatten(-1, (self.groups, -1)), self.blocks()).flatten(-2)
        return y if self.bias is None else y + self.bias

    def with_bias(self, bias: Tensor | None) -> Kernel:
        """Return this kernel with ``bias`` [O] added to its own."""
        return replace(self, bias=bias if self.bias is None else self.bias if bias is None else self.bias + bias)

    def blocks(self) -> Tensor:
        """Return the weight as [groups, O / groups, I / groups, *size]."""
        weight = self.weight.unflatten(0, (self.groups, -1))
        return weight.transpose(1, 2) if self.transposed else weight

    def with_blocks(self, blocks: Tensor, **changes: Any) -> Kernel:
        """Return this kernel with the weight of these blocks (see :meth:`blocks`) and other fields changed."""
        flat = (blocks.transpose(1, 2) if self.transposed else blocks).flatten(0, 1)
        return replace(self, weight=flat, groups=blocks.shape[0], **changes)

    def __repr__(self) -> str:
        word = "transposed convolution" if self.transposed else "convolution" if self.dims else "linear layer"
        parts = [f"{word} {self.inputs} -> {self.outputs}"]
        parts += ["x".join(map(str, self.size))] if self.dims else []
        for name, plain in (("stride", 1), ("padding", 0), ("dilation", 1), ("output_padding", 0)):
            value = getattr(self, name)
            parts += [f"{name.replace('_', ' ')} {value}"] if any(v != plain for v in value) else []
        parts += [f"groups {self.groups}"] if self.groups > 1 else []
        return f"<{', '.join(parts)}{'' if self.bias is None else ', with bias'}>"


def conv(
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Kernel:
    """Return the kernel of a convolution, with the arguments of ``torch.nn.functional.conv2d``.

    Raises:
        KernelError: ``padding="same"`` of an even kernel (more zeros on one side), or a stride with it.
    """
    dims = weight.dim() - 2
    steps = _each(stride, dims)
    apart = _each(dilation, dims)
    if isinstance(padding, str):
        padding = _padding_of(padding, tuple(weight.shape[2:]), steps, apart)
    return Kernel(weight, bias, steps, _each(padding, dims), apart, (0,) * dims, groups)


def _padding_of(word: str, size: Sizes, stride: Sizes, dilation: Sizes) -> Sizes:
    """Return what ``"same"`` and ``"valid"`` stand for."""
    if word not in ("same", "valid"):
        raise KernelError(f"padding={word!r} is neither a number nor 'same' or 'valid'")
    if word == "valid":
        return (0,) * len(size)
    if set(stride) - {1}:
        raise KernelError(f"padding='same' with stride {stride}: the output is not as large as the input")
    spans = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
    if any(span % 2 for span in spans):
        raise KernelError("padding='same' of an even kernel puts more zeros on one side than on the other")
    return tuple(span // 2 for span in spans)


def conv_transpose(
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Kernel:
    """Return the kernel of a transposed convolution, with the arguments of ``F.conv_transpose2d``."""
    dims = weight.dim() - 2
    steps, cut, apart, more = (_each(v, dims) for v in (stride, padding, dilation, output_padding))
    return Kernel(weight, bias, steps, cut, apart, more, groups, transposed=True)


def linear(weight: Tensor, bias: Tensor | None = None) -> Kernel:
    """Return the kernel of a linear layer, weight [O, I]."""
    return Kernel(weight, bias, (), (), (), ())


def _each(value: int | Sequence[int], dims: int) -> Sizes:
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) * (dims if len(value) == 1 else 1)


# -- fixed kernels ---------------------------------------------------------------------------------------------------


def identity(channels: int, dims: int, like: Tensor, groups: int = 1) -> Kernel:
    """Return the kernel of one tap that changes nothing, in ``groups`` groups.

    Args:
        channels: C.
        dims: spatial dimensions.
        like: a tensor of the dtype and device.
        groups: blocks of channels; the weight is [C, C / groups, 1, ...].
    """
    eye = torch.eye(channels // groups, dtype=like.dtype, device=like.device).repeat(groups, 1)
    return _plain(eye.reshape(*eye.shape, *(1,) * dims), groups)


def affine(scale: Tensor, shift: Tensor | None, dims: int) -> Kernel:
    """Return the depthwise kernel of one tap: channel c times ``scale[c]``, plus ``shift[c]``."""
    return replace(_plain(scale.reshape(-1, 1, *(1,) * dims), len(scale)), bias=shift)


def average(channels: int, size: Sequence[int], like: Tensor) -> Kernel:
    """Return average pooling with this window as a depthwise kernel (DBB, transform V); stride 1, no padding."""
    weight = torch.full((channels, 1, *size), 1 / math.prod(size), dtype=like.dtype, device=like.device)
    return _plain(weight, channels)


def frequency(channels: int, size: Sequence[int], like: Tensor) -> Kernel:
    """Return OREPA's fixed prior as a depthwise kernel: cosines of rising frequency.

    The channels are cut into one part per spatial dimension. Channel ``i`` of a part, counted from 0, holds
    ``cos(pi (t + 0.5) (i + 1) / K)`` at tap ``t`` of K along the part's dimension, constant along the others.

    Source: OREPA (CVPR 2022), frequency prior filter; there for two dimensions and 3 taps. Where the
    parts are not equal, the first ones have one channel more (the paper's code then counts the second from a half).
    """
    weight = torch.ones((channels, 1, *size), dtype=like.dtype, device=like.device)
    start = 0
    for dim, k in enumerate(size):
        stop = start + (channels - start + len(size) - dim - 1) // (len(size) - dim)
        order = torch.arange(1, stop - start + 1, dtype=torch.float64).reshape(-1, 1)
        waves = torch.cos(math.pi * (torch.arange(k, dtype=torch.float64) + 0.5) * order / k)
        shape = [stop - start, 1, *(k if d == dim else 1 for d in range(len(size)))]
        weight[start:stop] = waves.reshape(shape).to(like)
        start = stop
    return _plain(weight, channels)


def _plain(weight: Tensor, groups: int) -> Kernel:
    dims = weight.dim() - 2
    return Kernel(weight, None, (1,) * dims, (0,) * dims, (1,) * dims, (0,) * dims, groups)
