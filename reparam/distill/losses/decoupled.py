"""Decoupled knowledge distillation: the target class and the other classes apart."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from reparam.distill.losses.shared import (
    check_indices,
    check_logits,
    check_temperature,
    divergence,
    finite,
    promote,
)
from reparam.errors import InputError


def dkd(student: Tensor, teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float) -> Tensor:
    """Decoupled knowledge distillation: ``alpha * TCKD + beta * NCKD``, each times ``T^2``; the mean over the batch.

    TCKD is the divergence between the binary distributions (target class, all others), NCKD the one between the
    distributions over the other classes. All probabilities stay logarithms (differences of ``logsumexp``), so that a
    target probability of 0 or 1 does no harm. With ``beta`` replaced by ``1 - p_teacher(target)`` per image the sum is
    exactly ``kd``. Differentiable with respect to both sets of logits.

    Args:
        student: logits ``[N, C]``, ``C >= 2``.
        teacher: logits ``[N, C]``.
        target: class indices ``[N]``, int64.
        alpha: weight of the target-class term.
        beta: weight of the non-target-class term.
        temperature: ``T > 0``.

    Raises:
        InputError: shapes do not fit, ``C < 2``, a target is no class, or ``temperature`` is not positive.

    Source: Zhao et al., "Decoupled Knowledge Distillation" (CVPR 2022), equations 6 and 7.
    """
    check_logits(student, teacher)
    check_temperature(temperature)
    check_targets("dkd", student, target)
    student_binary, student_others = decouple(student, target, temperature)
    teacher_binary, teacher_others = decouple(teacher, target, temperature)
    target_term = divergence(teacher_binary, student_binary)
    other_term = divergence(teacher_others, student_others)
    return (alpha * target_term + beta * other_term) * temperature**2


def check_targets(loss: str, student: Tensor, target: Tensor) -> None:
    """Insist on one class index per image, and on a class beside it."""
    if target.shape != student.shape[:1] or student.shape[1] < 2:
        raise InputError(
            f"{loss} needs logits [N, C >= 2] and targets [N]; got logits {list(student.shape)} and "
            f"targets {list(target.shape)} (class indices, not one-hot)"
        )
    check_indices(target, student.shape[1], "targets")


def decouple(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log probabilities ``[N, 2]`` of (target, all others) and ``[N, C]`` of each one among the others.

    The target's column of the second is the lowest number in both networks: a probability of 0, which adds nothing to
    a divergence. Sizes do not depend on values, so no device has to report any.
    """
    scaled = promote(logits) / temperature
    column = target[:, None]
    is_target = torch.arange(scaled.shape[1], device=scaled.device) == column
    others = scaled.masked_fill(is_target, -torch.inf)
    everything = scaled.logsumexp(dim=1)
    binary = torch.stack([scaled.gather(1, column)[:, 0], others.logsumexp(dim=1)], dim=1) - everything[:, None]
    return finite(binary), finite(F.log_softmax(others, dim=1))
