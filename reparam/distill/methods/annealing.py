"""Annealing-KD: first the teacher's logits, scaled up to full size, then the labels (Jafari et al., EACL 2021)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from reparam.distill.losses.shared import constant, promote
from reparam.distill.methods.base import Batch, Distiller, Outputs, Weights, distiller


@distiller("annealing")
class AnnealingKD(Distiller):
    """First phase ``|S - phi Z|^2`` with ``phi = 1 - (T - 1) / tau_max``, second phase cross entropy alone.

    The temperature T falls from ``tau_max = 10`` to 1 in steps of 1, each for an equal share of the epochs of the first
    phase, so phi grows from 1 / tau_max to 1; a first phase of fewer epochs than that has one step per epoch. The
    square error is the mean over batch and classes. Both phases share the learning rate schedule of the run, and the
    second goes on from the end of the first; the authors start a new schedule from the best epoch of the first.

    Source: Jafari et al., "Annealing Knowledge Distillation" (EACL 2021), the annealing loss and its two phases; the
    authors' program, whose phases have 200 and 100 epochs, whence ``anneal_epochs`` of two thirds.
    """

    numbers = frozenset({"anneal"})
    defaults = Weights(ce_weight=1.0, distill_weight=1.0)
    highest = 10.0

    def shares(self) -> tuple[float, float]:
        """See `Distiller`: one of the two is zero."""
        first = self.epoch <= self.weights.anneal_epochs
        return (0.0, self.weights.ramp(self.epoch)) if first else (self.weights.ce_weight, 0.0)

    def forward(self, learner: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `Distiller`."""
        epochs = self.weights.anneal_epochs
        levels = min(int(self.highest), epochs)
        level = min((self.epoch - 1) * levels // epochs, levels - 1)
        temperature = self.highest - level * (self.highest - 1) / (levels - 1) if levels > 1 else 1.0
        scale = 1 - (temperature - 1) / self.highest
        return F.mse_loss(promote(learner.logits), scale * constant(teacher.logits))
