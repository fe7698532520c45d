"""Random values for what starts constant, so that no wrong map hides behind a zero or a one."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def randomise(model: M, seed: int = 0) -> M:
    """Give norms, their statistics, gains and everything else that starts constant random values, in place.

    Variances lie in [0.5, 2], means and biases in [-0.3, 0.3], gains in [0.7, 1.3]. The values do not depend on the
    dtype of the model, except for its rounding.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator, dtype=torch.float64).mul(high - low).add(low).to(like)

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            if name.endswith("running_var"):
                tensor.copy_(uniform(tensor, 0.5, 2.0))
            elif name.endswith("running_mean"):
                tensor.copy_(uniform(tensor, -0.3, 0.3))
            elif bool((tensor == tensor.flatten()[0]).all()):
                mean = float(tensor.flatten()[0])
                tensor.copy_(uniform(tensor, 0.7, 1.3) if mean else uniform(tensor, -0.3, 0.3))
    return model
