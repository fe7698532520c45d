"""Pictures: curves of a run, or of several, with the gap between student and teacher; logits of networks by t-SNE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from colorsys import hsv_to_rgb
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reparam.distill.files import write_atomically
from reparam.errors import InputError

FEWEST = 10
"""The fewest images that t-SNE can say something about."""

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


def draw_tsne(logits: Mapping[str, Tensor], labels: Tensor, path: Path, classes: Sequence[str] = ()) -> None:
    """Draw the logits of networks in two dimensions, coloured by class, into a PNG file.

    One panel for each network, each with an embedding of its own: distances can be compared inside a panel, not between
    two. t-SNE starts from the principal components, with perplexity 30 (less for fewer than 91 images) and a fixed
    seed, so that the same logits give the same picture.

    Args:
        logits: ``[N, classes]`` by the name of the network.
        labels: the class of each image ``[N]``.
        path: the file; it appears whole or not at all.
        classes: names for the legend; default: the numbers.

    Raises:
        InputError: fewer than 10 images, no network, sizes that do not fit, or logits that are not finite or all equal.

    Source: van der Maaten and Hinton (JMLR 2008); the picture is that of Gap-KD's figure 6.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = {name: _embedded(name, values, labels) for name, values in logits.items()}
    if not points:
        raise InputError("t-SNE needs the logits of one network or more")
    figure = Figure(figsize=(4.2 * len(points) + 1.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(points), squeeze=False)[0]
    shown = sorted(set(labels.tolist()))
    for panel, (name, places) in zip(panels, points.items(), strict=True):
        for number, label in enumerate(shown):
            own = places[labels == label]
            colour = f"C{number}" if len(shown) <= 10 else _hue(number / len(shown))
            title = classes[label] if label < len(classes) else str(label)
            panel.scatter(own[:, 0], own[:, 1], s=5, color=colour, label=title, linewidths=0)
        panel.set_title(name, fontsize="medium")
        panel.set_xticks([])
        panel.set_yticks([])
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", fontsize="small", markerscale=3)
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=120))


def _hue(share: float) -> tuple[float, float, float]:
    """A colour for each share of the circle of hues, where ten colours are too few."""
    return hsv_to_rgb(share, 0.75, 0.85)


def _embedded(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    """The two coordinates ``[N, 2]`` of each image."""
    from sklearn.manifold import TSNE

    values = logits.detach().double().cpu()
    if values.ndim != 2 or labels.ndim != 1 or len(values) != len(labels):
        raise InputError(f"t-SNE of {name}: logits are {list(logits.shape)} and labels {list(labels.shape)}")
    if len(values) < FEWEST:
        raise InputError(f"t-SNE of {name} needs {FEWEST} images or more, got {len(values)}")
    if not values.isfinite().all() or not (values != values[0]).any():
        raise InputError(f"t-SNE of {name}: the logits are not finite, or the same for all images")
    method = TSNE(2, perplexity=min(30.0, (len(values) - 1) / 3), init="pca", random_state=0, n_jobs=1)
    return torch.from_numpy(method.fit_transform(values.numpy()))
