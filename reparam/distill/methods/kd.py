"""Knowledge distillation: the softened classes of the static teacher (Hinton et al., 2015)."""

from __future__ import annotations

from torch import Tensor

from reparam.distill.losses import kd
from reparam.distill.methods.base import Batch, Distiller, Outputs, Weights, distiller


@distiller("kd")
class KD(Distiller):
    """``0.1 CE + 0.9 T^2 KL(softmax(Z / T) || softmax(S / T))`` with T = 4, as mdistiller sets it."""

    numbers = frozenset({"temperature", "standardise"})
    defaults = Weights(ce_weight=0.1, distill_weight=0.9, temperature=4.0)

    def forward(self, learner: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `Distiller`."""
        return kd(learner.logits, teacher.logits, self.temperature)
