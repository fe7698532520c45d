"""Attention transfer: the learner has to look where the static teacher looks (Zagoruyko and Komodakis, ICLR 2017)."""

from __future__ import annotations

from torch import Tensor

from reparam.distill.losses import attention_transfer, match_levels
from reparam.distill.methods.base import Batch, Distiller, Outputs, Weights, distiller


@distiller("at")
class AT(Distiller):
    """``CE + 1000 AT``, the sum over all matched levels, with squared activations; there is nothing to learn in it.

    Attributes:
        pairs: positions of the levels in the features of learner and teacher.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention" (ICLR 2017), equation 2; weight 1000 of the
    authors' code and of mdistiller.
    """

    wants_features = True
    defaults = Weights(distill_weight=1000.0)

    def __init__(self, learner: Outputs, teacher: Outputs, weights: Weights, labels: Tensor) -> None:
        super().__init__(learner, teacher, weights, labels)
        self.pairs = match_levels(learner.features, teacher.features)

    def forward(self, learner: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `Distiller`."""
        own = [learner.features[here] for here, _ in self.pairs]
        return attention_transfer(own, [teacher.features[there] for _, there in self.pairs])
