"""``reparam bench surgery``: plan, expand, extract and fold beside a deepcopy and a trace; what a view costs."""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import re
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

import reparam
import reparam.distill.models
from reparam.bench import records
from reparam.bench.costs import limits
from reparam.bench.growth import growth
from reparam.bench.imports import imports
from reparam.bench.subjects import device_of
from reparam.bench.timing import Job, interleaved, ratio, spread
from reparam.distill.runs import threads_restored
from reparam.models import load_model
from reparam.passes.tf32 import tf32

MODELS = ("resnet18", "resnet50", "vit_small_patch16_224")
YARDSTICK = "yardstick: deepcopy and trace"


def run(options: argparse.Namespace) -> int:
    """Measure what the options say, write the JSON, print it for people, and return the exit code."""
    folder, device = records.folder_of(options), device_of(options.device)
    wanted = options.only or ["models", "growth", "import", "large"]
    models = options.models or list(MODELS)
    for spec in models if "models" in wanted else ():
        _built(spec, torch.device("cpu"))  # an unknown name is found now, not after minutes
    with threads_restored(), tf32(False):
        if options.threads:
            torch.set_num_threads(options.threads)
        # Verification computes in float64: how fast the machine does belongs to its seconds.
        speed = limits(device, "fp64")
        content = {**records.origin(options, device), "kind": "surgery", "ratio": 2, "limits": speed}
        if "models" in wanted:
            content["models"] = {spec: measured(spec, device, options) for spec in models}
        if "growth" in wanted:
            content["growth"] = growth(device, options.runs)
        if "import" in wanted:
            content["import"] = imports(options.runs)
        if "large" in wanted:
            content["large"] = _large(options.large)
    print(table(content))
    print(f"wrote {records.write(folder, _file_name(options, device), content)}")
    return 0


def _file_name(options: argparse.Namespace, device: torch.device) -> str:
    words = ["surgery", *map(records.public, options.models or ()), *(options.only or ())]
    words += [] if device.type == "cpu" else [device.type]
    return re.sub(r"[^\w.+-]", "_", "-".join(words))


def _built(spec: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    with device:
        return load_model(spec).to(device).eval()


def _image(model: nn.Module, options: argparse.Namespace, device: torch.device, batch: int) -> Tensor:
    described = vars(model).get("pretrained_cfg") or {}
    shape = described.get("input_size", (3, 224, 224))
    shape = shape if options.size is None else (shape[0], options.size, options.size)
    return torch.randn(batch, *shape, device=device)


def measured(spec: str, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one model."""
    model = _built(spec, device)
    image = _image(model, options, device, 1)
    teacher = reparam.expand(model, 2, example_input=image, verify=False)
    run: dict[str, Callable[[], object]] = {
        "deepcopy": lambda: copy.deepcopy(model),
        "plan": lambda: reparam.plan(model, 2, example_input=image),
        "expand without verification": lambda: reparam.expand(model, 2, example_input=image, verify=False),
        "expand": lambda: reparam.expand(model, 2, example_input=image),
        "extract": lambda: reparam.extract(teacher),
        "fold": lambda: reparam.fold(model),
    }
    reason = _untraceable(model)
    if not reason:
        run[YARDSTICK] = lambda: fx.symbolic_trace(copy.deepcopy(model))
    times = interleaved({name: Job(job) for name, job in run.items()}, options.runs, warmup=1, device=device)
    yard = times[YARDSTICK if not reason else "deepcopy"]
    return {
        "input": list(image.shape),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": {name: spread(found.seconds) for name, found in times.items()},
        "over_yardstick": {name: ratio(found, yard) for name, found in times.items()},
        "trace": reason or "torch.fx.symbolic_trace",
        "view": view_overhead(model, teacher, _image(model, options, device, options.batch), options.runs),
    }


def _untraceable(model: nn.Module) -> str:
    try:
        fx.symbolic_trace(model)
    except Exception as error:
        return f"torch.fx cannot trace it ({type(error).__name__}); the yardstick is the deepcopy alone"
    return ""


def view_overhead(model: nn.Module, teacher: nn.Module, images: Tensor, runs: int) -> dict[str, Any]:
    """Return what a call of the student's view takes beside one of the plain student, forward only.

    In eval mode without gradients, in train mode with them. A call of the view is the student's own forward pass and
    what comes on top of it; that is measured by itself as well, since it is small beside the noise of a forward pass.
    """
    plain, view = copy.deepcopy(model), reparam.student_view(teacher)
    found: dict[str, Any] = {"batch": len(images)}
    for mode in ("eval", "train"):
        for network in (plain, view):
            network.train(mode == "train")

        def call(network: nn.Module, mode: str = mode) -> Job:
            def forward() -> None:
                with torch.set_grad_enabled(mode == "train"):
                    network(images)

            return Job(forward)

        def on_top() -> None:
            with mock.patch.object(view.network, "forward", lambda *_: None):
                call(view).run()

        jobs = {"plain": call(plain), "view": call(view), "on_top": Job(on_top)}
        times = interleaved(jobs, runs, warmup=1, device=images.device)
        found[mode] = {name: spread(one.seconds) for name, one in times.items()}
        found[mode]["view_over_plain"] = ratio(times["view"], times["plain"])
        found[mode]["on_top_over_plain"] = ratio(times["on_top"], times["plain"])
    return found


# A model of a billion parameters -------------------------------------------------------------------------------------


def _large(name: str) -> dict[str, Any]:
    """Plan a large model on the meta device, in a process of its own so that its peak memory shows."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(plan_large, (name,))


def plan_large(name: str) -> dict[str, Any]:
    """Return time and memory of planning a model on the meta device; for a process that did nothing else yet."""
    model = _built(name, torch.device("meta"))
    before = _peak_kib()
    started = time.perf_counter()
    plan = reparam.plan(model, 2)
    seconds, peak = time.perf_counter() - started, _peak_kib()
    return {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "plan_seconds": round(seconds, 3),
        "coverage": plan.coverage,
        "peak_memory_mib": round(peak / 1024, 1),
        "peak_memory_growth_mib": round((peak - before) / 1024, 1),
    }


def _peak_kib() -> int:
    """Peak resident memory of this process alone; getrusage would count that of the parent it was forked from."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# Saying it -----------------------------------------------------------------------------------------------------------


def table(content: Mapping[str, Any]) -> str:
    """Return the figures for people to read."""
    lines = []
    for name, row in content.get("models", {}).items():
        lines.append(f"{name}, {row['parameters']:,} parameters, input {row['input']}")
        for step, seconds in row["seconds"].items():
            over = row["over_yardstick"][step]["median"]
            lines.append(f"  {step:<32} {seconds['median']:>8.3f} s {over:>8.2f} x the yardstick")
        view = row["view"]
        for key, what in (("view_over_plain", "a call of the view"), ("on_top_over_plain", "what the view adds to it")):
            found = ", ".join(f"{mode} {view[mode][key]['median']:.3f}" for mode in ("eval", "train"))
            lines.append(f"  {what} over the plain student at batch {view['batch']}: {found}")
    if "growth" in content:
        fits = content["growth"]["exponents"]
        lines.append(f"growth with the parameters: exponents {fits}")
    if "import" in content:
        found = content["import"]
        alone, all_ = (found[key]["median"] for key in ("reparam_seconds", "every_name_seconds"))
        lines.append(f"import of reparam beyond torch: {alone:.3f} s, {all_:.3f} s with every public name")
    if "large" in content:
        lines.append(f"plan of {content['large']['model']}: {content['large']['plan_seconds']:.1f} s")
    return "\n".join(lines)
