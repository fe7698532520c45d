"""Relational distillation: distances and angles among the images of a batch (Park et al., CVPR 2019)."""

from __future__ import annotations

from torch import Tensor

from reparam.distill.losses import pair_embeddings, rkd
from reparam.distill.methods.base import Batch, Distiller, Outputs, Weights, distiller
from reparam.errors import InputError


@distiller("rkd")
class RKD(Distiller):
    """``CE + 25 distances + 50 angles`` of what enters the classifiers; batches of 3 images or more.

    Source: Park et al., "Relational Knowledge Distillation" (CVPR 2019), equations 5 to 10; weights of mdistiller.
    """

    wants_embedding = True
    defaults = Weights(distill_weight=1.0)

    def __init__(self, learner: Outputs, teacher: Outputs, weights: Weights, labels: Tensor) -> None:
        super().__init__(learner, teacher, weights, labels)
        pair_embeddings(learner.embedding, teacher.embedding)

    def forward(self, learner: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `Distiller`."""
        if len(batch.labels) < 3:
            raise InputError(
                f"--method rkd compares three images or more, and a part of a step has {len(batch.labels)}: give a "
                "larger --batch-size (it is shared among the processes) or a smaller --accumulate"
            )
        return rkd(*pair_embeddings(learner.embedding, teacher.embedding))
