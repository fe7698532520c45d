"""One training run from settings to files, in one process or many. What is learned is decided elsewhere."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from reparam.distill import checkpoints, evaluate, files, report
from reparam.distill.config import TrainConfig
from reparam.distill.data import Source
from reparam.distill.distributed import joined
from reparam.distill.engine import precision
from reparam.distill.finish import finish
from reparam.distill.loaders import epoch_seed, seed_everything
from reparam.distill.meter import Meter
from reparam.distill.methods import get_distiller
from reparam.distill.runs import Run, start, threads_restored
from reparam.distill.signals import termination
from reparam.distill.states import (
    MOST_ROLLBACKS,
    RollBack,
    counts,
    finished,
    resumed,
    roll_back,
    save,
    take_up,
    write_results,
)
from reparam.errors import StoppedError, TrainingError
from reparam.provenance import LIBRARIES, versions


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
    if config.distiller:
        get_distiller(config.distiller)
    if config.tensorboard:
        report.tensorboard()
    with threads_restored(), termination() as asked_to_stop, joined(config.device) as group, precision(config):
        # Only the main process is sure to see the files of a run; what it finds there holds for all.
        done: dict[str, Any] | None = group.decide(lambda: finished(config))
        if done is not None:
            return done
        found = group.decide(lambda: resumed(config))
        run = start(config, student, source, group)
        try:
            _begin(run, found, command)
            del found  # a second copy of the whole state
            while run.epoch < config.epochs:
                try:
                    _epoch(run, asked_to_stop)
                except RollBack as reason:
                    roll_back(run, str(reason))
        finally:
            run.progress.close()
        summary = finish(run.config, run.engine, run.loader, run.folder, run.blank, counts(run))
        if group.main:
            run.progress.say(report.closing(summary, run.folder.path))
    return summary


def _begin(run: Run, found: checkpoints.Found | None, command: Sequence[str]) -> None:
    """Save the start of a new run, or take up the state of an old one."""
    if found is not None:
        take_up(run, found)  # before the settings are written: it may refuse the data
    if run.group.main:
        run.folder.write_config(run.config, versions(LIBRARIES), command, asdict(run.loader.facts))
    if found is None:
        save(run)
        return
    if run.group.main:
        run.folder.sweep()
        if run.config.resume != "auto":
            run.folder.reopen()
            checkpoints.drop_later(run.folder.path, run.steps)
        write_results(run, sent_back=run.config.resume != "auto")


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
    if run.group.any(asked_to_stop())[0]:
        _stop(run)
    run.engine.end_epoch()
    accuracies = _accuracies(run, epoch, asked_to_stop)
    if run.group.any(asked_to_stop())[0]:
        _stop(run)  # the epoch still counts as one before its evaluation, which may have been given up
    losses = run.meter.averages(run.loader.steps)
    run.epoch, run.step, run.meter = epoch, 0, Meter(run.engine.learners.names, run.group)
    row = {"epoch": epoch, "step": run.steps, "lr": lr, **losses, **accuracies}
    row["seconds"] = round(time.perf_counter() - started, 3)
    run.folder.rows.append(row)
    if epoch % config.save_epochs == 0 or epoch == config.epochs:
        save(run)
    elif run.group.main:
        run.folder.write_metrics()
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
    alone = run.group.world == 1
    look = run.looks.due() or (alone and run.group.device.type == "cpu")
    due = run.config.save_steps is not None and run.steps % run.config.save_steps == 0
    if not look and not due:
        if alone and asked_to_stop():
            _stop(run)
        return
    _check_finite(run, weights=due)
    stop, seconds = run.group.largest(asked_to_stop(), run.looks.seconds())
    run.looks.looked(seconds)
    if stop:
        _stop(run)
    if due and run.step < run.loader.steps:
        save(run)


def _stop(run: Run) -> None:
    _check_finite(run, weights=True)
    save(run)
    raise StoppedError(
        f"stopped by SIGTERM in epoch {run.epoch + 1}, after step {run.step} of {run.loader.steps}; the state is saved "
        f"in {run.folder.path / checkpoints.FOLDER}, go on with --resume auto --output {run.folder.path}"
    )


def _check_finite(run: Run, weights: bool = False) -> None:
    """Stop or roll back, all processes together, if a loss (or a weight) became NaN or Inf in one of them."""
    what = run.meter.bad()
    if what is None and (weights or run.step == run.loader.steps) and not evaluate.all_finite(run.engine.learners):
        what = "a weight became NaN or Inf"
    (bad,) = run.group.any(what is not None)
    if not bad:
        return
    place = f"in epoch {run.epoch + 1}, step {run.step} of {run.loader.steps}"
    where = f"{what or 'another process met NaN or Inf'} {place}"
    if run.config.on_nan == "rollback" and run.order < MOST_ROLLBACKS:
        raise RollBack(where)
    kept = f"the weights after epoch {run.saved}" if run.saved else "the initial weights (no epoch was saved)"
    raise TrainingError(
        f"{where}; {run.folder.path / files.STUDENT} keeps {kept}. "
        f"Try a smaller --lr (now {run.config.lr:g}), --clip-grad, more --warmup-epochs or --on-nan rollback"
    )


def _accuracies(run: Run, epoch: int, asked_to_stop: Callable[[], bool]) -> dict[str, float | None]:
    """Measure the networks after that epoch, where it is due; without meaning if the process was asked to stop."""
    engine = run.engine
    engine.learners.train(False)
    networks, averaged = engine.networks, engine.averaged()
    measured = epoch == run.config.epochs or epoch % run.config.eval_epochs == 0
    entries = [evaluate.Entry("student_top1", networks.student)]
    if networks.teacher is not None:
        entries.append(evaluate.Entry("teacher_top1", networks.teacher))
    if averaged is not None:
        entries.append(evaluate.Entry("student_ema_top1", averaged.student))
    if not measured:
        return {entry.name: None for entry in entries}
    with engine.autocast():
        batches = itertools.takewhile(lambda _: not asked_to_stop(), run.loader.test())
        rows = evaluate.measure(entries, batches, run.group, engine.images)
    return {row.name: row.top1 for row in rows}
