"""A run before its first step: everything that it needs, loaded and checked."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import reparam.distill.models  # noqa: F401  (registers the networks with timm)
from reparam.distill import report
from reparam.distill.config import TrainConfig
from reparam.distill.data import Arrays, Source, load_source
from reparam.distill.distributed import Group
from reparam.distill.engine import Engine
from reparam.distill.files import RunFolder, open_run_folder
from reparam.distill.finish import sizes
from reparam.distill.loaders import Loader, Shard, make_loader, seed_everything
from reparam.distill.meter import Meter
from reparam.distill.networks import Networks, make_learners, make_networks
from reparam.distill.optim import make_optimizer, make_scheduler
from reparam.distill.recording import check_recordable
from reparam.distill.statics import StaticTeacher, load_static_teachers
from reparam.distill.students import build_student, check_fit, grown
from reparam.errors import InputError


class Looks:
    """Says after which steps processes that wait for each other look after their run.

    That is every `MOST` steps, and more often where these take longer than `SECONDS`: whoever sends SIGTERM to
    processes kills them soon, torchrun after 30 s. What follows depends on steps counted and on a time that all
    processes have agreed on, so all of them look at the same steps.
    """

    MOST, SECONDS = 10, 1.0

    def __init__(self) -> None:
        self._interval = self._left = 1
        self._since = time.perf_counter()

    def due(self) -> bool:
        """Count a step; return whether to look after it."""
        self._left -= 1
        return self._left <= 0

    def seconds(self) -> float:
        """Return what the steps since the last look took in this process."""
        return time.perf_counter() - self._since

    def looked(self, seconds: float) -> None:
        """Choose the next look by the largest `seconds` of all processes."""
        steps = self._interval - max(self._left, 0)
        self._interval = self._left = max(1, min(self.MOST, int(self.SECONDS * steps / max(seconds, 1e-6))))
        self._since = time.perf_counter()


@dataclass
class Run:
    """Everything alive during a run.

    Attributes:
        config: settings with all defaults filled in.
        engine: networks, losses, optimizer.
        loader: the data.
        folder: where files go; only the main process writes.
        progress: what is shown.
        blank: the student before training, for the final check.
        epoch: number of finished epochs.
        step: finished steps of the epoch after that.
        steps: finished steps of all epochs.
        saved: the epoch whose networks are in the files.
        order: number of rollbacks, which changes the order of the data.
        seconds: of earlier parts of the run.
        meter: of the current epoch.
        started: when this part of the run began.
        looks: when to look after it next.
    """

    config: TrainConfig
    engine: Engine
    loader: Loader
    folder: RunFolder
    progress: report.Progress
    blank: nn.Module
    meter: Meter
    epoch: int = 0
    step: int = 0
    steps: int = 0
    order: int = 0
    saved: int = 0
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    looks: Looks = field(default_factory=lambda: Looks())

    @property
    def group(self) -> Group:
        """The processes."""
        return self.engine.group


def start(
    config: TrainConfig,
    student: nn.Module | None,
    source: Source | None,
    group: Group,
) -> Run:
    """Load and check everything that a run needs.

    Args:
        config: settings with all defaults filled in.
        student: the network to train, or None for the one that ``config`` names.
        source: the data, or None to load it.
        group: the processes.
    """
    source = source if source is not None else load_source(config.data, config.limit_train)
    _set_threads(config, source)
    loader, blank, networks, example = _learning(config, student, source, group)
    statics = load_static_teachers(config, loader.facts, example, _in_format(config)) if config.distiller else []
    engine = assemble(config, networks, statics, example, loader.labels, loader.steps, group)
    learners = engine.learners
    folder = RunFolder(group.decide(lambda: open_run_folder(config, check=False).path))
    progress = report.Progress(config.epochs, loader.steps, config.quiet or not group.main)
    run = Run(config, engine, loader, folder, progress, blank, Meter(learners.names, group))
    progress.say(report.opening(config, loader.facts, sizes(networks), str(group.device), group.world))
    return run


def check_start(config: TrainConfig, source: Source, group: Group) -> None:
    """Build what a run trains, and throw it away: whether that works is to be known before other runs take hours.

    Nothing is asked of static networks, which may not have been trained yet.

    Raises:
        ReparamError: see ``start``.
    """
    _learning(config, None, source, group)


def _learning(
    config: TrainConfig, student: nn.Module | None, source: Source, group: Group
) -> tuple[Loader, nn.Module, Networks, Tensor]:
    """Return the data, the student before training, what is trained, and two images."""
    check_recordable(config, group)
    seed_everything(config.seed)
    student = student if student is not None else build_student(config, len(source.classes), source.in_chans)
    student.to(group.device)
    loader = make_loader(source, config, student, group.device, Shard(group.rank, group.world))
    if (loader.batch_size // group.world) % config.accumulate:
        share = f"{loader.batch_size} images over {group.world} processes"
        raise InputError(f"--accumulate {config.accumulate} does not divide each process's part of a step, {share}")
    example = next(iter(loader.test()))[0][:2]
    check_fit(student, example, loader.facts, config.model)
    if config.precision == "fp64":
        student.double()
        example = example.double()
    if config.widen is not None:
        student = grown(student, config.widen, example, config.noise)
    return loader, copy.deepcopy(student), make_networks(student, example, config), example


def assemble(
    config: TrainConfig,
    networks: Networks,
    statics: Sequence[StaticTeacher],
    example: Tensor,
    labels: Tensor,
    steps: int,
    group: Group,
) -> Engine:
    """Put networks, losses, optimizer and schedule together: what takes the steps of a run.

    Args:
        config: settings with all defaults filled in.
        networks: the learners, on their device.
        statics: the static teacher and its assistants; empty without one.
        example: images ``[N, C, H, W]``.
        labels: the class of every training image ``[M]``.
        steps: of an epoch.
        group: the processes.

    Raises:
        InputError: the method needs what a network does not have, or there is nothing to train.
    """
    if config.channels_last:
        networks.owner.to(memory_format=torch.channels_last)
    compiled: Any = torch.compile if config.compile else lambda network: network
    learners = make_learners(networks, statics, example, labels, config, compiled)
    exempt = frozenset(f"owner.{name}" for name in getattr(networks.owner, "no_weight_decay", set)())
    divisors: dict[str, float] = getattr(networks.student, "divisors", dict)()
    scales = {f"owner.{name}": value for name, value in divisors.items()}
    optimizer = make_optimizer(learners, config, exempt, scales)
    scheduler = make_scheduler(optimizer, config, steps)
    return Engine(learners, statics, optimizer, scheduler, config, group)


def _in_format(config: TrainConfig) -> Callable[[nn.Module], nn.Module]:
    wanted = torch.channels_last if config.channels_last else torch.preserve_format
    return lambda network: network.to(memory_format=wanted)


@contextmanager
def threads_restored() -> Iterator[None]:
    """Leave the number of threads as it was."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _set_threads(config: TrainConfig, source: Source) -> None:
    tiny = isinstance(source, Arrays) and source.x_train[0, 0].numel() <= 16 * 16 and config.image_size is None
    if config.threads or tiny:
        torch.set_num_threads(config.threads or 1)
