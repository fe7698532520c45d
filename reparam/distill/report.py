"""What a person sees of a run: a progress bar (lines where there is no terminal) and the result."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reparam.distill.config import TrainConfig
from reparam.distill.loaders import Facts


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
            if row.get(f"{network}_top1") is not None:
                parts.append(f"{network} loss {row[f'{network}_loss']:.4f} top-1 {row[f'{network}_top1']:6.2f}%")
        self.say("  ".join([*parts, f"{row['seconds']:.1f} s"]))

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


def opening(config: TrainConfig, facts: Facts, parameters: Mapping[str, int | None], device: str) -> str:
    """Describe a run before it starts."""
    channels, height, width = facts.image_shape
    images = f"{facts.train_images:,} training and {facts.test_images:,} test images {channels}x{height}x{width}"
    lines = [f"data     {facts.name}: {facts.classes} classes, {images}"]
    lines.append(f"student  {config.model}: {parameters['student']:,} parameters")
    if parameters["teacher"] is not None:
        growth = parameters["teacher"] / max(parameters["student"] or 1, 1)
        extra = f" with {config.branches} branches" if config.branches else ""
        count = f"{parameters['teacher']:,} ({growth:.2f}x)"
        lines.append(f"teacher  the same network at ratio {config.ratio}{extra}: {count}")
    else:
        what = f"the student with {config.branches} branches" if config.branches else "the plain student"
        lines.append(f"teacher  none: {what} with the identical recipe (--baseline)")
    recipe = f"{config.epochs} epochs, batch {config.batch_size}, {config.optimizer}, lr {config.lr:g}"
    return "\n".join([*lines, f"recipe   {recipe}, {config.schedule} schedule, seed {config.seed}, {device}"])


def closing(summary: Mapping[str, Any], folder: Path) -> str:
    """Describe the result of a run."""
    parity, parameters = summary["parity"], summary["parameters"]
    rows = [["", "top-1", "parameters"]]
    rows.append(["student (extracted)", f"{summary['student_top1']:.2f}%", f"{parameters['student']:,}"])
    if summary["teacher_top1"] is not None:
        rows.append(["teacher", f"{summary['teacher_top1']:.2f}%", f"{parameters['teacher']:,}"])
    verdict = "PASS" if summary["parity_passed"] else "FAIL"
    numbers = f"max abs {parity['max_abs']:.1e}, max rel {parity['max_rel']:.1e}"
    judge = "judge:  --compare runs the plain student, same recipe, beside it: at lr and ratio^2 lr, over three seeds"
    epochs = summary["epochs"]
    against = "the network trained" if summary["baseline"] else "the student trained inside the teacher"
    return "\n".join(
        [
            f"\nResult on {summary['data']['test_images']:,} test images after {epochs} epoch{'s' * (epochs != 1)}, "
            f"{summary['seconds']:.1f} s",
            table(rows),
            f"parity: {folder / 'student.safetensors'}, loaded again, against {against}:",
            f"        {numbers}, same class for {100 * parity['argmax_agreement']:.2f}% of the images: {verdict}",
            f"files:  {folder}: {', '.join(sorted(entry.name for entry in folder.iterdir()))}",
            *([] if summary["baseline"] else [judge]),
        ]
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows of text in columns, the first flush left, the others flush right; the first row is the header."""
    first, *widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for name, *cells in rows:
        numbers = "".join(f"   {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append(f"  {name:<{first}}{numbers}")
    return "\n".join([lines[0], "  " + "-" * (len(lines[0]) - 2), *lines[1:]])
