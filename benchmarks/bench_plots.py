"""The plots of docs/benchmarks.md, drawn from the JSON: bars over the ideal, and growth with size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw(results: Mapping[str, dict[str, Any]], folder: Path) -> list[Path]:
    """Draw what there are results for into ``folder`` and return the files."""
    # What was measured before a change stands in a table of its own, and no ideal is that of heads or features.
    every = {name: data for name, data in results.items() if data.get("kind") == "step"}
    steps = {name: data for name, data in every.items() if not name.startswith("before-") and not data["teacher"]}
    surgery = [data for data in results.values() if data.get("kind") == "surgery" and "growth" in data]
    found = []
    if steps:
        found.append(_steps(steps, folder / "bench-step.png"))
    if surgery:
        found.append(_growth(surgery[0]["growth"], folder / "bench-growth.png"))
    return found


def _axes(height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(8, height), layout="constrained")


def _save(figure: Any, target: Path) -> Path:
    from matplotlib import pyplot

    target.parent.mkdir(parents=True, exist_ok=True)
    # Without the version of matplotlib, which would change the file.
    figure.savefig(target, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return target


def _steps(steps: Mapping[str, dict[str, Any]], target: Path) -> Path:
    bars = []
    for data in steps.values():
        switches = [word for word in ("compile", "channels_last", "cuda_graph", "no_overlap") if data.get(word)]
        where = ", ".join([data["model"], f"batch {data['batch']}", data["device_type"], data["precision"], *switches])
        bars += [
            (f"{name}\n{where}", row["over_ideal"]) for name, row in data["steps"].items() if name.startswith("GPD")
        ]
    figure, axes = _axes(1 + 0.5 * len(bars))
    middles = [over["median"] for _, over in bars]
    spans = [[over["median"] - over["low"] for _, over in bars], [over["high"] - over["median"] for _, over in bars]]
    axes.barh(range(len(bars)), middles, xerr=spans, color="#4c72b0", height=0.6)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("time of a step over the ideal (median of rounds, quartiles)")
    return _save(figure, target)


def _growth(data: dict[str, Any], target: Path) -> Path:
    figure, axes = _axes(4)
    for name in ("plan", "expand"):
        rows = [row for row in data["sizes"] if row[f"{name}_seconds"]]
        label = f"{name}, exponent {data['exponents'][name]}"
        points = [[row[key] for row in rows] for key in ("parameters", f"{name}_seconds")]
        axes.loglog(*points, marker="o", label=label)
    axes.set_xlabel("parameters")
    axes.set_ylabel("seconds")
    axes.legend()
    axes.grid(alpha=0.3)
    return _save(figure, target)
