"""Which part of a method helps, and against what: all arms of a comparison, several seeds, one JSON.

    python benchmarks/evidence.py --data fashion-mnist:DIR --limit-train 10000 --model cifar_resnet8_w8 --epochs 15 \
        --static cifar_resnet20 --seeds 0,1,2,3,4 --runs RUNS
    python benchmarks/evidence.py --suite gap --data fashion-mnist:DIR --limit-train 10000 --image-size 16 \
        --batch-size 128 --lr 0.02 --epochs 15 --channels-last --threads 1 --model cifar10_plain2 \
        --static cifar10_plain10 --assistant cifar10_plain4 --jobs 2 --seeds 0,1,2 --runs RUNS

Arms of the suite ``gpd``, the default: the plain student at lr and at ratio^2 lr (the student inside a teacher takes an
effective step that much larger), both also for ``--compute`` times the epochs (what a GPD epoch costs); branches alone;
GPD without and with branches; and with a static teacher, which is trained first: KD, DKD, GPD with DKD. Averaged
weights (EMA) are measured in each run.
Arms of the suite ``gap``, all of the same student: alone, and with a static teacher, which is trained first: KD, TAKD
and Gap-KD through ``--assistant``, Gap-KD through the student grown by 2, Kdiffusion and its control; on request GPD
with Gap-KD and with Kdiffusion, and both methods at smaller weights. Each arm trains its assistant in its own folder.
Plain networks of ten layers pool four times: images need 16 pixels.
A run that is done is not repeated: the same command goes on where an interrupted one stopped.
Takes every option of ``reparam train`` as the base of all arms. Paths of the measuring machine are not written.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import connection, get_all_start_methods, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import compare_training
import record
from arm_tables import spread

from reparam.distill import files
from reparam.distill.command import add_arguments, config_from
from reparam.distill.config import TrainConfig
from reparam.distill.distributed import resolve_device
from reparam.distill.recipes import load_recipe
from reparam.errors import StoppedError


@dataclasses.dataclass(frozen=True)
class Arm:
    """One line of the table: settings that differ from the base, and which trained teacher they need."""

    name: str
    changes: dict[str, Any]
    static: bool = False


def gpd_arms(base: TrainConfig, options: argparse.Namespace) -> list[Arm]:
    branches, compute = options.with_branches, options.compute
    lr = base.resolved().lr or 0.0
    wide = lr * base.ratio**2
    plain: dict[str, Any] = {"method": "baseline"}
    milestones = base.milestones and tuple(epoch * compute for epoch in base.milestones)
    long = {"epochs": base.epochs * compute, "milestones": milestones}
    return [
        Arm(f"baseline, lr {lr:g}", {**plain, "lr": lr}),
        Arm(f"baseline, lr {wide:g}", {**plain, "lr": wide}),
        Arm(f"baseline, lr {lr:g}, {compute}x epochs", {**plain, "lr": lr, **long}),
        Arm(f"baseline, lr {wide:g}, {compute}x epochs", {**plain, "lr": wide, **long}),
        Arm(f"{branches} alone", {**plain, "branches": branches}),
        Arm("GPD without branches", {"method": "gpd"}),
        Arm(f"GPD with {branches}", {"method": "gpd", "branches": branches}),
        Arm("KD", {"method": "kd"}, static=True),
        Arm("DKD", {"method": "dkd"}, static=True),
        Arm(f"GPD with {branches} + DKD", {"method": "gpd+dkd", "branches": branches}, static=True),
        Arm("GPD without branches, lr scaled", {"method": "gpd", "lr_scale": "student"}),
        Arm("GPD without branches, no soft loss", {"method": "gpd", "kd_weight": 0.0}),
        Arm("GPD without branches, soft loss 0.3", {"method": "gpd", "kd_weight": 0.3}),
        Arm("GPD without branches, soft loss 1", {"method": "gpd", "kd_weight": 1.0}),
        Arm(f"GPD without branches, lr {lr / base.ratio**2:g}", {"method": "gpd", "lr": lr / base.ratio**2}),
        Arm(f"GPD with {branches}, no soft loss", {"method": "gpd", "branches": branches, "kd_weight": 0.0}),
    ]


def gap_arms(base: TrainConfig, options: argparse.Namespace) -> list[Arm]:
    """Gap-KD has weights and temperatures of a recipe, and the same share of the epochs as its warm-up."""
    recipe = load_recipe(options.gap_recipe).settings
    gap = {name: recipe[name] for name in ("ce_weight", "alpha", "beta")}
    usual = {"tau_schedule": "dtm", "tau_max": 20.0, "tau_min": 1.0}
    gap |= {name: recipe[name] for name, value in usual.items() if recipe[name] != value}
    gap["distill_warmup"] = round(base.resolved().epochs * recipe["distill_warmup"] / recipe["epochs"])
    through: dict[str, Any] = {"assistant": options.assistant, "assistant_epochs": options.assistant_epochs}
    return [
        Arm("baseline", {"method": "baseline"}),
        Arm("KD", {"method": "kd"}, static=True),
        Arm("TAKD", {"method": "takd", **through}, static=True),
        Arm("Gap-KD", {"method": "gapkd", **gap, **through}, static=True),
        Arm("Gap-KD, grown assistant", {"method": "gapkd", **gap, **through, "assistant": "expand:2"}, static=True),
        Arm("Kdiffusion", {"method": "kdiffusion"}, static=True),
        Arm("Kdiffusion, average", {"method": "kdiffusion-average"}, static=True),
        Arm("GPD + Gap-KD", {"method": "gpd+gapkd", **gap, **through}, static=True),
        Arm("GPD + Kdiffusion", {"method": "gpd+kdiffusion"}, static=True),
        # Lighter: the recipe's weights multiply the step, and ten steps of all stages outweigh the labels.
        Arm("Gap-KD, weights 1 1 2", {"method": "gapkd", **gap, **through, **_LIGHT}, static=True),
        Arm("Kdiffusion, weight 0.1", {"method": "kdiffusion", "distill_weight": 0.1}, static=True),
    ]


_LIGHT = {"ce_weight": 1.0, "alpha": 1.0, "beta": 2.0}
"""Weights of Gap-KD in a result folder of its release, for plain networks on CIFAR-10."""


@dataclasses.dataclass(frozen=True)
class Suite:
    """A set of arms, how many of them run without being asked for (the others look for reasons), and a file name."""

    arms: Callable[[TrainConfig, argparse.Namespace], list[Arm]]
    default_arms: int
    result: str


SUITES = {"gpd": Suite(gpd_arms, 10, "evidence"), "gap": Suite(gap_arms, 7, "gap")}


def main() -> int:
    options = _parse()
    base = _base(options)
    suite = SUITES[options.suite]
    chosen = _chosen(suite.arms(base, options), suite.default_arms, options)
    if any(arm.changes.get("assistant", "") is None for arm in chosen):
        sys.exit(
            "--assistant names the network between --static and --model, which some of the arms need; or see --arms"
        )
    runs = options.runs.expanduser()
    runs.mkdir(parents=True, exist_ok=True)
    seeds = options.seeds or (0, 1, 2, 3, 4)
    device = resolve_device(base.device)
    static = runs / "static"
    deadline = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
    waiting = [(f"seed {seed}  {arm.name}", arm, seed) for seed in seeds for arm in chosen]
    running: dict[str, tuple[BaseProcess, Path]] = {}
    if any(arm.static for arm in chosen):
        teacher = {"method": "baseline", "model": options.static, "epochs": options.static_epochs or base.epochs}
        trained = dataclasses.replace(base, **teacher, seed=1000, output=str(static))
        running[f"static teacher {options.static}"] = _start(trained), static
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while waiting or running:
            ready = [place for place in waiting if not place[1].static or (static / files.SUMMARY).is_file()]
            while ready and len(running) < options.jobs and time.monotonic() < deadline:
                place = ready.pop(0)
                waiting.remove(place)
                name, arm, seed = place
                running[name] = _start(_config(base, arm, seed, runs, options, static)), _folder(runs, arm, seed)
            if not running:
                break
            connection.wait(
                [process.sentinel for process, _ in running.values()], max(0.0, min(deadline - time.monotonic(), 1e6))
            )
            if time.monotonic() >= deadline:
                waiting = []
                _end(running)
            for name in [name for name, (process, _) in running.items() if not process.is_alive()]:
                _report(name, *running.pop(name))
                _write(options, base, chosen, seeds, runs, device)
    finally:  # nothing goes on behind the back of who stopped this, in folders that the next call takes up
        _end(running)
    return 0


def _end(running: dict[str, tuple[BaseProcess, Path]]) -> None:
    for process, _ in running.values():
        process.terminate()  # SIGTERM: the run saves its state and ends
    for process, _ in running.values():
        process.join()


def _start(config: TrainConfig) -> BaseProcess:
    # Every run in a fresh process, forked from one that has imported the libraries and nothing else where that exists.
    forks = "forkserver" in get_all_start_methods()
    server = get_context("forkserver" if forks else "spawn")
    if forks:
        server.set_forkserver_preload(["reparam.distill.chain", "reparam.distill.trainer", "timm", "matplotlib.pyplot"])
    process: BaseProcess = server.Process(target=run, args=(config,))  # type: ignore[attr-defined]
    process.start()
    return process


def _report(name: str, process: BaseProcess, folder: Path) -> None:
    if process.exitcode not in (0, 143, -signal.SIGTERM):
        sys.exit(f"{name} failed, see above")
    if process.exitcode:  # asked to end, before or after its first step
        print(f"{name}: stopped; the same command goes on", flush=True)
        return
    summary = files.read_json(folder / files.SUMMARY)
    print(f"{name}: {summary['student_top1']:.2f} ({summary['seconds']:.0f} s)", flush=True)


def run(config: TrainConfig) -> None:
    from reparam.distill.chain import train_all

    try:
        train_all(dataclasses.replace(config, resume="auto", quiet=True), command=["benchmarks/evidence.py"])
    except StoppedError:
        sys.exit(143)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="evidence.py")
    add_arguments(parser)
    own = parser.add_argument_group("evidence")
    own.add_argument("--suite", default="gpd", choices=tuple(SUITES), help="which comparison (default: gpd)")
    own.add_argument("--static", default="cifar_resnet20", help="network of the static teacher")
    own.add_argument("--static-epochs", type=int, help="its epochs (default: --epochs)")
    own.add_argument("--with-branches", default="orepa", help="recipe of the arms with branches")
    own.add_argument(
        "--gap-recipe",
        default="cifar10/plain10-plain2-gapkd",
        help="suite gap: recipe with the weights and temperatures of Gap-KD",
    )
    own.add_argument("--compute", type=int, default=5, help="how many times the epochs cost what GPD costs")
    own.add_argument("--arms", help="names of the arms to run, or parts of names, separated by |")
    own.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    own.add_argument("--minutes", type=float, help="stop after this time; the same command goes on")
    own.add_argument("--runs", type=Path, required=True, help="folder for the runs; finished ones are not repeated")
    own.add_argument("--result", type=Path, help="JSON file to write (default: in benchmarks/results/)")
    options = parser.parse_args()
    if hasattr(options, "output") or hasattr(options, "resume"):
        parser.error("--runs names the folder of all runs; --output and --resume are not for this command")
    return _with_assistant(options)


def _with_assistant(options: argparse.Namespace) -> argparse.Namespace:
    """The base of all arms has no assistant: take it out of the settings, for the arms that have one."""
    if options.suite == "gpd":
        return options
    given = vars(options)
    options.assistant, options.assistant_epochs = given.get("assistant"), given.get("assistant_epochs")
    return options


def _base(options: argparse.Namespace) -> TrainConfig:
    settings = {key: value for key, value in vars(options).items() if not key.startswith("assistant")}
    return config_from(argparse.Namespace(**settings) if options.suite == "gap" else options)


def _chosen(found: list[Arm], default: int, options: argparse.Namespace) -> list[Arm]:
    if options.arms is None:
        return found[:default]
    parts = options.arms.split("|")
    names = {arm.name for arm in found}
    # A whole name means that arm, not those whose names go on behind it.
    chosen = [arm for arm in found if arm.name in parts or any(part in arm.name for part in parts if part not in names)]
    if not chosen:
        sys.exit(f"no arm matches {options.arms!r}; arms: {'; '.join(arm.name for arm in found)}")
    return chosen


def _config(
    base: TrainConfig, arm: Arm, seed: int, runs: Path, options: argparse.Namespace, static: Path
) -> TrainConfig:
    changes = dict(arm.changes)
    if arm.static:
        changes |= {"teacher": options.static, "teacher_checkpoint": str(static)}
    return dataclasses.replace(base, **changes, seed=seed, output=str(_folder(runs, arm, seed)))


def _folder(runs: Path, arm: Arm, seed: int) -> Path:
    words = "".join(letter if letter.isalnum() or letter == "." else " " for letter in arm.name).split()
    return runs / f"{'-'.join(words)}-seed{seed}"


def _write(
    options: argparse.Namespace, base: TrainConfig, chosen: list[Arm], seeds: tuple[int, ...], runs: Path, device: Any
) -> None:
    rows = [row for arm in chosen if (row := _row(arm, seeds, runs)) is not None]
    if not rows:
        return
    kind = base.data.partition(":")[0]
    name = f"{SUITES[options.suite].result}-{kind}-{base.model.rpartition(':')[2]}-{base.epochs}-epochs.json"
    config = {key: value for key, value in dataclasses.asdict(base.resolved()).items() if key not in _PATHS}
    content: dict[str, Any] = {"arms": rows, "config": {**config, "data": kind}, "compute": options.compute}
    if options.suite == "gap":
        del content["compute"]
        content["gap_recipe"] = options.gap_recipe
        content["assistant"] = {"model": options.assistant, "epochs": options.assistant_epochs or base.epochs}
    teacher = runs / "static" / files.SUMMARY
    if any(arm.static for arm in chosen) and teacher.is_file():
        summary = files.read_json(teacher)
        content["static"] = {"model": options.static, "epochs": summary["epochs"], "top1": summary["student_top1"]}
    origin = record.provenance(compare_training.command(kind, "evidence.py", ("--result", "--runs")), device)
    target = options.result or record.RESULTS / name
    files.write_json(target, {**content, **origin})


_PATHS = ("output", "checkpoint", "resume", "teacher_checkpoint")


def _row(arm: Arm, seeds: tuple[int, ...], runs: Path) -> dict[str, Any] | None:
    summaries = {}
    for seed in seeds:
        path = _folder(runs, arm, seed) / files.SUMMARY
        if path.is_file():
            summaries[seed] = files.read_json(path)
    if not summaries:
        return None
    found = list(summaries.values())
    row: dict[str, Any] = {"name": arm.name, "seeds": list(summaries), "epochs": found[0]["epochs"]}
    for key in ("student_top1", "student_ema_top1", "teacher_top1"):
        values = [summary[key] for summary in found if summary[key] is not None]
        if values:
            row[key] = spread(values)
    row["seconds"] = [summary["seconds"] for summary in found]
    assistants = _assistants(arm, seeds, runs)
    if assistants:
        row["assistants"] = assistants
    row["parameters"] = found[0]["parameters"]
    row["parity_max_rel"] = max(summary["parity"]["max_rel"] for summary in found)
    return row


def _assistants(arm: Arm, seeds: tuple[int, ...], runs: Path) -> list[dict[str, Any]]:
    """Accuracy and cost of the assistants that the finished runs of an arm trained on the way, in their order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        folder = _folder(runs, arm, seed)
        if (folder / files.SUMMARY).is_file():
            for path in sorted(folder.glob(f"assistant-*/{files.SUMMARY}")):
                found.setdefault(path.parent.name.partition("-")[2], []).append(files.read_json(path))
    return [
        {
            "name": _network(summaries[0]["config"]),
            "epochs": summaries[0]["epochs"],
            "top1": spread([summary["student_top1"] for summary in summaries]),
            "seconds": [summary["seconds"] for summary in summaries],
            "parameters": summaries[0]["parameters"]["student"],
        }
        for _, summaries in sorted(found.items())
    ]


def _network(config: dict[str, Any]) -> str:
    return f"expand:{config['widen']}" if config["widen"] else config["model"]


if __name__ == "__main__":
    sys.exit(main())
