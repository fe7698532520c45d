"""One model, in a process of its own: plan, expand, verify, extract, and the row of the result that tells about it.

The steps are those of ``reparam.expand``, one after the other, so that one pass gives the times and the worst error.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

import reparam
from reparam.coverage.catalogue import Entry, build, example
from reparam.coverage.reasons import contractions, narrow_layers, opaque_leaves, short_source, short_text
from reparam.coverage.weights import balance, randomise
from reparam.passes.example import Inputs, batch_of, example_for, normalise, random_like
from reparam.passes.expand import verified_inputs, verify_plan
from reparam.passes.plan import Plan
from reparam.passes.search import prepare
from reparam.passes.skeleton import skeleton_of
from reparam.passes.teacher import Teacher
from reparam.passes.validate import check_model
from reparam.passes.widen import build_teacher

NOISE = 0.25
BIT_EQUAL, CLOSE = "bit-equal", "within 2 ulp"


@dataclass(frozen=True)
class Settings:
    """What holds for all models of a run.

    Args:
        ratio: replicas per channel.
        plan_only: plan on the meta device and do nothing else.
        threads: of torch, in each process.
        seed: of the random weights.
    """

    ratio: int = 2
    plan_only: bool = False
    threads: int = 1
    seed: int = 0


def work(sender: Connection, entry: Entry, settings: Settings, folder: str) -> None:
    """Measure one model and send its row; the target of a process. ``folder`` is that of the run, for file names."""
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends this process
    _be_the_first_to_go()
    torch.set_num_threads(settings.threads)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    sender.send(measured(entry, settings))
    sender.close()


def measured(entry: Entry, settings: Settings) -> dict[str, Any]:
    """Return the row of a model: what was found, or the error that ended it."""
    row = opening(entry)
    try:
        found = plan_row(entry, settings) if settings.plan_only else full_row(entry, settings)
    except Exception as error:
        return {**row, "status": "error", "error": _described(error), "peak_memory_mib": peak_memory()}
    return {**row, "status": "ok", **found, "peak_memory_mib": peak_memory()}


def opening(entry: Entry) -> dict[str, Any]:
    """Return what a row says before anything is measured."""
    row: dict[str, Any] = {"name": entry.name, "group": entry.group}
    if entry.family:
        row["family"] = entry.family
    if entry.options:
        row["options"] = dict(entry.options)
    return row


def plan_row(entry: Entry, settings: Settings) -> dict[str, Any]:
    """Plan on the meta device."""
    start = time.perf_counter()
    try:
        with torch.device("meta"):
            model = build(entry)
    except NotImplementedError:
        model = build(entry)  # its initialisation reads values (torchvision's RegNet)
    built = time.perf_counter()
    plan = reparam.plan(model, settings.ratio, example_input=example(entry, "meta"))
    seconds = {"build": built - start, "plan": time.perf_counter() - built}
    return {**_of_plan(plan, model), "seconds": _rounded(seconds)}


def full_row(entry: Entry, settings: Settings) -> dict[str, Any]:
    """Plan, expand, verify, run and extract a network with random float32 weights."""
    start = time.perf_counter()
    torch.manual_seed(settings.seed)
    given = example(entry)
    model = randomise(build(entry), settings.seed)
    inputs = _real(model, given)
    balance(model, inputs)
    seconds = {"build": time.perf_counter() - start}
    plan, teacher, error = _expanded(model, settings.ratio, given, seconds)
    with torch.no_grad():
        teacher(*inputs[0], **inputs[1])  # verification runs the graph; its guards are those of the teacher
    start = time.perf_counter()
    student = reparam.extract(teacher)
    seconds["extract"] = time.perf_counter() - start
    return {
        **_of_plan(plan, model),
        "worst_error": float(f"{error:.3g}"),
        "round_trip": _round_trip(model, student, settings.ratio),
        "seconds": _rounded(seconds),
        "narrow": narrow_layers(plan),
        "leaves": opaque_leaves(plan, model),
        "notes": [short_text(note) for note in plan.notes],
    }


def _real(model: nn.Module, given: Any) -> Inputs:
    """Return inputs as verification takes them: of the shapes that are given or found, random, one sample if found."""
    inputs = example_for(model, skeleton_of(model), given)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return random_like(inputs, "cpu", None, 1 if given is None else batch_of(normalise(given)))


def _expanded(model: nn.Module, ratio: int, given: Any, seconds: dict[str, float]) -> tuple[Plan, Teacher, float]:
    """Do what ``reparam.expand`` does, with the time that planning takes and the worst error of a node."""
    start = time.perf_counter()
    check_model(model)
    capture, inputs, plan = prepare(model, ratio, given)
    seconds["plan"] = time.perf_counter() - start
    error = verify_plan(model, capture, plan, *verified_inputs(capture, plan, inputs, given))
    teacher = build_teacher(model, capture, plan, NOISE)
    seconds["expand"] = time.perf_counter() - start
    return plan, teacher, error


def _of_plan(plan: Plan, model: nn.Module) -> dict[str, Any]:
    return {
        "input": describe(plan.inputs),
        "parameters": [plan.parameters, plan.wide_parameters],
        "multiply_adds": list(plan.multiply_adds),
        "coverage": round(plan.coverage, 4),
        "contractions": contractions(plan, model),
    }


def describe(inputs: Any) -> str:
    """Return the example input of a plan in short: ``2x3x224x224``, lists in brackets."""

    def one(value: Any) -> str:
        if "tensor" in value:
            return "x".join(map(str, value["tensor"]))
        items = value.get("list", value.get("tuple"))
        if items is not None:
            return f"[{', '.join(map(one, items))}]"
        return "..." if "dict" in value else repr(value.get("value"))

    named = [f"{name}={one(value)}" for name, value in inputs.get("kwargs", {}).items()]
    return ", ".join([*map(one, inputs.get("args", ())), *named])


def _round_trip(model: nn.Module, student: nn.Module, ratio: int) -> str:
    """Compare what was extracted with what was expanded."""
    before, after = model.state_dict(), student.state_dict()
    if list(before) != list(after):
        return f"other keys: {sorted(set(before) ^ set(after))[:3]}"
    different = [name for name, value in before.items() if not torch.equal(value, after[name])]
    if not different:
        return BIT_EQUAL
    power_of_two = ratio & (ratio - 1) == 0
    if not power_of_two and all(_is_close(before[name], after[name]) for name in different):
        return CLOSE
    return f"{len(different)} of {len(before)} tensors differ, first {different[0]}"


def _is_close(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or not a.is_floating_point():
        return False
    return torch.allclose(a, b, rtol=4 * torch.finfo(a.dtype).eps, atol=0)


def _described(error: Exception) -> dict[str, str]:
    frames = traceback.extract_tb(error.__traceback__)
    where = short_source(f"{frames[-1].filename}:{frames[-1].lineno}") if frames else ""
    return {"type": type(error).__name__, "message": short_text(str(error)), "where": where}


def peak_memory() -> float:
    """Return the peak resident memory of this process, in MiB; on Linux its own, without that of its parent."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return round(int(line.split()[1]) / 1024)
    try:
        import resource
    except ImportError:
        return 0.0  # not on this system
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


def _be_the_first_to_go() -> None:
    """Where memory runs out, Linux shall end this process and none that somebody works in."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}
