"""What must hold for the teacher of every random network; used by the tests and by benchmarks/random_networks.py."""

from __future__ import annotations

import copy
import importlib
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from random_networks import Program
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import reparam

EXPAND = importlib.import_module("reparam.passes.expand")
TOLERANCE = 1e-12
TRAIN_TOLERANCE = 1e-10
ULP = 2.0**-52


@dataclass(frozen=True)
class Outcome:
    """What was measured on one network.

    Args:
        coverage: share of conv and linear weights that are widened on both sides.
        widened: whether any parameter has another shape.
        node: worst relative error of a node.
        output: worst relative error of an output, other batch size and resolution included.
        gradient: worst relative error of a gradient.
        train: worst relative error in train mode, None where that was not compared.
        resolution: whether another resolution was possible.
    """

    coverage: float
    widened: bool
    node: float
    output: float
    gradient: float
    train: float | None
    resolution: bool

    @property
    def worst(self) -> float:
        return max(self.node, self.output)


class Mismatch(AssertionError):
    """A law does not hold for a network."""


def check(program: Program, ratio: int | Mapping[str, int]) -> Outcome:
    """Expand the network of ``program`` and check every law.

    Raises:
        Mismatch: a law does not hold.
    """
    student = program.build()
    x = program.sample()
    errors: list[float] = []
    verify_plan = EXPAND.verify_plan

    def record(*args: Any, **kwargs: Any) -> float:
        errors.append(verify_plan(*args, **kwargs))
        return errors[-1]

    with mock.patch.object(EXPAND, "verify_plan", record):
        torch.manual_seed(0)
        teacher = reparam.expand(student, ratio=ratio, example_input=x)
    _demand(errors[0], TOLERANCE, "a node")
    for name, tensor in teacher.state_dict().items():
        if any(n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True)):
            raise Mismatch(f"values of {name} share their memory")
    output = _outputs(program, student, teacher)
    _round_trip(student, teacher, ratio)
    gradient = _gradients(program, student, teacher)
    train = _train(program, student, teacher)
    plan = teacher.plan
    return Outcome(plan.coverage, bool(plan.params), errors[0], output[0], gradient, train, output[1])


def _demand(error: float, limit: float, what: str) -> None:
    if not error <= limit:
        raise Mismatch(f"{what}: relative error {error:.2e}, allowed {limit:.0e}")


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def error_of(expected: Any, found: Any) -> float:
    """Largest difference relative to the largest value of each tensor, absolute where that is 0."""
    worst = 0.0
    a, b = tensors(expected), tensors(found)
    if pytree.tree_structure(expected) != pytree.tree_structure(found):
        raise Mismatch("outputs have another structure")
    for one, two in zip(a, b, strict=True):
        if one.shape != two.shape or one.dtype != two.dtype:
            raise Mismatch(f"{list(one.shape)} {one.dtype} became {list(two.shape)} {two.dtype}")
        scale = float(one.abs().max())
        difference = float((one - two).abs().max())
        # Below 1e-12 of values around 1 the student's output is the rounding of a 0: (x - x.mean()).mean().
        worst = max(worst, difference / scale if scale > 1e-12 else difference)
        if not math.isfinite(difference):
            raise Mismatch("a value is not finite")
    return worst


def _outputs(program: Program, student: nn.Module, teacher: nn.Module) -> tuple[float, bool]:
    """Same batch, another batch size, and, where the student accepts it, another resolution."""
    worst, larger = 0.0, False
    with torch.no_grad():
        for batch, more in ((2, 0), (3, 0), (2, 3)):
            x = program.sample(batch, more, seed=5)
            try:
                expected = student(*x)
            except (RuntimeError, ValueError, IndexError):
                continue
            if any(value.shape[0] != batch for value in tensors(expected)):
                continue  # reshape(-1, constant) took a part of the resolution for samples
            larger = larger or more > 0
            what = "the output" + (" at another resolution" if more else f" for batch {batch}")
            error = error_of(expected, teacher(*x))
            _demand(error, TOLERANCE, what)
            view = error_of(expected, reparam.student_view(teacher)(*x))
            _demand(view, TOLERANCE, what + " of the view")
            worst = max(worst, error)
    return worst, larger


def _round_trip(student: nn.Module, teacher: nn.Module, ratio: int | Mapping[str, int]) -> None:
    ratios = [ratio] if isinstance(ratio, int) else ratio.values()
    plain = reparam.extract(teacher)
    if type(plain) is not type(student):
        raise Mismatch(f"extract gives a {type(plain).__name__}")
    mine, theirs = student.state_dict(), plain.state_dict()
    if list(mine) != list(theirs):
        raise Mismatch("extract gives other state_dict keys")
    for name, value in mine.items():
        found = theirs[name]
        if found.shape != value.shape or found.dtype != value.dtype:
            raise Mismatch(f"extract: {name} is {found.dtype} {list(found.shape)}")
        power = all(r & (r - 1) == 0 for r in ratios)
        limit = 0.0 if power else 2 * ULP
        if value.is_floating_point() and bool(((found - value).abs() > limit * value.abs()).any()):
            raise Mismatch(f"extract: {name} differs from the student's")
        if not value.is_floating_point() and not torch.equal(found, value):
            raise Mismatch(f"extract: {name} differs from the student's")


def loss_of(value: Any) -> Tensor:
    """A smooth loss of all outputs in which every element has a weight of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for tensor in tensors(value):
        weight = torch.linspace(0.5, 1.5, tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
        total = total + (weight * tensor).sum() / math.sqrt(tensor.numel())
    return total


def _gradients(program: Program, student: nn.Module, teacher: nn.Module) -> float:
    """Gradients with respect to the input (teacher) and to the parameters (view) are the student's."""
    worst = 0.0
    x = tuple(t.requires_grad_() for t in program.sample(seed=7))
    own = _gradient(student, x)
    if own is None:
        return 0.0
    names = [name for name, _p in student.named_parameters()]
    # A gradient that cancels (of a bias in front of a norm) is measured against a share of the largest one.
    floor = 1e-3 * max(float(g.abs().max()) for g in (*own[0], *own[1]) if g.numel())
    ours = _gradient(teacher, x)
    if ours is None:
        raise Mismatch("the teacher's output does not depend on anything")
    for expected, found in zip(own[0], ours[0], strict=True):
        worst = max(worst, _gradient_error(expected, found))
    _demand(worst, LIMIT_GRADIENT, "the gradient with respect to the input")
    view = _gradient(reparam.student_view(teacher), x)
    assert view is not None
    wide = dict(zip([n for n, _p in teacher.named_parameters()], view[1], strict=True))
    for name, expected in zip(names, own[1], strict=True):
        error = _gradient_error(_spread(teacher, name, expected), wide[name], floor)
        _demand(error, LIMIT_GRADIENT, f"the gradient of the view with respect to {name}")
        worst = max(worst, error)
    return worst


LIMIT_GRADIENT = 1e-10
"""Gradients pass back through everything that conditions the outputs, once more: they may lose two digits."""


def _gradient(module: nn.Module, x: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]] | None:
    loss = loss_of(module(*x))
    if not loss.requires_grad:
        return None
    parameters = list(module.parameters())
    found = torch.autograd.grad(loss, [*x, *parameters], allow_unused=True)
    full = [torch.zeros_like(t) if g is None else g for t, g in zip([*x, *parameters], found, strict=True)]
    return full[: len(x)], full[len(x) :]


def _gradient_error(expected: Tensor, found: Tensor, floor: float = 0.0) -> float:
    scale = max(float(expected.abs().max()), floor, 1e-3)
    return float((expected - found).abs().max()) / scale


def _spread(teacher: Any, name: str, gradient: Tensor) -> Tensor:
    """The view reads the first replica of each index times the divisor: so goes the gradient."""
    param_map = teacher.plan.params.get(name)
    if param_map is None:
        return gradient
    for dim in param_map.divide:
        counts = torch.tensor(param_map.maps[dim].counts, dtype=gradient.dtype)
        gradient = gradient * counts.view([-1 if d == dim else 1 for d in range(gradient.dim())])
    for dim, replica_map in param_map.maps.items():
        shape = [len(replica_map) if d == dim else n for d, n in enumerate(gradient.shape)]
        gradient = gradient.new_zeros(shape).index_copy(dim, torch.tensor(replica_map.first), gradient)
    return gradient


# -- train mode ----------------------------------------------------------------------------------------------------

NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def _train(program: Program, student: nn.Module, teacher: nn.Module) -> float | None:
    """Outputs and running statistics in train mode, batches of at least 64 values per channel."""
    if any(dict(step.options).get("p") for step in program.steps) or _random(program):
        return None
    batch = 64 // max(_smallest(program, student) // 2, 1) + 1
    x = program.sample(min(max(batch, 4), 64), seed=11)
    student, teacher = copy.deepcopy(student).train(), copy.deepcopy(teacher).train()
    with torch.no_grad():
        error = error_of(student(*x), teacher(*x))
    _demand(error, TRAIN_TOLERANCE, "the output in train mode")
    for name, expected in student.named_buffers():
        param_map = teacher.plan.params.get(name)
        if "running" not in name:
            continue
        expected = expected if param_map is None else param_map.widen(expected)
        found = error_of(expected, teacher.get_buffer(name))
        _demand(found, TRAIN_TOLERANCE, f"{name} after a step in train mode")
        error = max(error, found)
    view = reparam.student_view(teacher).train()
    with torch.no_grad():
        view(*x)
    for name, value in reparam.extract(teacher).named_buffers():
        if "running" in name:
            _demand(error_of(student.get_buffer(name), value), TRAIN_TOLERANCE, f"{name} of the view")
    return error


def _random(program: Program) -> bool:
    """Whether a step draws random numbers in train mode."""
    return any(dict(step.options).get("kind") == "rrelu" for step in program.steps)


def _smallest(program: Program, student: nn.Module) -> int:
    """Fewest values per channel that a norm sees for the batch of 2."""
    seen: list[int] = []

    def look(module: nn.Module, args: tuple[Tensor, ...], result: Any) -> None:
        seen.append(args[0].numel() // args[0].shape[1])

    handles = [m.register_forward_hook(look) for m in student.modules() if isinstance(m, NORMS)]
    with torch.no_grad():
        student(*program.sample())
    for handle in handles:
        handle.remove()
    return min(seen, default=64)


def failure(program: Program, ratio: int | Mapping[str, int]) -> str | None:
    """Return what is wrong with the teacher of a program, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check(program, ratio)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def kinds(program: Program) -> Iterator[str]:
    """Yield what each step is, with its variant, for histograms."""
    for step in program.steps:
        options = dict(step.options)
        variant = options.get("f") or options.get("kind") or options.get("form") or options.get("use") or ""
        again = " again" if step.again is not None else ""
        yield f"{step.name}{again} {variant}".strip()
