"""Checkpoints: the whole state of a run in one file, whole or not at all, and a way back when a file is damaged.

A file holds tensors and plain values only and is read with ``weights_only=True``. Its name carries the number of
finished steps and the CRC-32 of its content, so that a torn or damaged file is found before it is used.
"""

from __future__ import annotations

import io
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reparam.distill.config import completed
from reparam.distill.files import write_atomically
from reparam.errors import FormatError, InputError

VERSION = 1
FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{8})\.ckpt")


@dataclass(frozen=True)
class Found:
    """A checkpoint that was read.

    Attributes:
        path: the file.
        state: its content.
        damaged: newer files that could not be used, with the reason.
    """

    path: Path
    state: dict[str, Any]
    damaged: tuple[str, ...]


def write_checkpoint(folder: Path, steps: int, state: Mapping[str, Any]) -> Path:
    """Write ``state`` into ``folder``/checkpoints and return the file.

    Args:
        folder: of the run.
        steps: number of finished optimizer steps.
        state: tensors and plain values.

    Raises:
        OSError: no space is left, for example. Older checkpoints are untouched then.
    """
    buffer = io.BytesIO()
    torch.save({"version": VERSION, **state}, buffer)
    content = buffer.getbuffer()
    path = folder / FOLDER / f"step-{steps:09d}-{zlib.crc32(content):08x}.ckpt"
    path.parent.mkdir(exist_ok=True)

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    write_atomically(path, write)
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read one checkpoint; nothing in it is executed.

    Raises:
        FormatError: missing, damaged, or written by another version.
    """
    if path.is_dir():
        raise FormatError(f"{path} is a folder, not a checkpoint; to go on in it: --output {path} --resume auto")
    if not path.is_file():
        raise FormatError(f"no such checkpoint: {path}")
    content = path.read_bytes()
    named = _NAME.fullmatch(path.name)
    if named and f"{zlib.crc32(content):08x}" != named[2]:
        raise FormatError(f"checkpoint {path} is damaged: its content does not have the checksum in its name")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling meets in a damaged file
        raise FormatError(f"checkpoint {path} is damaged or no checkpoint of a run: {type(error).__name__}") from error
    if not isinstance(state, dict) or "version" not in state or "steps" not in state:
        raise FormatError(f"{path} is no checkpoint of a run; weights alone go to --checkpoint")
    if state["version"] != VERSION:
        raise FormatError(f"checkpoint {path} has version {state['version']}, this reparam reads version {VERSION}")
    return state


def latest(folder: Path) -> Found | None:
    """Read the newest checkpoint of a run that is intact; None if the run has none at all.

    Raises:
        FormatError: there are checkpoints and all of them are damaged.
    """
    damaged: list[str] = []
    files = checkpoints(folder)
    for path in reversed(files):
        try:
            return Found(path, read_checkpoint(path), tuple(damaged))
        except FormatError as error:
            damaged.append(str(error))
    if files:
        raise FormatError("no checkpoint of the run can be used:\n" + "\n".join(damaged))
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first; of two for the same step the newer file is the later."""
    named = [path for path in (folder / FOLDER).glob("step-*.ckpt") if _NAME.fullmatch(path.name)]
    return sorted(named, key=lambda path: (path.name[:14], path.stat().st_mtime_ns))


def after(folder: Path, steps: int) -> Path | None:
    """Return the checkpoint of a run after that many steps; None where it was not kept."""
    return next((path for path in reversed(checkpoints(folder)) if path.name[:14] == f"step-{steps:09d}"), None)


def prune(folder: Path, rows: Sequence[Mapping[str, Any]], best: int, newest: int = 2) -> None:
    """Remove all checkpoints but the ``newest`` and those after the ``best`` epochs, and what a killed write left.

    Args:
        folder: of the run.
        rows: of metrics.csv, with "step" and "student_top1".
        best: how many of the best epochs to keep; of equal ones the later.
        newest: how many of the newest files.
    """
    there = {path.name[:14] for path in checkpoints(folder)}
    measured = [row for row in rows if row["student_top1"] is not None and f"step-{row['step']:09d}" in there]
    ranked = sorted(measured, key=lambda row: (row["student_top1"], row["step"]), reverse=True)
    kept = {f"step-{row['step']:09d}" for row in ranked[:best]}
    for path in checkpoints(folder)[:-newest]:
        if path.name[:14] not in kept:
            path.unlink(missing_ok=True)
    for leftover in (folder / FOLDER).glob(".step-*.partial.ckpt"):
        leftover.unlink(missing_ok=True)


def drop_later(folder: Path, steps: int, written: Path | None = None) -> None:
    """Remove the checkpoints of a run after that many steps: it was sent back, and they belong to a part given up.

    Args:
        folder: of the run.
        steps: number of finished steps.
        written: the checkpoint of just these steps; others of the same are removed as well.
    """
    here = f"step-{steps:09d}"
    for path in checkpoints(folder):
        later, same = path.name[:14] > here, written is not None and path.name[:14] == here and path != written
        if later or same:
            path.unlink(missing_ok=True)


def check_same(saved: Mapping[str, Any], current: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on with other settings than those of the checkpoint.

    Raises:
        InputError: names every setting that differs, with both values.
    """
    saved = completed(saved)
    names = sorted((set(saved) | set(current)) - _FREE)
    differing = [name for name in names if _plain(name, saved.get(name)) != _plain(name, current.get(name))]
    if differing:
        listed = "; ".join(f"{name} was {saved.get(name)!r}, is {current.get(name)!r}" for name in differing)
        raise InputError(
            f"--resume: {path} belongs to a run with other settings: {listed}. Repeat the command of that run "
            "(config.json has it), or start a new run with --checkpoint"
        )


_FREE = frozenset(
    "output resume quiet workers threads device tensorboard keep_best save_steps save_epochs on_nan max_bad_images "
    "compile cuda_graph overlap channels_last eval_epochs teacher_checkpoint assistant_checkpoint".split()
)
"""Settings that may change between the parts of a run: they say how it is computed and kept, not what."""


def _plain(name: str, value: Any) -> Any:
    """Data may have moved; whether it is the same is seen when it is loaded."""
    if name == "data" and isinstance(value, str):
        return value.partition(":")[0]
    if name == "checkpoint":
        return value is not None  # the file as well
    return list(value) if isinstance(value, tuple) else value
