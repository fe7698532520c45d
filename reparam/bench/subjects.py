"""What is measured: steps of plain networks, and of GPD as the trainer takes them."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
import reparam.distill.models
from reparam.bench.timing import Job, kept, nbytes, states
from reparam.distill.config import TrainConfig
from reparam.distill.data import Facts
from reparam.distill.distributed import Group, resolve_device
from reparam.distill.engine import Engine, autocast
from reparam.distill.meter import Meter
from reparam.distill.methods.base import Batch
from reparam.distill.networks import make_networks
from reparam.distill.optim import make_optimizer, make_recordable
from reparam.distill.recording import Recording
from reparam.distill.runs import assemble
from reparam.distill.statics import StaticTeacher
from reparam.distill.students import build, check_fit
from reparam.errors import InputError
from reparam.passes.tf32 import tf32


@dataclass(frozen=True)
class Setting:
    """The same for all that is measured beside each other.

    Attributes:
        config: of a GPD run without branches and without static teacher.
        batch: random images and labels on the device.
        facts: what a loader would say about them.
        group: the processes; one, but where several are measured.
    """

    config: TrainConfig
    batch: Batch
    facts: Facts
    group: Group

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return self.group.device

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which networks run."""
        return autocast(self.config, self.device)

    def build(self, spec: str, option: str = "--model") -> nn.Module:
        """Return a network of the wanted classes and channels with the same random weights each time, on the device.

        Raises:
            InputError: there is no such network.
            ModelError: it fails on the images, or returns something else than logits of the wanted number.
        """
        torch.manual_seed(0)
        network = build(spec, self.facts.classes, self.facts.image_shape[0]).to(self.device)
        check_fit(network, self.batch.images[:2], self.facts, spec, option)
        return network.train()

    def placed(self, network: nn.Module) -> nn.Module:
        """Give a network the memory format of the run."""
        if not self.config.channels_last:
            return network
        return network.to(memory_format=torch.channels_last)

    @property
    def recorded(self) -> bool:
        """Whether steps are recorded as CUDA graphs."""
        return self.config.cuda_graph

    def ask(self, static: StaticTeacher) -> None:
        """Let a static teacher answer the batch."""
        with self.autocast():
            static(self.batch.images)

    def repeated(self, run: Callable[[], object], what: str) -> Callable[[], object]:
        """Return what does the same; as the repetition of a CUDA graph, if the setting says so."""
        return Recording(run, self.device, what) if self.recorded else run


def device_of(name: str) -> torch.device:
    """Return a device that measurements are made for; a GPU becomes the current one, which torch's clocks are about.

    Raises:
        InputError: it is not there, or neither a CPU nor a CUDA GPU.
    """
    device = resolve_device(name)
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: measurements are timed on cpu and cuda only")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def setting(options: argparse.Namespace, group: Group) -> Setting:
    """Return what the options of ``step`` and ``scale`` describe; each process has a batch of its own."""
    config = TrainConfig(
        model=options.model,
        ratio=options.ratio,
        batch_size=options.batch,
        optimizer=options.optimizer,
        clip_grad=options.clip_grad,
        precision=options.precision,
        compile=options.compile,
        channels_last=options.channels_last,
        cuda_graph=getattr(options, "cuda_graph", False),
        overlap=not getattr(options, "no_overlap", False),
        # Random labels are learned by heart at a larger rate, and then the arithmetic is of other numbers.
        lr=1e-4,
        schedule="constant",
        warmup_epochs=0,
    ).resolved()
    generator = torch.Generator().manual_seed(group.rank)
    shape = (options.channels, options.size, options.size)
    count = options.batch
    images = torch.randn(count, *shape, generator=generator).to(group.device)
    images = images.contiguous(memory_format=torch.channels_last) if options.channels_last else images
    labels = torch.randint(options.classes, (count,), generator=generator).to(group.device)
    batch = Batch(images, labels, None, torch.arange(count, device=group.device))
    half = (0.5,) * options.channels
    facts = Facts("random images", options.classes, options.batch, options.batch, shape, half, half, 0, False)
    return Setting(config, batch, facts, group)


class PlainStep:
    """A training step of a plain network: forward, cross entropy, backward, clipping, optimizer; nothing else.

    Args:
        network: in train mode, on its device.
        where: the setting.
    """

    def __init__(self, network: nn.Module, where: Setting) -> None:
        self.network, self.where = where.placed(network), where
        self._call: Callable[..., Any] = torch.compile(network) if where.config.compile else network
        self.optimizer = make_optimizer(network, where.config)
        if where.recorded:
            make_recordable(self.optimizer)
        self._scaler = torch.amp.GradScaler(where.device.type, enabled=where.config.precision == "fp16")
        self._trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._taken = where.repeated(self._take, f"a step of {type(network).__name__}")

    def __call__(self) -> None:
        """Take a step."""
        self._taken()

    def _take(self) -> None:
        self.learn()
        self._scaler.unscale_(self.optimizer)
        self.clip()
        self._scaler.step(self.optimizer)
        self._scaler.update()

    def learn(self) -> None:
        """Forward and backward."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.where.autocast():
            loss = F.cross_entropy(self._call(self.where.batch.images), self.where.batch.labels)
        self._scaler.scale(loss).backward()

    def clip(self) -> None:
        """Clip the gradients, if the setting says so."""
        if self.where.config.clip_grad:
            nn.utils.clip_grad_norm_(self._trained, self.where.config.clip_grad)

    def update(self) -> None:
        """Clip and let the optimizer step on the gradients that are there."""
        self.clip()
        self.optimizer.step()

    def job(self) -> Job:
        """Return the step as a job."""
        return Job(self, lambda: kept(self.network, self.optimizer))

    def sizes(self) -> dict[str, int]:
        """Return the bytes of parameters, gradients and optimizer state, after a step."""
        return sizes(self.network, self.optimizer)


class EngineStep:
    """A step of a run as the trainer takes it, without its data.

    Args:
        where: the setting.
        student: the network to train; GPD leaves it untouched.
        method: of the run.
        branches: a recipe, or None.
        statics: the static teacher, if the method has one.
    """

    def __init__(
        self,
        where: Setting,
        student: nn.Module,
        method: str = "gpd",
        branches: str | None = None,
        statics: Sequence[StaticTeacher] = (),
        teacher: str | None = None,
    ) -> None:
        config = replace(where.config, method=method, branches=branches, teacher=teacher).resolved()
        labels, example = where.batch.labels, where.batch.images[:2]
        networks = make_networks(student, example, config)
        self.engine: Engine = assemble(config, networks, statics, example, labels, 1000, where.group)
        self.where, self._steps = where, 0
        self.engine.learners.train()
        self._meter = Meter(self.engine.learners.names, where.group)
        # As often as the trainer looks for NaN; where looking costs waiting it does so less often.
        self._interval = 1 if where.device.type == "cpu" and where.group.world == 1 else 10

    def __call__(self) -> None:
        """Take a step."""
        self._steps += 1
        self.engine.step(self.where.batch, 1, self._steps, self._meter)
        if self._steps % self._interval == 0:
            self._meter.bad()

    def learn(self, name: str) -> None:
        """Forward and backward of one learner alone, against the labels."""
        self.engine.optimizer.zero_grad(set_to_none=True)
        with self.engine.gathered():
            with self.engine.autocast():
                logits = self.engine.learners(name, self.where.batch.images).logits
                loss = F.cross_entropy(logits, self.where.batch.labels)
            self.engine.scaler.scale(loss).backward()

    def job(self) -> Job:
        """Return the step as a job."""
        return Job(self, lambda: [*kept(self.engine.learners, self.engine.optimizer), *self._answering()])

    def _answering(self) -> list[Tensor]:
        return [tensor for static in self.engine.statics for tensor in kept(static.network)]

    def sizes(self) -> dict[str, int]:
        """Return the bytes of parameters, gradients and optimizer state, after a step."""
        return sizes(self.engine.learners, self.engine.optimizer)


def sizes(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return the bytes of parameters, gradients and optimizer state."""
    parameters = list(network.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return {
        "parameter_bytes": nbytes(parameters),
        "gradient_bytes": nbytes(gradients),
        "optimizer_bytes": nbytes(states(optimizer)),
    }


def plain_wide(where: Setting, student: nn.Module) -> nn.Module:
    """Return a plain network of the teacher's widths: the student expanded, without view, branches or second loss."""
    example = where.batch.images[:2]
    wide = reparam.expand(student, where.config.ratio, example_input=example, noise=0, verify=False)
    return wide.train()


def with_branches(where: Setting, student: nn.Module, recipe: str) -> tuple[nn.Module, nn.Module]:
    """Return the student with branches, merged to one kernel in each step, and a copy that runs them all.

    At ratio 1, without a second network: what branches cost, and what merging them saves.
    """
    for parameter in student.parameters():
        if parameter.dim() == 1 and not parameter.any():
            nn.init.uniform_(parameter, 0.5, 1.5)  # residual branches that start at 0 would hide a difference
    example = where.batch.images[:2]
    owner = reparam.expand(student, 1, branches=recipe, init="scratch", example_input=example, verify=False)
    apart = copy.deepcopy(owner)
    running = reparam.student_view(apart)
    for branch in running._narrow.branches:
        branch.running = True
    return reparam.student_view(owner).train(), running.train()


def difference(one: nn.Module, other: nn.Module, images: Tensor) -> float:
    """Return the largest difference of two networks' outputs, relative to the largest output."""
    with torch.no_grad(), tf32(False):
        first, second = one(images), other(images)
    return float(f"{(first - second).abs().max() / first.abs().max():.3g}")


def static_teacher(where: Setting, spec: str) -> StaticTeacher:
    """Return a network with random weights as a static teacher."""
    same = where.facts.mean, where.facts.std
    return StaticTeacher(where.placed(where.build(spec, "--teacher")), where.facts, same)
