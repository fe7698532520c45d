"""``reparam bench scale``: steps of GPD and of the plain student in one and several processes, and what they send.

Each process has a batch of its own of the same size, so the work of a process stays and efficiency is images per
second over those of one process times their number.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import socket
import time
from collections.abc import Sequence
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from reparam.bench import records
from reparam.bench.subjects import EngineStep, device_of, setting
from reparam.bench.timing import interleaved, spread
from reparam.distill.distributed import joined
from reparam.distill.engine import precision
from reparam.errors import InputError, ReparamError
from reparam.passes.tf32 import tf32

METHODS = {"baseline": "plain student", "gpd": "GPD"}
"""Methods that are measured, and what the JSON calls them."""


def run(options: argparse.Namespace) -> int:
    """Measure what the options say, write the JSON, print a table, and return the exit code."""
    folder, device = records.folder_of(options), device_of(options.device)
    counts = process_counts(options.processes)
    if device.type == "cuda" and max(counts) > torch.cuda.device_count():
        raise InputError(
            f"--processes {options.processes}: each process needs a GPU of its own, and there are "
            f"{torch.cuda.device_count()} here"
        )
    if device.type == "cpu" and options.precision == "tf32":
        raise InputError("--precision tf32 is a mode of CUDA GPUs; use fp32 on the CPU")
    found = {count: together(options, count) for count in counts}
    rows = rows_of(found, options.batch)
    with tf32(options.precision in ("tf32", "bf16", "fp16")):  # as the processes had it
        origin = records.origin(options, device)
    content = {
        **origin,
        "kind": "scale",
        "backend": "nccl" if device.type == "cuda" else "gloo",
        "threads": options.threads or 1,
        **{name: getattr(options, name) for name in ("ratio", "branches", "batch", "size", "classes", "precision")},
        "model": records.public(options.model),
        "rows": rows,
    }
    for row in rows:
        print(
            f"{row['method']:<14} {row['processes']} processes {1000 * row['seconds']['median']:>9.2f} ms "
            f"{row['images_per_second']:>9.1f} images/s, efficiency {row['efficiency']:.2f}, "
            f"{row['reduced_bytes'] / 2**20:.2f} MiB reduced"
        )
    words = ["scale", records.public(options.model), f"batch{options.batch}", f"{options.size}", options.precision]
    words += [*([options.branches] if options.branches else []), device.type]
    name = re.sub(r"[^\w.+-]", "_", "-".join(words))
    print(f"wrote {records.write(folder, name, content)}")
    return 0


def process_counts(text: str) -> list[int]:
    """Read ``"1,2,4"``; one process is always among them, since efficiency is relative to it.

    >>> process_counts("4,2")
    [1, 2, 4]

    Raises:
        InputError: it is no list of numbers from 1.
    """
    words = text.split(",")
    if not all(word.strip().isdigit() and int(word) >= 1 for word in words):
        raise InputError(f"--processes is a list of numbers from 1, such as 1,2,4, not {text!r}")
    return sorted({1, *map(int, words)})


def rows_of(found: dict[int, dict[str, Any]], batch: int) -> list[dict[str, Any]]:
    """Return the rows of the JSON from what was measured by number of processes and method."""
    rows = []
    for name in METHODS.values():
        alone = batch / found[1][name]["seconds"]["median"]
        for count, methods in found.items():
            one = methods[name]
            speed = count * batch / one["seconds"]["median"]
            rows.append({
                "method": name,
                "processes": count,
                **one,
                "images_per_second": float(f"{speed:.5g}"),
                "efficiency": round(speed / (count * alone), 4),
                "ring_bytes": round(2 * (count - 1) / count * one["gradient_bytes"]),
            })  # fmt: skip
    return rows


# Processes -----------------------------------------------------------------------------------------------------------


def together(options: argparse.Namespace, count: int) -> dict[str, Any]:
    """Measure with so many processes and return what the first one found, by method.

    Raises:
        ReparamError: a process died; its own message is above.
    """
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    given = {name: value for name, value in vars(options).items() if name not in ("run", "defaults")}
    port = _free_port()
    processes = [context.Process(target=work, args=(given, rank, count, port, answers)) for rank in range(count)]
    for process in processes:
        process.start()
    try:
        return _answer(processes, answers)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _answer(processes: Sequence[SpawnProcess], answers: Any) -> dict[str, Any]:
    while answers.empty():
        dead = next((p for p in processes if p.exitcode not in (None, 0)), None)
        if dead is not None:
            raise ReparamError(
                f"a process of {len(processes)} ended with exit code {dead.exitcode}; see its message above"
            )
        time.sleep(0.05)
    found: dict[str, Any] = answers.get()
    for process in processes:
        process.join(30)
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def work(given: dict[str, Any], rank: int, count: int, port: int, answers: Any) -> None:
    """Measure in one of the processes; the first one answers."""
    options = argparse.Namespace(**given)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(options.threads or 1)
    with joined(options.device) as group:
        where = setting(options, group)
        with precision(where.config):
            steps = {
                name: EngineStep(
                    where, where.build(options.model), method, options.branches if method == "gpd" else None
                )
                for method, name in METHODS.items()
            }
            reduced = {name: _counted(step) for name, step in steps.items()}
            for step in steps.values():
                step()
            sent = {name: sum(sizes) for name, sizes in reduced.items()}
            times = interleaved({name: s.job() for name, s in steps.items()}, options.runs, device=group.device)
        if group.main:
            answers.put({
                name: {
                    "seconds": spread(times[name].seconds),
                    "gradient_bytes": step.sizes()["gradient_bytes"],
                    "reduced_bytes": sent[name],
                }
                for name, step in steps.items()
            })  # fmt: skip


def _counted(step: EngineStep) -> list[int]:
    """Return a list that grows by the bytes of each bucket of gradients that the processes reduce."""
    sizes: list[int] = []
    network = step.engine._distributed
    if isinstance(network, nn.parallel.DistributedDataParallel):

        def hook(state: list[int], bucket: GradBucket) -> torch.futures.Future[Tensor]:
            state.append(bucket.buffer().nbytes)
            return allreduce_hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]

        # Its source is read for its types, and postponed annotations are strings there.
        hook.__annotations__ = {"bucket": GradBucket, "return": torch.futures.Future[torch.Tensor]}
        network.register_comm_hook(sizes, hook)
    return sizes
