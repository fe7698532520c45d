"""What `reparam.passes.heads` puts into a network: parallel copies of an operator, and a norm that lets values pass."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reparam.errors import InputError
from reparam.ops import algebra
from reparam.ops.kernels import Kernel, linear

COMBINATIONS = ("mean", "random")
"""What heads give to the next layer in train mode."""

_TENSORS = ("running_mean", "running_var", "weight", "bias")
"""Of a batch norm."""

_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@dataclass(frozen=True)
class Taker:
    """Who takes in the bias of a merged operator that has none itself.

    Attributes:
        path: of a batch norm, or of a convolution or linear layer with a bias.
        norm: which of both.
        index: channel of the bias at each channel of what enters it, -1 where nothing arrives.
        factor: how often it arrives.
    """

    path: str
    norm: bool
    index: tuple[int, ...]
    factor: int


@dataclass(frozen=True)
class Place:
    """Where heads are in a network.

    Attributes:
        stage: name by which they were asked for.
        path: of the module that they replace.
        geometry: of its kernel, without tensors: stride, padding, dilation, output_padding, groups, transposed.
        norm: path of the batch norm that followed it; None if there was none.
        takers: who takes in the bias of the merged operator, where neither it nor a norm has room for one.
    """

    stage: str
    path: str
    geometry: dict[str, Any] = field(default_factory=dict)
    norm: str | None = None
    takers: tuple[Taker, ...] = ()


class RowNorm(nn.Module):
    """Batch norm of values whose channels are last, over all other dimensions: ``[..., C] -> [..., C]``."""

    def __init__(self, channels: int, eps: float, momentum: float | None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, eps, momentum)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the rows."""
        normed: Tensor = self.norm(x.reshape(-1, x.shape[-1]))
        return normed.reshape(x.shape)


class Heads(nn.Module):
    """Parallel copies of an operator, each with a batch norm of its own; their mean goes on.

    ``z_j = BN_j(g_j(x))`` and ``mean_j z_j``. Each ``z_j`` is the output of the module ``norms.<j>``: a tap reads it.

    Args:
        operators: the copies, ``m`` convolutions or linear layers.
        place: where they are.
        eps: of the norms.
        momentum: of the norms.
        combine: what goes on in train mode, "mean" or "random": one of them, drawn anew in every call from torch's
            own generator. In eval mode it is the mean.
    """

    def __init__(
        self, operators: list[nn.Module], place: Place, eps: float, momentum: float | None, combine: str
    ) -> None:
        super().__init__()
        self.operators = nn.ModuleList(operators)
        self.place, self.combine = place, combine
        weight = _weight(operators[0])
        dims = weight.dim() - 2
        channels = weight.shape[1] * place.geometry["groups"] if place.geometry["transposed"] else weight.shape[0]
        with torch.device(weight.device):
            made = [self._norm(dims, channels, eps, momentum) for _ in operators]
        self.norms = nn.ModuleList(made).to(weight.dtype)

    @staticmethod
    def _norm(dims: int, channels: int, eps: float, momentum: float | None) -> nn.Module:
        return _NORMS[dims](channels, eps, momentum) if dims else RowNorm(channels, eps, momentum)

    def features(self, x: Tensor) -> list[Tensor]:
        """Return all ``z_j``."""
        return [norm(operator(x)) for operator, norm in zip(self.operators, self.norms, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        """Return what goes on, of the shape of one of them."""
        found = self.features(x)
        if self.training and self.combine == "random":
            return found[int(torch.randint(len(found), ()))]
        total = found[0]
        for value in found[1:]:  # a sum of values, which folding can read
            total = total + value
        return total / len(found)

    def extra_repr(self) -> str:
        """Show how many there are."""
        return f"count={len(self.operators)}, combine={self.combine!r}"


class Passing(nn.Module):
    """A batch norm that has to let values pass, because those in front of it are normalised already.

    What the norm's module does besides (an activation of its own) it still does. Its parameters are constants for the
    time being, and train mode does not reach its statistics.

    Args:
        norm: the batch norm; changed.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        eps: Any = norm.eps
        if not eps < 1:
            raise InputError(f"a batch norm with eps={eps} cannot let values pass; heads need one with eps < 1")
        self.norm = norm
        self.trained = {name: p.requires_grad for name, p in norm.named_parameters(recurse=False)}
        with torch.no_grad():
            for name, value in zip(_TENSORS, (0.0, 1.0 - eps, 1.0, 0.0), strict=True):
                tensor = getattr(norm, name)
                if tensor is not None:
                    tensor.fill_(value)
        for parameter in norm.parameters(recurse=False):
            parameter.requires_grad_(False)
        self.train(norm.training)

    def train(self, mode: bool = True) -> Passing:
        """Set the mode of everything but the norm itself."""
        super().train(mode)
        self.norm.training = False
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module of the norm."""
        return self.norm(*args, **kwargs)


# Copies --------------------------------------------------------------------------------------------------------------


def copies(operator: nn.Module, count: int, generator: torch.Generator | None) -> list[nn.Module]:
    """Return copies of a convolution or linear layer with weights drawn anew; biases stay.

    Weights are normal with the standard deviation of the operator's own, which is that of its first values in a fresh
    network, and does not depend on how these were drawn. Of weights that are all 0 it is He's, with fan-out.
    """
    made = []
    for _ in range(count):
        module = copy.deepcopy(operator)
        weight = _weight(module)
        if not weight.is_meta:
            with torch.no_grad():
                weight.copy_(_drawn(weight, generator))
        made.append(module)
    return made


def _drawn(weight: Tensor, generator: torch.Generator | None) -> Tensor:
    spread = float(weight.double().std()) if weight.numel() > 1 else 0.0
    if not spread > 0:
        spread = (2 / max(weight.numel() // weight.shape[1], 1)) ** 0.5
    home = generator.device if generator is not None else torch.device("cpu")
    return torch.randn(weight.shape, generator=generator, device=home) * spread


def _weight(operator: nn.Module) -> Tensor:
    weight: Any = operator.weight
    return weight


# Merging -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merged:
    """Heads as one operator, in float64.

    Attributes:
        kernel: of the mean of all heads, without bias.
        bias: of that mean, ``[O]``.
        mean: of what the kernel returns, as far as the heads' statistics know it, ``[O]``: without ``own``.
        own: what the biases of the operators contribute, ``[O]``; None if they have none.
    """

    kernel: Kernel
    bias: Tensor
    mean: Tensor
    own: Tensor | None


def merged(heads: Heads) -> Merged:
    """Merge heads in eval mode: every one with its norm (DBB, transform I), then their mean (transform II).

    Source: Ding et al., "Diverse Branch Block" (CVPR 2021), equations 3 and 4.
    """
    count = len(heads.operators)
    parts, means, owns = [], [], []
    for operator, norm in zip(heads.operators, heads.norms, strict=True):
        inner: Any = norm.norm if isinstance(norm, RowNorm) else norm
        kernel = kernel_of(operator, heads.place.geometry)
        mean, var, weight, bias = (getattr(inner, name).detach().double() for name in _TENSORS)
        factor, _ = algebra.affine_of(mean, var, weight, bias, inner.eps)
        parts.append(algebra.normalise(kernel, mean, var, weight, bias, inner.eps))
        own = None if kernel.bias is None else kernel.bias * factor / count
        means.append(mean * factor / count - (0 if own is None else own))
        owns += [] if own is None else [own]
    whole = algebra.add(*parts)
    assert whole.bias is not None
    whole = algebra.scale(whole, torch.full_like(whole.bias, 1 / count))
    assert whole.bias is not None
    return Merged(whole, whole.bias, torch.stack(means).sum(0), torch.stack(owns).sum(0) if owns else None)


def kernel_of(operator: nn.Module, geometry: dict[str, Any]) -> Kernel:
    """Return a convolution or linear layer as a kernel in float64."""
    weight, bias = _double(_weight(operator)), _double(getattr(operator, "bias", None))
    assert weight is not None
    return linear(weight, bias) if not geometry["stride"] else Kernel(weight, bias, **geometry)


def _double(tensor: Any) -> Tensor | None:
    return None if tensor is None else tensor.detach().double()


def give(norm: nn.Module, found: Merged, own: Tensor) -> None:
    """Set a norm that let values pass so that it puts the bias of a merged operator behind it.

    Its running mean becomes what the heads know of it; its variance and weight stay, as nobody knows the variance of
    the mean of all heads.

    Args:
        norm: of the network; changed.
        found: the merged operator.
        own: the bias that the operator has itself, ``[O]``.
    """
    place: Any = norm
    mean, var, weight, bias = (_double(getattr(place, name)) for name in _TENSORS)
    assert mean is not None and var is not None
    factor, shift = algebra.affine_of(mean, var, weight, bias, place.eps)
    wanted = factor * (found.bias - own) + shift  # what it has to add to ``factor * operator(x)``
    with torch.no_grad():
        if bias is None:
            place.running_mean.copy_(-wanted / factor)
        else:
            place.running_mean.copy_(found.mean + own)
            place.bias.copy_(wanted + factor * place.running_mean.double())


def take(module: nn.Module, taker: Taker, bias: Tensor) -> None:
    """Let a module behind merged heads take in their bias.

    A batch norm of ``x + b`` has another mean, a linear operator another bias.

    Args:
        module: of the network; changed.
        taker: who it is.
        bias: of the merged operator, ``[O]``, in float64.
    """
    place: Any = module
    index = torch.tensor(taker.index, device=bias.device)
    shift = torch.where(index >= 0, taker.factor * bias[index], 0)
    with torch.no_grad():
        if taker.norm:
            place.running_mean.copy_(place.running_mean.double() - shift)
            return
        weight = place.weight.double()
        rows = weight.flatten(2).sum(-1) if weight.dim() > 2 else weight
        groups = getattr(place, "groups", 1)
        carried = torch.einsum("goi,gi->go", rows.reshape(groups, -1, rows.shape[-1]), shift.unflatten(0, (groups, -1)))
        place.bias.copy_(place.bias.double() + carried.flatten())
