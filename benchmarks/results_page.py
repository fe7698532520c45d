"""Write the figures of docs/results.md from the JSON under benchmarks/results/.

python benchmarks/results_page.py           # rewrite the page
python benchmarks/results_page.py --check   # exit status 1 where the page is not what the JSON says
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
START, END = "<!-- begin: written by benchmarks/results_page.py -->", "<!-- end -->"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    old = PAGE.read_text()
    new = page(old)
    if arguments.check:
        return int(new != old)
    PAGE.write_text(new)
    return 0


def page(text: str) -> str:
    """Return the page with its generated part brought up to date."""
    head, _, rest = text.partition(START)
    _, _, tail = rest.partition(END)
    return f"{head}{START}\n\n{body()}\n{END}{tail}"


def body() -> str:
    """Return the generated part."""
    parts = []
    for path in sorted(record.RESULTS.glob("*.json")):
        kind = next((k for k in SECTIONS if path.name.startswith(k)), None)
        if kind is not None:
            data = json.loads(path.read_text())
            parts.append(SECTIONS[kind](data) + "\n" + _origin(path.name, data))
    return "\n".join(parts)


def _origin(name: str, data: dict[str, Any]) -> str:
    torch = data["versions"]["torch"]
    return (
        f"`{data['command']}` at commit `{data['commit'][:10]}`, torch {torch}, {data['device']}, {data['date']}; "
        f"output: `benchmarks/results/{name}`.\n"
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
        seeds = ", ".join(map(str, arm["seeds"]))
        scores = ", ".join(f"{score:.2f}" for score in arm["student_top1"])
        teacher = f"{sum(arm['teacher_top1']) / len(arm['teacher_top1']):.2f}" if arm["teacher_top1"] else ""
        seconds = sum(arm["seconds"]) / len(arm["seconds"])
        cells = (arm["name"], seeds, scores, f"{arm['mean']:.2f}", f"{arm['std']:.2f}", teacher, f"{seconds:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    difference, error = verdict["difference"], verdict["standard_error"]
    better = (
        "better than" if difference > 2 * error else "worse than" if difference < -2 * error else "no different from"
    )
    lines.append(
        f"\nGPD minus the best baseline ({verdict['best_baseline']}): {difference:+.2f} points, standard error "
        f"{error:.2f}: at equal epochs GPD is {better} it here. A GPD epoch costs more, see the last column.\n"
    )
    return "\n".join(lines)


def _evidence(data: dict[str, Any]) -> str:
    config, static = data["config"], data.get("static")
    size = f", {config['limit_train']:,} training images" if config.get("limit_train") else ""
    lines = [
        f"### Arms on {config['data']}: {config['model']}, {config['epochs']} epochs{size}\n",
        "| arm | epochs | seeds | student top-1 (%) | averaged weights | dynamic teacher | s per run |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in data["arms"]:
        scores = [_spread(arm.get(key)) for key in ("student_top1", "student_ema_top1", "teacher_top1")]
        seconds = sum(arm["seconds"]) / len(arm["seconds"])
        cells = (arm["name"], str(arm["epochs"]), str(len(arm["seeds"])), *scores, f"{seconds:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    if static is not None:
        lines.append(f"\nStatic teacher: {static['model']}, {static['epochs']} epochs, {static['top1']:.2f}%.")
    return "\n".join([*lines, ""])


def _gap(data: dict[str, Any]) -> str:
    config, static = data["config"], data.get("static")
    size = f", {config['limit_train']:,} training images" if config.get("limit_train") else ""
    pixels = f" of {config['image_size']} px" if config.get("image_size") else ""
    lines = [
        f"### Large gaps on {config['data']}: {static['model'] if static else 'none'} -> {config['model']}, "
        f"{config['epochs']} epochs{size}{pixels}\n",
        "| arm | seeds | student top-1 (%) | assistant | its top-1 | dynamic teacher | s per run, assistant included |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in data["arms"]:
        assistants = arm.get("assistants", [])
        names = ", ".join(f"{one['name']} ({one['parameters']:,} parameters)" for one in assistants)
        scores = ", ".join(_spread(one["top1"]) for one in assistants)
        runs = [arm["seconds"], *(one["seconds"] for one in assistants)]
        seconds = sum(sum(each) for each in runs) / len(arm["seconds"])
        student, teacher = _spread(arm.get("student_top1")), _spread(arm.get("teacher_top1"))
        cells = (arm["name"], str(len(arm["seeds"])), student, names, scores, teacher, f"{seconds:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    if static is not None:
        lines.append(f"\nStatic teacher: {static['model']}, {static['epochs']} epochs, {static['top1']:.2f}%.")
    return "\n".join([*lines, ""])


def _spread(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{found['mean']:.2f}" if found["std"] is None else f"{found['mean']:.2f} ± {found['std']:.2f}"


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


def _surgery(data: dict[str, Any]) -> str:
    lines = [
        f"### Surgery: {data['model']} at {data['input'][-1]} px, {data['threads']} threads\n",
        "| step | median (s) | min | max | relative to the yardstick |",
        "|---|---|---|---|---|",
    ]
    yard = next(times["median"] for name, times in data["seconds"].items() if name.startswith("yardstick"))
    for name, times in data["seconds"].items():
        ratio = f"{times['median'] / yard:.2f}"
        lines.append(f"| {name} | {times['median']:.2f} | {times['min']:.2f} | {times['max']:.2f} | {ratio} |")
    large = data["large"]
    lines.append(
        f"\n`plan` of {large['model']} ({large['parameters'] / 1e9:.2f}e9 parameters, meta device): "
        f"{large['plan_seconds']:.1f} s, peak memory of the process {large['peak_memory_mib']:.0f} MiB, of which "
        f"{large['peak_memory_growth_mib']:.0f} MiB for planning.\n"
    )
    return "\n".join(lines)


def _networks(data: dict[str, Any]) -> str:
    return (
        "### Random networks\n\n"
        f"{data['networks']:,} networks drawn at random: {data['mismatches']} mismatches; "
        f"largest relative error of a node {data['worst_node_error']:.1e}; mean coverage {data['coverage_mean']:.3f}.\n"
    )


def _branches(data: dict[str, Any]) -> str:
    words = {
        "plain": "plain",
        "merged": f"{data['recipe']}, merged to one kernel per layer",
        "run": "the same, every branch run as convolutions",
    }
    lines = [
        f"### Branches: training step of {data['model']}, batch {data['batch']}, {data['size']} px\n",
        "| network | parameters | median (s) | min | max | relative to plain |",
        "|---|---|---|---|---|---|",
    ]
    plain = data["seconds_per_training_step"]["plain"]["median"]
    for name, times in data["seconds_per_training_step"].items():
        count = f"{data['parameters'][name] / 1e6:.2f}M"
        cells = (words[name], count, *(f"{times[k]:.2f}" for k in ("median", "min", "max")))
        lines.append(f"| {' | '.join(cells)} | {times['median'] / plain:.2f} |")
    forward, merge = data["multiply_adds"].values()
    lines.append(
        f"\n{data['layers_with_branches']} layers have branches. Forward pass of the batch {forward / 1e9:.1f} G "
        f"multiply-adds, merging {merge / 1e9:.1f} G. Running the branches takes "
        f"{data['run_over_merged']:.2f} times as long as merging them.\n"
    )
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "branches": _branches,
    "compare_training": _training,
    "evidence": _evidence,
    "fold": _fold,
    "gap": _gap,
    "random_networks": _networks,
    "surgery": _surgery,
}


if __name__ == "__main__":
    sys.exit(main())
