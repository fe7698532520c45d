"""The page of a coverage run, in Markdown: nothing in it that is not in the result file."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from reparam.coverage.catalogue import GROUPS, TIMM
from reparam.coverage.results import EXACT, commits, is_exact, returns

Row = Mapping[str, Any]

_WELL, _FAIR = 0.95, 0.6
_SHOWN = 3

_INTRO = """\
# Coverage

What `reparam expand` does to networks as they are: the smallest network of each family of timm (a family is a module of
timm) and the networks of torchvision. Every figure on this page is written by `reparam coverage` from its result file;
a test compares the two. Weights are random, and norms, their statistics and everything else that starts constant are
randomised, so that no wrong map hides behind a zero or a one, and scaled so that activations stay near 1.

- *Widened*: the share of conv and linear weight values that are widened on both sides; the network's own inputs and
  outputs count as done. *Parameters* and *multiply-adds*: of the student, and how many times as many the teacher has.
- *Worst node error*: the largest relative difference between student and teacher over all nodes of the graph, in
  float64. A row is *exact* up to {exact:.0e}.
- *Round trip*: whether `extract(expand(model))`, with noise, in float32, has the state_dict of the model bit for bit.
- *Seconds*: of `plan`, of `expand` with verification (planning included), of `extract`; each model in a process of its
  own, which has the libraries imported.
- *Kept narrow*: operators in front of which values return to the student's width, with their number; the reasons are
  [below](#what-is-contracted-and-why).
"""


def page(data: Mapping[str, Any], everything: Mapping[str, Any] | None = None) -> str:
    """Return the page.

    Args:
        data: the content of a result file.
        everything: that of a plan-only run over all of timm's names, whose summary is added.
    """
    if data["plan_only"]:
        return "\n".join(["# Plans\n", _plans(data), *_failures(data["rows"]), _origin(data)])
    rows = data["rows"]
    parts = [_INTRO.format(exact=EXACT)]
    if not rows:
        return "\n".join([*parts, "Nothing has been measured yet.\n", *_reasons(rows)])
    parts.append(_summary(rows))
    for group in GROUPS:
        members = [row for row in rows if row["group"] == group]
        if members:
            parts.append(_group(group, members))
    parts += _reasons(rows)
    parts += _failures(rows)
    if everything is not None:
        parts += ["## Plans of all timm networks\n", _plans(everything), *_failures(everything["rows"], "### ")]
    parts += ["## How this was made\n", _origin(data)]
    if everything is not None:
        parts.append(_origin(everything))
    return "\n".join(parts)


# Summaries -----------------------------------------------------------------------------------------------------------


def _summary(rows: Sequence[Row]) -> str:
    header = (
        "models", "number", "exact", "round trip bit-equal", "at least 95% widened", "at least 60%", "least widened",
        "worst node error", "`expand`, median s", "longest s",
    )  # fmt: skip
    cells = []
    for group in GROUPS:
        members = [row for row in rows if row["group"] == group]
        if members:
            cells.append(_summary_row(_title(group), members))
    return "## Summary\n\n" + _table(header, cells)


def _summary_row(title: str, rows: Sequence[Row]) -> list[str]:
    done = [row for row in rows if row["status"] == "ok"]
    shares = [row["coverage"] for row in done]
    seconds = [row["seconds"]["expand"] for row in done]
    return [
        title,
        str(len(rows)),
        str(sum(map(is_exact, rows))),
        str(sum(row.get("round_trip") == "bit-equal" for row in rows)),
        str(sum(share >= _WELL for share in shares)),
        str(sum(share >= _FAIR for share in shares)),
        _percent(min(shares)) if shares else "",
        f"{max(row['worst_error'] for row in done):.1e}" if done else "",
        f"{statistics.median(seconds):.1f}" if seconds else "",
        f"{max(seconds):.1f}" if seconds else "",
    ]


def _plans(data: Mapping[str, Any]) -> str:
    rows = data["rows"]
    done = [row for row in rows if row["status"] == "ok"]
    lines = [
        f"{len(rows):,} networks on the meta device: {len(done):,} planned, {len(rows) - len(done)} with an error or "
        f"out of time; {data['wall_seconds'] / 60:.0f} minutes with {data['jobs']} processes.\n"
    ]
    if done:
        seconds = [row["seconds"]["plan"] for row in done]
        steps = [(1.0, "all of them"), (_WELL, "at least 95%"), (0.8, "at least 80%"), (_FAIR, "at least 60%")]
        cells = [[word, f"{sum(row['coverage'] >= share for row in done):,}"] for share, word in steps]
        lines.append(_table(("conv and linear weights widened", "networks"), [*cells, ["any", f"{len(done):,}"]]))
        lines.append(f"`plan` takes {statistics.median(seconds):.1f} s in the median, {max(seconds):.1f} s at most.\n")
        narrow = sorted(
            (row for row in done if row["coverage"] < _FAIR), key=lambda row: (row["coverage"], row["name"])
        )
        if narrow:
            names = ", ".join(f"`{row['name']}` {_percent(row['coverage'])}" for row in narrow)
            lines.append(f"Under 60%: {names}.\n")
    return "\n".join(lines)


# Tables --------------------------------------------------------------------------------------------------------------


def _group(group: str, rows: Sequence[Row]) -> str:
    header: tuple[str, ...] = (
        "family" if group == TIMM else "", "model", "input", "parameters", "multiply-adds", "widened",
        "worst node error", "round trip", "plan s", "expand s", "extract s", "peak MiB", "kept narrow",
    )  # fmt: skip
    cells = [[row.get("family", ""), *_cells(row)] for row in rows]
    if group != TIMM:
        header, cells = header[1:], [line[1:] for line in cells]
    return f"## {_title(group)}\n\n" + _table(header, cells)


def _cells(row: Row) -> list[str]:
    name = f"`{row['name'].rpartition(':')[2] if row['group'].startswith('torchvision') else row['name']}`"
    if row["status"] != "ok":
        return [name, *[""] * 4, f"**{row['status']}**", *[""] * 4, str(row.get("peak_memory_mib", "")), ""]
    options = ", ".join(f"{key}={value}" for key, value in row.get("options", {}).items() if value is not None)
    return [
        name,
        row["input"] + (f" ({options})" if options else ""),
        _growth(row["parameters"]),
        _growth(row["multiply_adds"]),
        _percent(row["coverage"]),
        f"{row['worst_error']:.1e}" if is_exact(row) else f"**{row['worst_error']:.1e}**",
        "yes"
        if row["round_trip"] == "bit-equal"
        else row["round_trip"]
        if returns(row)
        else f"**{row['round_trip']}**",
        *(f"{row['seconds'][step]:.1f}" for step in ("plan", "expand", "extract")),
        str(row["peak_memory_mib"]),
        _operators(row["contractions"]),
    ]


def _operators(contractions: Iterable[Mapping[str, Any]]) -> str:
    counts: Counter[str] = Counter()
    for entry in contractions:
        counts[entry["operator"]] += entry["count"]
    named = [f"{operator} {n}" for operator, n in counts.most_common(_SHOWN)]
    rest = len(counts) - len(named)
    return ", ".join(named) + (f" and {rest} more" if rest else "")


def _reasons(rows: Sequence[Row]) -> list[str]:
    title = "## What is contracted and why\n"
    models: dict[tuple[str, str], list[str]] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for row in rows:
        for entry in row.get("contractions", []):
            key = entry["operator"], entry["reason"]
            models.setdefault(key, []).append(row.get("family") or row["name"].rpartition(":")[2])
            counts[key] += entry["count"]
    if not models:
        return [title, "Nothing.\n"]
    cells = []
    for key, names in sorted(models.items(), key=lambda item: (-len(item[1]), item[0])):
        shown = sorted(set(names))
        where = ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")
        cells.append([f"`{key[0]}`", _plain(key[1]), str(len(names)), str(counts[key]), where])
    return [title, _table(("operator", "reason", "models", "places", "in"), cells)]


def _failures(rows: Sequence[Row], level: str = "## ") -> list[str]:
    failed = [row for row in rows if row["status"] != "ok"]
    if not failed:
        return []
    cells = [
        [f"`{row['name']}`", row["error"]["type"], _plain(row["error"]["message"]), _plain(row["error"]["where"])]
        for row in failed
    ]
    return [f"{level}Errors\n", _table(("model", "error", "message", "at"), cells)]


def _origin(data: Mapping[str, Any]) -> str:
    found = [f"`{name}`" for name in commits(data["rows"])]
    at = f" at {'commit' if len(found) == 1 else 'commits'} {', '.join(found)}" if found else ""
    libraries = ", ".join(f"{name} {data['versions'][name]}" for name in ("torch", "timm", "torchvision"))
    threads = f"{data['threads']} thread{'s' * (data['threads'] != 1)} each"
    return (
        f"`{data['command']}`{at}, {libraries}, ratio {data['ratio']}, {data['device']}, {data['cores']} cores, "
        f"{data['jobs']} processes with {threads}, {data['date']}.\n"
    )


# Text ----------------------------------------------------------------------------------------------------------------


def _title(group: str) -> str:
    return group.replace("_", " ")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    escape: Callable[[str], str] = lambda cell: cell.replace("|", "\\|")  # noqa: E731
    lines = [" | ".join(header), " | ".join(["---"] * len(header)), *(" | ".join(map(escape, row)) for row in rows)]
    return "".join(f"| {line} |\n" for line in lines)


def _plain(text: str) -> str:
    """Return text in which Markdown sees no markup."""
    return re.sub(r"([\\`*_\[\]])", r"\\\1", text).replace("<", "&lt;")


def _growth(pair: Sequence[int]) -> str:
    before, after = pair
    return f"{_count(before)}, {after / before:.2f}x" if before else "0"


def _count(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f}{unit}"
    return str(int(value))


def _percent(share: float) -> str:
    # 99.96% is not everything.
    return f"{min(share, 0.999) if share < 1 else 1:.1%}"
