"""``reparam evaluate``: the table at the end of a run, made again from the run's files."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import reparam
import reparam.distill.models  # registers the networks with timm
from reparam.distill import evaluate, files, report
from reparam.distill.config import TrainConfig
from reparam.distill.config import options as settings
from reparam.distill.data import Folders, load_test
from reparam.distill.distributed import resolve_device
from reparam.distill.evaluate import Entry
from reparam.distill.figures import draw_tsne
from reparam.distill.finish import EMA, EXTRACTED, TEACHER, entries_of
from reparam.distill.loaders import Facts, Loader, make_loader, without_idle
from reparam.distill.networks import Networks, with_method
from reparam.distill.statics import load_static_teachers
from reparam.distill.students import build, check_fit, grown
from reparam.errors import DataError, FormatError, InputError, ReparamError
from reparam.models import load_weights
from reparam.passes.tf32 import tf32
from reparam.provenance import provenance

TSNE_IMAGES, TSNE_CLASSES = 2000, 10
"""How many test images of how many classes the picture shows; t-SNE takes its time, and more would hide each other."""

_OF_NETWORKS = ("model", "teacher", "method")
"""Groups of settings that say what the networks are."""

_OF_TEST = ("data", "image_size", "interpolation", "workers", "max_bad_images", "batch_size")
"""Settings that say how test images are read."""


def run(options: argparse.Namespace) -> int:
    """Run ``reparam evaluate`` with its parsed options."""
    return evaluate_run(options.folder, options.data, options.device, options.batch_size, options.json, options.tsne)


def evaluate_run(
    folder: str,
    data: str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    json: str | None = None,
    tsne: str | None = None,
) -> int:
    """Measure the networks of a finished (or stopped) run and print the table.

    Args:
        folder: output folder of the run.
        data: where the test data is; default: where the run found it.
        device: where to compute.
        batch_size: images at a time; default: that of the run.
        json: file to write the table into.
        tsne: PNG file to draw the logits of student and teachers into.

    Returns:
        0, or 1 if networks that should be equal differ.

    Raises:
        InputError: the folder holds no run, ``tsne`` is no name of a PNG file, or there are too few images for it;
            a file is to be written into a folder that does not exist.
        DataError: the test data cannot be used, or has other classes or channels than the run's.
        FormatError: a file of the run is damaged or does not fit.
    """
    path = Path(folder).expanduser()
    picture = None if tsne is None else Path(tsne).expanduser()
    if picture is not None and (picture.suffix.lower() != ".png" or not picture.parent.is_dir()):
        raise InputError(f"--tsne {tsne}: name a file that ends in .png, in a folder that exists")
    written = None if json is None else Path(json).expanduser()
    if written is not None and (written.is_dir() or not written.parent.is_dir()):
        raise InputError(f"--json {json}: name a file in a folder that exists")
    changes: dict[str, Any] = {"data": data, "batch_size": batch_size}
    config = _config_of(path, {name: value for name, value in changes.items() if value is not None})
    place = resolve_device(device)
    run = _load(path, config, place)
    facts = run.loader.facts
    with torch.no_grad(), tf32(False):
        rows = evaluate.measure(run.entries, run.loader.test())
    table = [dataclasses.asdict(row) for row in rows]
    print(f"{path}: {config.model} on {facts.test_images:,} test images of {facts.name}")
    if not (path / files.SUMMARY).is_file():
        print(f"the run has not finished ({files.SUMMARY} is missing): these are the weights that it saved last")
    print(report.networks_table(table))
    if written is not None:
        files.write_json(written, {"table": table, **provenance(f"reparam evaluate {path.name}", place)})
    if picture is not None:
        networks = _pictured(run.entries, config, facts, run.example)
        _draw_logits(networks, run.loader, run.classes, picture)
    return 0 if all(row.passed for row in rows if row.same_as is not None) else 1


@dataclasses.dataclass(frozen=True)
class _Run:
    """What a run left, and its test data.

    Attributes:
        classes: their names.
        loader: of the data, in the normalisation of the run's own data.
        example: two images of it.
        entries: the networks.
    """

    classes: Sequence[str]
    loader: Loader
    example: torch.Tensor
    entries: list[Entry]


def _load(path: Path, config: TrainConfig, place: torch.device) -> _Run:
    (trained,) = files.read_entries(path / files.CONFIG, "data")
    source = load_test(config.data, trained["classes"])
    channels, *_, size = trained["image_shape"]
    if source.in_chans != channels:
        raise DataError(
            f"data {config.data!r} has images of {source.in_chans} channels, and the networks of {path} take {channels}"
        )
    if isinstance(source, Folders):  # whose images have many sizes
        config = dataclasses.replace(config, image_size=size)
    student = build(config.model, len(source.classes), source.in_chans).to(place)
    normalisation = tuple(trained["mean"]), tuple(trained["std"])
    loader = make_loader(source, without_idle(config, source), student, place, normalisation=normalisation)
    example = next(iter(loader.test()))[0][:2]
    check_fit(student, example, loader.facts, config.model)
    if config.widen is not None:
        student = grown(student, config.widen, example, config.noise)
    entries: list[Entry] = []
    for suffix, own, wide in (("", files.STUDENT, files.TEACHER), (EMA, files.STUDENT_EMA, files.TEACHER_EMA)):
        if (path / own).is_file():
            entries += _entries(student, path / own, path / wide, example, config, suffix)
    return _Run(source.classes, loader, example, entries)


def _pictured(
    entries: Sequence[Entry], config: TrainConfig, facts: Facts, example: torch.Tensor
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Student, dynamic teacher, static teacher and assistants, by the name that the picture gives them."""
    titles = {EXTRACTED: f"student {config.model}", TEACHER: "dynamic teacher"}
    found: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        titles[entry.name]: entry.network for entry in entries if entry.name in titles
    }
    if config.distiller is None:
        return found
    try:
        statics = load_static_teachers(config, facts, example)
    except ReparamError as error:
        print(f"the picture lacks the static teacher: {error}")
        return found
    names = [f"teacher {config.teacher}", *(f"assistant {name}" for name in (config.assistant or "").split(","))]
    for name, static in zip(names, statics, strict=False):
        found[name] = lambda images, static=static: static(images).logits  # type: ignore[misc]
    return found


def _draw_logits(
    networks: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
    loader: Loader,
    classes: Sequence[str],
    path: Path,
) -> None:
    """Run the networks on the first test images of the first classes, as many of each, and draw their logits."""
    shown = min(TSNE_CLASSES, len(classes))
    left = [TSNE_IMAGES // shown] * shown
    logits: dict[str, list[torch.Tensor]] = {name: [] for name in networks}
    labels: list[torch.Tensor] = []
    with torch.no_grad(), tf32(False):
        for images, batch in loader.test():
            kept = []
            for place, label in enumerate(batch.tolist()):
                if label < shown and left[label]:
                    left[label] -= 1
                    kept.append(place)
            if kept:
                labels.append(batch[kept].cpu())
                placed = images[kept]
                for name, network in networks.items():
                    logits[name].append(network(placed).float().cpu())
            if not any(left):
                break
    joined = {name: torch.cat(parts) if parts else torch.zeros(0, len(classes)) for name, parts in logits.items()}
    draw_tsne(joined, torch.cat(labels) if labels else torch.zeros(0, dtype=torch.long), path, classes)
    print(f"t-SNE of {sum(map(len, labels)):,} test images of {shown} classes: {path}")


def _entries(
    student: nn.Module, own: Path, wide: Path, example: torch.Tensor, config: TrainConfig, suffix: str
) -> list[Entry]:
    """The rows for one set of weights; without a teacher the student as trained is the extracted one."""
    load_weights(student, own)
    student.eval()
    extracted = copy.deepcopy(student)
    if wide.is_file():
        prepared, release = with_method(student, example, config)
        teacher = reparam.load(wide, prepared).to(example.device).eval()
        networks = Networks(reparam.student_view(teacher).eval(), teacher, release=release)
        return entries_of(networks, extracted, example, suffix)
    return entries_of(Networks(copy.deepcopy(student)), extracted, example, suffix)


def _config_of(folder: Path, changes: Mapping[str, Any]) -> TrainConfig:
    """The settings of the run in ``folder``, with changes.

    Those of training alone are left out: they may not fit the data or the machine, and have no say in a test.
    """
    if not (folder / files.CONFIG).is_file() or not (folder / files.STUDENT).is_file():
        raise InputError(f"{folder} is no output folder of reparam train: it lacks {files.CONFIG} or {files.STUDENT}")
    (saved,) = files.read_entries(folder / files.CONFIG, "config")
    unknown = sorted(set(saved) - set(settings()))
    if unknown:
        raise FormatError(f"{folder / files.CONFIG} was written by another version: unknown {', '.join(unknown)}")
    kept = [name for name, (option, _) in settings().items() if option.group in _OF_NETWORKS or name in _OF_TEST]
    return TrainConfig(**{**{name: saved[name] for name in kept if name in saved}, **changes})
