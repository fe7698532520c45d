"""GPD against its honest control: the plain student with the identical recipe, at several learning rates and seeds.

The student inside a teacher of ratio r takes an effective step r^2 times larger in its hidden layers (about r times
with AdamW), so a gain over the baseline at the same learning rate alone proves nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reparam.distill import files
from reparam.distill.chain import train_all
from reparam.distill.checkpoints import check_same
from reparam.distill.config import TrainConfig, options
from reparam.distill.data import load_source
from reparam.distill.figures import draw_curves
from reparam.distill.files import open_run_folder
from reparam.distill.ranges import STATIC_ONLY
from reparam.distill.report import table
from reparam.distill.signals import termination
from reparam.errors import InputError, StoppedError, TrainingError
from reparam.provenance import LIBRARIES, versions

COMPARISON = "comparison.json"


@dataclass(frozen=True)
class Arm:
    """One line of a comparison: a name and the settings of its runs, but for seed and output."""

    name: str
    config: TrainConfig


@dataclass(frozen=True)
class Outcome:
    """How one run of a comparison ended: with its summary.json, or with an error in training."""

    seed: int
    summary: dict[str, Any] | None = None
    error: str | None = None


def arms(config: TrainConfig) -> list[Arm]:
    """Return the method at ``lr`` and the plain student, without branches, as a user would train it alone.

    With GPD it is trained at ``lr`` and at ``ratio^2 lr``; with AdamW also at ``ratio lr``.
    """
    powers = [0] if not config.gpd else [0, 2] if config.optimizer == "sgd" else [0, 1, 2]
    factors = [config.ratio**power for power in powers]
    base_lr = config.resolved().lr or 0.0
    found = [Arm(f"{config.method} lr {base_lr:g}", config.resolved())]
    without = {name: default for name, (_, default) in options().items() if name in STATIC_ONLY}
    without |= dict.fromkeys(("teacher", "teacher_checkpoint", "branches", "branch_init"))
    without |= {"teacher_checkpoint_ema": False}
    for factor in dict.fromkeys(factors):
        plain = dataclasses.replace(config, method="baseline", lr=base_lr * factor, **without)
        found.append(Arm(f"baseline lr {base_lr * factor:g}", plain.resolved()))
    return found


def compare(config: TrainConfig, seeds: Sequence[int], command: Sequence[str] = ()) -> dict[str, Any]:
    """Run every arm with every seed; write each run's folder and comparison.json, which is rewritten after every run.

    A run that diverges is a result: the others go on, and the verdict does without it. With ``resume="auto"`` runs that
    have finished are not run again.

    Args:
        config: the settings of the GPD runs; ``baseline`` has to be False.
        seeds: seeds of the runs, without repetition.
        command: what the user typed, for the files.

    Returns:
        The content of comparison.json.

    Raises:
        InputError: settings that no comparison has, or the output folder holds something else.
        StoppedError: the process got SIGTERM, in a run or between two of them.
    """
    if config.baseline:
        raise InputError("--compare runs the baselines itself; --method names what to compare with them")
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise InputError(f"--seeds needs different numbers that are not negative, got {list(seeds)}")
    for seed in seeds:
        dataclasses.replace(config, seed=seed)  # refuses what is too large
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--compare runs in one process; start it without torchrun, or start its runs one by one")
    folder = _folder(config)
    source = load_source(config.data, config.limit_train)
    if not config.quiet:
        print(opening(config, seeds), flush=True)
    compared = arms(config)
    outcomes: dict[str, list[Outcome]] = {arm.name: [] for arm in compared}
    content = _content(config, compared, outcomes, command)
    waiting = [(seed, arm) for seed in seeds for arm in compared]
    with termination() as asked_to_stop:
        for number, (seed, arm) in enumerate(waiting, 1):
            run = dataclasses.replace(arm.config, seed=seed, output=str(run_folder(folder, arm, seed)), quiet=True)
            outcome = _outcome(run, arm, folder, functools.partial(train_all, run, source=source, command=command))
            outcomes[arm.name].append(outcome)
            content = _content(config, compared, outcomes, command)
            files.write_json(folder / COMPARISON, content)
            if not config.quiet:
                print(f"seed {seed}  {arm.name}: {_line(outcome)}", flush=True)
            if asked_to_stop() and number < len(waiting):  # too late for the run, which has finished
                raise StoppedError(f"stopped by SIGTERM after {number} of {len(waiting)} runs; {_way_out(folder)}")
    draw_curves(_curves(folder, compared, seeds[0]), folder / files.CURVES)
    if not config.quiet:
        print(describe(content, folder))
    return content


def _folder(config: TrainConfig) -> Path:
    """The folder of the comparison: a new one, or with ``--resume auto`` that of the one to go on with."""
    if config.resume is None:
        return open_run_folder(config).path
    if config.resume != "auto":
        raise InputError(f"--resume {config.resume}: a comparison has many runs; --compare takes --resume auto alone")
    if config.output is None:
        raise InputError("--resume auto looks for a comparison in --output, which was not given")
    path = Path(config.output).expanduser() / COMPARISON
    if not path.is_file():
        return open_run_folder(config).path
    (settings,) = files.read_entries(path, "config")
    check_same(settings, dataclasses.asdict(config.resolved()), path)
    return path.parent


def _way_out(folder: Path) -> str:
    return f"go on with the same command and --compare --resume auto --output {folder}"


def _outcome(run: TrainConfig, arm: Arm, folder: Path, start: Callable[[], dict[str, Any]]) -> Outcome:
    """Run one arm with one seed; that it fails in training is a result as well."""
    try:
        return Outcome(run.seed, summary=start())
    except StoppedError as error:
        raise StoppedError(
            f"stopped by SIGTERM in the run {arm.name} with seed {run.seed}; its state is saved, {_way_out(folder)}"
        ) from error
    except TrainingError as error:
        return Outcome(run.seed, error=str(error))


def _curves(folder: Path, compared: Sequence[Arm], seed: int) -> dict[str, list[dict[str, Any]]]:
    written = {arm.name: run_folder(folder, arm, seed) for arm in compared}
    return {name: files.read_metrics(path) for name, path in written.items() if (path / files.METRICS).is_file()}


def run_folder(folder: Path, arm: Arm, seed: int) -> Path:
    """The folder of one run of a comparison."""
    return folder / f"{arm.name.replace(' ', '-')}-seed{seed}"


def opening(config: TrainConfig, seeds: Sequence[int]) -> str:
    """Say what a comparison is going to run."""
    names = [arm.name for arm in arms(config)]
    return (
        f"{len(names) * len(seeds)} runs of {config.model} on {config.data}, {config.epochs} epochs each: "
        f"{', '.join(names)}; seeds {', '.join(map(str, seeds))}"
    )


def _line(outcome: Outcome) -> str:
    summary = outcome.summary
    if summary is None:
        return f"FAILED: {outcome.error}"
    teacher = "" if summary["teacher_top1"] is None else f", teacher {summary['teacher_top1']:.2f}%"
    return f"student {summary['student_top1']:.2f}%{teacher}, {summary['seconds']:.0f} s"


def _content(
    config: TrainConfig, compared: Sequence[Arm], outcomes: Mapping[str, Sequence[Outcome]], command: Sequence[str]
) -> dict[str, Any]:
    measured = [_arm_numbers(arm, outcomes[arm.name]) for arm in compared if outcomes[arm.name]]
    return {
        "arms": measured,
        "verdict": _verdict(measured),
        "config": dataclasses.asdict(config.resolved()),
        "command": list(command),
        "versions": versions(LIBRARIES),
    }


def _arm_numbers(arm: Arm, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The numbers of an arm over the runs that finished; without one of these they are None, or empty lists."""
    runs = [outcome.summary for outcome in outcomes if outcome.summary is not None]
    top1 = [run["student_top1"] for run in runs]
    teachers = [run["teacher_top1"] for run in runs if run["teacher_top1"] is not None]
    return {
        "name": arm.name,
        "baseline": arm.config.baseline,
        "lr": arm.config.lr,
        "seeds": [outcome.seed for outcome in outcomes if outcome.summary is not None],
        "student_top1": top1,
        "mean": statistics.mean(top1) if top1 else None,
        "std": statistics.stdev(top1) if len(top1) > 1 else None,
        "student_ema_top1": [run["student_ema_top1"] for run in runs] if arm.config.ema and runs else None,
        "teacher_top1": teachers or None,
        "seconds": [run["seconds"] for run in runs],
        "threads": runs[0]["threads"] if runs else None,
        "parameters": runs[0]["parameters"] if runs else None,
        "parity_max_rel": max((run["parity"]["max_rel"] for run in runs), default=None),
        "failed": [{"seed": outcome.seed, "error": outcome.error} for outcome in outcomes if outcome.summary is None],
    }


def _verdict(measured: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Compare GPD with the best baseline; the difference is in points of top-1, with its standard error.

    Runs that failed are left out, and named; None where either side has no run that finished.
    """
    finished = [arm for arm in measured if arm["seeds"]]
    gpd = [arm for arm in finished if not arm["baseline"]]
    plain = [arm for arm in finished if arm["baseline"]]
    if not gpd or not plain:
        return None
    best = max(plain, key=lambda arm: float(arm["mean"]))
    error = None
    if gpd[0]["std"] is not None and best["std"] is not None:
        error = (gpd[0]["std"] ** 2 / len(gpd[0]["seeds"]) + best["std"] ** 2 / len(best["seeds"])) ** 0.5
    return {
        "best_baseline": best["name"],
        "difference": gpd[0]["mean"] - best["mean"],
        "standard_error": error,
        "left_out": left_out(measured),
    }


def left_out(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say which arms lack which seeds because these runs failed."""
    said = []
    for arm in measured:
        seeds = ", ".join(str(failed["seed"]) for failed in arm["failed"])
        if seeds:
            said.append(f"{arm['name']} (seed {seeds}{'' if arm['seeds'] else ': no run finished'})")
    return said


def called(content: dict[str, Any]) -> str:
    """The name of what a comparison is about."""
    method = str(content["config"]["method"])
    return "GPD" if method == "gpd" else method


def describe(content: dict[str, Any], folder: Path) -> str:
    """Lay out a comparison as a table with a verdict."""
    measured, verdict = content["arms"], content["verdict"]
    failed = {(arm["name"], run["seed"]): run["error"] for arm in measured for run in arm["failed"]}
    seeds = sorted({seed for arm in measured for seed in arm["seeds"]} | {seed for _, seed in failed})
    averaged = ["averaged"] if any(arm.get("student_ema_top1") for arm in measured) else []
    rows = [["student top-1", *(f"seed {seed}" for seed in seeds), "mean", "std", *averaged, "s per run"]]
    for arm in measured:
        scores = dict(zip(arm["seeds"], arm["student_top1"], strict=True))
        numbers = [f"{scores[seed]:.2f}" if seed in scores else "FAILED" for seed in seeds]
        numbers += ["-" if arm[name] is None else f"{arm[name]:.2f}" for name in ("mean", "std")]
        if averaged:
            found = arm.get("student_ema_top1")
            numbers.append(f"{statistics.mean(found):.2f}" if found else "-")
        rows.append([arm["name"], *numbers, f"{statistics.mean(arm['seconds']):.0f}" if arm["seconds"] else "-"])
    lines = ["", table(rows), *(f"FAILED  {name}, seed {seed}: {why}" for (name, seed), why in failed.items())]
    if verdict is None:
        lines.append(f"no verdict: there is nothing to compare without {'; '.join(left_out(measured))}")
    else:
        error = "" if verdict["standard_error"] is None else f" +- {verdict['standard_error']:.2f}"
        without = f"; left out, because they failed: {'; '.join(verdict['left_out'])}" if verdict["left_out"] else ""
        lines.append(
            f"{called(content)} minus the best baseline ({verdict['best_baseline']}): "
            f"{verdict['difference']:+.2f}{error} points, at equal epochs (its steps cost more: see s per run){without}"
        )
    return "\n".join([*lines, f"files: {folder / COMPARISON}"])
