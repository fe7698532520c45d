"""Knowledge review: each level of the teacher against those of the learner fused from the deep end (ReviewKD)."""

from __future__ import annotations

from torch import Tensor

from reparam.distill.losses import ReviewKD, match_levels, pair_embeddings
from reparam.distill.methods.base import Batch, Distiller, Outputs, Weights, distiller


@distiller("reviewkd")
class KnowledgeReview(Distiller):
    """``CE + min(epoch / 20, 1) w HCL`` over all matched levels, and what enters the classifiers as one of 1 x 1.

    ``w`` is 1; mdistiller and the authors set 0.6 to 8 by pair of networks (5 for most on CIFAR-100), and a warm-up of
    1 epoch on ImageNet.

    Attributes:
        pairs: positions of the levels in the features of learner and teacher.

    Source: Chen et al., "Distilling Knowledge via Knowledge Review" (CVPR 2021), section 3; weight and warm-up of
    mdistiller. Its tables drop the stem, and take maps in front of their ReLU where its networks return them. Here the
    levels are found on the graph: for networks of CIFAR whose stem has a resolution of its own, or several stages have
    one (ShuffleNets, MobileNetV2, VGG), they are others than in its tables (docs/recipes.md).
    """

    wants_features = True
    wants_embedding = True
    defaults = Weights(distill_weight=1.0, warmup=20)

    def __init__(self, learner: Outputs, teacher: Outputs, weights: Weights, labels: Tensor) -> None:
        super().__init__(learner, teacher, weights, labels)
        self.pairs = match_levels(learner.features, teacher.features)
        self.loss = ReviewKD(*self._levels(learner, teacher))

    def forward(self, learner: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `Distiller`."""
        loss: Tensor = self.loss(*self._levels(learner, teacher))
        return loss

    def _levels(self, learner: Outputs, teacher: Outputs) -> tuple[list[Tensor], list[Tensor]]:
        own, other = pair_embeddings(learner.embedding, teacher.embedding)
        first = [learner.features[here] for here, _ in self.pairs]
        return [*first, own], [*(teacher.features[there] for _, there in self.pairs), other]
