"""Write the figures of docs/results.md and docs/benchmarks.md from the JSON under benchmarks/results/, and the plots.

python benchmarks/results_page.py           # rewrite the pages and draw the plots
python benchmarks/results_page.py --check   # exit status 1 where a page is not what the JSON says
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import arm_tables
import bench_plots
import bench_sections
import record

DOCS = Path(__file__).parents[1] / "docs"
START, END = "<!-- begin: written by benchmarks/results_page.py -->", "<!-- end -->"

PICTURES = {
    "bench-step.png": "Time of a GPD step over the ideal, for each result",
    "bench-growth.png": "Time of plan and expand over the number of parameters",
}
"""Plots of docs/benchmarks.md, and what a reader who cannot see them is told."""

Section = Callable[[dict[str, Any]], str]

NOW = {
    "benchmarks/surgery.py": "surgery",
    "benchmarks/fold.py": "fold",
    "benchmarks/branches.py": "step --side-by-side",
}
"""Scripts of earlier results, and what takes their place."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    stale = False
    if not arguments.check:
        bench_plots.draw(committed(), DOCS / "pictures")
    for name in PAGES:
        old = (DOCS / name).read_text()
        new = page(name, old)
        stale = stale or new != old
        if not arguments.check:
            (DOCS / name).write_text(new)
    return int(stale and arguments.check)


def committed() -> dict[str, dict[str, Any]]:
    """Return all results by the name of their file."""
    return {path.name: json.loads(path.read_text()) for path in sorted(record.RESULTS.glob("*.json"))}


def page(name: str, text: str) -> str:
    """Return a page with its generated part brought up to date."""
    head, _, rest = text.partition(START)
    _, _, tail = rest.partition(END)
    return f"{head}{START}\n\n{_pictures(name)}{body(PAGES[name])}\n{END}{tail}"


def _pictures(name: str) -> str:
    """Return the plots that a page has, where they were drawn."""
    shown = PICTURES if name == "benchmarks.md" else {}
    lines = [f"![{words}](pictures/{file})\n\n" for file, words in shown.items() if (DOCS / "pictures" / file).exists()]
    return "".join(lines)


def body(sections: Mapping[str, Section]) -> str:
    """Return the generated part of a page."""
    parts, results = [], committed()
    for names, data in arm_tables.pooled(results):
        kind = next((k for k in sections if names[0].startswith(k)), None)
        if kind is not None:
            origins = "\n".join(_origin(name, results[name]) for name in names)
            parts.append(f"{sections[kind](data)}\n{origins}")
    return "\n".join(parts)


def _origin(name: str, data: dict[str, Any]) -> str:
    torch = data["versions"]["torch"]
    script = next((script for script in NOW if script in data["command"]), None)
    now = f" (today: `reparam bench {NOW[script]}`)" if script else ""
    return (
        f"`{data['command']}`{now} at commit `{data['commit'][:10]}`, torch {torch}, {data['device']}, "
        f"{data['date']}; output: `benchmarks/results/{name}`.\n"
    )


def _training(data: dict[str, Any]) -> str:
    config, verdict = data["config"], data["verdict"]
    size = f", {config['limit_train']} training images" if config.get("limit_train") else ""
    lines = [
        f"### {config['data']}, {config['model']}, {config['epochs']} epochs{size}\n",
        "| run | seeds | student top-1 (%) | mean | std | teacher mean | s per run |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in data["arms"]:
        seeds = ", ".join([*map(str, arm["seeds"]), *(f"{run['seed']} failed" for run in arm.get("failed", ()))])
        scores = ", ".join(f"{score:.2f}" for score in arm["student_top1"])
        teacher = f"{sum(arm['teacher_top1']) / len(arm['teacher_top1']):.2f}" if arm["teacher_top1"] else ""
        seconds = f"{sum(arm['seconds']) / len(arm['seconds']):.0f}" if arm["seconds"] else ""
        mean = "" if arm["mean"] is None else f"{arm['mean']:.2f}"
        std = "" if arm["std"] is None else f"{arm['std']:.2f}"
        cells = (arm["name"], seeds, scores, mean, std, teacher, seconds)
        lines.append(f"| {' | '.join(cells)} |")
    if verdict is None:
        return "\n".join([*lines, "\nNo verdict: of GPD or of all baselines no run finished.\n"])
    difference, error = verdict["difference"], verdict["standard_error"]
    line = f"\nGPD minus the best baseline ({verdict['best_baseline']}): {difference:+.2f} points"
    if error is None:
        return "\n".join([*lines, f"{line}; one seed says nothing about chance. A GPD epoch costs more.\n"])
    better = (
        "better than" if difference > 2 * error else "worse than" if difference < -2 * error else "no different from"
    )
    lines.append(
        f"{line}, standard error {error:.2f}: at equal epochs GPD is {better} it here. A GPD epoch costs more, see the "
        "last column.\n"
    )
    return "\n".join(lines)


def _fold(data: dict[str, Any]) -> str:
    lines = [
        f"### Folding: batch {data['batch']}, {data['threads']} threads\n",
        "Norms that run before and after folding; the largest difference of the outputs, relative to the largest one; "
        "inference time of the folded network relative to the unfolded one, run side by side.\n",
        "| network | norms | reparam | timm | torch.fx | float64 error | timm's | float32 error | model's own | time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in data["models"].items():
        ours, theirs = row["reparam"], row["timm"]
        left = [str(row[kind].get("norms", "fails")) for kind in ("reparam", "timm", "torch.fx")]
        fuses = theirs.get("norms", row["norms_before"]) < row["norms_before"]
        errors = [
            f"{ours['float64_error']:.1e}",
            f"{theirs['float64_error']:.1e}" if fuses else "",
            f"{ours['float32_error']:.1e}",
            f"{row['float32_error_of_the_model']:.1e}",
        ]
        cells = (f"`{name}`", str(row["norms_before"]), *left, *errors, f"{ours['time_ratio']['median']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    times = sorted(row["reparam"]["time_ratio"]["median"] for row in data["models"].values())
    lines.append(
        f"\nMedian of the times {times[len(times) // 2]:.2f}, from {times[0]:.2f} to {times[-1]:.2f}. timm's errors "
        "stand where its own code removes norms.\n"
    )
    return "\n".join(lines)


def _networks(data: dict[str, Any]) -> str:
    return (
        "### Random networks\n\n"
        f"{data['networks']:,} networks drawn at random: {data['mismatches']} mismatches; "
        f"largest relative error of a node {data['worst_node_error']:.1e}; mean coverage {data['coverage_mean']:.3f}.\n"
    )


PAGES: dict[str, dict[str, Section]] = {
    "results.md": {
        "compare_training": _training,
        "evidence": arm_tables.evidence,
        "fold": _fold,
        "gap": arm_tables.gap,
        "random_networks": _networks,
    },
    "benchmarks.md": {
        "step": bench_sections.step,
        "before-step": bench_sections.before,
        "before-surgery": bench_sections.before,
        "surgery": bench_sections.surgery,
        "scale": bench_sections.scale,
        "branches": bench_sections.branches,
    },
}
"""Pages, and what writes the results on them, by how the name of a file begins."""


if __name__ == "__main__":
    sys.exit(main())
