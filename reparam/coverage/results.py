"""The result file: where it comes from, and one row per model; always whole, also when a run is ended."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reparam.coverage.catalogue import GROUPS
from reparam.errors import FormatError, InputError
from reparam.provenance import provenance, versions

FORMAT, VERSION = "reparam-coverage", 1
EXACT = 1e-12
"""Largest relative error of a node, in float64, of a row that counts as exact."""

_JUDGED_BY = ("reparam", "torch", "timm", "torchvision")

Row = dict[str, Any]


def is_exact(row: Mapping[str, Any]) -> bool:
    """Whether every node agrees to `EXACT` in float64."""
    return bool(row["status"] == "ok" and row.get("worst_error", 1.0) <= EXACT)


def returns(row: Mapping[str, Any]) -> bool:
    """Whether what is extracted is what was expanded: bit for bit, or as close as a ratio of 3 allows."""
    return row.get("round_trip") in ("bit-equal", "within 2 ulp")


def is_good(row: Mapping[str, Any], plan_only: bool) -> bool:
    """Whether a row has nothing to complain about."""
    return row["status"] == "ok" and (plan_only or (is_exact(row) and returns(row)))


@dataclass
class Results:
    """The content of a result file.

    Args:
        path: where it is written.
        settings: ratio, plan_only, seed: rows of other settings do not belong together.
        header: everything else about the run.
        rows: by name.
        families: the smallest network of each family of timm, family -> [name, parameters].
        seconds: wall-clock time of all runs that went into the file.
    """

    path: Path
    settings: dict[str, Any]
    header: dict[str, Any]
    rows: dict[str, Row] = field(default_factory=dict)
    families: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    _since: float = field(default_factory=time.monotonic)

    def add(self, row: Row) -> None:
        """Add a row, or replace that of the same name, and write the file."""
        self.rows[row["name"]] = {**row, "commit": self.header["commit"][:10]}
        self.write()

    def write(self) -> None:
        """Write the file; it appears whole or not at all."""
        self.seconds += time.monotonic() - self._since
        self._since = time.monotonic()
        text = _to_text(self.content())
        partial = self.path.with_name(f".{self.path.name}.partial")
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)

    def content(self) -> dict[str, Any]:
        """Return what the file says."""
        order = {group: k for k, group in enumerate(GROUPS)}
        rows = sorted(self.rows.values(), key=lambda r: (order.get(r["group"], 99), r.get("family", ""), r["name"]))
        return {
            "format": FORMAT,
            "version": VERSION,
            **self.header,
            **self.settings,
            "wall_seconds": round(self.seconds, 1),
            "families": self.families,
            "rows": rows,
        }


def open_results(path: Path, settings: dict[str, Any], command: str, more: dict[str, Any], again: bool) -> Results:
    """Return the results to add to: those of the file where there is one.

    Args:
        path: of the file.
        settings: see `Results`.
        command: of this run.
        more: what else the header says about this run.
        again: start anew where the file was measured with other settings or versions.

    Raises:
        InputError: the file cannot be written, or was measured with other settings or versions.
        FormatError: the file is something else.
    """
    check_writable(path)
    results = Results(path, settings, {**provenance(command), **more})
    if not path.exists():
        return results
    old = read(path)
    differences = [
        f"{name} {old.get(name)}, now {value}" for name, value in settings.items() if old.get(name) != value
    ] + [
        f"{name} {old['versions'].get(name)}, now {value}"
        for name, value in versions(_JUDGED_BY).items()
        if old["versions"].get(name) != value
    ]
    if differences and not again:
        raise InputError(
            f"{path} holds results of another kind ({'; '.join(differences)}): --again measures everything in it anew, "
            "--output names another file"
        )
    if not differences:
        results.rows = {row["name"]: row for row in old["rows"]}
        results.families, results.seconds = old["families"], old["wall_seconds"]
    return results


def read(path: Path) -> dict[str, Any]:
    """Return the content of a result file.

    Raises:
        FormatError: it is none, or one of another version.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise FormatError(f"{path} is no result of reparam coverage: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FormatError(f"{path} is no result of reparam coverage: it has no 'format': {FORMAT!r}")
    if data.get("version") != VERSION:
        raise FormatError(f"{path} has version {data.get('version')!r}, this release reads version {VERSION}")
    return data


def check_writable(path: Path) -> None:
    """Fail before the work, not after it.

    Raises:
        InputError: there is no such folder, or it may not be written to.
    """
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK) or not os.access(path.parent, os.W_OK):
        raise InputError(f"cannot write {path}: no permission")


def commits(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the commits that rows were measured at."""
    return sorted({row["commit"] for row in rows if row.get("commit")})


def _to_text(content: dict[str, Any]) -> str:
    """JSON with one row per line, so that a difference between two files is a difference between models."""
    head = json.dumps({**content, "rows": []}, indent=1)
    lines = ",\n  ".join(json.dumps(row) for row in content["rows"])
    return head[: head.rindex("[]")] + (f"[\n  {lines}\n ]" if lines else "[]") + "\n}\n"
