"""DIST: correlations of the predictions instead of their values (Huang et al., NeurIPS 2022)."""

from __future__ import annotations

from torch import Tensor

from reparam.distill.losses import dist
from reparam.distill.methods.base import Batch, Distiller, Outputs, Weights, distiller


@distiller("dist")
class DIST(Distiller):
    """``CE + 2 inter + 2 intra``, the paper's weights for ImageNet and CIFAR-100, with T = 1."""

    numbers = frozenset({"temperature"})
    defaults = Weights(distill_weight=2.0, temperature=1.0)

    def forward(self, learner: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `Distiller`."""
        return dist(learner.logits, teacher.logits, temperature=self.temperature)
