"""Kernels that are a product of channels and taps, added to another kernel without writing each of them out.

A pointwise operator, alone or with another one before or behind it, has the kernel
``W[o, i, tap] = sum_k channels[o, i, k] taps[o or i, k, tap]``. Many branches are of this form: OREPA's average, prior
and 1x1 (taps of the output), its depthwise-separable branch (taps of the input), and its 1x1 in front of a full kernel
(channels that all outputs share). Written out, each would be as large as the whole kernel, several times over with its
gradients; as products those of one kind are added in one pass, in place. With TF32 switched on, a GPU rounds what goes
into the products, as it does in the convolution that uses the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reparam.ops import algebra
from reparam.ops.kernels import Kernel, Sizes

KINDS = ("output", "input", "shared")
"""Taps of each output, taps of each input, taps of each output with channels that all outputs share."""


@dataclass(frozen=True)
class Factors:
    """An operator without bias and padding as a product.

    Args:
        channels: [K, O, I / groups]; of the kind ``"shared"`` [K, 1, I].
        taps: [O, K, *size]; of the kind ``"input"`` [I, K, *size].
        stride: per dimension.
        dilation: per dimension.
        groups: of the operator; 1 for other kinds than ``"output"``.
        kind: one of :data:`KINDS`.
    """

    channels: Tensor
    taps: Tensor
    stride: Sizes
    dilation: Sizes
    groups: int
    kind: str = "output"

    def scaled(self, factors: Tensor) -> Factors:
        """Return the product with each output multiplied by its factor, [O]."""
        if self.kind == "input":
            return replace(self, channels=self.channels * factors[:, None])
        return replace(self, taps=self.taps * factors.reshape(-1, *(1,) * (self.taps.dim() - 1)))

    def joins(self, kernel: Kernel) -> bool:
        """Whether its taps are taken at the places of those of ``kernel``, or its only tap is in their middle."""
        size = tuple(self.taps.shape[2:])
        if set(kernel.size) <= {1}:  # nothing to save
            return False
        if kernel.transposed or kernel.groups != self.groups or kernel.stride != self.stride:
            return False
        if set(size) == {1}:
            return all(k % 2 for k in kernel.size)
        return size == kernel.size and self.dilation == kernel.dilation

    def placed(self, size: Sizes) -> Tensor:
        """Return the taps as [O or I / groups, K, number of taps], a single one in the middle."""
        if tuple(self.taps.shape[2:]) == size:
            return self.taps.flatten(2)
        beside = math.prod(size) // 2  # sizes are odd, see joins
        return F.pad(self.taps.flatten(2), (beside, beside))


def point(kernel: Kernel) -> Factors:
    """Return a kernel of one tap as a product."""
    weight = kernel.weight
    taps = weight.new_ones((len(weight), 1, *(1,) * kernel.dims))
    return Factors(weight.flatten(1)[None], taps, kernel.stride, kernel.dilation, kernel.groups)


def sequence(first: Kernel, second: Kernel) -> Factors | None:
    """Return two kernels in a row as a product, where one is pointwise; None for others."""
    if not first.dims or any((*first.padding, *second.padding)) or first.bias is not None or second.bias is not None:
        return None
    if first.pointwise and second.groups == second.inputs == second.outputs:
        return Factors(first.weight.flatten(1)[None], second.weight, second.stride, second.dilation, first.groups)
    if first.pointwise and first.groups == second.groups == 1:
        channels = first.weight.flatten(1)[:, None]
        return Factors(channels, second.weight, second.stride, second.dilation, 1, "shared")
    if second.pointwise and first.groups == first.inputs:
        return _depthwise_first(first, second)
    return None


def _depthwise_first(first: Kernel, second: Kernel) -> Factors | None:
    """Each input has ``first.outputs / first.inputs`` filters, which the outputs of its group mix."""
    groups, outputs = second.groups, second.outputs
    taps = first.weight.reshape(first.inputs, -1, *first.size)
    channels = second.weight.reshape(outputs, first.inputs // groups, -1).permute(2, 0, 1)
    if groups == 1:
        return Factors(channels, taps, first.stride, first.dilation, groups, "input")
    if groups != first.inputs:  # the taps of an input depend on the group
        return None
    return Factors(channels, taps.repeat_interleave(outputs // groups, 0), first.stride, first.dilation, groups)


def add(kernel: Kernel, scale: Tensor | None, products: Sequence[Factors]) -> Kernel:
    """Return the sum of a kernel and products that join it (:meth:`Factors.joins`).

    Args:
        kernel: to add to.
        scale: factors of its outputs, [O]; None for none.
        products: of any kind.
    """
    if not products:
        return kernel if scale is None else algebra.scale(kernel, scale)
    pairs: list[Tensor | None] = []
    for kind in KINDS:
        chosen = [product for product in products if product.kind == kind]
        pairs.append(torch.cat([product.channels for product in chosen]) if chosen else None)
        pairs.append(torch.cat([product.placed(kernel.size) for product in chosen], 1) if chosen else None)
    # A compiler joins the operators of forward and backward itself.
    total = _total if torch.compiler.is_compiling() else _Total.apply
    bias = kernel.bias if kernel.bias is None or scale is None else kernel.bias * scale
    return replace(kernel, weight=total(kernel.weight, scale, *pairs), bias=bias)


def _total(weight: Tensor, scale: Tensor | None, *pairs: Tensor | None) -> Tensor:
    """Scale a weight [O, I / groups, *size] and add channels and taps of each kind; one new tensor, filled in place."""
    result = weight.clone() if scale is None else weight * scale.reshape(-1, *(1,) * (weight.dim() - 1))
    flat = result.contiguous().flatten(2)
    channels, taps, *rest = pairs
    if channels is not None and taps is not None:
        # Not baddbmm_: torch's flop counter knows the other two.
        out = None if torch.is_grad_enabled() else flat
        flat = torch.baddbmm(flat, channels.permute(1, 2, 0), taps, out=out)
    channels, taps, *rest = rest
    if channels is not None and taps is not None:
        flat.add_(torch.bmm(channels.permute(2, 1, 0), taps).transpose(0, 1))
    channels, taps = rest
    if channels is not None and taps is not None:
        columns = channels[:, 0].T @ taps.transpose(0, 1).flatten(1)  # [I, outputs x taps]
        flat.add_(columns.unflatten(1, (len(weight), -1)).transpose(0, 1))
    whole = flat.reshape(weight.shape)
    last = weight.dim() == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
    return whole.contiguous(memory_format=torch.channels_last) if last else whole


class _Total(torch.autograd.Function):
    """:func:`_total` with a backward pass that writes no tensor of the weight's size but the weight's own gradient."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _total(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, *pairs = ctx.saved_tensors
        needed = ctx.needs_input_grad
        gradient = gradients[0].contiguous()
        flat = gradient.flatten(2)
        of_scale = None
        if scale is not None and needed[1]:
            rows, own = flat.flatten(1)[:, None], weight.flatten(1)[..., None]
            # On a CPU the product of both is not written out; a GPU would round inside of a matrix product (TF32).
            of_scale = (rows @ own).flatten() if rows.device.type == "cpu" else (rows[:, 0] * own[..., 0]).sum(1)
        of_weight = None
        if needed[0]:
            of_weight = gradient if scale is None else gradient * scale.reshape(-1, *(1,) * (weight.dim() - 1))
        found: list[Tensor | None] = [of_weight, of_scale]
        for kind, backward in enumerate((_of_output, _of_input, _of_shared)):
            channels, taps = pairs[2 * kind : 2 * kind + 2]
            found += (None, None) if channels is None else backward(flat, channels, taps)
        return tuple(found)


def _of_output(gradient: Tensor, channels: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of channels [K, O, I] and taps [O, K, n] from that of the weight [O, I, n]."""
    return torch.bmm(gradient, taps.mT).permute(2, 0, 1), torch.bmm(channels.permute(1, 0, 2), gradient)


def _of_input(gradient: Tensor, channels: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """The same for taps [I, K, n]."""
    turned = gradient.transpose(0, 1)
    return torch.bmm(turned, taps.mT).permute(2, 1, 0), torch.bmm(channels.permute(2, 0, 1), turned)


def _of_shared(gradient: Tensor, channels: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """The same for channels [K, 1, I]."""
    turned = gradient.transpose(0, 1).flatten(1)  # [I, outputs x taps]
    of_taps = (channels[:, 0] @ turned).unflatten(1, (len(gradient), -1)).transpose(0, 1)
    return (taps.transpose(0, 1).flatten(1) @ turned.T)[:, None], of_taps
