"""Teacher assistants in a chain: each network learns from the one before it (Mirzadeh et al., AAAI 2020)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from reparam.distill.losses import kd
from reparam.distill.methods.base import Batch, Distiller, Outputs, Weights, distiller


@distiller("takd")
class TAKD(Distiller):
    """``0.1 CE + 0.9 T^2 KL`` from the last assistant, which learned in the same way from the one before it.

    The paper's loss is ``(1 - lambda) CE + lambda T^2 KL``. The authors search lambda and T for each pair of networks,
    and their program averages the divergence over batch and classes; here it is KD's batch mean with KD's weights, so
    that ``kd``, ``takd`` and ``dgkd`` compare.

    Source: Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant" (AAAI 2020), the student's loss of
    its section on the teacher assistant.
    """

    assistants = None
    reads = "last"
    hands_down = "previous"
    numbers = frozenset({"temperature"})
    defaults = Weights(ce_weight=0.1, distill_weight=0.9, temperature=4.0)

    def forward(self, learner: Outputs, teacher: Outputs, batch: Batch, assistants: Sequence[Outputs] = ()) -> Tensor:
        """See `Distiller`."""
        return kd(learner.logits, [teacher, *assistants][-1].logits, self.temperature)
