"""Kernels that are a product of channels and taps, added to another kernel without writing each of them out.

A pointwise operator, alone or with a depthwise one before or behind it, has the kernel
``W[o, i, tap] = sum_k channels[o, i, k] taps[o or i, k, tap]``. Many branches are of this form (OREPA's average, prior,
1x1 and depthwise-separable ones). Written out, each would be as large as the whole kernel, several times over with
its gradients; as products all of them are added in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reparam.ops.kernels import Kernel, Sizes


@dataclass(frozen=True)
class Factors:
    """An operator without bias and padding as a product.

    Args:
        channels: [K, O, I / groups].
        taps: [O, K, *size], or with ``by_input`` [I / groups, K, *size].
        stride: per dimension.
        dilation: per dimension.
        groups: of the operator.
        by_input: the taps belong to inputs instead of outputs.
    """

    channels: Tensor
    taps: Tensor
    stride: Sizes
    dilation: Sizes
    groups: int
    by_input: bool = False

    def scaled(self, factors: Tensor) -> Factors:
        """Return the product with each output multiplied by its factor, [O]."""
        if self.by_input:
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
        middle = torch.zeros(size, dtype=self.taps.dtype, device=self.taps.device)
        middle[tuple(k // 2 for k in size)] = 1
        return self.taps.flatten(2) * middle.flatten()


def point(kernel: Kernel) -> Factors:
    """Return a kernel of one tap as a product."""
    weight = kernel.weight
    taps = weight.new_ones((len(weight), 1, *(1,) * kernel.dims))
    return Factors(weight.flatten(1)[None], taps, kernel.stride, kernel.dilation, kernel.groups)


def sequence(first: Kernel, second: Kernel) -> Factors | None:
    """Return a pointwise kernel and a depthwise one, in either order, as a product; None for others."""
    if not first.dims or any((*first.padding, *second.padding)) or first.bias is not None or second.bias is not None:
        return None
    if first.pointwise and second.groups == second.inputs == second.outputs:
        return Factors(first.weight.flatten(1)[None], second.weight, second.stride, second.dilation, first.groups)
    if second.pointwise and first.groups == first.inputs:
        return _depthwise_first(first, second)
    return None


def _depthwise_first(first: Kernel, second: Kernel) -> Factors | None:
    """Each input has ``first.outputs / first.inputs`` filters, which the outputs of its group mix."""
    groups, outputs = second.groups, second.outputs
    taps = first.weight.reshape(first.inputs, -1, *first.size)
    channels = second.weight.reshape(outputs, first.inputs // groups, -1).permute(2, 0, 1)
    if groups == 1:
        return Factors(channels, taps, first.stride, first.dilation, groups, by_input=True)
    if groups != first.inputs:  # the taps of an input depend on the group
        return None
    return Factors(channels, taps.repeat_interleave(outputs // groups, 0), first.stride, first.dilation, groups)


def add(kernel: Kernel, products: Sequence[Factors]) -> Kernel:
    """Return the sum of a kernel and products that join it (:meth:`Factors.joins`)."""
    if not products:
        return kernel
    weight = kernel.weight.flatten(2)
    for by_input in (False, True):
        chosen = [product for product in products if product.by_input == by_input]
        if not chosen:
            continue
        taps = torch.cat([product.placed(kernel.size) for product in chosen], 1)
        channels = torch.cat([product.channels for product in chosen])
        if by_input:
            weight = weight + torch.bmm(channels.permute(2, 1, 0), taps).transpose(0, 1)
        else:
            weight = torch.baddbmm(weight, channels.permute(1, 2, 0), taps)
    return replace(kernel, weight=weight.reshape(kernel.weight.shape))
