"""GPD against its honest control: the plain student with the identical recipe, at several learning rates and seeds.

The student inside a teacher of ratio r takes an effective step r^2 times larger in its hidden layers (about r times
with AdamW), so a gain over the baseline at the same learning rate alone proves nothing.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reparam.distill import files
from reparam.distill.chain import train_all
from reparam.distill.config import TrainConfig, options
from reparam.distill.data import load_source
from reparam.distill.figures import draw_curves
from reparam.distill.files import open_run_folder
from reparam.distill.ranges import STATIC_ONLY
from reparam.distill.report import table
from reparam.errors import InputError
from reparam.provenance import LIBRARIES, versions

COMPARISON = "comparison.json"


@dataclass(frozen=True)
class Arm:
    """One line of a comparison: a name and the settings of its runs, but for seed and output."""

    name: str
    config: TrainConfig


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
    for factor in dict.fromkeys(factors):
        plain = dataclasses.replace(config, method="baseline", lr=base_lr * factor, **without)
        found.append(Arm(f"baseline lr {base_lr * factor:g}", plain.resolved()))
    return found


def compare(config: TrainConfig, seeds: Sequence[int], command: Sequence[str] = ()) -> dict[str, Any]:
    """Run every arm with every seed; write each run's folder and comparison.json, which is rewritten after every run.

    Args:
        config: the settings of the GPD runs; ``baseline`` has to be False.
        seeds: seeds of the runs, without repetition.
        command: what the user typed, for the files.

    Returns:
        The content of comparison.json.
    """
    if config.baseline:
        raise InputError("--compare runs the baselines itself; --method names what to compare with them")
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise InputError(f"--seeds needs different numbers that are not negative, got {list(seeds)}")
    for seed in seeds:
        dataclasses.replace(config, seed=seed)  # refuses what is too large
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--compare runs in one process; start it without torchrun, or start its runs one by one")
    if config.resume is not None:
        raise InputError("--compare starts all its runs; leave out --resume")
    folder = open_run_folder(config).path
    source = load_source(config.data, config.limit_train)
    if not config.quiet:
        print(opening(config, seeds), flush=True)
    results: dict[str, dict[int, dict[str, Any]]] = {arm.name: {} for arm in arms(config)}
    for seed in seeds:
        for arm in arms(config):
            output = str(run_folder(folder, arm, seed))
            run = dataclasses.replace(arm.config, seed=seed, output=output, quiet=True)
            summary = train_all(run, source=source, command=command)
            results[arm.name][seed] = summary
            files.write_json(folder / COMPARISON, _content(config, results, command))
            if not config.quiet:
                print(f"seed {seed}  {arm.name}: {_line(summary)}", flush=True)
    content = _content(config, results, command)
    draw_curves(_curves(folder, arms(config), seeds[0]), folder / files.CURVES)
    if not config.quiet:
        print(describe(content, folder))
    return content


def _curves(folder: Path, compared: Sequence[Arm], seed: int) -> dict[str, list[dict[str, Any]]]:
    return {arm.name: files.read_metrics(run_folder(folder, arm, seed)) for arm in compared}


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


def _line(summary: dict[str, Any]) -> str:
    teacher = "" if summary["teacher_top1"] is None else f", teacher {summary['teacher_top1']:.2f}%"
    return f"student {summary['student_top1']:.2f}%{teacher}, {summary['seconds']:.0f} s"


def _content(
    config: TrainConfig, results: dict[str, dict[int, dict[str, Any]]], command: Sequence[str]
) -> dict[str, Any]:
    measured = [_arm_numbers(name, list(runs.values())) for name, runs in results.items() if runs]
    return {
        "arms": measured,
        "verdict": _verdict(measured),
        "config": dataclasses.asdict(config.resolved()),
        "command": list(command),
        "versions": versions(LIBRARIES),
    }


def _arm_numbers(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    top1 = [run["student_top1"] for run in runs]
    teachers = [run["teacher_top1"] for run in runs if run["teacher_top1"] is not None]
    return {
        "name": name,
        "baseline": runs[0]["baseline"],
        "lr": runs[0]["config"]["lr"],
        "seeds": [run["config"]["seed"] for run in runs],
        "student_top1": top1,
        "mean": statistics.mean(top1),
        "std": statistics.stdev(top1) if len(top1) > 1 else None,
        "teacher_top1": teachers or None,
        "seconds": [run["seconds"] for run in runs],
        "threads": runs[0]["threads"],
        "parameters": runs[0]["parameters"],
        "parity_max_rel": max(run["parity"]["max_rel"] for run in runs),
    }


def _verdict(measured: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Compare GPD with the best baseline; the difference is in points of top-1, with its standard error."""
    gpd = [arm for arm in measured if not arm["baseline"]]
    plain = [arm for arm in measured if arm["baseline"]]
    if not gpd or not plain:
        return None
    best = max(plain, key=lambda arm: float(arm["mean"]))
    error = None
    if gpd[0]["std"] is not None and best["std"] is not None:
        error = (gpd[0]["std"] ** 2 / len(gpd[0]["seeds"]) + best["std"] ** 2 / len(best["seeds"])) ** 0.5
    return {"best_baseline": best["name"], "difference": gpd[0]["mean"] - best["mean"], "standard_error": error}


def called(content: dict[str, Any]) -> str:
    """The name of what a comparison is about."""
    method = str(content["config"]["method"])
    return "GPD" if method == "gpd" else method


def describe(content: dict[str, Any], folder: Path) -> str:
    """Lay out a comparison as a table with a verdict."""
    rows = [["student top-1", *(f"seed {seed}" for seed in content["arms"][0]["seeds"]), "mean", "std", "s per run"]]
    for arm in content["arms"]:
        spread = "-" if arm["std"] is None else f"{arm['std']:.2f}"
        numbers = [*(f"{value:.2f}" for value in arm["student_top1"]), f"{arm['mean']:.2f}", spread]
        rows.append([arm["name"], *numbers, f"{statistics.mean(arm['seconds']):.0f}"])
    verdict = content["verdict"]
    error = "" if verdict["standard_error"] is None else f" +- {verdict['standard_error']:.2f}"
    return "\n".join(
        [
            "",
            table(rows),
            f"{called(content)} minus the best baseline ({verdict['best_baseline']}): "
            f"{verdict['difference']:+.2f}{error} points, at equal epochs (its steps cost more: see s per run)",
            f"files: {folder / COMPARISON}",
        ]
    )
