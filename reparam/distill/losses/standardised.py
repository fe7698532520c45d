"""Logit standardisation (LSKD): a step in front of any loss on logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from reparam.distill.losses.shared import centred_unit, check_floating, check_logits, constant, promote
from reparam.errors import InputError


def standardise(logits: Tensor) -> Tensor:
    """Logits ``[N, C]`` with mean 0 and standard deviation 1 in each row, so that only their relations are left.

    The standard deviation is that of the whole row (the sum of squares divided by C, not C - 1). A row that is
    constant up to rounding has no relations: it becomes zeros, and its gradient is zero.

    Args:
        logits: ``[N, C]``, ``C >= 2``.

    Raises:
        InputError: not ``[N, C >= 2]``.

    Source: Sun et al., "Logit Standardization in Knowledge Distillation" (CVPR 2024), algorithm 1. The temperature by
    which it also divides belongs to the loss that follows.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise InputError(f"standardisation needs logits [N, C >= 2], got {list(logits.shape)}")
    check_floating(logits)
    return centred_unit(promote(logits)) * logits.shape[1] ** 0.5


def lskd(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Put ``standardise`` in front of a loss on logits; the teacher is detached.

    ``lskd(kd)(student, teacher, temperature=2.0)`` and ``lskd(dkd)(student, teacher, target, alpha, beta, 2.0)``.
    The result does not change when all logits of a row are shifted or multiplied by a positive number.

    Args:
        loss: takes (student, teacher, ...) with logits ``[N, C]``; the other arguments are passed on.

    Raises:
        InputError: (when called) shapes differ, are not ``[N, C >= 2]``, or what the loss raises.

    Source: as ``standardise``. The paper uses temperature 2 and multiplies the weight of the loss by 9.
    """

    @functools.wraps(loss)
    def standardised(student: Tensor, teacher: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        check_logits(student, teacher)
        return loss(standardise(student), standardise(constant(teacher)), *args, **kwargs)

    return standardised
