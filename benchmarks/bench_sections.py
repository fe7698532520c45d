"""The sections of docs/benchmarks.md, one for each kind of result of ``reparam bench``."""

from __future__ import annotations

from typing import Any

import budgets

GIGA = 1e9
MIB = 2**20


def step(data: dict[str, Any], with_budgets: bool = True) -> str:
    """Return the tables of a training step and of its parts."""
    switches = [word for word in ("compile", "channels_last", "cuda_graph", "no_overlap") if data.get(word)]
    how = ", ".join([data["precision"], data["optimizer"], *switches, f"{data['threads']} threads"])
    static = f", static teacher {data['teacher']}, method {data['method']}" if data["teacher"] else ""
    lines = [
        f"### Step: {data['model']}, batch {data['batch']} at {data['size']} px, ratio {data['ratio']}\n",
        f"{how}{static}.",
        f"TF32: matmul {data['tf32']['matmul']}, cuDNN {data['tf32']['cudnn']}. Measured ceilings: "
        f"{data['ceiling']['flops_per_second'] / GIGA:.0f} GFLOP/s, "
        f"{data['ceiling']['bytes_per_second'] / GIGA:.1f} GB/s.\n",
        "| step | ms | quartiles | / ideal | per round | images/s | G multiply-adds | roofline | peak MiB | / ideal "
        "| parameters MiB | gradients | optimizer |",
        "|" + "---|" * 13,
    ]
    for name, row in data["steps"].items():
        seconds, over = row["seconds"], row["over_ideal"]
        low, high = (1000 * value for value in seconds["quartiles"])
        peak, memory = row["peak_memory_bytes"], row["peak_memory_over_ideal"]
        cells = [
            name,
            f"{1000 * seconds['median']:.1f}",
            f"{low:.1f} to {high:.1f}",
            f"{over['of_medians']:.3f}",
            f"{over['median']:.3f}",
            f"{row['images_per_second']:.4g}",
            f"{row['multiply_adds'] / GIGA:.2f}",
            f"{row['share_of_roofline']:.0%}",
            "" if peak is None else f"{peak / MIB:.0f}",
            "" if memory is None else f"{memory:.3f}",
            *(f"{row[key] / MIB:.1f}" for key in ("parameter_bytes", "gradient_bytes", "optimizer_bytes")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_parts(data), *(_budgets(data) if with_budgets else [])])


def before(data: dict[str, Any]) -> str:
    """Return the same of a step or of surgery before a change, for which there is no budget."""
    if data["kind"] == "surgery":
        return surgery(data, with_budgets=False).replace("### Surgery:", "### Before the changes for speed:")
    return step(data, with_budgets=False).replace("### Step:", "### Before the changes for speed:", 1)


def _parts(data: dict[str, Any]) -> list[str]:
    rows = [(step, part, row) for step, parts in data["parts"].items() for part, row in parts.items()]
    if not rows:
        return []
    lines = ["| part | ms | quartiles |", "|---|---|---|"]
    for name, part, row in rows:
        low, high = (1000 * value for value in row["seconds"]["quartiles"])
        lines.append(f"| {name}: {part} | {1000 * row['seconds']['median']:.1f} | {low:.1f} to {high:.1f} |")
    return [*lines, ""]


def _budgets(data: dict[str, Any]) -> list[str]:
    found = budgets.checked(data)
    if not found:
        return []
    lines = ["| budget | figure | limit | |", "|---|---|---|---|"]
    for entry in found:
        verdict = "kept" if entry.kept else "over"
        lines.append(f"| {entry.what} | {entry.value:.3g} | {entry.limit:.3g} | {verdict} |")
    return [*lines, ""]


def surgery(data: dict[str, Any], with_budgets: bool = True) -> str:
    """Return the tables of surgery; of the script before `reparam bench` as well."""
    if data.get("kind") != "surgery":
        return _earlier_surgery(data)
    lines = []
    for name, row in data.get("models", {}).items():
        lines += [
            f"### Surgery: {name}, {row['parameters'] / 1e6:.1f}M parameters, {row['input'][-1]} px, "
            f"{data['threads']} threads\n",
            "| operation | median (s) | min | max | relative to deepcopy and trace |",
            "|---|---|---|---|---|",
        ]
        for operation, times in row["seconds"].items():
            over = f"{row['over_yardstick'][operation]['median']:.2f}"
            cells = (operation, *(f"{times[key]:.3f}" for key in ("median", "min", "max")), over)
            lines.append(f"| {' | '.join(cells)} |")
        view = row["view"]
        words = [f"{view[mode]['view_over_plain']['median']:.3f} in {mode} mode" for mode in ("eval", "train")]
        lines.append(f"\nA call of the view over one of the plain student, batch {view['batch']}: {', '.join(words)}.")
        if "on_top_over_plain" in view["eval"]:
            words = [f"{view[mode]['on_top_over_plain']['median']:.4f} in {mode} mode" for mode in ("eval", "train")]
            lines.append(f"What it does beside the student's own forward pass, over a plain call: {', '.join(words)}.")
        lines.append("")
    if "limits" in data:
        speed = data["limits"]["flops_per_second"] / 2 / GIGA
        lines.append(f"Product of float64 matrices on this machine: {speed:.0f} G multiply-adds per second.\n")
    lines += _growth(data["growth"]) if "growth" in data else []
    if "import" in data:
        found = data["import"]
        lines.append(
            f"`import reparam`: {found['reparam_seconds']['median']:.3f} s beyond torch's "
            f"{found['torch_seconds']['median']:.2f} s, {found['every_name_seconds']['median']:.2f} s once every "
            f"public name was used; it imports "
            f"{', '.join(found['also_imported']) or 'no timm, torchvision, sklearn or matplotlib'}.\n"
        )
    lines += [_large(data["large"])] if "large" in data else []
    return "\n".join([*lines, *(_budgets(data) if with_budgets else [])])


def _growth(data: dict[str, Any]) -> list[str]:
    lines = [
        f"### Growth: {data['network']}\n",
        "| parameters | plan (s) | expand without verification (s) |",
        "|---|---|---|",
    ]
    for row in data["sizes"]:
        expand = "" if row["expand_seconds"] is None else f"{row['expand_seconds']:.3f}"
        lines.append(f"| {row['parameters'] / 1e6:.1f}M | {row['plan_seconds']:.3f} | {expand} |")
    fits = ", ".join(f"{name} {value}" for name, value in data["exponents"].items())
    return [*lines, f"\nFitted exponents of time over parameters: {fits}.\n"]


def _large(data: dict[str, Any]) -> str:
    return (
        f"`plan` of {data['model']} ({data['parameters'] / 1e9:.2f}e9 parameters, meta device): "
        f"{data['plan_seconds']:.1f} s, peak memory of the process {data['peak_memory_mib']:.0f} MiB, of which "
        f"{data['peak_memory_growth_mib']:.0f} MiB for planning.\n"
    )


def scale(data: dict[str, Any]) -> str:
    """Return the table of several processes."""
    lines = [
        f"### Processes: {data['model']}, {data['batch']} images per process at {data['size']} px, {data['backend']}, "
        f"{data['precision']}\n",
        "| method | processes | ms | images/s | efficiency | MiB reduced per step, on paper | measured | sent (ring) |",
        "|" + "---|" * 8,
    ]
    for row in data["rows"]:
        cells = (
            row["method"],
            str(row["processes"]),
            f"{1000 * row['seconds']['median']:.1f}",
            f"{row['images_per_second']:.4g}",
            f"{row['efficiency']:.2f}",
            *(f"{row[key] / MIB:.2f}" for key in ("gradient_bytes", "reduced_bytes", "ring_bytes")),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _earlier_surgery(data: dict[str, Any]) -> str:
    lines = [
        f"### Surgery: {data['model']} at {data['input'][-1]} px, {data['threads']} threads\n",
        "| step | median (s) | min | max | relative to the yardstick |",
        "|---|---|---|---|---|",
    ]
    yard = next(times["median"] for name, times in data["seconds"].items() if name.startswith("yardstick"))
    for name, times in data["seconds"].items():
        ratio = f"{times['median'] / yard:.2f}"
        lines.append(f"| {name} | {times['median']:.2f} | {times['min']:.2f} | {times['max']:.2f} | {ratio} |")
    lines.append(f"\n{_large(data['large'])}")
    return "\n".join(lines)


def branches(data: dict[str, Any]) -> str:
    """Return the table of the script that measured branches before `reparam bench step --side-by-side`."""
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
