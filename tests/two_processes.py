"""Runs in two processes that are forked from one that has imported everything: importing torch takes most of a run."""

from __future__ import annotations

import json
import multiprocessing
import re
import socket
import time
from pathlib import Path
from typing import Any

import training_worker

LIMIT = 400.0
"""Seconds that all jobs together may take before they count as stuck; a slow machine needs a quarter of it."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def two_processes(folder: Path, jobs: list[dict[str, Any]]) -> list[str]:
    """Run jobs of `training_worker` in two processes inside a folder, and return what each of them said."""
    for job in jobs:
        job["port"] = free_port()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "reparam.cli", "reparam.distill.trainer", "sklearn.datasets"])
    stamp = time.monotonic_ns()
    path, logs = folder / f"jobs-{stamp}.json", [folder / f"said-{stamp}-{rank}.txt" for rank in range(2)]
    path.write_text(json.dumps(jobs))
    processes = [
        context.Process(target=training_worker.forked, args=(rank, path, logs[rank]), daemon=True) for rank in range(2)
    ]
    for process in processes:
        process.start()
    until = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    stuck = [process for process in processes if process.is_alive()]
    for process in stuck:
        process.kill()
        process.join()
    said = [log.read_text() if log.exists() else "" for log in logs]
    assert not stuck, said
    return said


def codes(said: str) -> list[int]:
    """The exit codes of the jobs, as one process said them."""
    return [int(code) for code in re.findall(r"^job .*: (\d+)$", said, re.MULTILINE)]
