"""FitNet: a layer in the middle of the learner has to become one of the static teacher (Romero et al., ICLR 2015)."""

from __future__ import annotations

from torch import Tensor

from reparam.distill.losses import FitNet, match_levels
from reparam.distill.methods.base import Batch, Distiller, Outputs, Weights, distiller


@distiller("fitnet")
class FitNetHint(Distiller):
    """``CE + 100 hint``, where the hint compares the middle level through a 1 x 1 convolution with norm.

    Of ``n`` matched levels the one with the number ``(n - 1) // 2``, from 0: stage 2 of 3 or 4, the hint layer of
    mdistiller and RepDistiller for ResNets. The hint acts during the whole training, as it does there; the paper trains
    the lower half with it first and the network with logits afterwards.

    Attributes:
        pair: positions of the level in the features of learner and teacher.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets" (ICLR 2015), equation 3; weight 100 of mdistiller.
    """

    wants_features = True
    defaults = Weights(distill_weight=100.0)

    def __init__(self, learner: Outputs, teacher: Outputs, weights: Weights, labels: Tensor) -> None:
        super().__init__(learner, teacher, weights, labels)
        pairs = match_levels(learner.features, teacher.features)
        self.pair = pairs[(len(pairs) - 1) // 2]
        self.loss = FitNet(learner.features[self.pair[0]], teacher.features[self.pair[1]])

    def forward(self, learner: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `Distiller`."""
        loss: Tensor = self.loss(learner.features[self.pair[0]], teacher.features[self.pair[1]])
        return loss
