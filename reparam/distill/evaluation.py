"""``reparam evaluate``: the table at the end of a run, made again from the run's files or from a checkpoint."""

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
from reparam.distill import checkpoints, evaluate, files, report
from reparam.distill.config import TrainConfig
from reparam.distill.config import options as settings
from reparam.distill.data import Folders, load_test
from reparam.distill.distributed import resolve_device
from reparam.distill.engine import average_statistics
from reparam.distill.evaluate import Entry
from reparam.distill.figures import draw_tsne
from reparam.distill.finish import ASSISTANT, EMA, EXTRACTED, STATIC, TEACHER, entries_of, static_entries
from reparam.distill.loaders import Facts, Loader, make_loader, without_idle
from reparam.distill.networks import Networks, make_networks, with_method
from reparam.distill.statics import load_static_teachers
from reparam.distill.students import build, check_fit, grown
from reparam.distill.transfer import finest
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
    return evaluate_run(
        options.folder,
        options.data,
        options.device,
        options.batch_size,
        options.json,
        options.tsne,
        options.output,
    )


def evaluate_run(
    folder: str,
    data: str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    json: str | None = None,
    tsne: str | None = None,
    output: str | None = None,
) -> int:
    """Measure the networks of a finished (or stopped) run and print the table.

    Args:
        folder: output folder of the run, or one of its checkpoints.
        data: where the test data is; default: where the run found it.
        device: where to compute.
        batch_size: images at a time; default: that of the run.
        json: file to write the table into.
        tsne: PNG file to draw the logits of student and teachers into.
        output: folder for the networks of a checkpoint: the files of weights that a run writes.

    Returns:
        0, or 1 if networks that should be equal differ.

    Raises:
        InputError: the folder holds no run, ``tsne`` is no name of a PNG file, or there are too few images for it;
            a file is to be written into a folder that does not exist, or networks into one that has some.
        DataError: the test data cannot be used, or has other classes or channels than the run's.
        FormatError: a file of the run is damaged or does not fit.
    """
    written, picture = _files(json, tsne)
    saved = _saved(Path(folder).expanduser())
    target = None if output is None else _target(saved, output)
    changes: dict[str, Any] = {"data": data, "batch_size": batch_size}
    config = _config_of(saved, {name: value for name, value in changes.items() if value is not None})
    place = resolve_device(device)
    run = _load(saved, config, place, target)
    facts = run.loader.facts
    with torch.no_grad(), tf32(False):
        rows = evaluate.measure(run.entries, run.loader.test(), place=lambda images: images.to(run.example.dtype))
    table = [dataclasses.asdict(row) for row in rows]
    print(f"{saved.path}: {config.model} on {facts.test_images:,} test images of {facts.name}{_stage(saved)}")
    print(report.networks_table(table))
    if target is not None:
        print(f"files:  {target}: {', '.join(sorted(entry.name for entry in target.iterdir()))}")
    if written is not None:
        files.write_json(written, {"table": table, **provenance(f"reparam evaluate {saved.path.name}", place)})
    if picture is not None:
        networks = _pictured(run.entries, config)
        _draw_logits(networks, run, picture)
    return 0 if all(row.passed for row in rows if row.same_as is not None) else 1


def _files(json: str | None, tsne: str | None) -> tuple[Path | None, Path | None]:
    """Return the files to write, checked before anything is measured."""
    picture = None if tsne is None else Path(tsne).expanduser()
    if picture is not None and (picture.suffix.lower() != ".png" or not picture.parent.is_dir()):
        raise InputError(f"--tsne {tsne}: name a file that ends in .png, in a folder that exists")
    written = None if json is None else Path(json).expanduser()
    if written is not None and (written.is_dir() or not written.parent.is_dir()):
        raise InputError(f"--json {json}: name a file in a folder that exists")
    return written, picture


@dataclasses.dataclass(frozen=True)
class _Saved:
    """What a run wrote about itself.

    Attributes:
        path: its folder, or a checkpoint.
        config: its settings, as they were written.
        data: facts about its data.
        checkpoint: the content of the checkpoint; None for a folder.
    """

    path: Path
    config: dict[str, Any]
    data: dict[str, Any]
    checkpoint: dict[str, Any] | None = None

    @property
    def statics(self) -> list[int] | None:
        """Fingerprints of the static teacher and its assistants; None where they were not written."""
        if self.checkpoint is not None:
            return self.checkpoint.get("statics")
        summary = self.path / files.SUMMARY
        found: list[int] | None = files.read_json(summary).get("statics") if summary.is_file() else None
        return found


def _saved(path: Path) -> _Saved:
    if path.is_file():
        state = checkpoints.read_checkpoint(path)
        return _Saved(path, state["config"], state["data"], state)
    if not (path / files.CONFIG).is_file() or not (path / files.STUDENT).is_file():
        raise InputError(
            f"{path} is no output folder of reparam train, nor a checkpoint: it lacks {files.CONFIG} or {files.STUDENT}"
        )
    config, data = files.read_entries(path / files.CONFIG, "config", "data")
    return _Saved(path, config, data)


def _stage(saved: _Saved) -> str:
    """Say how far the networks were trained, where that is not to the end."""
    if saved.checkpoint is not None:
        epochs, step = saved.checkpoint["epoch"], saved.checkpoint["step"]
        return f"\nafter {epochs} epoch{'s' * (epochs != 1)}" + (f" and {step} steps" if step else "")
    if (saved.path / files.SUMMARY).is_file():
        return ""
    return f"\nthe run has not finished ({files.SUMMARY} is missing): these are the weights that it saved last"


def _target(saved: _Saved, output: str) -> Path:
    """Return a new folder for the networks of a checkpoint."""
    if saved.checkpoint is None:
        raise InputError(f"--output: {saved.path} has the files of its networks already; a checkpoint has none")
    target = Path(output).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"--output {target} is a file or holds something already; name a new folder")
    target.mkdir(parents=True, exist_ok=True)
    return target


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


def _load(saved: _Saved, config: TrainConfig, place: torch.device, target: Path | None) -> _Run:
    path, trained = saved.path, saved.data
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
    if saved.config.get("precision") == "fp64" and finest(place) == torch.float64:
        student, example = student.double(), example.double()
    if config.widen is not None:
        student = grown(student, config.widen, example, config.noise)
    if saved.checkpoint is not None:
        entries = _entries_of_state(saved, student, example, config, target)
    else:
        entries = []
        for suffix, own, wide in (("", files.STUDENT, files.TEACHER), (EMA, files.STUDENT_EMA, files.TEACHER_EMA)):
            if (path / own).is_file():
                entries += _entries(student, path / own, path / wide, example, config, suffix)
    # What a static network expects of its images follows from the data of the run, not from those of this test.
    facts = dataclasses.replace(loader.facts, name=trained["name"])
    return _Run(source.classes, loader, example, entries + _static_entries(saved, config, facts, example))


def _static_entries(saved: _Saved, config: TrainConfig, facts: Facts, example: torch.Tensor) -> list[Entry]:
    if config.distiller is None:
        return []
    try:
        statics = load_static_teachers(_with_own_assistants(saved, config), facts, example)
    except ReparamError as error:
        print(f"without the static teacher: {error}")
        return []
    if saved.statics not in (None, [static.fingerprint for static in statics]):
        print("without the static teacher: these are not the weights that it, or an assistant, had in the run")
        return []
    return static_entries(config, statics)


def _with_own_assistants(saved: _Saved, config: TrainConfig) -> TrainConfig:
    """Look for assistants that the run trained in its own folder, which may have moved since."""
    if config.assistant_checkpoint is None:
        return config
    folder = saved.path.parent.parent if saved.checkpoint is not None else saved.path
    paths = [Path(path) for path in config.assistant_checkpoint.split(",")]
    found = [path if path.exists() else folder / path.name for path in paths]
    return dataclasses.replace(config, assistant_checkpoint=",".join(map(str, found)))


def _pictured(entries: Sequence[Entry], config: TrainConfig) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Student, dynamic teacher, static teacher and assistants, by the name that the picture gives them."""
    titles = {EXTRACTED: f"student {config.model}", TEACHER: "dynamic teacher", STATIC: f"teacher {config.teacher}"}
    return {
        titles.get(entry.name, entry.name): entry.network
        for entry in entries
        if entry.name in titles or entry.name.startswith(ASSISTANT)
    }


def _draw_logits(networks: Mapping[str, Callable[[torch.Tensor], torch.Tensor]], run: _Run, path: Path) -> None:
    """Run the networks on the first test images of the first classes, as many of each, and draw their logits."""
    classes = run.classes
    shown = min(TSNE_CLASSES, len(classes))
    left = [TSNE_IMAGES // shown] * shown
    logits: dict[str, list[torch.Tensor]] = {name: [] for name in networks}
    labels: list[torch.Tensor] = []
    with torch.no_grad(), tf32(False):
        for images, batch in run.loader.test():
            kept = []
            for place, label in enumerate(batch.tolist()):
                if label < shown and left[label]:
                    left[label] -= 1
                    kept.append(place)
            if kept:
                labels.append(batch[kept].cpu())
                placed = images[kept].to(run.example.dtype)
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


def _entries_of_state(
    saved: _Saved, student: nn.Module, example: torch.Tensor, config: TrainConfig, target: Path | None
) -> list[Entry]:
    """The rows for the networks of a checkpoint, which are written into the folder ``target`` as well."""
    state = saved.checkpoint or {}
    networks = make_networks(student, example, config)
    owners = {"owner": networks.owner}
    sets = {"": networks}
    if state["ema"] is not None:
        owners["ema"] = copy.deepcopy(networks.owner)
        sets[EMA] = networks.of(owners["ema"])
    try:
        for place, owner in owners.items():
            owner.load_state_dict(state[place], strict=True)
    except RuntimeError as error:
        raise FormatError(f"{saved.path} does not fit {config.model}, which may have changed since: {error}") from error
    if state.get("statistics"):  # within an epoch each process had its own
        average_statistics(owners, state["statistics"])
    entries: list[Entry] = []
    for suffix, one in sets.items():
        one.train(False)
        extracted = one.extract().eval()
        entries += entries_of(one, extracted, example, suffix)
        if target is not None:
            files.RunFolder(target).save_networks(extracted, one.teacher, ema=suffix == EMA)
    return entries


def _config_of(saved: _Saved, changes: Mapping[str, Any]) -> TrainConfig:
    """The settings of a run, with changes.

    Those of training alone are left out: they may not fit the data or the machine, and have no say in a test.
    """
    unknown = sorted(set(saved.config) - set(settings()))
    if unknown:
        raise FormatError(f"{saved.path} was written by another version: unknown {', '.join(unknown)}")
    kept = [name for name, (option, _) in settings().items() if option.group in _OF_NETWORKS or name in _OF_TEST]
    return TrainConfig(**{**{name: saved.config[name] for name in kept if name in saved.config}, **changes})
