"""Operators that torch writes as modules with control flow on the training flag, as one graph operator each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrizations, spectral_norm


def spectral_normalize(
    weight: Tensor, u: Tensor, v: Tensor, training: bool, dim: int, iterations: int, eps: float, u_first: bool
) -> Tensor:
    """Divide ``weight`` by its largest singular value, estimated by power iteration.

    Args:
        weight: any shape with at least two dimensions.
        u: left singular vector, [weight.shape[dim]]; updated in place in train mode.
        v: right singular vector, [product of the other sizes]; updated in place in train mode.
        training: whether to iterate.
        dim: dimension of the rows.
        iterations: power iterations per call.
        eps: smallest norm of a vector.
        u_first: which vector an iteration updates first.
    """
    matrix = weight.movedim(dim, 0).flatten(1)
    if training:
        with torch.no_grad():
            for _ in range(iterations):
                for left in (u_first, not u_first):
                    vector = torch.mv(matrix, v) if left else torch.mv(matrix.t(), u)
                    (u if left else v).copy_(F.normalize(vector, dim=0, eps=eps))
    sigma = torch.vdot(u.clone(), torch.mv(matrix, v.clone()))
    return weight / sigma


@contextlib.contextmanager
def intrinsics(record: Callable[[Callable[..., Any], tuple[Any, ...]], Any]) -> Iterator[None]:
    """While active, torch's spectral norms are recorded as ``spectral_normalize``.

    Args:
        record: gets the operator and its arguments; returns the recorded value, or NotImplemented to run torch's code.
    """
    modern, hook = parametrizations._SpectralNorm, spectral_norm.__globals__["SpectralNorm"]
    plain_forward, plain_compute = modern.forward, hook.compute_weight

    def forward(self: Any, weight: Any) -> Any:
        if weight.ndim == 1:
            return plain_forward(self, weight)
        arguments = (weight, self._u, self._v, self.training, self.dim, self.n_power_iterations, self.eps, True)
        value = record(spectral_normalize, arguments)
        return plain_forward(self, weight) if value is NotImplemented else value

    def compute_weight(self: Any, module: Any, do_power_iteration: Any) -> Any:
        weight, u, v = (getattr(module, self.name + end) for end in ("_orig", "_u", "_v"))
        arguments = (weight, u, v, do_power_iteration, self.dim, self.n_power_iterations, self.eps, False)
        value = record(spectral_normalize, arguments)
        return plain_compute(self, module, do_power_iteration) if value is NotImplemented else value

    modern.forward, hook.compute_weight = forward, compute_weight  # type: ignore[method-assign]
    try:
        yield
    finally:
        modern.forward, hook.compute_weight = plain_forward, plain_compute  # type: ignore[method-assign]
