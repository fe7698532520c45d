"""Decoupled knowledge distillation (Zhao et al., CVPR 2022)."""

from __future__ import annotations

from torch import Tensor

from reparam.distill.losses import dkd
from reparam.distill.methods.base import Batch, Distiller, Outputs, Weights, distiller


@distiller("dkd")
class DKD(Distiller):
    """``CE + alpha TCKD + beta NCKD``; of mixed images the larger share is the target class.

    Defaults are those for CIFAR-100; the ImageNet recipes set T = 1, beta = 0.5 and a warm-up of 1 epoch.
    """

    numbers = frozenset({"temperature", "alpha", "beta", "standardise"})
    defaults = Weights(temperature=4.0, alpha=1.0, beta=8.0, warmup=20)

    def forward(self, learner: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `Distiller`."""
        numbers = self.weights
        return dkd(learner.logits, teacher.logits, batch.labels, numbers.alpha, numbers.beta, self.temperature)
