"""The parts of a GPD step, each as a job of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import reparam
from reparam.bench.subjects import EngineStep, PlainStep
from reparam.bench.timing import Job
from reparam.passes.blocks import path_of
from reparam.passes.teacher import Teacher, require_teacher


def plain_parts(step: PlainStep) -> dict[str, Job]:
    """Return the parts of a plain step."""
    tensors = step.job().tensors
    return {"forward and backward": Job(step.learn, tensors), "clipping and optimizer": Job(step.update, tensors)}


def gpd_parts(step: EngineStep) -> dict[str, Job]:
    """Return the parts of a GPD step; the optimizer comes behind a part that leaves it all gradients."""
    engine, tensors = step.engine, step.job().tensors
    teacher = require_teacher(engine.networks.owner)
    jobs: dict[str, Callable[[], object]] = {
        "teacher: forward and backward": lambda: step.learn("teacher"),
        "clipping and optimizer": engine.update,
        "student view: forward and backward": lambda: step.learn("student"),
        "narrowing": _both_ways(step, lambda: narrowed(teacher, merging=False)),
    }
    if teacher.plan.branches:
        jobs["narrowing and merging of the student"] = _both_ways(step, lambda: narrowed(teacher, merging=True))
        jobs["merging of the teacher"] = _both_ways(step, lambda: merged(teacher))
    for static in engine.statics:
        jobs["static teacher: forward"] = lambda static=static: step.where.ask(static)  # type: ignore[misc]
    return {name: Job(run, tensors) for name, run in jobs.items()}


def narrowed(teacher: nn.Module, *, merging: bool) -> list[Tensor]:
    """Return the student's tensors that are computed from a teacher's parameters, with or without its branches."""
    view = reparam.student_view(teacher)
    apart: Any = () if merging else view._narrow.branches
    branches, student = view.tensors(apart)
    found = [*student.values(), *(() if merging else branches.values())]
    own = {id(parameter) for parameter in teacher.parameters()}
    # Each once: tied weights have several names.
    computed = {id(value): value for value in found if value.requires_grad and id(value) not in own}
    return list(computed.values())


def merged(teacher: Teacher) -> list[Tensor]:
    """Return the merged kernels of a teacher's layers; branches with norms run side by side and have none."""
    result = []
    for branch in teacher.plan.branches:
        block = teacher.get_submodule(path_of(branch))
        if not block.normed:
            result.append(block(teacher.get_parameter(branch.site.name)))
    return result


def _both_ways(step: EngineStep, compute: Callable[[], Sequence[Tensor]]) -> Callable[[], None]:
    """Return what computes tensors from parameters, and the gradients of the parameters from those of the tensors."""
    with step.engine.gathered():
        given = [torch.ones_like(value, memory_format=torch.preserve_format) for value in compute()]

    def run() -> None:
        step.engine.optimizer.zero_grad(set_to_none=True)
        with step.engine.gathered():
            values = compute()
            if values:
                torch.autograd.backward(values, given)

    return run
