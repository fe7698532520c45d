"""Averaged weights: timm's moving average, for networks whose state is more than plain float tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from timm.utils import ModelEmaV3  # type: ignore[attr-defined]
from torch import Tensor, nn

from reparam.passes.skeleton import canonical_names, named_tensors


class Averages(ModelEmaV3):
    """Moving average of a network's parameters and of its buffers: decay and warm-up are timm's.

    Timm goes through the ``state_dict``. There, a tensor of two names stands twice and would move twice as fast; a mask
    of -inf would become NaN, as the mean of two infinities is none; and complex numbers would not be averaged. Buffers
    that are not finite at the start, and whatever holds no real or complex numbers, are copied.

    Args:
        model: the network in training.
        decay: weight of the average so far, in [0, 1).
        warmup: whether the decay starts small.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool) -> None:
        super().__init__(model, decay=decay, use_warmup=warmup)
        self._masks = {name for name, buffer in model.named_buffers() if not bool(buffer.isfinite().all())}

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Move the averages a step towards the network."""
        averages: list[Tensor] = []
        values: list[Tensor] = []
        for name, average, value in self._pairs(model):
            if name in self._masks or not (value.is_floating_point() or value.is_complex()):
                average.copy_(value)
            else:
                averages.append(_real(average))
                values.append(_real(value))
        if averages:
            torch._foreach_lerp_(averages, values, weight=1 - decay)

    def _pairs(self, model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield every tensor once, under its first name."""
        current = dict(named_tensors(model))
        own = dict(named_tensors(self.module))
        for name, first in canonical_names(self.module).items():
            if name == first:
                yield name, own[name], current[name]


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
