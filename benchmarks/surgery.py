"""How long surgery takes: plan, expand with and without verification, extract; and planning a 1e9-parameter model.

    python benchmarks/surgery.py

Writes benchmarks/results/surgery.json. Runs are interleaved with a yardstick (deepcopy plus one float64 forward pass of
the student and of a plain network of the teacher's size), so that a noisy machine shows.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import timm
import torch

import reparam


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--large", default="regnety_2560", help="planned on the meta device")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="where to write (default: benchmarks/results)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    model = timm.create_model(arguments.model).eval().to(device)
    teacher = reparam.expand(model, 2)
    wide = copy.deepcopy(teacher).double().eval()
    plain = copy.deepcopy(model).double().eval()
    image = torch.randn(1, 3, 224, 224, dtype=torch.float64, device=device)

    def yardstick() -> None:
        copy.deepcopy(model)
        with torch.no_grad():
            plain(image), wide(image)

    jobs: dict[str, Callable[[], Any]] = {
        "plan": lambda: reparam.plan(model, 2),
        "expand without verification": lambda: reparam.expand(model, 2, verify=False),
        "expand": lambda: reparam.expand(model, 2),
        "extract": lambda: reparam.extract(teacher),
        "yardstick: deepcopy, float64 forward of student and teacher": yardstick,
    }
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for run in range(arguments.runs + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if run:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    result = {
        **record.provenance(f"python benchmarks/surgery.py --runs {arguments.runs} --device {device.type}", device),
        "model": arguments.model,
        "input": [1, 3, 224, 224],
        "threads": torch.get_num_threads(),
        "seconds": {name: record.spread(times) for name, times in seconds.items()},
        "large": _large(arguments.large),
    }
    print(record.write("surgery.json" if device.type == "cpu" else "surgery-cuda.json", result, arguments.folder))


def _large(name: str) -> dict[str, Any]:
    """Plan a large model on the meta device, in a process of its own so that its peak memory shows."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_plan_large, (name,))


def _peak_kib() -> int:
    """Peak resident memory of this process alone; getrusage would count that of the parent it was forked from."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _plan_large(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        model = timm.create_model(name)
    before = _peak_kib()
    start = time.perf_counter()
    plan = reparam.plan(model, 2)
    peak = _peak_kib()
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "plan_seconds": round(time.perf_counter() - start, 3),
        "coverage": plan.coverage,
        "peak_memory_mib": round(peak / 1024, 1),
        "peak_memory_growth_mib": round((peak - before) / 1024, 1),
    }


if __name__ == "__main__":
    main()
