"""Gap-KD: an assistant between teacher and student, a falling temperature, and a doubly decoupled loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from reparam.distill.config import TrainConfig
from reparam.distill.losses import double_decoupled
from reparam.distill.methods.base import Batch, Distiller, Outputs, Weights, distiller


@distiller("gapkd")
class GapKD(Distiller):
    """Second stage: ``a CE + min(epoch / 7, 1) (alpha TCKL(S, T) + beta NCKL(S, A))`` with a temperature per epoch.

    The first stage trains the assistant A with ``0.1 CE + 0.9 KD`` from the teacher T, with a falling temperature too.
    Weights are those of table 4 for ResNets, which are the ones found for CIFAR-10; the recipes have those of each row.
    The released second stage has a constant temperature of 4: ``--student-temperature 4``. The factor on the right side
    of equation 14, which its left side lacks, is ``--prefactor``.

    Source: Gap-KD, equations 11 to 14, algorithm 1 and table 4.
    """

    assistants = 1
    numbers = frozenset({"temperature", "alpha", "beta"})
    settings = frozenset({"student_temperature", "prefactor"})
    schedule = ("dtm", 20.0, 1.0)
    defaults = Weights(ce_weight=0.68, alpha=8.3, beta=6.2, warmup=7)

    @classmethod
    def read(cls, config: TrainConfig) -> bool:
        """See `Distiller`: whether there is a prefactor."""
        return bool(config.prefactor)

    def forward(self, learner: Outputs, teacher: Outputs, batch: Batch, assistants: Sequence[Outputs] = ()) -> Tensor:
        """See `Distiller`."""
        return double_decoupled(
            learner.logits,
            teacher.logits,
            assistants[0].logits,
            batch.labels,
            self.weights.alpha,
            self.weights.beta,
            self.temperature,
            prefactor=bool(self.weights.own),
        )
