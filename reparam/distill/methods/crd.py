"""Contrastive distillation: the embeddings of an image in both networks belong together (Tian et al., ICLR 2020)."""

from __future__ import annotations

from torch import Tensor

from reparam.distill.losses import CRD, pair_embeddings
from reparam.distill.methods.base import Batch, Distiller, Outputs, Weights, distiller

_NEGATIVES = 16384


@distiller("crd")
class ContrastiveDistillation(Distiller):
    """``CE + 0.8 CRD`` with 16384 negatives of other classes per image, or as many as there are training images.

    Mixed images have no entry in the memory and are not allowed. ``temperature`` is that of the contrast.

    Source: Tian, Krishnan, Isola, "Contrastive Representation Distillation" (ICLR 2020), section 3; T = 0.07, K, the
    width of 128, the momentum of 0.5 and the weight of 0.8 are those of the authors' code and of mdistiller.
    """

    wants_embedding = True
    allows_mixing = False
    numbers = frozenset({"temperature"})
    defaults = Weights(distill_weight=0.8, temperature=0.07)

    def __init__(self, learner: Outputs, teacher: Outputs, weights: Weights, labels: Tensor) -> None:
        super().__init__(learner, teacher, weights, labels)
        own, other = pair_embeddings(learner.embedding, teacher.embedding)
        count = len(labels)
        self.loss = CRD(own, other, count, labels, min(_NEGATIVES, count), temperature=weights.temperature)

    def forward(self, learner: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `Distiller`."""
        loss: Tensor = self.loss(*pair_embeddings(learner.embedding, teacher.embedding), batch.indices)
        return loss
