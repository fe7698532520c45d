"""Soft losses between the logits of a student and of a teacher.

Every loss takes logits ``[N, C]``, returns the mean over the batch (a scalar tensor) and is differentiable with respect
to both arguments: detach the teacher where it must not learn from the student. Half-precision logits are computed in
float32. Results and gradients stay finite for all finite logits up to the size where the loss itself overflows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from reparam.errors import InputError


def kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Knowledge distillation: ``T^2 * mean_batch KL(softmax(teacher / T) || softmax(student / T))``.

    Args:
        student: logits ``[N, C]``.
        teacher: logits ``[N, C]``.
        temperature: ``T > 0``; the factor ``T^2`` keeps the size of the gradient independent of it.

    Raises:
        InputError: shapes differ, are not ``[N, C]``, or ``temperature`` is not positive.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (2015).
    """
    _check_logits(student, teacher)
    _check_temperature(temperature)
    log_student = _log_softmax(student, temperature)
    log_teacher = _log_softmax(teacher, temperature)
    return _divergence(log_teacher, log_student) * temperature**2


def dkd(student: Tensor, teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float) -> Tensor:
    """Decoupled knowledge distillation: ``alpha * TCKD + beta * NCKD``, each times ``T^2``.

    TCKD is the divergence between the binary distributions (target class, all others), NCKD the one between the
    distributions over the other classes. All probabilities stay logarithms (differences of ``logsumexp``), so that a
    target probability of 0 or 1 does no harm. With ``beta`` replaced by ``1 - p_teacher(target)`` per image the sum is
    exactly ``kd``.

    Args:
        student: logits ``[N, C]``, ``C >= 2``.
        teacher: logits ``[N, C]``.
        target: class indices ``[N]``, int64.
        alpha: weight of the target-class term.
        beta: weight of the non-target-class term.
        temperature: ``T > 0``.

    Raises:
        InputError: shapes do not fit, ``C < 2``, or ``temperature`` is not positive.

    Source: Zhao et al., "Decoupled Knowledge Distillation" (CVPR 2022).
    """
    _check_logits(student, teacher)
    _check_temperature(temperature)
    if target.shape != student.shape[:1] or student.shape[1] < 2:
        raise InputError(
            f"dkd needs logits [N, C >= 2] and targets [N]; got logits {list(student.shape)} and "
            f"targets {list(target.shape)} (class indices, not one-hot)"
        )
    student_binary, student_others = _decouple(student, target, temperature)
    teacher_binary, teacher_others = _decouple(teacher, target, temperature)
    target_term = _divergence(teacher_binary, student_binary)
    other_term = _divergence(teacher_others, student_others)
    return (alpha * target_term + beta * other_term) * temperature**2


def smoothed_cross_entropy(student: Tensor, teacher: Tensor, smoothing: float = 0.1) -> Tensor:
    """Cross entropy of the student against ``(1 - smoothing) * softmax(teacher) + smoothing / C``.

    The soft loss "sce" of generative parameter distillation (temperature 1), used there with weight 3 and a detached
    teacher.

    Args:
        student: logits ``[N, C]``.
        teacher: logits ``[N, C]``.
        smoothing: share of the uniform distribution, in [0, 1].

    Raises:
        InputError: shapes differ, are not ``[N, C]``, or ``smoothing`` lies outside [0, 1].
    """
    _check_logits(student, teacher)
    if not 0 <= smoothing <= 1:
        raise InputError(f"smoothing must lie in [0, 1], got {smoothing}")
    log_student = _log_softmax(student, 1.0)
    soft_target = (1 - smoothing) * _log_softmax(teacher, 1.0).exp() + smoothing / student.shape[1]
    return -(soft_target * log_student).sum(dim=1).mean()


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    if student.ndim != 2 or student.shape != teacher.shape:
        raise InputError(
            "logits of student and teacher must both be [N, C] with equal sizes; "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise InputError(f"temperature must be positive, got {temperature}")


def _promote(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _finite(log_probability: Tensor) -> Tensor:
    """Replace the -inf of an overflowed difference by the lowest finite number, so that 0 * log 0 is 0."""
    return log_probability.clamp_min(torch.finfo(log_probability.dtype).min)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return _finite(F.log_softmax(_promote(logits) / temperature, dim=1))


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Batch mean of KL(p || q) for log probabilities ``[N, C]``."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _decouple(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log probabilities ``[N, 2]`` of (target, all others) and ``[N, C - 1]`` of each one among the others."""
    scaled = _promote(logits) / temperature
    is_target = F.one_hot(target, scaled.shape[1]).bool()
    others = scaled[~is_target].view(scaled.shape[0], scaled.shape[1] - 1)
    everything = scaled.logsumexp(dim=1)
    binary = torch.stack([scaled[is_target] - everything, others.logsumexp(dim=1) - everything], dim=1)
    return _finite(binary), _finite(F.log_softmax(others, dim=1))
