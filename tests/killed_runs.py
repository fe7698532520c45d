"""Kill ``reparam train`` at random moments until it is finished; a script that test_resume.py starts.

    python tests/killed_runs.py OUTPUT SEED KILLS SAVE_STEPS ARGUMENT...

Each life of the run is a forked process, so that torch is imported once. Prints one JSON line: the number of kills and,
for each of them, finished steps and steps in the newest checkpoint. The parent reads all files all the time.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from safetensors import safe_open

from reparam.cli import main
from reparam.distill import checkpoints, trainer
from reparam.distill.engine import Engine


def live(arguments: list[str], log: Path) -> None:
    """Train in this process, noting every finished step."""
    step = Engine.step

    def noted(self, batch, epoch, steps, meter):
        step(self, batch, epoch, steps, meter)
        with log.open("a") as file:
            file.write(f"{steps}\n")

    Engine.step = noted
    os._exit(main(arguments))


def read_everything(folder: Path) -> None:
    """Read every file of the run that exists; whatever is damaged raises."""
    for path in folder.rglob("*"):
        if path.name.startswith("."):
            continue  # a file in the making
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".csv":
                rows = list(csv.DictReader(path.read_text().splitlines()))
                assert all(None not in row.values() and None not in row for row in rows), path
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    assert all(file.get_tensor(name) is not None for name in file.keys())  # noqa: SIM118
            elif path.suffix == ".ckpt":
                checkpoints.read_checkpoint(path)
        except Exception:
            if path.exists():  # else it was removed in the meantime
                raise


def lines(log: Path) -> int:
    """Number of steps that were taken, with those that were taken again."""
    return log.read_bytes().count(b"\n") if log.exists() else 0


def finished(log: Path) -> int:
    """Number of the step that was finished last."""
    lines = log.read_text().split() if log.exists() else []
    return int(lines[-1]) if lines else 0


def run(output: Path, seed: int, kills: int, save_steps: int, arguments: list[str]) -> None:
    """Live and die, then finish."""
    for module in (trainer.__name__, "sklearn.datasets", "matplotlib.figure", "torchvision.transforms.v2"):
        importlib.import_module(module)  # once, before the fork
    words = ["train", *arguments, "--save-steps", str(save_steps), "--resume", "auto", "--output", str(output)]
    log, draw = output.with_name("steps.log"), random.Random(seed)
    history, newest = [], 0
    while True:
        child = os.fork()
        if child == 0:
            live(words, log)
        # Every fourth dies while it starts, the others some time after their first step.
        starting, later = len(history) % 4 == 3, draw.uniform(0, 0.5)
        until = time.monotonic() + later if starting else float("inf")
        before, status = lines(log), None
        while time.monotonic() < until:
            if until == float("inf") and len(history) < kills and lines(log) > before:
                until = time.monotonic() + later
            if output.exists():
                read_everything(output)
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            status = None
            time.sleep(0.01)
        if status is not None:
            assert status == 0, f"a life of the run failed: {status}"
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if output.exists():
            read_everything(output)
        found = checkpoints.latest(output) if output.exists() else None
        saved = 0 if found is None else found.state["steps"]
        assert found is None or not found.damaged
        assert saved >= newest, f"went back from {newest} to {saved}"
        newest = saved
        history.append([finished(log), saved])
    print(json.dumps({"kills": len(history), "history": history}), file=sys.stderr)


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
