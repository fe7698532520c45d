"""What the paper leaves open, one option each."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from reparam.distill.kdiffusion.posterior import Diffusion, diffusion
from reparam.errors import InputError, near_matches

_CHOICES = {
    "start": ("first", "zero"),
    "noise": ("student", "gaussian", "chain"),
    "shuffle": ("iteration", "sample", "none"),
    "guide_from": ("mean", "last"),
}


@dataclass(frozen=True)
class Options:
    """The settings of Kdiffusion. Where the paper is silent, the default is what makes its text and its maths agree.

    Attributes:
        features: ``m``, parallel heads and steps of the chain; 10 in the paper (2, 4, 8 and 16 in its ablation).
        schedule: noise schedule, "linear" (DDPM) or "cosine"; the paper names none.
        steps: ``T``, diffusion steps of the schedule, cut into ``m`` equal jumps; the paper names none.
        start: the value before the first step: "first", the first feature, on which the paper's last factor conditions;
            or "zero", the mean of the prior, since hardly any signal is left at time ``T``.
        noise: where a step of the teacher's chain starts: "student", noise is the student's feature of that step
            without gradient (equation 8); "gaussian", fresh standard normal noise; "chain", at the student's own value,
            which leaves ``v`` times the difference to the teacher.
        detach: whether earlier predictions are constants of later steps; off, so that all features learn from all steps
            behind them.
        standardise: whether every channel of the teacher's feature gets mean 0 and variance 1 over batch and places,
            as the chain assumes of its data; off, the connector has to learn the scale.
        layer_weights: weight of each layer's loss, in the order of the layers; empty for 1 each.
        middle: weight of the chain's loss (alpha of equation 15).
        guide: weight of the guided loss (beta of equation 15); 0 switches it off.
        guide_from: what enters the teacher's next layer: "mean", the connector's value of the mean of all heads,
            which is what is deployed; or "last", the last prediction of the chain.
        shuffle: the order of the features is drawn once per "iteration" (the paper), for each "sample", or is "none".
        connector_norm: whether the connector ends with a batch norm; without it it has a bias.
    """

    features: int = 10
    schedule: str = "linear"
    steps: int = 1000
    start: str = "first"
    noise: str = "student"
    detach: bool = False
    standardise: bool = True
    layer_weights: tuple[float, ...] = ()
    middle: float = 1.0
    guide: float = 1.0
    guide_from: str = "mean"
    shuffle: str = "iteration"
    connector_norm: bool = True

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: an unknown choice, a weight that is no number from 0 on, or what `diffusion` refuses.
        """
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"{name}={value!r}{near_matches(str(value), known)}; choose from {', '.join(known)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "bool" and not isinstance(value, bool):
                raise InputError(f"{field.name} is True or False, got {value!r}")
        for weight in (self.middle, self.guide, *self.layer_weights):
            if not (weight >= 0 and math.isfinite(weight)):
                raise InputError(f"weights of losses are numbers from 0 on, got {weight}")
        self.diffusion()

    def diffusion(self) -> Diffusion:
        """The numbers of the chain."""
        return diffusion(self.schedule, self.steps, self.features)

    def layer_weight(self, layer: int, layers: int) -> float:
        """The weight of a layer, by its number from 0.

        Raises:
            InputError: there are weights for another number of layers.
        """
        if not self.layer_weights:
            return 1.0
        if len(self.layer_weights) != layers:
            raise InputError(
                f"layer_weights (--head-weights) holds {len(self.layer_weights)} weights for {layers} layers with heads"
            )
        return self.layer_weights[layer]


__all__ = ["Options"]
