"""Where a measurement comes from, and the JSON file it goes to."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = ("reparam", "torch", "timm", "torchvision", "numpy", "hypothesis")
RESULTS = Path(__file__).parent / "results"


def provenance(command: str, device: torch.device | None = None) -> dict[str, Any]:
    """Return command, commit, library versions, device and date of a measurement."""
    device = device or torch.device("cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {
        "command": command,
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--", "reparam", "benchmarks", "tests")),
        "versions": {name: _version(name) for name in _LIBRARIES},
        "python": platform.python_version(),
        "device": name,
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def write(name: str, content: dict[str, Any], folder: Path | None = None) -> Path:
    """Write ``content`` as JSON into benchmarks/results/ (or ``folder``); the write is atomic."""
    target = (folder or RESULTS) / name
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, target)
    return target


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Return median, minimum and maximum of a list of times."""
    return {
        "median": round(statistics.median(seconds), 4),
        "min": round(min(seconds), 4),
        "max": round(max(seconds), 4),
        "runs": len(seconds),
    }


def git(*words: str) -> str:
    """Return what git prints, or an empty string outside a checkout."""
    try:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
