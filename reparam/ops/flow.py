"""A feature map on its way through the operators of a branch, with the padding that has not been done yet.

In a sequence only the first operator that reads more than one place may pad. What comes before it acts on each place by
itself; so padding waits, and the value of a padded place goes through the same operators: zeros in front of a norm are
the norm's shift behind it.

Source: DBB (CVPR 2021), where the first norm pads with its bias value, so that merging is right at the border.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from reparam.ops import algebra
from reparam.ops.kernels import Kernel, Sizes


@dataclass(frozen=True, eq=False)
class Flow:
    """A feature map.

    Args:
        x: [N, C, ...] (behind linear operators [..., C]).
        padding: places still to be added on either side, per dimension; negative ones are to be cut off.
        value: [C], what a padded place holds; None for zeros.
    """

    x: Tensor
    padding: Sizes
    value: Tensor | None = None

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.x.shape[1] if self.padding else self.x.shape[-1]

    def cropped(self, span: Sizes, own: Sizes) -> Flow:
        """Return what an operator of span ``own`` sees, in the middle of what one of ``span`` sees."""
        sides = [(a - b) // 2 for a, b in zip(span, own, strict=True)]
        return replace(self, padding=tuple(p - s for p, s in zip(self.padding, sides, strict=True)))

    def through(self, kernel: Kernel) -> Flow:
        """Return what comes out of an operator that does not pad by itself."""
        if kernel.pointwise:
            value = self.value
            if value is not None:
                column = value.reshape(1, -1, *(1,) * kernel.dims)
                value = kernel(column).flatten()
            return Flow(kernel(self.x), self.padding, value)
        if self.value is None and all(p >= 0 for p in self.padding):
            return Flow(replace(kernel, padding=self.padding)(self.x), (0,) * kernel.dims)
        return Flow(kernel(self.padded().x), (0,) * kernel.dims)

    def padded(self) -> Flow:
        """Return the same feature map with its padding done."""
        if not any(self.padding):
            return Flow(self.x, self.padding)
        sides = [side for p in reversed(self.padding) for side in (p, p)]
        none = (0,) * len(self.padding)
        if self.value is None:
            return Flow(F.pad(self.x, sides), none)
        column = self.value.reshape(1, -1, *(1,) * len(self.padding))
        return Flow(F.pad(self.x - column, sides) + column, none)

    def scaled(self, factors: Tensor) -> Flow:
        """Return it times one factor per channel, [C]."""
        value = None if self.value is None else self.value * factors
        return replace(self, x=self.x * self._column(factors), value=value)

    def normed(
        self,
        mean: Tensor,
        var: Tensor,
        weight: Tensor,
        bias: Tensor,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Flow:
        """Return it behind a batch norm; all tensors [C]. Padding that waits is no part of the statistics."""
        x = self.x if self.padding else self.x.flatten(0, -2)
        x = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
        x = x if self.padding else x.unflatten(0, self.x.shape[:-1])
        if not any(self.padding):
            return Flow(x, self.padding)
        factor, shift = algebra.affine_of(mean, var, weight, bias, eps)
        value = shift if self.value is None else shift + factor * self.value
        return Flow(x, self.padding, value)

    def _column(self, values: Tensor) -> Tensor:
        return values.reshape(-1, *(1,) * len(self.padding))


def summed(flows: Sequence[Flow]) -> Flow:
    """Return the sum; padding that differs is done before."""
    if len({flow.padding for flow in flows}) > 1:
        flows = [flow.padded() for flow in flows]
    values = [flow.value for flow in flows if flow.value is not None]
    total: Tensor = functools.reduce(torch.add, (flow.x for flow in flows))
    return Flow(total, flows[0].padding, functools.reduce(torch.add, values) if values else None)
