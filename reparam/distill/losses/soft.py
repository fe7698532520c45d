"""Soft targets: what the student's logits cost against the teacher's.

Every loss takes logits ``[N, C]`` and returns the mean over the batch.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from reparam.distill.losses.shared import (
    check_logits,
    check_share,
    check_temperature,
    constant,
    divergence,
    log_softmax,
    promote,
)
from reparam.errors import InputError, near_matches

SOFT_LOSSES = ("ce", "sce", "kl", "mse", "l1")
"""Kinds of ``soft_loss``."""


def kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Knowledge distillation: ``T^2 * mean_batch KL(softmax(teacher / T) || softmax(student / T))``.

    Differentiable with respect to both arguments: detach the teacher where it must not learn from the student.

    Args:
        student: logits ``[N, C]``.
        teacher: logits ``[N, C]``.
        temperature: ``T > 0``; the factor ``T^2`` keeps the size of the gradient independent of it.

    Raises:
        InputError: shapes differ, are not ``[N, C]``, the batch is empty, or ``temperature`` is not positive.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (2015), section 2.
    """
    check_logits(student, teacher)
    check_temperature(temperature)
    log_student = log_softmax(student, temperature)
    log_teacher = log_softmax(teacher, temperature)
    return divergence(log_teacher, log_student) * temperature**2


def smoothed_cross_entropy(student: Tensor, teacher: Tensor, smoothing: float = 0.1) -> Tensor:
    """Cross entropy of the student against ``(1 - smoothing) * softmax(teacher) + smoothing / C``.

    The soft loss "sce" of generative parameter distillation (temperature 1), used there with weight 3 and a detached
    teacher. Differentiable with respect to both arguments.

    Args:
        student: logits ``[N, C]``.
        teacher: logits ``[N, C]``.
        smoothing: share of the uniform distribution, in [0, 1].

    Raises:
        InputError: shapes differ, are not ``[N, C]``, the batch is empty, or ``smoothing`` lies outside [0, 1].
    """
    check_logits(student, teacher)
    check_share("smoothing", smoothing)
    log_student = log_softmax(student, 1.0)
    soft_target = (1 - smoothing) * log_softmax(teacher, 1.0).exp() + smoothing / student.shape[1]
    return -(soft_target * log_student).sum(dim=1).mean()


def soft_loss(student: Tensor, teacher: Tensor, kind: str = "sce", smoothing: float = 0.1) -> Tensor:
    """The soft loss from the dynamic teacher to the student, by the name of its kind; the teacher is detached.

    | kind | loss, with ``q = softmax(teacher)`` and ``p = softmax(student)`` |
    |---|---|
    | ``ce`` | ``mean_batch sum_c -q_c log p_c`` |
    | ``sce`` | the same against ``(1 - smoothing) q + smoothing / C`` |
    | ``kl`` | ``mean_batch KL(q || p)``: ``ce`` less the entropy of the teacher, so the gradient is that of ``ce`` |
    | ``mse`` | mean over batch and classes of the squared difference of the logits |
    | ``l1`` | mean over batch and classes of the absolute difference of the logits |

    The released code also knows "bce", the binary cross entropy with the teacher's raw logits as targets. Those are
    no probabilities, and such a loss has no lower bound, so it is refused.

    Args:
        student: logits ``[N, C]``.
        teacher: logits ``[N, C]``.
        kind: one of ``SOFT_LOSSES``.
        smoothing: share of the uniform distribution for ``sce``, in [0, 1]; other kinds do not look at it.

    Raises:
        InputError: ``kind`` is "bce" or unknown, shapes differ or are not ``[N, C]``, or ``smoothing`` is no share.
    """
    teacher = teacher.detach()
    check_logits(student, teacher)
    if kind in ("ce", "sce"):
        return smoothed_cross_entropy(student, teacher, smoothing if kind == "sce" else 0.0)
    if kind == "kl":
        return kd(student, teacher, 1.0)
    if kind == "mse":
        return F.mse_loss(promote(student), constant(teacher))
    if kind == "l1":
        return F.l1_loss(promote(student), constant(teacher))
    known = f"known kinds: {', '.join(SOFT_LOSSES)}"
    if kind == "bce":
        raise InputError(
            "soft loss 'bce' is ill-formed: it takes the teacher's raw logits for probabilities and has no lower "
            f"bound; use 'ce' or 'sce' instead ({known})"
        )
    raise InputError(f"unknown soft loss {kind!r}{near_matches(kind, SOFT_LOSSES)}; {known}")
