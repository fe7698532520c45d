"""Curves of a run, or of several, as a picture: accuracy over the epochs, and the gap between student and teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reparam.distill.files import write_atomically

_NETWORKS = {"student_top1": "student", "student_ema_top1": "student, averaged", "teacher_top1": "teacher"}
_LINES = {"student_top1": "-", "student_ema_top1": "-.", "teacher_top1": "--"}


def draw_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw test accuracy and gap over the epochs into a PNG file.

    Args:
        runs: rows of metrics.csv by the name of the run; a single run may have the empty name. Runs of several arms of
            a comparison, GPD and baseline, become one picture.
        path: the file; it appears whole or not at all.
    """
    # The object interface: nothing global, no window, no backend to choose.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with_teacher = [name for name, rows in runs.items() if rows and rows[-1].get("teacher_top1") is not None]
    figure = Figure(figsize=(7, 6.5 if with_teacher else 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2 if with_teacher else 1, 1, sharex=True, squeeze=False)[:, 0]
    for number, (name, rows) in enumerate(runs.items()):
        colour = f"C{number % 10}"
        for key, network in _NETWORKS.items():
            points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                label = f"{name}: {network}" if name else network
                own = colour if len(runs) > 1 else None
                panels[0].plot(*zip(*points, strict=True), _LINES[key], color=own, label=label, lw=1.2)
        if name in with_teacher:
            measured = [row for row in rows if row["teacher_top1"] is not None]
            gap = [row["teacher_top1"] - row["student_top1"] for row in measured]
            panels[1].plot([row["epoch"] for row in measured], gap, color=colour, label=name or None, lw=1.2)
    panels[0].set_ylabel("top-1 on test images (%)")
    panels[0].legend(fontsize="small")
    if with_teacher:
        panels[1].set_ylabel("gap: teacher - student (points)")
        panels[1].axhline(0, color="0.6", lw=0.8)
        if any(with_teacher):
            panels[1].legend(fontsize="small")
    panels[-1].set_xlabel("epoch")
    for panel in panels:
        panel.grid(alpha=0.3)
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=120))
