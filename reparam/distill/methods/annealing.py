"""Annealing-KD: first the teacher's logits, scaled up to full size, then the labels (Jafari et al., EACL 2021)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from reparam.distill.losses.shared import constant, promote
from reparam.distill.methods.base import Batch, Distiller, Outputs, Weights, distiller


@distiller("annealing")
class AnnealingKD(Distiller):
    """First phase ``|S - phi Z|^2`` with ``phi = 1 - (T - 1) / tau_max``, second phase cross entropy alone.

    The temperature T falls from tau_max to 1 in equal steps over the first phase, so phi grows from 1 / tau_max to 1.
    The phases share the learning rate schedule of the run.

    Source: Jafari et al., "Annealing Knowledge Distillation" (EACL 2021), equations 5 to 7; mean over
    batch and classes.
    """

    numbers = frozenset({"anneal"})
    defaults = Weights(ce_weight=1.0, distill_weight=1.0)
    highest = 10.0

    def shares(self) -> tuple[float, float]:
        """See `Distiller`: one of the two is zero."""
        first = self.epoch <= self.weights.anneal_epochs
        return (0.0, self.weights.distill_weight) if first else (self.weights.ce_weight, 0.0)

    def forward(self, learner: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `Distiller`."""
        epochs = self.weights.anneal_epochs
        share = min(self.epoch - 1, epochs - 1) / max(epochs - 1, 1)
        temperature = self.highest + (1 - self.highest) * share
        scale = 1 - (temperature - 1) / self.highest
        return F.mse_loss(promote(learner.logits), scale * constant(teacher.logits))
