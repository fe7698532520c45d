"""Where a measurement comes from: command, commit, versions, device and date. Knows nothing of the rest."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import reparam

if TYPE_CHECKING:
    import torch

LIBRARIES = ("reparam", "torch", "timm", "torchvision", "numpy", "hypothesis")
_ROOT = Path(__file__).parents[1]
_SOURCES = ("reparam", "benchmarks", "tests", ":(exclude)benchmarks/results")


def provenance(command: str, device: torch.device | None = None) -> dict[str, Any]:
    """Return command, commit, library versions, device and date of a measurement; no path and no host name."""
    name = f"{platform.machine()} CPU"
    if device is not None and device.type == "cuda":
        import torch

        name = torch.cuda.get_device_name(device)
    return {
        "command": command,
        "commit": commit(),
        "uncommitted_changes": bool(git("status", "--porcelain", "--", *_SOURCES)),
        "versions": versions(LIBRARIES),
        "python": platform.python_version(),
        "device": name,
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def versions(names: Iterable[str]) -> dict[str, str | None]:
    """Return the installed version of each distribution, None where there is none."""
    return {name: reparam.__version__ if name == "reparam" else _version(name) for name in names}


def commit() -> str:
    """Return the commit of the checkout that this package runs from, or an empty string."""
    return git("rev-parse", "HEAD")


def git(*words: str) -> str:
    """Return what git prints about the checkout of this package, or an empty string where it is installed without."""
    # An installed copy may lie inside somebody else's repository, whose commit would say nothing.
    tracked = _run("ls-files", "--error-unmatch", "reparam/__init__.py")
    return (_run(*words) or "") if tracked else ""


def _run(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(_ROOT), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
