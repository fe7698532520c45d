"""DIST: the student's predictions have to correlate with the teacher's, not to equal them."""

from __future__ import annotations

from torch import Tensor

from reparam.distill.losses.shared import (
    centred_unit,
    check_floating,
    check_logits,
    check_samples,
    check_temperature,
    constant,
    log_softmax,
    promote,
)
from reparam.errors import InputError


def correlation_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """``1 - Pearson correlation`` along the last dimension, the mean over all other dimensions; in [0, 2].

    Does not change under ``a x + b`` with ``a > 0``. A row that is constant up to rounding correlates with nothing:
    its distance is 1 and its gradient zero. The teacher is detached.

    Args:
        student: ``[..., K]``, ``K >= 2``.
        teacher: the same shape.

    Raises:
        InputError: shapes differ or have fewer than 2 numbers to correlate.
    """
    if student.shape != teacher.shape or student.ndim < 1 or student.shape[-1] < 2 or student.numel() == 0:
        raise InputError(
            "a correlation needs equal shapes with at least 2 numbers in the last dimension; "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )
    check_floating(student, teacher)
    return 1 - (centred_unit(promote(student)) * centred_unit(constant(teacher))).sum(-1).mean()


def dist(student: Tensor, teacher: Tensor, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> Tensor:
    """DIST: ``T^2 * (beta * inter + gamma * intra)``, correlation distances of the probabilities at temperature T.

    ``inter`` compares the classes within each image and is a mean over images, ``intra`` compares the images within
    each class and is a mean over classes. The teacher is detached.

    Args:
        student: logits ``[N, C]``, ``N >= 2``, ``C >= 2``.
        teacher: logits ``[N, C]``.
        beta: weight of the relations between classes.
        gamma: weight of the relations within a class.
        temperature: ``T > 0``.

    Raises:
        InputError: shapes differ, are not ``[N >= 2, C >= 2]``, or ``temperature`` is not positive.

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher" (NeurIPS 2022), the relations between and
    within classes of section 4. The factor ``T^2`` is that of the authors' code and of ``kd``.
    """
    check_logits(student, teacher)
    check_temperature(temperature)
    check_samples(student.shape[0], 2, "relations within a class need")
    own = log_softmax(student, temperature).exp()
    other = log_softmax(teacher.detach(), temperature).exp()
    inter = correlation_distance(own, other)
    intra = correlation_distance(own.T, other.T)
    return (beta * inter + gamma * intra) * temperature**2
