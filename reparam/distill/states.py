"""The state of a run: what to go on from, saving, taking it up again, going back."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reparam.distill import checkpoints, files
from reparam.distill.config import TrainConfig
from reparam.distill.finish import save_networks
from reparam.distill.meter import Meter
from reparam.distill.runs import Run
from reparam.errors import InputError, TrainingError

MOST_ROLLBACKS = 5


class RollBack(Exception):
    """A loss was NaN or Inf, and the run goes on from its last checkpoint."""


def finished(config: TrainConfig) -> dict[str, Any] | None:
    """Return the result, if the run to go on with has finished already.

    Raises:
        InputError: it was a run with other settings.
    """
    if config.resume != "auto" or config.output is None:
        return None
    path = Path(config.output).expanduser() / files.SUMMARY
    if not path.is_file():
        return None
    (settings,) = files.read_entries(path, "config")
    checkpoints.check_same(settings, asdict(config), path)
    if not config.quiet:
        print(f"{path.parent} holds a finished run; nothing to do")
    return files.read_json(path)


def resumed(config: TrainConfig) -> checkpoints.Found | None:
    """Return the checkpoint to go on from, checked against the settings; None for a new run.

    Raises:
        InputError: the settings differ, or the output folder holds another run.
        FormatError: the checkpoint is damaged, or all of them are.
    """
    found = _found(config)
    if found is not None:
        checkpoints.check_same(found.state["config"], asdict(config), found.path)
    output = None if config.output is None else Path(config.output).expanduser() / checkpoints.FOLDER
    inside = found is not None and output is not None and found.path.resolve().parent == output.resolve()
    if not inside:
        files.check_output(config, unstarted=config.resume == "auto")
    return found


def _found(config: TrainConfig) -> checkpoints.Found | None:
    if config.resume is None:
        return None
    if config.resume != "auto":
        path = Path(config.resume).expanduser()
        return checkpoints.Found(path, checkpoints.read_checkpoint(path), ())
    if config.output is None:
        raise InputError("--resume auto looks for a run in --output, which was not given")
    return checkpoints.latest(Path(config.output).expanduser())


def counts(run: Run) -> dict[str, Any]:
    """Return how far a run is."""
    seconds = run.seconds + time.perf_counter() - run.started
    return {"epoch": run.epoch, "step": run.step, "steps": run.steps, "order": run.order, "seconds": seconds}


def save(run: Run) -> None:
    """Write a checkpoint, then everything that can be made again from it.

    Raises:
        TrainingError: a file could not be written; what was there before is intact.
    """
    meter = run.meter.state()
    statistics = run.engine.statistics() if run.step else []
    if not run.group.main:
        return
    state = {
        **run.engine.state(),
        **counts(run),
        "config": asdict(run.config),
        "data": asdict(run.loader.facts),
        "statics": [static.fingerprint for static in run.engine.statics],
        "saved": run.saved,
        "meter": meter,
        "statistics": statistics,
        "rows": run.folder.rows,
    }
    try:
        written = checkpoints.write_checkpoint(run.folder.path, run.steps, state)
        # What is there of this step or a later one is damaged, or of a part that was given up.
        checkpoints.drop_later(run.folder.path, run.steps, written)
        write_results(run)
        checkpoints.prune(run.folder.path, run.folder.rows, run.config.keep_best)
    except OSError as error:
        raise TrainingError(
            f"cannot write into {run.folder.path}: {error.strerror or error} (epoch {run.epoch}, step {run.steps}); "
            "older checkpoints are intact: make room and go on with --resume auto"
        ) from error


def write_results(run: Run, sent_back: bool = False) -> None:
    """Write what is made from the state at the end of an epoch; also within one where the run was sent back there."""
    if run.group.main and (run.step == 0 or sent_back):
        run.folder.write_metrics()
        save_networks(run.folder, run.engine)
        run.saved = run.epoch


def take_up(run: Run, found: checkpoints.Found, quiet: bool = False) -> None:
    """Put the state of a checkpoint into the run.

    Raises:
        InputError: the data or a static network is not that of the checkpoint.
    """
    state = found.state
    facts = asdict(run.loader.facts)
    saved = state["data"]
    differing = [f"{name} was {saved.get(name)}, is {now}" for name, now in facts.items() if now != saved.get(name)]
    if differing:
        raise InputError(f"--resume: {found.path} belongs to a run on other data: {'; '.join(differing)}")
    answering = [static.fingerprint for static in run.engine.statics]
    if state.get("statics", answering) != answering:
        raise InputError(
            f"--resume: {found.path} belongs to a run with a static teacher or assistant of other weights; give the "
            "ones of that run with --teacher-checkpoint and --assistant-checkpoint (config.json has them)"
        )
    run.engine.load(state, state["steps"])
    run.engine.load_statistics(state.get("statistics", []))
    run.epoch, run.step, run.steps, run.order = (state[name] for name in ("epoch", "step", "steps", "order"))
    run.saved = run.epoch if run.step == 0 else state.get("saved", run.epoch)
    run.seconds = state["seconds"]
    run.folder.rows[:] = state["rows"]
    run.meter = Meter(run.engine.learners.names, run.group, state["meter"])
    for damaged in found.damaged:
        run.progress.say(f"skipped: {damaged}")
    run.progress.start_at(run.steps)
    if not quiet:
        run.progress.say(f"resume   {found.path}: {run.epoch} epochs and {run.step} steps are done")


def roll_back(run: Run, reason: str) -> None:
    """Go back to the last checkpoint, with another order of the data so that the same does not happen again."""
    order, seconds = run.order + 1, counts(run)["seconds"]
    found = run.group.decide(lambda: checkpoints.latest(run.folder.path))
    if found is None:
        raise TrainingError(f"{reason}; there is no checkpoint to roll back to")
    take_up(run, found, quiet=True)
    run.order = order
    run.seconds, run.started = seconds, time.perf_counter()
    run.progress.say(
        f"{reason}: back to step {run.steps}, with another order of the data ({order} of {MOST_ROLLBACKS} rollbacks)"
    )
