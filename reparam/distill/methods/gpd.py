"""Gap Preserving Distillation: the student learns from the larger network that it lives in (Guo et al., ICLR 2025).

``L = CE(T, y) + CE(S, y) + w soft(S, T)``, with the dynamic teacher T detached in the last term and w = 3, and for each
of both, if there is a static teacher Z, the loss of the method beside it: ``+ D(T, Z) + D(S, Z)`` (Algorithm 1).
Teacher and student share all parameters; their gradients add up before one optimizer step.
"""

from __future__ import annotations

from torch import Tensor, nn

import reparam
from reparam.distill.config import TrainConfig
from reparam.distill.losses import soft_loss


def dynamic_teacher(student: nn.Module, ratio: int, example: Tensor, config: TrainConfig) -> nn.Module:
    """Return the student widened by ``ratio``, with the branches that the settings ask for."""
    return reparam.expand(
        student,
        ratio,
        branches=config.branches,
        init=config.branch_init or "student",
        example_input=example,
        noise=config.noise,
    )


def soft_term(student: Tensor, teacher: Tensor, config: TrainConfig, epoch: int) -> Tensor | None:
    """The student's loss against the dynamic teacher, weighted; None before the epoch in which it starts.

    Args:
        student: logits ``[N, classes]``.
        teacher: logits of the dynamic teacher; detached.
        config: ``kd_loss``, ``kd_smoothing``, ``kd_weight`` and ``kd_start_epoch`` are read.
        epoch: from 1.
    """
    if epoch < config.kd_start_epoch or config.kd_weight == 0:
        return None
    return config.kd_weight * soft_loss(student, teacher, config.kd_loss, config.kd_smoothing)
