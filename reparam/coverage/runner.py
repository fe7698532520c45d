"""Run the models of a list, each in a process of its own with a time limit, several at a time.

The processes are forked from one that has imported torch and timm already: a model costs its own time and not that of
the imports, and what kills its process (time, memory, a crash) costs one row.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from reparam.coverage.catalogue import Entry
from reparam.coverage.measure import Settings, opening, work

Row = dict[str, Any]

_PRELOADED = ["torch", "torchvision", "timm", "reparam.coverage.warm"]


@dataclass
class _Job:
    entry: Entry
    process: BaseProcess
    receiver: Connection
    started: float
    slots: int


def run_all(
    entries: Iterable[Entry], settings: Settings, jobs: int, limit: float
) -> Generator[tuple[Entry, Row], None, None]:
    """Yield every model with its row, in the order in which they finish.

    Args:
        entries: the models.
        settings: what to do with them.
        jobs: processes at a time. A model that needs more than its share of the memory runs with fewer beside it.
        limit: seconds for each model, from the start of its process.
    """
    context: Any = _context()
    waiting, running = list(entries), list[_Job]()
    try:
        while waiting or running:
            while waiting and _fits(running, waiting[0], settings, jobs):
                running.append(_started(context, waiting.pop(0), settings, jobs))
            timeout = max(0.0, min(job.started + limit - time.monotonic() for job in running))
            wait([job.receiver for job in running], timeout)
            for job in list(running):
                row = _row_of(job, limit)
                if row is not None:
                    running.remove(job)
                    yield job.entry, row
    finally:
        for job in running:
            _end(job)


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _started(context: Any, entry: Entry, settings: Settings, jobs: int) -> _Job:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(sender, entry, settings, os.getcwd()), daemon=True)
    process.start()
    sender.close()  # the child has its own; with this one open, its end would not be seen
    return _Job(entry, process, receiver, time.monotonic(), _slots(entry, settings, jobs))


def _row_of(job: _Job, limit: float) -> Row | None:
    """Return the row of a job that has finished, died or run out of time; None while it runs."""
    spent = time.monotonic() - job.started
    row: Row | None = None
    if job.receiver.poll():
        try:
            row = job.receiver.recv()
        except (EOFError, OSError):  # it died, perhaps in the middle of its row
            job.process.join()
            row = {**opening(job.entry), "status": "error", "error": _death(job.process.exitcode)}
    elif spent >= limit:
        message = f"not done after {limit:g} s"
        row = {**opening(job.entry), "status": "timeout", "error": {"type": "Timeout", "message": message, "where": ""}}
    if row is None:
        return None
    _end(job)
    return {**row, "total_seconds": round(spent, 2)}


def _death(code: int | None) -> dict[str, str]:
    message = f"the process ended with exit code {code}"
    if code is not None and code < 0:
        message = f"the process was ended by signal {-code}"
        message += " (the system ran out of memory?)" if code == -9 else ""
    return {"type": "Killed", "message": message, "where": ""}


def _end(job: _Job) -> None:
    # A process that has sent its row has nothing left to do; waiting for it to tidy up takes longer.
    job.process.kill()
    job.process.join()
    job.receiver.close()


# Memory --------------------------------------------------------------------------------------------------------------


def _fits(running: list[_Job], entry: Entry, settings: Settings, jobs: int) -> bool:
    return not running or sum(job.slots for job in running) + _slots(entry, settings, jobs) <= jobs


def _slots(entry: Entry, settings: Settings, jobs: int) -> int:
    """Return how many of the ``jobs`` places a model takes: several where it needs more than its share of memory."""
    if settings.plan_only:
        return 1
    # The student, what is extracted, the teacher, and the largest tensors in float64 on the way, at 4 bytes each.
    need = 4 * entry.parameters * (3 + settings.ratio**2)
    return min(jobs, max(1, math.ceil(need * jobs / _memory())))


def _memory() -> float:
    """Return the bytes of memory of this machine."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return math.inf


# What is seen of it --------------------------------------------------------------------------------------------------


class Progress:
    """Shows how far a run is: a tqdm bar on a terminal, one line per model everywhere else.

    Args:
        total: number of models.
        what: the unit of the bar.
    """

    def __init__(self, total: int, what: str = "model") -> None:
        self._total, self._done, self._bar = total, 0, None
        if total and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=what, dynamic_ncols=True, leave=False, file=sys.stderr)

    def step(self, line: str) -> None:
        """Count one, and print what became of it."""
        self._done += 1
        if self._bar is None:
            print(f"[{self._done}/{self._total}] {line}", flush=True)
            return
        self._bar.write(line, file=sys.stdout)
        self._bar.update()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
