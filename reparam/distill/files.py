"""The folder of a run and everything written into it, each file whole or not at all.

========================= ==========================================================================
config.json               settings with all defaults filled in, command, versions, data; written first
recipe.yaml               the same settings as a recipe, for ``--recipe``
metrics.csv               one row per finished epoch
checkpoints/              the state of the run, to go on from (``--resume``)
student.safetensors       the extracted student after the last finished epoch (0: the initial weights)
teacher.safetensors       the same for the dynamic teacher, as ``reparam.load`` reads it
student_ema.safetensors   both with averaged weights, in a run with ``--ema``
teacher_ema.safetensors
curves.png                accuracy and gap over the epochs
summary.json              the result; its presence says that the run has finished
========================= ==========================================================================
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
from reparam.distill.recipes import dump_recipe
from reparam.errors import FormatError, InputError
from reparam.weight_files import save_weights

CONFIG, RECIPE, METRICS, SUMMARY = "config.json", "recipe.yaml", "metrics.csv", "summary.json"
STUDENT, TEACHER = "student.safetensors", "teacher.safetensors"
STUDENT_EMA, TEACHER_EMA = "student_ema.safetensors", "teacher_ema.safetensors"
CURVES = "curves.png"


@dataclass
class RunFolder:
    """Writes the files of one run.

    Attributes:
        path: the folder; it exists.
        rows: the rows of metrics.csv so far.
    """

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    def write_config(
        self, config: TrainConfig, versions: Mapping[str, str | None], command: Sequence[str], data: Mapping[str, Any]
    ) -> None:
        """Write config.json and recipe.yaml."""
        content = {"config": dataclasses.asdict(config), "command": list(command), "versions": dict(versions)}
        write_json(self.path / CONFIG, {**content, "data": dict(data)})
        text = dump_recipe(config, f"The settings of a run of {config.model} on {config.data}.")
        write_atomically(self.path / RECIPE, lambda partial: partial.write_text(text, encoding="utf-8"))

    def write_metrics(self) -> None:
        """Write metrics.csv."""
        text = io.StringIO(newline="")
        if self.rows:
            writer = csv.DictWriter(text, fieldnames=list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        write_atomically(self.path / METRICS, lambda partial: partial.write_text(text.getvalue(), encoding="utf-8"))

    def sweep(self) -> None:
        """Remove what a killed process left of files that it was writing."""
        for path in self.path.glob(".*partial*"):
            path.unlink(missing_ok=True)

    def reopen(self) -> None:
        """Remove what says that the run has finished: it goes on from an earlier step."""
        for name in (SUMMARY, CURVES):
            (self.path / name).unlink(missing_ok=True)

    def save_networks(self, student: nn.Module, teacher: nn.Module | None, ema: bool = False) -> None:
        """Write the student's file and, if there is a teacher, the teacher's."""
        save_weights(student, self.path / (STUDENT_EMA if ema else STUDENT))
        if teacher is not None:
            target = self.path / (TEACHER_EMA if ema else TEACHER)
            write_atomically(target, lambda partial: reparam.save(teacher, partial))


def open_run_folder(config: TrainConfig, check: bool = True) -> RunFolder:
    """Create the folder of a run; without ``config.output`` it gets a new name under ``runs/``.

    Raises:
        InputError: see `check_output`, which ``check=False`` leaves out.
    """
    if check:
        check_output(config)
    if config.output is None:
        return RunFolder(_new_folder(config))
    path = Path(config.output).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return RunFolder(path)


def check_output(config: TrainConfig, unstarted: bool = False) -> None:
    """Refuse an output folder that cannot take a new run, before any work is done.

    Args:
        config: the settings.
        unstarted: whether a run may be there that ended before its first checkpoint.

    Raises:
        InputError: the folder holds a run already, or is a file.
    """
    if config.output is None:
        return
    path = Path(config.output).expanduser()
    if path.exists() and not path.is_dir():
        raise InputError(f"--output {path} is a file; name a folder")
    marks = (SUMMARY, "comparison.json") if unstarted else (CONFIG, SUMMARY, "comparison.json")
    taken = [name for name in marks if (path / name).exists()]
    if taken:
        again = "--compare --resume auto" if "comparison.json" in taken else "--resume auto"
        raise InputError(
            f"--output {path} holds a run already ({', '.join(taken)}); name another folder, remove it, or go on with "
            f"{again}"
        )


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


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read metrics.csv of a run; every value is a number, or None where nothing was measured."""
    with (folder / METRICS).open(newline="", encoding="utf-8") as file:
        return [{name: float(value) if value else None for name, value in row.items()} for row in csv.DictReader(file)]


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that `write_json` wrote.

    Raises:
        FormatError: damaged.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is damaged: {error}") from error
    return content


def read_entries(path: Path, *names: str) -> list[dict[str, Any]]:
    """Read entries of a file that `write_json` wrote, each of them a mapping.

    Raises:
        FormatError: damaged, or without one of them.
    """
    content = read_json(path)
    known = content if isinstance(content, dict) else {}
    lacking = [name for name in names if not isinstance(known.get(name), dict)]
    if lacking:
        raise FormatError(f"{path} is damaged or was written by another version: it lacks {', '.join(lacking)}")
    return [content[name] for name in names]


def weights_of(path: str, ema: bool = False) -> tuple[Path, bool]:
    """Return the file of weights that a path names: itself, or the student in the output folder of a run.

    Args:
        path: a file or a folder.
        ema: whether the averaged weights are meant. A run has them in a file of their own.

    Returns:
        The file, and whether to look inside it for averaged weights.

    Raises:
        InputError: the run has no averaged weights.
    """
    found = Path(path).expanduser()
    if not found.is_dir():
        return found, ema
    if ema and not (found / STUDENT_EMA).is_file():
        raise InputError(f"{found} has no averaged weights ({STUDENT_EMA}): a run has them if it is trained with --ema")
    return found / (STUDENT_EMA if ema else STUDENT), False


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file beside ``path`` and move it there in one step."""
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, f"{path.name} could not be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
