"""``reparam bench step``: a GPD step against the ideal, a plain student step and a plain wide step one after the other.

The ideal is what training two plain networks of these sizes costs: both get the same optimizer over their own
parameters and cross entropy with the labels. GPD adds the student's view, branches and the loss between both networks.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from reparam.bench import costs, records
from reparam.bench.parts import gpd_parts, plain_parts
from reparam.bench.subjects import (
    EngineStep,
    PlainStep,
    Setting,
    device_of,
    difference,
    plain_wide,
    setting,
    static_teacher,
    with_branches,
)
from reparam.bench.timing import Job, Measured, interleaved, ratio, spread
from reparam.distill.distributed import Group
from reparam.distill.engine import precision
from reparam.distill.recording import WARM
from reparam.distill.runs import threads_restored
from reparam.errors import InputError
from reparam.ops.recipes import get as get_recipe
from reparam.passes.teacher import require_teacher

STUDENT, WIDE, IDEAL, GPD, NATIVE = "plain student", "plain wide", "ideal", "GPD", "native wide"
"""Names of the rows; GPD with branches is ``GPD + RECIPE``, a method against a static teacher alone its own name."""

MERGED, APART = "merged", "every branch run"


@dataclass
class Bench:
    """All that is measured in one run.

    Attributes:
        where: the setting.
        steps: whole steps by name, in the order of a round.
        parts: the parts of some of them.
        sizes: asks a step for its bytes.
        facts: what else the JSON says about a step.
    """

    where: Setting
    steps: dict[str, Job] = field(default_factory=dict)
    parts: dict[str, dict[str, Job]] = field(default_factory=dict)
    sizes: dict[str, Callable[[], dict[str, int]]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)


def run(options: argparse.Namespace) -> int:
    """Measure what the options say, write the JSON, print a table, and return the exit code."""
    folder, device = records.folder_of(options), device_of(options.device)
    recipes = recipe_names(options.branches or [])
    _check(options, device)
    with threads_restored():
        if options.threads:
            torch.set_num_threads(options.threads)
        where = setting(options, Group(0, 0, 1, device))
        with precision(where.config):
            bench = prepare(where, options, recipes)
            content = {**records.origin(options, device), **described(options), **measured(bench, options)}
    print(table(content))
    print(f"wrote {records.write(folder, file_name(options, device), content)}")
    return 0


def recipe_names(words: list[str]) -> list[str]:
    """Return the recipes of ``--branches``: words, or lists in one word; a recipe's own options have commas as well.

    >>> recipe_names(["orepa,dbb"])
    ['orepa', 'dbb']

    Raises:
        InputError: there is no such recipe, or it has no such option.
    """
    names: list[str] = []
    for piece in ",".join(words).split(",") if words else []:
        if names and re.fullmatch(r"\w+=.*", piece) and ":" in names[-1]:
            names[-1] += f",{piece}"
        else:
            names.append(piece)
    for name in names:
        get_recipe(name)
    return list(dict.fromkeys(names))


def _check(options: argparse.Namespace, device: torch.device) -> None:
    if options.cuda_graph and device.type != "cuda":
        raise InputError(f"--cuda-graph records work of a GPU, and --device is {options.device}; add --device cuda")
    if options.cuda_graph and options.precision == "fp16":
        raise InputError("--cuda-graph: fp16 asks after each step whether the loss scale fits, which no graph can hold")
    if options.precision == "tf32" and device.type != "cuda":
        raise InputError("--precision tf32 is a mode of CUDA GPUs; use fp32 on the CPU")
    if options.side_by_side and not options.branches:
        raise InputError("--side-by-side compares ways to run branches; name a recipe with --branches")
    if options.teacher is None and options.no_overlap:
        raise InputError("--no-overlap is about a static teacher; name one with --teacher")
    if options.teacher is None and options.method != "kd":
        raise InputError(f"--method {options.method} is a loss against a static teacher; name one with --teacher")


# What is measured ----------------------------------------------------------------------------------------------------


def prepare(where: Setting, options: argparse.Namespace, recipes: list[str]) -> Bench:
    """Build all networks and return the jobs over them."""
    bench = Bench(where)
    static = static_teacher(where, options.teacher) if options.teacher else None
    student = PlainStep(where.build(options.model), where)
    wide = PlainStep(plain_wide(where, where.build(options.model)), where)
    small, large = student.job(), wide.job()
    answered = (lambda: None) if static is None else where.repeated(lambda: where.ask(static), "the static teacher")

    def ideal() -> None:
        student()
        wide()
        answered()

    answering = [] if static is None else list(static.network.parameters())
    bench.steps = {STUDENT: small, WIDE: large,
                   IDEAL: Job(ideal, lambda: [*small.tensors(), *large.tensors(), *answering])}  # fmt: skip
    bench.sizes = {STUDENT: student.sizes, WIDE: wide.sizes, IDEAL: lambda: _sum(student.sizes(), wide.sizes())}
    bench.parts = {STUDENT: plain_parts(student), WIDE: plain_parts(wide)}
    if static is not None:
        step = EngineStep(where, where.build(options.model), options.method, None, [static], options.teacher)
        bench.steps[options.method], bench.sizes[options.method] = step.job(), step.sizes
    for recipe in [None, *recipes]:
        _add_gpd(bench, options, recipe, [] if static is None else [static])
    for recipe in recipes if options.side_by_side else ():
        _add_side_by_side(bench, options.model, recipe)
    if options.wide_model:
        native = PlainStep(where.build(options.wide_model, "--wide-model"), where)
        bench.steps[NATIVE], bench.sizes[NATIVE] = native.job(), native.sizes
        bench.parts[NATIVE] = plain_parts(native)
    return bench


def _add_gpd(bench: Bench, options: argparse.Namespace, recipe: str | None, statics: list[Any]) -> None:
    method = f"gpd+{options.method}" if statics else "gpd"
    name = GPD if recipe is None else f"{GPD} + {recipe}"
    where = bench.where
    step = EngineStep(where, where.build(options.model), method, recipe, statics, options.teacher)
    bench.steps[name], bench.sizes[name], bench.parts[name] = step.job(), step.sizes, gpd_parts(step)
    branches = require_teacher(step.engine.networks.owner).plan.branches
    bench.facts[name] = {
        "layers_with_branches": len(branches),
        "multiply_adds_of_merging": sum(branch.merge_multiply_adds for branch in branches),
        "multiply_adds_of_merging_in_the_teacher": sum(branch.wide_merge_multiply_adds for branch in branches),
    }


def _add_side_by_side(bench: Bench, model: str, recipe: str) -> None:
    where = bench.where
    merged, apart = with_branches(where, where.build(model), recipe)
    off = difference(merged, apart, where.batch.images)
    for kind, network in ((MERGED, merged), (APART, apart)):
        name, step = f"{STUDENT} + {recipe}, {kind}", PlainStep(network, where)
        bench.steps[name], bench.sizes[name] = step.job(), step.sizes
        bench.facts[name] = {"relative_difference_of_outputs": off}


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: value + other[name] for name, value in one.items()}


# Measuring -----------------------------------------------------------------------------------------------------------


def measured(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Run all jobs and return the figures of steps and parts."""
    device = bench.where.device
    calls = options.calls or (3 if device.type == "cuda" else 1)
    counts = {name: costs.count(job.run) for name, job in bench.steps.items()}
    ceiling = costs.limits(device, options.precision)
    # Calls until each step is recorded, and some more.
    warmup = WARM + 2 if options.cuda_graph else 2
    times = interleaved(bench.steps, options.runs, warmup=warmup, calls=calls, device=device)
    if options.cuda_graph:
        for found in times.values():
            found.peak = None
    rows = {}
    for name, found in times.items():
        ideal = times[IDEAL]
        rows[name] = {
            **timed(found, ideal, options.batch),
            **bench.sizes[name](),
            **counts[name],
            **costs.shares(counts[name], spread(found.seconds)["median"], ceiling),
            **bench.facts.get(name, {}),
        }
    if options.wide_model:
        rows[NATIVE]["over_plain_wide"] = ratio(times[NATIVE], times[WIDE])
    return {
        "calls": calls,
        "ceiling": {**ceiling, "bytes_moved": costs.HOW_BYTES_ARE_COUNTED},
        "peak_memory": _about_memory(device, options.cuda_graph),
        "steps": rows,
        "parts": {} if options.no_parts else _parts(bench, options, calls),
    }  # fmt: skip


def _about_memory(device: torch.device, recorded: bool) -> str:
    if device.type != "cuda":
        return "null: on a CPU one process cannot tell the memory of one job from that of the others"
    if recorded:
        return "null: a CUDA graph has memory of its own, of which the allocator counts what it keeps alone"
    return "what a job keeps plus what it needs beyond that"


def timed(found: Measured, ideal: Measured, images: int) -> dict[str, Any]:
    """Return time and memory of a step, and both over the ideal's."""
    seconds = spread(found.seconds)
    memory = None if found.peak is None or ideal.peak is None else round(found.peak / ideal.peak, 4)
    return {
        "seconds": seconds,
        "over_ideal": ratio(found, ideal),
        "images_per_second": float(f"{images / seconds['median']:.5g}"),
        "peak_memory_bytes": found.peak,
        "peak_memory_over_ideal": memory,
    }


def _parts(bench: Bench, options: argparse.Namespace, calls: int) -> dict[str, dict[str, Any]]:
    jobs = {(step, part): job for step, parts in bench.parts.items() for part, job in parts.items()}
    named = {f"{step}: {part}": job for (step, part), job in jobs.items()}
    times = interleaved(named, options.runs, warmup=1, calls=calls, device=bench.where.device)
    found: dict[str, dict[str, Any]] = {}
    for step, part in jobs:
        found.setdefault(step, {})[part] = {"seconds": spread(times[f"{step}: {part}"].seconds)}
    return found


# Saying it -----------------------------------------------------------------------------------------------------------

_DESCRIBED = (
    "model", "ratio", "teacher", "wide_model", "batch", "size", "channels", "classes", "precision", "optimizer",
    "clip_grad", "compile", "channels_last", "cuda_graph", "no_overlap",
)  # fmt: skip


def described(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that describe the work."""
    found = {name: getattr(options, name) for name in _DESCRIBED}
    found["model"] = records.public(options.model)
    return {"kind": "step", **found, "method": f"gpd+{options.method}" if options.teacher else "gpd"}


def file_name(options: argparse.Namespace, device: torch.device) -> str:
    """Return the name of the JSON, which tells settings apart."""
    words = ["step", records.public(options.model), f"r{options.ratio}", f"batch{options.batch}", str(options.size)]
    words += [options.precision, device.type]
    words += [records.public(options.teacher)] if options.teacher else []
    words += [options.method] if options.method != "kd" else []
    words += [options.optimizer] if options.optimizer != "sgd" else []
    switches = ("compile", "channels_last", "cuda_graph", "no_overlap")
    words += [name.replace("_", "") for name in switches if getattr(options, name)]
    return re.sub(r"[^\w.+-]", "_", "-".join(words))


def table(content: Mapping[str, Any]) -> str:
    """Return the figures for people to read."""
    lines = [f"{'step':<40} {'ms':>9} {'/ ideal':>8} {'per round':>10} {'images/s':>9} {'peak MiB':>9} {'roofline':>9}"]
    for name, row in content["steps"].items():
        peak = "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**20:.0f}"
        over = row["over_ideal"]
        lines.append(
            f"{name:<40} {1000 * row['seconds']['median']:>9.2f} {over['of_medians']:>8.3f} {over['median']:>10.3f} "
            f"{row['images_per_second']:>9.1f} {peak:>9} {row['share_of_roofline']:>9.1%}"
        )
    for step, parts in content["parts"].items():
        for part, row in parts.items():
            lines.append(f"  {f'{step}: {part}':<70} {1000 * row['seconds']['median']:>9.2f} ms")
    return "\n".join(lines)
