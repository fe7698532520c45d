"""The JSON file that a measurement goes to, and where it comes from."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reparam.provenance import git, provenance

__all__ = ["RESULTS", "git", "provenance", "spread", "write"]

RESULTS = Path(__file__).parent / "results"


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
