"""The end of a run: networks into files, files into fresh networks, and one table over all of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import reparam
from reparam.distill import checkpoints, evaluate, files
from reparam.distill.config import TrainConfig
from reparam.distill.engine import Engine
from reparam.distill.evaluate import Entry, Row
from reparam.distill.files import RunFolder
from reparam.distill.loaders import Loader
from reparam.distill.networks import Networks
from reparam.distill.statics import StaticTeacher
from reparam.errors import ReparamError
from reparam.passes.tf32 import tf32
from reparam.provenance import LIBRARIES, versions

AS_TRAINED, EXTRACTED, FOLDED, TEACHER = "student as trained", "student extracted", "student folded", "teacher"
STATIC, ASSISTANT = "static teacher", "assistant "
EMA = " (EMA)"


def sizes(networks: Networks) -> dict[str, int | None]:
    """Numbers of parameters of student and dynamic teacher."""
    teacher = networks.teacher
    return {
        "student": evaluate.count_parameters(networks.extract()),
        "teacher": None if teacher is None else evaluate.count_parameters(teacher),
    }


def save_networks(folder: RunFolder, engine: Engine) -> None:
    """Write the extracted student and the dynamic teacher, and both with averaged weights if there are any."""
    networks, averaged = engine.networks, engine.averaged()
    folder.save_networks(networks.extract(), networks.teacher)
    if averaged is not None:
        folder.save_networks(averaged.extract(), averaged.teacher, ema=True)


def entries_of(networks: Networks, extracted: nn.Module, example: Tensor, suffix: str = "") -> list[Entry]:
    """Return the rows of the table for one set of weights.

    Args:
        networks: in evaluation mode.
        extracted: the student as a plain model, in evaluation mode.
        example: images ``[N, C, H, W]``, to fold with.
        suffix: of the names.
    """
    first = AS_TRAINED + suffix
    own = evaluate.count_parameters(networks.inside())
    # What a method gave the student is merged: another arithmetic.
    tolerance = evaluate.PARITY_TOLERANCE if networks.release is None else evaluate.FOLDED_TOLERANCE
    entries = [
        Entry(first, networks.student, parameters=own),
        Entry(EXTRACTED + suffix, extracted, first, tolerance),
    ]
    folded = _folded(extracted, example)
    if folded is not None:
        entries.append(Entry(FOLDED + suffix, folded, first, evaluate.FOLDED_TOLERANCE))
    if networks.teacher is not None:
        entries.append(Entry(TEACHER + suffix, networks.teacher))
    return entries


def static_entries(config: TrainConfig, statics: Sequence[StaticTeacher]) -> list[Entry]:
    """Return the rows of the static teacher and of its assistants."""
    names = (STATIC, *(f"{ASSISTANT}{name}" for name in (config.assistant or "").split(",")))
    return [
        Entry(name, static.logits, parameters=evaluate.count_parameters(static.network))
        for name, static in zip(names, statics, strict=False)
    ]


def _folded(extracted: nn.Module, example: Tensor) -> nn.Module | None:
    """The student with every norm and branch folded that can be; None where it cannot be recorded."""
    try:
        return reparam.fold(copy.deepcopy(extracted), example_input=example)
    except ReparamError:
        return None


def finish(
    config: TrainConfig,
    engine: Engine,
    loader: Loader,
    folder: RunFolder,
    blank: nn.Module,
    counts: Mapping[str, Any],
) -> dict[str, Any]:
    """Load the written students into fresh networks, measure everything, and write summary.json and curves.png.

    Args:
        config: settings with all defaults filled in.
        engine: with the trained networks.
        loader: of the test images.
        folder: of the run.
        blank: the student before training; changed here.
        counts: epochs, steps and seconds.
    """
    engine.learners.train(False)
    device = engine.group.device
    example = engine.images(next(iter(loader.test()))[0][:2])

    def again(networks: Networks, name: str) -> nn.Module:
        if not engine.group.main:  # only the main process is sure to see the file
            return networks.extract().to(device).eval()
        fresh = copy.deepcopy(blank)
        fresh.load_state_dict(load_file(folder.path / name), strict=True)
        return fresh.to(device).eval()

    averaged = engine.averaged()
    entries = entries_of(engine.networks, again(engine.networks, files.STUDENT), example)
    if averaged is not None:
        entries += entries_of(averaged, again(averaged, files.STUDENT_EMA), example, EMA)
    entries += static_entries(config, engine.statics)
    with tf32(False):  # whose rounding is above the tolerances
        table = evaluate.measure(entries, loader.test(), engine.group, engine.images)
    summary = _summary(config, engine, loader, folder, table, counts)
    if engine.group.main:
        files.write_json(folder.path / files.SUMMARY, summary)
        _draw(folder)
    engine.group.barrier()
    return summary


def _draw(folder: RunFolder) -> None:
    from reparam.distill.figures import draw_curves

    draw_curves({"": folder.rows}, folder.path / files.CURVES)


def _summary(
    config: TrainConfig,
    engine: Engine,
    loader: Loader,
    folder: RunFolder,
    table: list[Row],
    counts: Mapping[str, Any],
) -> dict[str, Any]:
    rows = {row.name: row for row in table}
    measured = [row for row in folder.rows if row["student_top1"] is not None]
    best = max(measured, key=lambda row: (row["student_top1"], row["epoch"]))
    kept = checkpoints.after(folder.path, best["step"])
    compared = [row for row in table if row.same_as is not None]
    parity = rows[EXTRACTED].parity
    return {
        "student_top1": rows[EXTRACTED].top1,
        "student_ema_top1": rows[EXTRACTED + EMA].top1 if EXTRACTED + EMA in rows else None,
        "teacher_top1": rows[TEACHER].top1 if TEACHER in rows else None,
        "teacher_ema_top1": rows[TEACHER + EMA].top1 if TEACHER + EMA in rows else None,
        "statics": [static.fingerprint for static in engine.statics],
        "static_teacher_top1": rows[STATIC].top1 if STATIC in rows else None,
        "baseline": config.baseline,
        "method": config.method,
        "table": [asdict(row) for row in table],
        "parity": None if parity is None else parity.as_dict(),
        "parity_passed": all(row.passed for row in compared),
        "seconds": round(counts["seconds"], 2),
        "parameters": sizes(engine.networks),
        "epochs": counts["epoch"],
        "steps": counts["steps"],
        "rollbacks": counts["order"],
        "best_student_top1": best["student_top1"],
        "best_epoch": best["epoch"],
        "best_checkpoint": None if kept is None else kept.name,
        "data": asdict(loader.facts),
        "device": str(engine.group.device),
        "processes": engine.group.world,
        "threads": torch.get_num_threads(),
        "config": asdict(config),
        "versions": versions(LIBRARIES),
    }
