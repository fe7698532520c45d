"""Logit standardisation in front of knowledge distillation (Sun et al., CVPR 2024)."""

from __future__ import annotations

from torch import Tensor

from reparam.distill.losses import kd, lskd
from reparam.distill.methods.base import Batch, Distiller, Outputs, Weights, distiller

_standardised_kd = lskd(kd)


@distiller("lskd")
class LSKD(Distiller):
    """``0.1 CE + 9 KD`` on logits of mean 0 and deviation 1, with base temperature 2, as the authors set it.

    The standardisation goes in front of DKD as well: ``--method dkd --standardise``.
    """

    numbers = frozenset({"temperature"})
    defaults = Weights(ce_weight=0.1, distill_weight=9.0, temperature=2.0)

    def forward(self, learner: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `Distiller`."""
        return _standardised_kd(learner.logits, teacher.logits, self.temperature)
