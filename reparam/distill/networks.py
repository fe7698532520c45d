"""The networks of a run, and the losses of a step over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import reparam
from reparam.distill.config import TrainConfig
from reparam.distill.features import Observed, continued, needs
from reparam.distill.losses import standardise
from reparam.distill.methods.base import (
    Batch,
    Distiller,
    Outputs,
    cross_entropy,
    get_distiller,
    weights_of,
)
from reparam.distill.methods.gpd import dynamic_teacher, soft_term
from reparam.distill.statics import StaticTeacher, asked
from reparam.errors import InputError

STUDENT, TEACHER = "student", "teacher"

Release = Callable[[nn.Module], nn.Module]
"""What a method put into a network, taken out of a copy of it."""


@dataclass(frozen=True)
class Networks:
    """The learners of a run.

    Attributes:
        student: images ``[N, C, H, W]`` to logits; a view on the teacher's parameters if there is a dynamic teacher.
        teacher: the dynamic teacher, which owns the parameters, or None without one.
        branched: the network that owns the parameters of a student with branches but without a wider teacher.
        release: makes the plain student of the one that was trained, where a method gave it more; it copies.
    """

    student: nn.Module
    teacher: nn.Module | None = None
    branched: nn.Module | None = None
    release: Release | None = None

    @property
    def owner(self) -> nn.Module:
        """The network whose parameters are trained and whose state_dict is the whole state of the run."""
        return self.teacher or self.branched or self.student

    def inside(self) -> nn.Module:
        """Return the student as a model of its own, with all that a method gave it for training."""
        return self.student if self.owner is self.student else reparam.extract(self.owner)

    def extract(self) -> nn.Module:
        """Return the student as a plain model of its own."""
        return self.inside() if self.release is None else self.release(self.inside())

    def of(self, owner: nn.Module) -> Networks:
        """Return the same networks over ``owner``, a copy of this one's owner (the averaged weights)."""
        if self.owner is self.student:
            return replace(self, student=owner)
        view = reparam.student_view(owner)
        changed = {"teacher": owner} if self.teacher is not None else {"branched": owner}
        return replace(self, student=view, **changed)

    def train(self, mode: bool = True) -> None:
        """Put all networks into training (or evaluation) mode."""
        self.owner.train(mode)
        self.student.train(mode)


def with_method(student: nn.Module, example: Tensor, config: TrainConfig) -> tuple[nn.Module, Release | None]:
    """Return the network to train in the place of the student, and what makes the student of it; None for nothing."""
    kind = get_distiller(config.distiller) if config.distiller else Distiller
    prepared = kind.prepare(student, example, config)
    return prepared, None if prepared is student else kind.release


def make_networks(student: nn.Module, example: Tensor, config: TrainConfig) -> Networks:
    """Make what the settings train: the student as it is, with branches, or inside a dynamic teacher.

    Before that the loss against the static teacher may put something into it (`Distiller.prepare`).

    Args:
        student: on its device; a run with a teacher leaves it untouched.
        example: images ``[N, C, H, W]``.
        config: the settings.
    """
    prepared, release = with_method(student, example, config)
    if config.gpd:
        teacher = dynamic_teacher(prepared, config.ratio, example, config)
        return Networks(reparam.student_view(teacher), teacher, release=release)
    if config.branches is not None:
        branched = dynamic_teacher(prepared, 1, example, config)
        return Networks(reparam.student_view(branched), branched=branched, release=release)
    return Networks(prepared, release=release)


@dataclass(frozen=True)
class Part:
    """One loss of a step, and the logits that it belongs to.

    Attributes:
        network: "student" or "teacher".
        loss: scalar with gradient.
        logits: ``[N, classes]``.
    """

    network: str
    loss: Tensor
    logits: Tensor


class Learners(nn.Module):
    """Everything with gradients in one module: the network that owns the parameters, and connectors of the losses.

    One module, so that DistributedDataParallel reduces the gradients of a step once: its ``forward`` runs one of the
    learners by name.
    """

    def __init__(
        self,
        networks: Networks,
        observed: Mapping[str, Callable[[Tensor], Outputs]],
        losses: Mapping[str, Distiller],
    ) -> None:
        super().__init__()
        self.owner = networks.owner
        self.losses = nn.ModuleDict(losses)
        # In tuples: the view's parameters are the owner's, it must be no submodule.
        self._networks = (networks,)
        self._observed = (dict(observed),)

    @property
    def networks(self) -> Networks:
        """The learners."""
        return self._networks[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the learners in the order of a step: the teacher first, so that the student can learn from it."""
        return tuple(self._observed[0])

    def forward(self, name: str, images: Tensor) -> Outputs:
        """Run one learner."""
        return self._observed[0][name](images)

    def train(self, mode: bool = True) -> Learners:
        """Switch networks and losses."""
        super().train(mode)
        self.networks.train(mode)
        return self


def make_learners(
    networks: Networks,
    statics: Sequence[StaticTeacher],
    example: Tensor,
    labels: Tensor,
    config: TrainConfig,
    compiled: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> Learners:
    """Put the learners together with the loss against the static teacher, one for each of them.

    Args:
        networks: the learners.
        statics: the static teacher, told here what to observe, and its assistants; empty without one.
        example: images ``[N, C, H, W]``.
        labels: the class of every training image ``[M]``.
        config: the settings.
        compiled: what to do with a network before it is used, such as ``torch.compile``.

    Raises:
        InputError: the method needs features and a network has none, or its images must not be mixed.
    """
    learning = {TEACHER: networks.teacher, STUDENT: networks.student}
    present = {name: network for name, network in learning.items() if network is not None}
    kind = get_distiller(config.distiller) if config.distiller else None
    if kind is None or not statics:
        return Learners(networks, {name: Observed(compiled(network)) for name, network in present.items()}, {})
    if not kind.allows_mixing and (config.mixup or config.cutmix):
        raise InputError(f"--method {config.method}: mixed images have no index; leave out --mixup and --cutmix")
    static = statics[0]
    networks.train(False)
    wanted = needs(kind)
    own = wanted.stages(networks.inside().eval(), example, config.model)
    other = wanted.stages(static.network, static.normalised(example), config.teacher or "")
    if config.compile and (own is not None or other is not None):
        raise InputError(
            f"--method {config.method} looks inside the networks, which --compile does not allow; leave it out"
        )
    static.observe = Observed(static.network, other)
    answers = static(example)
    weights = weights_of(config, kind)
    losses: dict[str, Distiller] = {}
    observed: dict[str, Observed] = {}
    for name, network in present.items():
        if name == STUDENT or config.teacher_distill:
            with torch.no_grad():
                losses[name] = kind(Observed(network, own)(example), answers, weights, labels)
            if other is not None and other.features and kind.meet is not Distiller.meet:
                losses[name].meet(continued(static.network, other, static.normalised, example))
        observed[name] = Observed(compiled(network), own)
    static.observe = Observed(compiled(static.network), other)
    for assistant in statics[1:]:
        assistant.observe = Observed(compiled(assistant.network))
    device, dtype = example.device, example.dtype
    return Learners(networks, observed, {name: loss.to(device, dtype) for name, loss in losses.items()})


def parts(
    learners: Learners,
    run: Callable[[str, Tensor], Outputs],
    statics: Sequence[StaticTeacher],
    batch: Batch,
    config: TrainConfig,
    epoch: int,
) -> Iterator[Part]:
    """Yield the losses of a step, one learner after the other.

    The caller runs the backward pass of each part before it asks for the next one: the dynamic teacher is detached in
    the student's loss, so its graph can go before the student's is built. The gradient is the same and the peak memory
    lower. Nothing here keeps state or touches an optimizer.

    Args:
        learners: networks and losses.
        run: (name, images) to the outputs of a learner; ``learners`` itself, or what distributes it.
        statics: the static teacher and its assistants; empty without one.
        batch: what to learn from.
        config: the settings.
        epoch: from 1.
    """
    read = statics[-1:] if config.distiller and get_distiller(config.distiller).reads == "last" else statics
    against = [loss for loss in learners.losses.values() if isinstance(loss, Distiller)] if statics else []
    for loss in against:
        loss.epoch = epoch
    # The second of two phases may be without the static networks: they need not run.
    needed = read if any(loss.shares()[1] for loss in against) else ()
    fetched = asked(needed, batch.images, config.overlap)
    dynamic: Tensor | None = None
    for name in learners.names:
        outputs = run(name, batch.images)
        answers = fetched()
        total = cross_entropy(outputs.logits, batch, config)
        if against and name in learners.losses:
            total = _against_static(total, learners.losses[name], outputs, answers, batch, config)
        if name == STUDENT and dynamic is not None:
            soft = soft_term(outputs.logits, dynamic, config, epoch)
            total = total if soft is None else total + soft
        dynamic = outputs.logits.detach()
        part = Part(name, total, outputs.logits)
        del outputs, total
        yield part
        del part  # and with it the graph, before the next one is built


def _against_static(
    labelled: Tensor,
    loss: nn.Module,
    outputs: Outputs,
    answers: Sequence[Outputs],
    batch: Batch,
    config: TrainConfig,
) -> Tensor:
    """``ce_weight CE + ramp D`` for a learner with a loss against the static teacher."""
    assert isinstance(loss, Distiller)  # ModuleDict knows modules only
    ce_weight, share = loss.shares()
    total = ce_weight * labelled
    if not share:
        return total
    if config.standardise:
        outputs = replace(outputs, logits=standardise(outputs.logits))
        answers = [replace(answer, logits=standardise(answer.logits)) for answer in answers]
    teacher, *assistants = answers
    further = {"assistants": assistants} if loss.assistants != 0 else {}
    return total + share * loss(outputs, teacher, batch, **further)
