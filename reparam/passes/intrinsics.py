"""Operators that torch writes as modules with control flow on the training flag, as one graph operator each.

Also what would fail or crash on symbolic values: custom autograd functions, tensors made from sizes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._functorch import apis, eager_transforms
from torch.nn.utils import parametrizations, spectral_norm
from torch.utils import checkpoint

from reparam.passes.proxies import source_line
from reparam.passes.torch_modules import Patch, Record, everywhere, is_symbolic, torch_modules
from reparam.passes.torch_recurrent import torch_recurrent


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


_FACTORIES = "zeros ones empty full rand randn randint arange linspace eye tensor as_tensor finfo iinfo".split()


@contextlib.contextmanager
def intrinsics(record: Record, function: Record) -> Iterator[None]:
    """While active, operators that the tracer cannot look into are recorded as one node each.

    These are spectral norms (as ``spectral_normalize``), instance norms, custom autograd functions, factories of
    tensors whose sizes are symbolic, and torch's attention and recurrent modules.

    Args:
        record: ``record(function, args, kwargs)`` returns the recorded value, or NotImplemented to run torch's code.
        function: the same for functions that may be traced into, or recorded as one operator.
    """
    patches = [*_spectral_norms(record), *_instance_norms(), *_autograd_functions(record), *_factories(record)]
    patches += [*_checkpoints(), *_same_paddings(record), *torch_modules(record), *torch_recurrent(record)]
    patches += [*_branching_functions(function), *_transforms()]
    with contextlib.ExitStack() as stack:
        for holder, name, value in patches:
            stack.callback(_restore, holder, name, vars(holder).get(name, _MISSING))
            setattr(holder, name, value)
        yield


_MISSING = object()


def _restore(holder: Any, name: str, value: Any) -> None:
    if value is _MISSING:
        delattr(holder, name)
    else:
        setattr(holder, name, value)


def _spectral_norms(record: Record) -> list[Patch]:
    modern, hook = parametrizations._SpectralNorm, spectral_norm.__globals__["SpectralNorm"]
    plain_forward, plain_compute = modern.forward, hook.compute_weight

    def forward(self: Any, weight: Any) -> Any:
        if weight.ndim == 1:
            return plain_forward(self, weight)
        arguments = (weight, self._u, self._v, self.training, self.dim, self.n_power_iterations, self.eps, True)
        value = record(spectral_normalize, arguments, {})
        return plain_forward(self, weight) if value is NotImplemented else value

    def compute_weight(self: Any, module: Any, do_power_iteration: Any) -> Any:
        weight, u, v = (getattr(module, self.name + end) for end in ("_orig", "_u", "_v"))
        arguments = (weight, u, v, do_power_iteration, self.dim, self.n_power_iterations, self.eps, False)
        value = record(spectral_normalize, arguments, {})
        return plain_compute(self, module, do_power_iteration) if value is NotImplemented else value

    return [(modern, "forward", forward), (hook, "compute_weight", compute_weight)]


def _instance_norms() -> list[Patch]:
    instance = torch.nn.modules.instancenorm._InstanceNorm
    plain = instance.forward

    def forward(self: Any, x: Any) -> Any:
        # torch compares the width with num_features first, which the tracer would take for control flow.
        if not is_symbolic(x) or x.dim() == self._get_no_batch_dim():
            return plain(self, x)
        self._check_input_dim(x)
        batch = self.training if self.track_running_stats else True
        statistics = (self.running_mean, self.running_var, self.weight, self.bias)
        return F.instance_norm(x, *statistics, batch, self.momentum, self.eps)

    return [(instance, "forward", forward)]


def _autograd_functions(record: Record) -> list[Patch]:
    function = torch.autograd.Function
    plain = inspect.getattr_static(function, "apply")

    def apply(cls: Any, *args: Any) -> Any:
        # Their C++ entry would take a symbolic value for a tensor.
        value = record(_applied(cls), args, {}) if is_symbolic(args) else NotImplemented
        return plain.__get__(None, cls)(*args) if value is NotImplemented else value

    return [(function, "apply", classmethod(apply))]


@functools.cache
def _applied(cls: Any) -> Callable[..., Any]:
    """Return ``cls.apply`` as a function with a name."""

    def apply(*args: Any) -> Any:
        return cls.apply(*args)

    # The module stays this one: fx writes names from torch as they are, and would call the class.
    apply.__name__ = apply.__qualname__ = cls.__name__
    return apply


def _checkpoints() -> list[Patch]:
    """Activation checkpointing asks for devices; the recorded graph computes the same without it."""
    name = "_checkpoint_impl"

    def call(function: Any, args: Any, kwargs: Any, **_options: Any) -> Any:
        return function(*args, **kwargs)

    return [(checkpoint, name, call)] if hasattr(checkpoint, name) else []


def _same_paddings(record: Record) -> list[Patch]:
    """Make timm's padding to the resolution one node: it alone branches on sizes, not the layer around it."""
    home = sys.modules.get("timm.layers.padding")
    found = getattr(home, "pad_same", None)
    plain = getattr(found, "reparam_plain", found)  # while a leaf is recorded inside another recording
    return everywhere("pad_same", plain, _symbolic(record, plain)) if plain else []


def _symbolic(record: Record, plain: Any) -> Any:
    @functools.wraps(plain)
    def make(*args: Any, **kwargs: Any) -> Any:
        value = record(plain, args, kwargs) if is_symbolic(args, kwargs) else NotImplemented
        return plain(*args, **kwargs) if value is NotImplemented else value

    make.reparam_plain = plain  # type: ignore[attr-defined]
    return make


def _branching_functions(record: Record) -> list[Patch]:
    """Let timm's functions that branch (it lists them) be one operator where the branch asks for a size."""
    listed = vars(sys.modules.get("timm.layers._fx", object)).get("_autowrap_functions", ())
    return [patch for plain in listed for patch in everywhere(plain.__name__, plain, _symbolic(record, plain))]


def _transforms() -> list[Patch]:
    """Let ``torch.vmap`` and derivatives of ``torch.func`` refuse symbolic values, which end in torch's C++ code."""
    return [
        (home, name, _refusing(getattr(home, name), called))
        for home, name, called in (
            (apis, "vmap_impl", "torch.vmap"),
            (eager_transforms, "grad_impl", "torch.func.grad"),
            (eager_transforms, "grad_and_value_impl", "torch.func.grad_and_value"),
            (eager_transforms, "_vjp_with_argnums", "torch.func.vjp"),
            (eager_transforms, "_jvp_with_argnums", "torch.func.jvp"),
            (eager_transforms, "error_if_complex", "torch.func.jacrev, jacfwd or hessian"),  # which asks first
        )
        if hasattr(home, name)
    ]


def _refusing(plain: Any, called: str) -> Any:
    def refuse(*values: Any) -> None:
        if is_symbolic(*values):
            raise fx.proxy.TraceError(
                f"{source_line()}: {called} is applied to code that computes with inputs or parameters, "
                "and no graph holds such transforms"
            )

    def watched(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            refuse(result)  # of constants, but with inputs or parameters from around it
            return result

        return call if callable(function) else function

    @functools.wraps(plain)
    def transform(function: Any, *args: Any, **kwargs: Any) -> Any:
        refuse(args, kwargs)
        return plain(watched(function), *args, **kwargs)

    return transform


def _factories(record: Record) -> list[Patch]:
    return [(torch, name, _symbolic(record, getattr(torch, name))) for name in _FACTORIES]
