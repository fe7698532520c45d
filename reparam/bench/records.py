"""The JSON file that a measurement goes to: where it lies, what it says about the machine, how it is written."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from pathlib import Path
from typing import Any

import torch

from reparam.errors import InputError
from reparam.passes.tf32 import uses_tf32
from reparam.provenance import provenance

_CHECKOUT = Path(__file__).parents[2] / "benchmarks" / "results"


def folder_of(options: argparse.Namespace) -> Path:
    """Return the folder for results, made where it is missing, and find out now whether it can be written.

    Raises:
        InputError: it cannot.
    """
    given = options.folder
    folder = Path(given) if given else _CHECKOUT if _CHECKOUT.is_dir() else Path()
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"--folder {folder} cannot be written ({error.strerror}); name a folder of your own"
        ) from error
    return folder


def write(folder: Path, name: str, content: dict[str, Any]) -> Path:
    """Write a result as ``name``.json; the file appears whole or not at all."""
    target = folder / f"{name}.json"
    partial = target.with_name(f"{target.name}.partial")
    try:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def origin(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return where a measurement comes from, and the switches of torch that change it."""
    return {
        **provenance(command(options), device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "tf32": {**uses_tf32(), "used": device.type == "cuda"},
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }


def command(options: argparse.Namespace) -> str:
    """Return the command that was typed, without the folders of this machine, so that it can be published."""
    words = ["reparam", "bench", options.what]
    for name, default in options.defaults.items():
        value = getattr(options, name)
        if value == default or value == [] or name in ("folder", "run", "what", "defaults"):
            continue
        if name == "models":
            words += [public(item) for item in value]
            continue
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif isinstance(value, list):
            words += [word for item in value for word in (flag, public(item))]
        else:
            words += [flag, public(str(value))]
    return shlex.join(words)


def public(word: str) -> str:
    """Return a word of a command without the folders of this machine."""
    path = Path(word)
    return path.name if path.is_absolute() else word
