"""What a person sees of a run: a progress bar (lines where there is no terminal) and the result."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reparam.distill.checkpoints import FOLDER
from reparam.distill.config import TrainConfig
from reparam.distill.loaders import Facts
from reparam.distill.ranges import cut_off
from reparam.errors import InputError


class Progress:
    """Shows how far a run is: a tqdm bar on a terminal, one line per epoch everywhere else.

    Args:
        epochs: number of epochs.
        steps: optimizer steps per epoch.
        quiet: show nothing.
    """

    def __init__(self, epochs: int, steps: int, quiet: bool = False) -> None:
        self._epochs, self._quiet, self._bar = epochs, quiet, None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=epochs * steps, unit="step", dynamic_ncols=True, leave=False, file=sys.stderr)

    def say(self, line: str) -> None:
        """Print a line without disturbing the bar."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def step(self) -> None:
        """Count an optimizer step."""
        if self._bar is not None:
            self._bar.update()

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Report a finished epoch, given its row of metrics.csv."""
        parts = [f"epoch {row['epoch']:>3}/{self._epochs}", f"lr {row['lr']:<8.3g}"]
        for network in ("student", "teacher"):
            if f"{network}_loss" in row:
                parts.append(f"{network} loss {row[f'{network}_loss']:.4f}")
            if row.get(f"{network}_top1") is not None:
                parts[-1] += f" top-1 {row[f'{network}_top1']:6.2f}%"
        if row.get("student_ema_top1") is not None:
            parts.append(f"averaged {row['student_ema_top1']:6.2f}%")
        self.say("  ".join([*parts, f"{row['seconds']:.1f} s"]))

    def start_at(self, steps: int) -> None:
        """Show that so many optimizer steps are done already."""
        if self._bar is not None:
            self._bar.n = steps
            self._bar.refresh()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


def opening(
    config: TrainConfig, facts: Facts, parameters: Mapping[str, int | None], device: str, processes: int = 1
) -> str:
    """Describe a run before it starts."""
    channels, height, width = facts.image_shape
    images = f"{facts.train_images:,} training and {facts.test_images:,} test images {channels}x{height}x{width}"
    lines = [f"data     {facts.name}: {facts.classes} classes, {images}"]
    lines.append(f"student  {config.model}: {parameters['student']:,} parameters")
    extra = f" with {config.branches} branches" if config.branches else ""
    if parameters["teacher"] is not None:
        growth = parameters["teacher"] / max(parameters["student"] or 1, 1)
        count = f"{parameters['teacher']:,} ({growth:.2f}x)"
        lines.append(f"teacher  the same network at ratio {config.ratio}{extra}: {count}")
    if config.teacher is not None:
        lines.append(f"static   {config.teacher}, which the method {config.distiller} compares with")
    if parameters["teacher"] is None and config.teacher is None:
        lines.append(f"teacher  none: the {'plain ' if not extra else ''}student{extra} alone (--method baseline)")
    recipe = f"{config.epochs} epochs, batch {config.batch_size}, {config.optimizer}, lr {config.lr:g}"
    places = f"{device}, {processes} processes" if processes > 1 else device
    lines.append(f"recipe   {recipe}, {config.schedule} schedule, seed {config.seed}, {places}")
    return "\n".join([*lines, *(f"note     {reason}" for reason in cut_off(config))])


def closing(summary: Mapping[str, Any], folder: Path) -> str:
    """Describe the result of a run."""
    epochs = summary["epochs"]
    judge = "judge:  --compare runs the plain student, same recipe, beside it: at lr and ratio^2 lr, over three seeds"
    return "\n".join(
        [
            f"\nResult on {summary['data']['test_images']:,} test images after {epochs} epoch{'s' * (epochs != 1)}, "
            f"{summary['seconds']:.1f} s",
            networks_table(summary["table"]),
            f"files:  {folder}: {', '.join(sorted(entry.name for entry in folder.iterdir()))}",
            *_best(summary, folder),
            *([judge] if summary["method"] == "gpd" else []),
        ]
    )


def _best(summary: Mapping[str, Any], folder: Path) -> list[str]:
    """Say how to get the student of an epoch before the last, if that was better and its checkpoint is there."""
    name, epoch = summary["best_checkpoint"], summary["best_epoch"]
    if name is None or epoch == summary["epochs"]:
        return []
    path = folder / FOLDER / name
    return [
        f"best:   {summary['best_student_top1']:.2f}% after epoch {epoch}, chosen on these images; its networks: "
        f"reparam evaluate {path} --output DIR"
    ]


def networks_table(measured: Sequence[Mapping[str, Any]]) -> str:
    """Lay out what was measured: accuracy, size, and the largest relative difference from the network above it."""
    with_five = any(row["top5"] is not None for row in measured)
    rows = [["", "top-1", *(["top-5"] if with_five else []), "parameters", "max rel difference", "same class"]]
    for row in measured:
        five = [f"{row['top5']:.2f}%"] if with_five else []
        parity = row["parity"]
        verdict = "PASS" if row["passed"] else "FAIL"
        equal = ["", ""] if parity is None else [f"{parity['max_rel']:.1e} {verdict}", _share(parity)]
        rows.append([row["name"], f"{row['top1']:.2f}%", *five, f"{row['parameters']:,}", *equal])
    return table(rows)


def _share(parity: Mapping[str, float]) -> str:
    return f"{100 * parity['argmax_agreement']:.2f}%"


def tensorboard() -> Any:
    """Return TensorBoard's writer.

    Raises:
        InputError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("--tensorboard needs TensorBoard; pip install 'reparam[tensorboard]'") from error
    return SummaryWriter


def to_tensorboard(folder: Path, row: Mapping[str, Any]) -> None:
    """Add a row of metrics.csv to TensorBoard's events in ``folder``; what was not measured is left out."""
    with tensorboard()(str(folder)) as writer:
        for name, value in row.items():
            if name not in ("epoch", "step") and value is not None:
                writer.add_scalar(name, value, row["epoch"])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows of text in columns, the first flush left, the others flush right; the first row is the header."""
    first, *widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for name, *cells in rows:
        numbers = "".join(f"   {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append(f"  {name:<{first}}{numbers}")
    return "\n".join([lines[0], "  " + "-" * (len(lines[0]) - 2), *lines[1:]])
