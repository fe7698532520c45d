"""Training runs in one of several processes: forked ones, or as torchrun starts them, for which this is a script.

    python tests/training_worker.py JOBS.json

Each job has the ``arguments`` of ``reparam train``, a ``port`` to meet the others (none under torchrun), a file to
``dump`` the final state into, and accidents: ``nan`` or ``die`` in one ``rank`` at one ``step``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from reparam.cli import main
from reparam.distill import finish, trainer
from reparam.distill.engine import Engine

STEP, FINISH = Engine.step, trainer.finish


def prepare(job: dict[str, Any]) -> None:
    """Arrange accidents and the dump of the final state."""
    own_rank = int(os.environ["RANK"])
    accident, left = job.get("accident"), [job.get("times", 1)]
    mark = Path(job["mark"]) if "mark" in job else None

    def step(self, batch, epoch, steps, meter):
        if accident is not None and accident["rank"] == own_rank and steps == accident["step"] and left[0]:
            left[0] -= 1
            if accident["what"] == "nan":
                batch = dataclasses.replace(batch, images=batch.images * float("nan"))
            elif accident["what"] == "term":
                os.kill(os.getpid(), signal.SIGTERM)
            elif not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        STEP(self, batch, epoch, steps, meter)

    def dumped(config, engine, *rest):
        if "dump" in job:
            torch.save(engine.state(), f"{job['dump']}-{own_rank}.pt")
        return FINISH(config, engine, *rest)

    Engine.step, trainer.finish = step, dumped


def run(jobs: list[dict[str, Any]]) -> int:
    """Run all jobs; the exit codes go to a file beside each dump."""
    finish._draw = lambda folder: None
    code = 0
    for job in jobs:
        prepare(job)
        if "port" in job:
            os.environ["MASTER_PORT"] = str(job["port"])
        code = main(["train", *job["arguments"]])
        print(f"job {job.get('name')}: {code}", flush=True)
    return code


def forked(rank: int, jobs: Path, log: Path) -> None:
    """Be one of two processes that work on a file of jobs inside its folder, and say everything into a file."""
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.chdir(jobs.parent)
    sys.exit(run(json.loads(jobs.read_text())))


if __name__ == "__main__":
    sys.exit(run(json.loads(Path(sys.argv[1]).read_text())))
