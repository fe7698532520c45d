"""Densely guided distillation: teacher and all assistants teach the student together (Son et al., ICCV 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reparam.distill.losses import kd
from reparam.distill.methods.base import Batch, Distiller, Outputs, Weights, distiller

KEPT = 0.75
"""Probability with which an assistant takes part in a step."""


@distiller("dgkd")
class DGKD(Distiller):
    """``0.1 CE + 0.9 T^2 sum KL`` over the teacher and the assistants, some of which sit out each step.

    Each assistant learned from the teacher and all assistants before it. In train mode an assistant takes part with
    probability 0.75, drawn per step; the teacher always does.

    Source: Son et al., "Densely Guided Knowledge Distillation using Multiple Teacher Assistants" (ICCV 2021), the dense
    loss and its stochastic learning.
    """

    assistants = None
    hands_down = "all"
    numbers = frozenset({"temperature"})
    defaults = Weights(ce_weight=0.1, distill_weight=0.9, temperature=4.0)

    def forward(self, learner: Outputs, teacher: Outputs, batch: Batch, assistants: Sequence[Outputs] = ()) -> Tensor:
        """See `Distiller`."""
        loss = kd(learner.logits, teacher.logits, self.temperature)
        for assistant in assistants:
            if not self.training or torch.rand(()) < KEPT:
                loss = loss + kd(learner.logits, assistant.logits, self.temperature)
        return loss
