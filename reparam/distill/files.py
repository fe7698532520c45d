"""The folder of a run and everything written into it, each file whole or not at all.

===================== ==============================================================================
config.json           settings with all defaults filled in, command, versions; written first
metrics.csv           one row per finished epoch
student.safetensors   the extracted student after the last finished epoch (0: the initial weights)
teacher.safetensors   the same for the teacher, as ``reparam.load`` reads it; not in a baseline run
summary.json          the result; its presence says that the run has finished
===================== ==============================================================================
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

import reparam
from reparam.distill.config import TrainConfig
from reparam.errors import InputError
from reparam.models import save_weights

CONFIG, METRICS, SUMMARY = "config.json", "metrics.csv", "summary.json"
STUDENT, TEACHER = "student.safetensors", "teacher.safetensors"


@dataclass
class RunFolder:
    """Writes the files of one run.

    Attributes:
        path: the folder; it exists.
        rows: the rows of metrics.csv so far.
    """

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    def write_config(self, config: TrainConfig, versions: Mapping[str, str], command: Sequence[str]) -> None:
        """Write config.json."""
        content = {"config": dataclasses.asdict(config), "command": list(command), "versions": dict(versions)}
        write_json(self.path / CONFIG, content)

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Append a row to metrics.csv; every row has the same keys."""
        self.rows.append(dict(row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.path / METRICS, lambda partial: partial.write_text(text.getvalue(), encoding="utf-8"))

    def save_networks(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Write student.safetensors and, if there is a teacher, teacher.safetensors."""
        save_weights(student, self.path / STUDENT)
        if teacher is not None:
            write_atomically(self.path / TEACHER, lambda partial: reparam.save(teacher, partial))


def open_run_folder(config: TrainConfig) -> RunFolder:
    """Create the folder of a run; without ``config.output`` it gets a new name under ``runs/``.

    Raises:
        InputError: see `check_output`.
    """
    check_output(config)
    if config.output is None:
        return RunFolder(_new_folder(config))
    path = Path(config.output).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return RunFolder(path)


def check_output(config: TrainConfig) -> None:
    """Refuse an output folder that cannot take a run, before any work is done.

    Raises:
        InputError: the folder holds a run already, or is a file.
    """
    if config.output is None:
        return
    path = Path(config.output).expanduser()
    if path.exists() and not path.is_dir():
        raise InputError(f"--output {path} is a file; name a folder")
    taken = [name for name in (CONFIG, SUMMARY, "comparison.json") if (path / name).exists()]
    if taken:
        raise InputError(f"--output {path} holds a run already ({', '.join(taken)}); name another folder or remove it")


def _new_folder(config: TrainConfig) -> Path:
    model = config.model.rpartition(":")[2].replace("/", "-")
    name = f"{config.data.partition(':')[0]}-{model}-{config.method}-seed{config.seed}"
    for attempt in range(1, 10_000):
        path = Path("runs", name if attempt == 1 else f"{name}-{attempt}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise InputError(f"runs/ is full of runs named {name}; clear it or give --output")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as indented JSON."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file beside ``path`` and move it there in one step."""
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
