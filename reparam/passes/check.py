"""Numerical comparison of two networks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from reparam.errors import InputError
from reparam.passes.example import Inputs, example_for, normalise, random_like
from reparam.passes.gradients import without_gradients
from reparam.passes.seeds import seeded
from reparam.passes.skeleton import first_floating_dtype, rebuild, skeleton_of
from reparam.passes.teacher import Teacher
from reparam.passes.tf32 import tf32
from reparam.passes.torch_modules import without_fast_paths
from reparam.passes.view import StudentView, extract

_TOLERANCES = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-5, 1e-4),
    torch.float16: (2e-2, 2e-2),
    torch.bfloat16: (1e-1, 1e-1),
}
"""Relative tolerances by the dtype of the weights: of the float64 run, of the run in that dtype."""


@dataclass(frozen=True)
class Report:
    """How far two networks are apart on the same inputs.

    Args:
        max_abs: largest absolute difference of the outputs in float64.
        max_rel: the same relative to the largest output.
        sqnr_db: signal to quantisation noise ratio in dB, 10 log10(sum a^2 / sum (a - b)^2); inf where equal.
        native_max_abs: largest absolute difference in the networks' own dtype.
        native_max_rel: the same relative to the largest output.
        argmax_agreement: share of samples whose largest output is at the same place, in [0, 1].
        tolerance: relative tolerance in float64.
        native_tolerance: relative tolerance in the own dtype.
        dtype: the own dtype.
    """

    max_abs: float
    max_rel: float
    sqnr_db: float
    native_max_abs: float
    native_max_rel: float
    argmax_agreement: float
    tolerance: float
    native_tolerance: float
    dtype: str

    @property
    def passed(self) -> bool:
        """Whether both relative differences are within their tolerances."""
        return self.max_rel <= self.tolerance and self.native_max_rel <= self.native_tolerance

    def __str__(self) -> str:
        return (
            f"{'PASS' if self.passed else 'FAIL'}: float64 max abs {self.max_abs:.2e}, max rel {self.max_rel:.2e} "
            f"(tolerance {self.tolerance:.0e}), SQNR {self.sqnr_db:.0f} dB; {self.dtype} max abs "
            f"{self.native_max_abs:.2e}, max rel {self.native_max_rel:.2e} (tolerance {self.native_tolerance:.0e}); "
            f"argmax agreement {self.argmax_agreement:.1%}"
        )


def check(a: nn.Module, b: nn.Module, example_input: Any = None, *, tolerance: float | None = None) -> Report:
    """Compare two networks that should compute the same function; neither is changed.

    Both run in eval mode on the same random inputs, in float64 and in their own dtype, TF32 off. Weights and norm
    statistics are taken as they are: of two arbitrary networks nobody can tell which statistics belong together.

    Args:
        a: reference.
        b: the network to compare.
        example_input: see ``reparam.plan``; only its shapes are used. Found from ``a`` where None.
        tolerance: relative tolerance of the float64 run. None follows the dtype of the weights, because weights that
            were rounded to it differ by its precision: 1e-10 for float64, 1e-5 for float32, 2e-2 for float16, 1e-1
            for bfloat16.

    Raises:
        InputError: outputs of different form, or an input that a network does not accept.
    """
    inputs = _shapes(a, example_input)
    dtype = first_floating_dtype(a) or torch.float32
    device = next((p.device for p in a.parameters()), torch.device("cpu"))
    with seeded(0, device), tf32(False):
        real = random_like(inputs, device, torch.float64, None)
        wide = [_outputs(m, real, torch.float64) for m in (a, b)]
        native = [_outputs(m, real, dtype) for m in (a, b)]
    max_abs, max_rel, sqnr = _differences(*wide)
    native_abs, native_rel, _ = _differences(*native)
    wide_limit, native_limit = _TOLERANCES.get(dtype, (1e-5, 1e-4))
    return Report(
        max_abs=max_abs,
        max_rel=max_rel,
        sqnr_db=sqnr,
        native_max_abs=native_abs,
        native_max_rel=native_rel,
        argmax_agreement=_agreement(*wide),
        tolerance=wide_limit if tolerance is None else tolerance,
        native_tolerance=native_limit,
        dtype=str(dtype).removeprefix("torch."),
    )


def _shapes(model: nn.Module, example: Any) -> Inputs:
    if example is not None:
        args, kwargs = normalise(example)
        shapes: Inputs = pytree.tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, (args, kwargs))
        return shapes
    if isinstance(model, (Teacher, StudentView)):
        from reparam.passes.example import inputs_from_json

        owner = model.teacher if isinstance(model, StudentView) else model
        return inputs_from_json(owner.plan.inputs)
    return example_for(model, skeleton_of(model), None)


def _outputs(model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """Run a model on copies of its tensors in another dtype, in eval mode."""
    target = extract(model.teacher) if isinstance(model, StudentView) else model
    if not isinstance(target, Teacher):
        # What its code keeps between calls (attention biases in eval mode) is neither read nor left behind.
        target = rebuild(target, lambda _name, tensor: tensor).train()
    tensors = {name: _converted(t, dtype) for name, t in [*target.named_parameters(), *target.named_buffers()]}
    args, kwargs = pytree.tree_map(lambda v: _converted(v, dtype) if isinstance(v, Tensor) else v, inputs)
    modes = [(m, m.training) for m in target.modules()]
    try:
        for module, _mode in modes:
            module.training = False
        with without_fast_paths():
            out = without_gradients(lambda: functional_call(target, tensors, args, kwargs))
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{type(model).__name__} does not accept the example input: {error}") from error
    finally:
        for module, mode in modes:
            module.training = mode
    found = [v.detach() for v in pytree.tree_leaves(_plain(out)) if isinstance(v, Tensor)]
    return [v for v in found if v.is_floating_point()]


def _plain(value: Any) -> Any:
    """Open dataclass-like outputs."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    return value


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach().clone()


def _differences(a: list[Tensor], b: list[Tensor]) -> tuple[float, float, float]:
    if [t.shape for t in a] != [t.shape for t in b]:
        raise InputError(
            f"the outputs have different shapes: {[tuple(t.shape) for t in a]} and {[tuple(t.shape) for t in b]}"
        )
    worst = relative = signal = noise = 0.0
    for x, y in zip(a, b, strict=True):
        x, y = x.double(), y.double()
        apart = (x - y).masked_fill((x == y) | (x.isnan() & y.isnan()), 0.0)
        difference = float(apart.abs().nan_to_num(math.inf, math.inf).max()) if x.numel() else 0.0
        scale = float(x.abs().max()) if x.numel() else 0.0
        worst = max(worst, difference)
        share = difference if scale == 0 or not math.isfinite(difference) else difference / scale
        relative = max(relative, share)
        signal += float(x[x.isfinite()].square().sum())
        noise += float(apart.square().sum())
    if not math.isfinite(worst):
        return worst, relative, -math.inf
    return worst, relative, math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


def _agreement(a: list[Tensor], b: list[Tensor]) -> float:
    shares = [float((x.argmax(1) == y.argmax(1)).double().mean()) for x, y in zip(a, b, strict=True) if x.dim() > 1]
    return min(shares, default=1.0)
