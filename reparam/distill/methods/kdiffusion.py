"""Kdiffusion: parallel heads at the ends of stages learn the steps of a diffusion to the teacher's features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reparam.distill.config import TrainConfig
from reparam.distill.kdiffusion import LayerLoss, Options, average
from reparam.distill.losses import match_levels
from reparam.distill.methods.base import Batch, Continued, Distiller, Outputs, Weights, distiller
from reparam.errors import InputError, near_matches
from reparam.passes.heads import add_heads, merge_heads
from reparam.passes.stages import stages

_OPTIONS = {
    "heads": "features",
    "head_shuffle": "shuffle",
    "head_weights": "layer_weights",
    "head_connector_norm": "connector_norm",
    "head_standardise": "standardise",
    "diffusion_schedule": "schedule",
    "diffusion_steps": "steps",
    "diffusion_start": "start",
    "diffusion_noise": "noise",
    "diffusion_detach": "detach",
    "guide_from": "guide_from",
}
"""Settings of a run, and what `Options` calls them."""

_SEED = 0x6B64
"""Told apart from the seed of the student's own weights, whose random numbers the heads would repeat."""


class _WithHeads(Distiller):
    """What `Kdiffusion` and its control share: heads, and a connector for each stage that has some.

    A stage is compared with the stage of the teacher that ReviewKD pairs it with (`match_levels` over all stages of
    both); if the student has more stages than the teacher, one without a partner with the nearest in size.

    Attributes:
        options: the settings.
        pairs: positions of the stages with heads in the features of the learner, and of their partners.
        layers: a loss with its connector for each pair.
    """

    wants_features = True
    wants_heads = True

    def __init__(self, learner: Outputs, teacher: Outputs, weights: Weights, labels: Tensor) -> None:
        super().__init__(learner, teacher, weights, labels)
        self.options = weights.own or Options()
        self.pairs = _pairs(learner, teacher)
        count = len(self.pairs)
        if not count:
            raise InputError("the student has no heads: this loss needs the network that Distiller.prepare returns")
        self.layers = nn.ModuleList(
            LayerLoss(learner.heads[own][0], teacher.features[other], self.options, self.weight(layer, count))
            for layer, (own, other) in enumerate(self.pairs)
        )

    def weight(self, layer: int, layers: int) -> float:
        """The weight of a layer, by its number from 0."""
        return self.options.layer_weight(layer, layers)

    @classmethod
    def read(cls, config: TrainConfig) -> Options:
        """See `Distiller`: the settings that differ from the defaults of `Options`."""
        names = {**_OPTIONS, "alpha": "middle", "beta": "guide"}
        given = {ours: getattr(config, name) for name, ours in names.items() if getattr(config, name) is not None}
        return Options(**given)

    @classmethod
    def prepare(cls, student: nn.Module, example: Tensor, config: TrainConfig) -> nn.Module:
        """See `Distiller`: a copy with heads, whose weights follow from the seed of the run."""
        if config.widen is not None:
            raise InputError(f"--method {config.method}: heads go into a plain network; leave out --widen")
        wished = "all" if config.head_stages is None else config.head_stages
        chosen: str | int | list[str] = wished
        if wished.lstrip("-").isdigit():
            chosen = int(wished)
        elif wished not in ("last", "all"):
            chosen = wished.split(",")
            _check_names(chosen, student, example)
        generator = torch.Generator().manual_seed(config.seed ^ _SEED)
        count, combine = cls.read(config).features, config.head_combine or "mean"
        try:
            return add_heads(student, chosen, count, example, combine=combine, generator=generator)
        except InputError as error:
            raise InputError(f"--method {config.method} --head-stages {wished}: {error}") from error

    @classmethod
    def release(cls, student: nn.Module) -> nn.Module:
        """See `Distiller`: a copy with the heads merged."""
        return merge_heads(student)

    def layer(self, number: int) -> LayerLoss:
        """The loss of a stage."""
        found = self.layers[number]
        assert isinstance(found, LayerLoss)  # ModuleList knows modules only
        return found


@distiller("kdiffusion")
class Kdiffusion(_WithHeads):
    """``CE + alpha sum of L_chain + beta sum of L_guided`` over the stages with heads; alpha and beta are 1.

    L_guided compares what the teacher's next stage makes of its own feature and of the student's estimate of it; behind
    the last stage that is all up to the logits. ``--beta 0`` leaves it out. The order of the
    heads is drawn from torch's own generator, which a run seeds before each step. Where the teacher does not read its
    last feature, as behind the last block of a transformer that classifies by its class token, that term is 0.

    Source: Kdiffusion, equations 8 to 15, with the corrected coefficients of `reparam.distill.kdiffusion.diffusion`.
    """

    numbers = frozenset({"alpha", "beta"})
    settings = frozenset({"head_stages", "head_combine", *_OPTIONS})
    defaults = Weights(alpha=1.0, beta=1.0)

    def __init__(self, learner: Outputs, teacher: Outputs, weights: Weights, labels: Tensor) -> None:
        super().__init__(learner, teacher, weights, labels)
        self._continued: tuple[Continued, ...] = ()

    def meet(self, continued: Continued) -> None:
        """See `Distiller`."""
        self._continued = (continued,)

    def forward(self, learner: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `Distiller`."""
        total = learner.logits.new_zeros(())
        for number, (own, other) in enumerate(self.pairs):
            head = self._next(teacher, other, batch) if self._continued and self.options.guide else None
            total = total + self.layer(number)(learner.heads[own], teacher.features[other], head)
        return total

    def _next(self, teacher: Outputs, level: int, batch: Batch) -> Any:
        """The teacher behind one of its features; what it made of its own feature is known already."""
        feature, behind = teacher.features[level], [*teacher.features, teacher.logits][level + 1]

        def run(value: Tensor) -> Tensor:
            return behind if value is feature else self._continued[0](batch.images, level, value)

        return run


@distiller("kdiffusion-average")
class KdiffusionAverage(_WithHeads):
    """The control: ``CE + w L2(mean of all heads, teacher's feature)``, summed over the stages; no diffusion.

    Source: Kdiffusion, table 2, row "average".
    """

    settings = frozenset(
        {"heads", "head_stages", "head_combine", "head_weights", "head_connector_norm", "head_standardise"}
    )

    def forward(self, learner: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `Distiller`."""
        total = learner.logits.new_zeros(())
        for number, (own, other) in enumerate(self.pairs):
            layer, target = self.layer(number), teacher.features[other]
            total = total + layer.weight * average(layer.join(learner.heads[own], target), target, self.options)
        return total


def _check_names(names: Sequence[str], student: nn.Module, example: Tensor) -> None:
    """Insist on names of stages: what is inside one has no partner at the teacher."""
    known = stages(student, example).features
    for name in names:
        if name not in known:
            raise InputError(
                f"--head-stages {name}: no such stage of {type(student).__name__}{near_matches(name, known)}; it has "
                f"{', '.join(known) or 'none'}; or give last, all, or a number"
            )


def _pairs(learner: Outputs, teacher: Outputs) -> list[tuple[int, int]]:
    """The stages with heads, each with its partner at the teacher."""
    partners = dict(match_levels(learner.features, teacher.features))

    def nearest(own: int) -> int:
        side = _side(learner.features[own])
        far = [(abs(math.log(_side(value) / side)), -level) for level, value in enumerate(teacher.features)]
        return -min(far)[1]

    return [(own, partners.get(own, nearest(own))) for own, heads in enumerate(learner.heads) if heads]


def _side(maps: Tensor) -> float:
    return math.sqrt(maps.shape[2] * maps.shape[3])
