"""Generative parameter distillation from scratch: the student learns from the larger network that it lives in.

``L = CE(T, y) + CE(S, y) + w * SCE(S, softmax(T))`` with the teacher detached in the last term, temperature 1 and
w = 3. Teacher and student share all parameters; their gradients add up before one optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from reparam.distill.config import TrainConfig
from reparam.distill.losses import smoothed_cross_entropy
from reparam.distill.methods.base import Method, Networks, Part, expanded, logits_of, register


def prepare(student: nn.Module, example: Tensor, config: TrainConfig) -> Networks:
    """Expand the student into its dynamic teacher and take the view of the student on the teacher's parameters."""
    teacher = expanded(student, config.ratio, example, config)
    view = reparam.student_view(teacher)
    return Networks(student=view, teacher=teacher, extract=lambda: reparam.extract(teacher))


def step(networks: Networks, images: Tensor, labels: Tensor, config: TrainConfig) -> Iterator[Part]:
    """Yield the teacher's loss, then the student's.

    Because the teacher is detached in the student's loss, its graph can go before the student's is built: the gradient
    is the same and the peak memory lower.
    """
    assert networks.teacher is not None  # prepare() made one
    teacher_logits = logits_of(networks.teacher, images)
    yield Part("teacher", _cross_entropy(teacher_logits, labels, config), teacher_logits)
    teacher_logits = teacher_logits.detach()
    student_logits = logits_of(networks.student, images)
    soft_loss = smoothed_cross_entropy(student_logits, teacher_logits, config.kd_smoothing)
    loss = _cross_entropy(student_logits, labels, config) + config.kd_weight * soft_loss
    yield Part("student", loss, student_logits)


def _cross_entropy(logits: Tensor, labels: Tensor, config: TrainConfig) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)


GPD = register(Method("gpd", parts=("teacher", "student"), prepare=prepare, step=step))
