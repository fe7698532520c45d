"""One training run from settings to files, in one process or many. What is learned is decided elsewhere."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import nn

import reparam.distill.models  # noqa: F401  (registers the networks with timm)
from reparam.distill import checkpoints, evaluate, files, report
from reparam.distill.config import TrainConfig
from reparam.distill.data import Arrays, Source, load_source
from reparam.distill.distributed import Group, joined
from reparam.distill.engine import Engine, precision
from reparam.distill.files import RunFolder, open_run_folder
from reparam.distill.finish import finish, save_networks, sizes
from reparam.distill.loaders import Loader, Shard, epoch_seed, make_loader, seed_everything
from reparam.distill.meter import Meter
from reparam.distill.networks import make_learners, make_networks
from reparam.distill.optim import make_optimizer, make_scheduler
from reparam.distill.signals import termination
from reparam.distill.statics import load_static_teacher
from reparam.distill.students import build_student, check_fit
from reparam.errors import InputError, StoppedError, TrainingError
from reparam.provenance import LIBRARIES, versions

MOST_ROLLBACKS = 5


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
        order: number of rollbacks, which changes the order of the data.
        seconds: of earlier parts of the run.
        meter: of the current epoch.
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
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    @property
    def group(self) -> Group:
        """The processes."""
        return self.engine.group


class _RollBack(Exception):
    """A loss was NaN or Inf, and the run goes on from its last checkpoint."""


def train(
    config: TrainConfig,
    *,
    student: nn.Module | None = None,
    source: Source | None = None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Train a student as ``config`` says and write everything into its output folder.

    Args:
        config: the settings.
        student: the network to train, untouched by a run with a teacher; default: the one that ``config`` names.
        source: the data, if it is loaded already.
        command: what the user typed, for config.json.

    Returns:
        The content of summary.json.

    Raises:
        DataError: the data cannot be used.
        InputError: a setting is wrong, or the output folder holds another run.
        ModelError: a network does not fit the data.
        FormatError: weights or a checkpoint are damaged or do not fit.
        StoppedError: the process got SIGTERM; the state is saved.
        TrainingError: a loss or a weight became NaN or Inf, or a file could not be written; the files of the last good
            epoch are kept.
    """
    config = config.resolved()
    if (done := _finished(config)) is not None:
        return done
    resumed = _resumed(config)
    if resumed is None:
        files.check_output(config, unstarted=config.resume == "auto")
    with _threads_restored(), joined(config.device) as group, precision(config), termination() as asked_to_stop:
        run = _start(config, student, source, command, group, resumed)
        try:
            if resumed is None:
                _save(run)
            while run.epoch < config.epochs:
                try:
                    _epoch(run, asked_to_stop)
                except _RollBack as reason:
                    _roll_back(run, str(reason))
        finally:
            run.progress.close()
        summary = finish(run.config, run.engine, run.loader, run.folder, run.blank, _counts(run))
    run.progress.say(report.closing(summary, run.folder.path))
    return summary


def _resumed(config: TrainConfig) -> checkpoints.Found | None:
    """The checkpoint to go on from, checked against the settings; None for a new run."""
    if config.resume is None:
        return None
    if config.resume != "auto":
        path = Path(config.resume).expanduser()
        found = checkpoints.Found(path, checkpoints.read_checkpoint(path), ())
    elif config.output is None:
        raise InputError("--resume auto looks for a run in --output, which was not given")
    else:
        latest = checkpoints.latest(Path(config.output).expanduser())
        if latest is None:
            return None
        found = latest
    checkpoints.check_same(found.state["config"], asdict(config), found.path)
    return found


def _finished(config: TrainConfig) -> dict[str, Any] | None:
    """The result, if the run to go on with has finished already."""
    path = Path(config.output or ".").expanduser() / files.SUMMARY
    if config.resume != "auto" or not path.is_file():
        return None
    if not config.quiet:
        print(f"{path.parent} holds a finished run; nothing to do")
    return files.read_json(path)


def _start(
    config: TrainConfig,
    student: nn.Module | None,
    source: Source | None,
    command: Sequence[str],
    group: Group,
    resumed: checkpoints.Found | None,
) -> Run:
    """Load and check everything, and take up the state of a checkpoint."""
    source = source if source is not None else load_source(config.data, config.limit_train)
    _set_threads(config, source)
    seed_everything(config.seed)
    student = student if student is not None else build_student(config, len(source.classes), source.in_chans)
    student.to(group.device)
    loader = make_loader(source, config, student, group.device, Shard(group.rank, group.world))
    example = next(iter(loader.test()))[0][:2]
    check_fit(student, example, loader.facts, config.model)
    if config.precision == "fp64":
        student.double()
        example = example.double()
    blank = copy.deepcopy(student)
    networks = make_networks(student, example, config)
    if config.channels_last:
        networks.owner.to(memory_format=torch.channels_last)
    static = load_static_teacher(config, loader.facts, example) if config.distiller else None
    compiled: Any = torch.compile if config.compile else lambda network: network
    learners = make_learners(networks, static, example, loader.labels, config, compiled)
    exempt = frozenset(f"owner.{name}" for name in getattr(networks.owner, "no_weight_decay", set)())
    divisors: dict[str, float] = getattr(networks.student, "divisors", dict)()
    scales = {f"owner.{name}": value for name, value in divisors.items()}
    optimizer = make_optimizer(learners, config, exempt, scales)
    scheduler = make_scheduler(optimizer, config, loader.steps)
    engine = Engine(learners, static, optimizer, scheduler, config, group)
    folder = _folder(config, group, resumed)
    progress = report.Progress(config.epochs, loader.steps, config.quiet or not group.main)
    run = Run(config, engine, loader, folder, progress, blank, Meter(learners.names, group))
    if resumed is not None:
        _take_up(run, resumed)
    if group.main:
        folder.write_config(config, versions(LIBRARIES), command, asdict(loader.facts))
    progress.say(report.opening(config, loader.facts, sizes(networks), str(group.device), group.world))
    return run


def _folder(config: TrainConfig, group: Group, resumed: checkpoints.Found | None) -> RunFolder:
    """Open the output folder; the main process chooses its name."""
    place: list[Any] = [None]
    if group.main:
        place = [open_run_folder(config, check=resumed is None and config.resume is None).path]
    if group.world > 1:
        torch.distributed.broadcast_object_list(place)
    return RunFolder(place[0])


@contextmanager
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _set_threads(config: TrainConfig, source: Source) -> None:
    tiny = isinstance(source, Arrays) and source.x_train[0, 0].numel() <= 16 * 16 and config.image_size is None
    if config.threads or tiny:
        torch.set_num_threads(config.threads or 1)


# An epoch ------------------------------------------------------------------------------------------------------------


def _epoch(run: Run, asked_to_stop: Callable[[], bool]) -> None:
    """Train for one epoch, or for the rest of one, evaluate, and write metrics and checkpoint."""
    started = time.perf_counter()
    config, epoch = run.config, run.epoch + 1
    lr = run.engine.lr(run.steps - run.step)
    run.engine.learners.train()
    for batch in run.loader.train(epoch, run.step, run.order):
        seed_everything(_step_seed(run))
        run.engine.step(batch, epoch, run.steps + 1, run.meter)
        run.step, run.steps = run.step + 1, run.steps + 1
        run.progress.step()
        _watch(run, asked_to_stop)
    _check_finite(run)
    run.engine.end_epoch()
    losses = run.meter.averages(run.loader.steps)
    run.epoch, run.step, run.meter = epoch, 0, Meter(run.engine.learners.names, run.group)
    row = {"epoch": epoch, "step": run.steps, "lr": lr, **losses, **_accuracies(run)}
    row["seconds"] = round(time.perf_counter() - started, 3)
    run.folder.rows.append(row)
    _save(run)
    run.progress.epoch(row)
    if config.tensorboard and run.group.main:
        report.to_tensorboard(run.folder.path, row)


def _step_seed(run: Run) -> int:
    """Everything random inside a step (dropout, drop path) follows from its place in the run: nothing to restore."""
    place = (epoch_seed(run.config.seed, run.epoch + 1) * 1_000_003 + run.step) * 1009 + run.order
    return (place * 4099 + run.group.rank) % 2**63


def _watch(run: Run, asked_to_stop: Callable[[], bool]) -> None:
    """Look after the run between two steps: NaN, SIGTERM, checkpoints inside an epoch.

    All processes look at the same steps and decide together. Where looking costs waiting, it is done less often.
    """
    alone_on_cpu = run.group.world == 1 and run.group.device.type == "cpu"
    interval = 1 if alone_on_cpu else 10 if run.group.device.type == "cpu" else 50
    due = run.config.save_steps is not None and run.steps % run.config.save_steps == 0
    if run.step % interval and not due:
        if run.group.world == 1 and asked_to_stop():
            _stop(run)
        return
    _check_finite(run)
    (stop,) = run.group.any(asked_to_stop())
    if stop:
        _stop(run)
    if due and run.step < run.loader.steps:
        _save(run)


def _stop(run: Run) -> None:
    _check_finite(run)
    _save(run)
    raise StoppedError(
        f"stopped by SIGTERM in epoch {run.epoch + 1}, after step {run.step} of {run.loader.steps}; the state is saved "
        f"in {run.folder.path / checkpoints.FOLDER}, go on with --resume auto --output {run.folder.path}"
    )


def _check_finite(run: Run) -> None:
    """Stop or roll back, all processes together, if a loss or a weight became NaN or Inf in one of them."""
    what = run.meter.bad()
    if what is None and run.step == run.loader.steps and not evaluate.all_finite(run.engine.learners.owner):
        what = "a weight became NaN or Inf"
    (bad,) = run.group.any(what is not None)
    if not bad:
        return
    place = f"in epoch {run.epoch + 1}, step {run.step} of {run.loader.steps}"
    where = f"{what or 'another process met NaN or Inf'} {place}"
    if run.config.on_nan == "rollback" and run.order < MOST_ROLLBACKS:
        raise _RollBack(where)
    kept = f"the weights after epoch {run.epoch}" if run.epoch else "the initial weights (no epoch was finished)"
    raise TrainingError(
        f"{where}; {run.folder.path / files.STUDENT} keeps {kept}. "
        f"Try a smaller --lr (now {run.config.lr:g}), --clip-grad, more --warmup-epochs or --on-nan rollback"
    )


def _roll_back(run: Run, reason: str) -> None:
    """Go back to the last checkpoint, with another order of the data so that the same does not happen again."""
    order = run.order + 1
    run.group.barrier()
    found = checkpoints.latest(run.folder.path)
    if found is None:
        raise TrainingError(f"{reason}; there is no checkpoint to roll back to")
    _take_up(run, found, quiet=True)
    run.order = order
    run.progress.say(
        f"{reason}: back to step {run.steps}, with another order of the data ({order} of {MOST_ROLLBACKS} rollbacks)"
    )


def _accuracies(run: Run) -> dict[str, float | None]:
    engine = run.engine
    engine.learners.train(False)
    networks, averaged = engine.networks, engine.averaged()
    last = run.epoch == run.config.epochs
    measured = last or run.epoch % run.config.eval_epochs == 0
    entries = [evaluate.Entry("student_top1", networks.student)]
    if networks.teacher is not None:
        entries.append(evaluate.Entry("teacher_top1", networks.teacher))
    if averaged is not None:
        entries.append(evaluate.Entry("student_ema_top1", averaged.student))
    if not measured:
        return {entry.name: None for entry in entries}
    with engine.autocast():
        rows = evaluate.measure(entries, run.loader.test(), run.group, engine.images)
    return {row.name: row.top1 for row in rows}


# State ---------------------------------------------------------------------------------------------------------------


def _counts(run: Run) -> dict[str, Any]:
    seconds = run.seconds + time.perf_counter() - run.started
    return {"epoch": run.epoch, "step": run.step, "steps": run.steps, "order": run.order, "seconds": seconds}


def _save(run: Run) -> None:
    """Write a checkpoint, then everything that can be made again from it.

    Raises:
        TrainingError: a file could not be written; what was there before is intact.
    """
    meter = run.meter.state()
    if not run.group.main:
        return
    state = {
        **run.engine.state(),
        **_counts(run),
        "config": asdict(run.config),
        "meter": meter,
        "rows": run.folder.rows,
    }
    try:
        checkpoints.write_checkpoint(run.folder.path, run.steps, state)
        if run.step == 0:
            run.folder.write_metrics()
            save_networks(run.folder, run.engine)
        checkpoints.prune(run.folder.path, run.folder.rows, run.config.keep_best)
    except OSError as error:
        raise TrainingError(
            f"cannot write into {run.folder.path}: {error.strerror or error} (epoch {run.epoch}, step {run.steps}); "
            "older checkpoints are intact: make room and go on with --resume auto"
        ) from error


def _take_up(run: Run, found: checkpoints.Found, quiet: bool = False) -> None:
    """Put the state of a checkpoint into the run."""
    state = found.state
    run.engine.load(state, state["steps"])
    run.epoch, run.step, run.steps, run.order = (state[name] for name in ("epoch", "step", "steps", "order"))
    run.seconds = state["seconds"]
    run.folder.rows[:] = state["rows"]
    run.meter = Meter(run.engine.learners.names, run.group, state["meter"])
    for damaged in found.damaged:
        run.progress.say(f"skipped: {damaged}")
    run.progress.start_at(run.steps)
    if not quiet:
        run.progress.say(f"resume   {found.path}: {run.epoch} epochs and {run.step} steps are done")
