"""Densely guided distillation: teacher and all assistants teach the student together (Son et al., ICCV 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reparam.distill.losses import kd
from reparam.distill.methods.base import Batch, Distiller, Outputs, Weights, distiller


@distiller("dgkd")
class DGKD(Distiller):
    """``0.1 CE + 0.9 T^2 sum KL`` over the teacher and the assistants, one of which sits out each step.

    Each assistant learned from the teacher and all assistants before it. In train mode one of them, the teacher
    included, is drawn per step and left out; a student whose only source is the teacher always keeps it.

    Weighting and number left out are those of the authors' program: ``(1 - lambda) CE + lambda T^2 sum KL`` without a
    division by the number of sources, one left out. Its divergence is the mean over batch and classes, and its lambda
    is 1; here it is KD's batch mean with KD's weights, so that ``kd``, ``takd`` and ``dgkd`` compare.

    Source: Son et al., "Densely Guided Knowledge Distillation using Multiple Teacher Assistants" (ICCV 2021), the dense
    loss and its stochastic learning; the authors' program (wonchulSon/DGKD).
    """

    assistants = None
    hands_down = "all"
    numbers = frozenset({"temperature"})
    defaults = Weights(ce_weight=0.1, distill_weight=0.9, temperature=4.0)

    def forward(self, learner: Outputs, teacher: Outputs, batch: Batch, assistants: Sequence[Outputs] = ()) -> Tensor:
        """See `Distiller`."""
        sources = [teacher, *assistants]
        if self.training and assistants:
            del sources[int(torch.randint(len(sources), ()))]
        first, *others = (kd(learner.logits, source.logits, self.temperature) for source in sources)
        return sum(others, start=first)
