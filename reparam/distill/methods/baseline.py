"""The plain student alone, with the identical recipe: the control that every method is compared with."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from reparam.distill.config import TrainConfig
from reparam.distill.methods.base import Method, Networks, Part, expanded, logits_of, register


def prepare(student: nn.Module, example: Tensor, config: TrainConfig) -> Networks:
    """Train the student as it is; or with branches and its own width, which is the control for them."""
    if config.branches is not None:
        branched = expanded(student, 1, example, config)
        view = reparam.student_view(branched)
        return Networks(student=view, teacher=None, extract=lambda: reparam.extract(branched))
    return Networks(student=student, teacher=None, extract=lambda: student)


def step(networks: Networks, images: Tensor, labels: Tensor, config: TrainConfig) -> Iterator[Part]:
    """Yield ``CE(S, y)``."""
    logits = logits_of(networks.student, images)
    yield Part("student", F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing), logits)


BASELINE = register(Method("baseline", parts=("student",), prepare=prepare, step=step))
