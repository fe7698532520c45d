"""What a method is made of: batches, outputs, and the loss between a learner and a static teacher.

A learner is a network that is being trained: the student, or GPD's dynamic teacher. Each loss against a static teacher
is one file with one `Distiller`; GPD is one file as well (``gpd.py``). A run combines at most one of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from reparam.distill.config import TrainConfig
from reparam.distill.ranges import flag
from reparam.distill.schedules import temperature
from reparam.errors import InputError, ModelError, near_matches


@dataclass(frozen=True)
class Batch:
    """What one step trains on.

    Attributes:
        images: ``[N, C, H, W]``, normalised for the student.
        labels: class indices ``[N]``; of mixed images the class of the larger share.
        targets: soft targets ``[N, classes]`` of mixed images, else None.
        indices: number of each image in the training set, ``[N]``.
    """

    images: Tensor
    labels: Tensor
    targets: Tensor | None
    indices: Tensor


@dataclass(frozen=True)
class Outputs:
    """What a network returned for a batch.

    Attributes:
        logits: ``[N, classes]``.
        features: feature maps ``[N, C, H, W]`` at the ends of its stages, shallow to deep; empty if nobody asked.
        embedding: the vectors ``[N, D]`` that enter the classifier; None if nobody asked.
        heads: for each of ``features`` the maps of the parallel heads at the end of that stage, none where it has no
            heads; empty if nobody asked.
    """

    logits: Tensor
    features: tuple[Tensor, ...] = ()
    embedding: Tensor | None = None
    heads: tuple[tuple[Tensor, ...], ...] = ()

    def detach(self) -> Outputs:
        """Return the same values without their history."""
        embedding = None if self.embedding is None else self.embedding.detach()
        features = tuple(value.detach() for value in self.features)
        heads = tuple(tuple(value.detach() for value in stage) for stage in self.heads)
        return Outputs(self.logits.detach(), features, embedding, heads)


Continued = Callable[[Tensor, int, Tensor], Tensor]
"""``(images, level, value)`` to what the static teacher makes of ``value`` in the place of its feature at a level.

That is its next feature, or its logits behind the last one. Images are normalised for the student.
"""


@dataclass(frozen=True)
class Weights:
    """The numbers of a loss against a static teacher: ``ce_weight CE + ramp distill_weight loss``.

    Attributes:
        ce_weight: weight of the learner's cross entropy.
        distill_weight: weight of the loss.
        warmup: epochs over which ``distill_weight`` grows linearly, ``min(epoch / warmup, 1)`` with epoch from 1.
        temperature: of the softmax, where the loss has one.
        temperatures: the same for each epoch, where it follows a schedule.
        anneal_epochs: epochs of the first phase of a method that has two.
        alpha: DKD's weight of the target class.
        beta: DKD's weight of the other classes.
        own: what `Distiller.read` made of the settings that the loss alone has.
    """

    ce_weight: float = 1.0
    distill_weight: float = 1.0
    warmup: int = 0
    temperature: float = 4.0
    temperatures: tuple[float, ...] = ()
    anneal_epochs: int = 0
    alpha: float = 1.0
    beta: float = 8.0
    own: Any = None

    def ramp(self, epoch: int) -> float:
        """The weight of the loss in an epoch, counted from 1."""
        return self.distill_weight * (min(epoch / self.warmup, 1.0) if self.warmup else 1.0)


class Distiller(nn.Module):
    """A loss between one learner and the static teacher; one instance for each learner.

    Its parameters (connectors, embeddings) are trained by the same optimizer and its buffers (memories) are part of
    the checkpoint, but none of them belongs to a network. It is in train mode during training.

    Args:
        learner: outputs of the learner for an example batch; only their shapes are read.
        teacher: the same of the static teacher.
        weights: the numbers, with the settings of the run filled in.
        labels: the class of every training image, ``[M]``.

    Attributes:
        wants_features: whether ``Outputs.features`` has to be filled.
        wants_embedding: whether ``Outputs.embedding`` has to be filled.
        wants_heads: whether ``Outputs.heads`` has to be filled, for a student to which `prepare` added heads.
        settings: names of the settings that belong to the loss alone; None stands for a default.
        assistants: how many networks between teacher and student the loss needs: 0, 1, or None for one or more. Such
            a loss takes their outputs as a further argument ``assistants``.
        reads: which of the static networks a step has to run: "all", or the "last" one, which the loss then gets as
            its teacher.
        hands_down: what a chain of assistants learns from: "teacher", each from the one before it ("previous"), or
            from all before it ("all").
        allows_mixing: whether mixed images (mixup, cutmix) make sense.
        numbers: which of temperature, alpha and beta the loss has, and "standardise" if its logits may be.
        schedule: name of the schedule that the temperature follows by default, with its highest and lowest value.
        defaults: the numbers of the method's paper.
        epoch: the current one, from 1; set before each step.
    """

    wants_features: ClassVar[bool] = False
    wants_embedding: ClassVar[bool] = False
    wants_heads: ClassVar[bool] = False
    settings: ClassVar[frozenset[str]] = frozenset()
    assistants: ClassVar[int | None] = 0
    reads: ClassVar[str] = "all"
    hands_down: ClassVar[str] = "teacher"
    allows_mixing: ClassVar[bool] = True
    numbers: ClassVar[frozenset[str]] = frozenset()
    schedule: ClassVar[tuple[str, float, float] | None] = None
    defaults: ClassVar[Weights] = Weights()

    def __init__(self, learner: Outputs, teacher: Outputs, weights: Weights, labels: Tensor) -> None:
        super().__init__()
        self.weights = weights
        self.epoch = 1

    @classmethod
    def read(cls, config: TrainConfig) -> Any:
        """Make of ``settings`` what the loss finds in ``Weights.own``."""
        return None

    @classmethod
    def prepare(cls, student: nn.Module, example: Tensor, config: TrainConfig) -> nn.Module:
        """Return the network to train in the place of the student; the same one in every process and on resuming."""
        return student

    @classmethod
    def release(cls, student: nn.Module) -> nn.Module:
        """Return the plain student for what became of `prepare`'s network, which stays as it is."""
        return student

    def meet(self, continued: Continued) -> None:
        """Get to know how to run the static teacher on from its features, before the first step.

        Called where ``wants_features`` is set. The teacher must not become part of the loss's state.
        """

    @property
    def temperature(self) -> float:
        """The temperature of the current epoch."""
        found = self.weights.temperatures
        return found[min(self.epoch, len(found)) - 1] if found else self.weights.temperature

    def shares(self) -> tuple[float, float]:
        """The weights of cross entropy and loss in the current epoch."""
        return self.weights.ce_weight, self.weights.ramp(self.epoch)

    def forward(self, learner: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The loss of a batch, a scalar without `Weights.ramp`; the teacher's outputs carry no gradient."""
        raise NotImplementedError


_DISTILLERS: dict[str, type[Distiller]] = {}


def distiller(name: str) -> Callable[[type[Distiller]], type[Distiller]]:
    """Register a `Distiller` under ``name``, which must be new; ``--method`` knows it then."""

    def register(kind: type[Distiller]) -> type[Distiller]:
        if name in _DISTILLERS or name in ("gpd", "baseline") or "+" in name:
            raise InputError(f"a method cannot be named {name!r}: the name is taken or holds a +")
        _DISTILLERS[name] = kind
        return kind

    return register


def get_distiller(name: str) -> type[Distiller]:
    """Return the registered loss of that name."""
    if name not in _DISTILLERS:
        known = sorted([*_DISTILLERS, "gpd", "baseline"])
        raise InputError(f"unknown method {name!r}{near_matches(name, known)}; known methods: {', '.join(known)}")
    return _DISTILLERS[name]


def distillers() -> tuple[str, ...]:
    """Return the names of all registered losses."""
    return tuple(sorted(_DISTILLERS))


def weights_of(config: TrainConfig, kind: type[Distiller]) -> Weights:
    """Return the defaults of a loss with what the settings say otherwise.

    Raises:
        InputError: a setting would have no effect on this loss.
    """
    for name in ("temperature", "tau_schedule", "tau_max", "tau_min", "alpha", "beta", "standardise", "anneal_epochs"):
        value = getattr(config, name)
        unset = value is None or value is False
        if not unset and name.replace("tau", "temperature").partition("_")[0] not in kind.numbers:
            given = flag(name) if value is True else f"{flag(name)} {value}"
            raise InputError(
                f"{given} would have no effect: the loss of --method {config.method} has nothing of the kind"
            )
    for name in sorted(set().union(*(other.settings for other in _DISTILLERS.values())) - kind.settings):
        if getattr(config, name) is not None:
            users = " and ".join(other for other in distillers() if name in _DISTILLERS[other].settings)
            raise InputError(
                f"{flag(name)} would have no effect: it belongs to --method {users}, not to {config.method}"
            )
    wished = {
        "ce_weight": config.ce_weight,
        "distill_weight": config.distill_weight,
        "warmup": config.distill_warmup,
        "temperature": config.student_temperature or config.temperature,
        "alpha": config.alpha,
        "beta": config.beta,
    }
    values = {**vars(kind.defaults), **{name: value for name, value in wished.items() if value is not None}}
    first = max(1, 2 * config.epochs // 3) if config.anneal_epochs is None else config.anneal_epochs
    further = {"temperatures": _temperatures(config, kind), "anneal_epochs": first, "own": kind.read(config)}
    return Weights(**{**values, **further})


def _temperatures(config: TrainConfig, kind: type[Distiller]) -> tuple[float, ...]:
    """The temperature of each epoch, where the settings or the method ask for a schedule."""
    if config.student_temperature is not None:  # the schedule, if any, is that of the assistants
        if config.temperature is not None:
            raise InputError(
                "--temperature is one value for both stages and --student-temperature that of the second; leave one out"
            )
        return ()
    wished = config.tau_schedule, config.tau_max, config.tau_min
    if config.temperature is not None and any(value is not None for value in wished):
        raise InputError(
            "--temperature is one value for all epochs; leave it out beside --tau-schedule, --tau-max and --tau-min"
        )
    if config.temperature is not None or (kind.schedule is None and config.tau_schedule is None):
        if config.tau_max is not None or config.tau_min is not None:
            raise InputError("--tau-max and --tau-min belong to a schedule of the temperature; add --tau-schedule")
        return ()
    name, highest, lowest = kind.schedule or ("dtm", 20.0, 1.0)
    highest = highest if config.tau_max is None else config.tau_max
    lowest = lowest if config.tau_min is None else config.tau_min
    epochs = max(config.epochs, 2) if config.fast_dev_run else config.epochs  # one epoch has no beginning and end
    return tuple(temperature(config.tau_schedule or name, highest, lowest, epochs))


def cross_entropy(logits: Tensor, batch: Batch, config: TrainConfig) -> Tensor:
    """Cross entropy with the labels, or with the soft targets of mixed images (smoothed already)."""
    if batch.targets is not None:
        return F.cross_entropy(logits, batch.targets)
    return F.cross_entropy(logits, batch.labels, label_smoothing=config.label_smoothing)


def logits_in(output: object) -> Tensor:
    """Insist that a model returned one tensor of logits ``[N, classes]``."""
    if not isinstance(output, Tensor) or output.ndim != 2:
        found = f"a tensor of shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(f"training needs a model that returns logits [N, classes], this one returns {found}")
    return output


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Run ``model`` and insist on one tensor of logits ``[N, C]``."""
    return logits_in(model(images))


__all__ = [
    "Batch",
    "Continued",
    "Distiller",
    "Outputs",
    "Weights",
    "cross_entropy",
    "distiller",
    "distillers",
    "get_distiller",
    "logits_in",
    "logits_of",
    "weights_of",
]
