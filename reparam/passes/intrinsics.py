"""Operators that torch writes as modules with control flow on the training flag, as one graph operator each.

Also custom autograd functions: their C++ entry would take a symbolic value for a tensor.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
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
    """While active, spectral norms are recorded as ``spectral_normalize``, autograd functions as their ``apply``.

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

    function = torch.autograd.Function
    own, plain_apply = vars(function).get("apply"), inspect.getattr_static(function, "apply")

    def apply(cls: Any, *args: Any) -> Any:
        value = record(_named(cls), args) if _is_symbolic(args) else NotImplemented
        return plain_apply.__get__(None, cls)(*args) if value is NotImplemented else value

    instance = torch.nn.modules.instancenorm._InstanceNorm
    plain_instance = instance.forward

    def normalize(self: Any, x: Any) -> Any:
        # torch compares the width with num_features first, which the tracer would take for control flow.
        if not issubclass(type(x), fx.Proxy) or x.dim() == self._get_no_batch_dim():
            return plain_instance(self, x)
        self._check_input_dim(x)
        batch = self.training if self.track_running_stats else True
        statistics = (self.running_mean, self.running_var, self.weight, self.bias)
        return F.instance_norm(x, *statistics, batch, self.momentum, self.eps)

    instance.forward = normalize  # type: ignore[method-assign]
    modern.forward, hook.compute_weight = forward, compute_weight  # type: ignore[method-assign]
    function.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        modern.forward, hook.compute_weight = plain_forward, plain_compute  # type: ignore[method-assign]
        instance.forward = plain_instance  # type: ignore[method-assign]
        del function.apply
        if own is not None:
            function.apply = own
