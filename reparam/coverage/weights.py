"""Random values for what starts constant, so that no wrong map hides behind a zero or a one."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from reparam.passes.example import Inputs
from reparam.passes.restore import unchanged
from reparam.passes.world import eval_mode

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


def balance(model: M, inputs: Inputs) -> M:
    """Bring running statistics and layers to the scale of what they get, in place, by one run in eval mode.

    A norm whose variances have nothing to do with its inputs does not normalise: activations grow from block to block,
    scores of attention reach 1e5, and the student's own rounding grows with them. So each variance is multiplied by the
    mean square of what the norm gets, each mean by its root; they differ between channels as before. A layer that
    starts small (the last ones of a detector) makes outputs that are all alike, and nothing is detected: convolutions
    and linear layers are multiplied so that the mean square of their outputs is 1.

    A module that is called more than once keeps the scale of its first call; one that is not called, or on nothing, or
    puts out zeros, keeps its values.

    Args:
        model: a network with random weights and statistics.
        inputs: real ones, positional and keyword, that are not changed.
    """
    seen: set[nn.Module] = set()

    def scale(module: nn.Module, args: tuple[Any, ...]) -> None:
        size = _mean_square(args)
        if size and module not in seen:
            seen.add(module)
            for name, tensor in _statistics(module).items():
                tensor.mul_(size if name == "running_var" else math.sqrt(size))

    def balanced(module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        size = _mean_square((output,))
        if not size or module in seen:
            return output
        seen.add(module)
        for tensor in module.parameters(recurse=False):
            tensor.div_(math.sqrt(size))
        return output / math.sqrt(size)

    hooks = [m.register_forward_pre_hook(scale) for m in model.modules() if _statistics(m)]
    hooks += [m.register_forward_hook(balanced) for m in model.modules() if isinstance(m, (nn.Linear, _ConvNd))]
    args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs)
    try:
        with torch.no_grad(), eval_mode(model), unchanged(model):
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return model


def _mean_square(values: tuple[Any, ...]) -> float:
    """Return the mean square of the first tensor, 0 where there is none or its mean square is no number."""
    tensors = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    size = float(tensors[0].double().square().mean()) if tensors else 0.0
    return size if math.isfinite(size) else 0.0


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    """Return the running statistics that a module has itself."""
    return {n: v for n in ("running_mean", "running_var") if (v := module._buffers.get(n)) is not None}
