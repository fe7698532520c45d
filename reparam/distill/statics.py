"""The static teacher: another network, trained before, that only answers."""

from __future__ import annotations

import functools
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reparam.distill.config import TrainConfig
from reparam.distill.data import Facts, Normalisation
from reparam.distill.evaluate import count_parameters
from reparam.distill.files import CONFIG, STUDENT, SUMMARY, read_entries, weights_of
from reparam.distill.methods.base import Outputs
from reparam.distill.students import build, check_fit, grown
from reparam.distill.transfer import finest, side_stream
from reparam.errors import InputError, ModelError
from reparam.models import TIMM_SCHEMES, load_weights

GROWN = "expand:"
"""How an assistant is named that is the student widened."""


class StaticTeacher:
    """A network in eval mode, without gradients, that sees images in its own normalisation.

    It is no module on purpose: nothing that walks the modules of a run can put it into train mode, optimise it or
    save it.

    Args:
        network: the network; it is put into eval mode and its parameters stop requiring gradients.
        facts: normalisation of the images that it will get.
        own: mean and standard deviation that it was trained with, in units of full scale.
    """

    def __init__(self, network: nn.Module, facts: Facts, own: Normalisation) -> None:
        self.network = network.eval().requires_grad_(False)
        self.observe: Callable[[Tensor], Outputs] | None = None
        self.normalised = renormalisation((facts.mean, facts.std), own, next(network.parameters()).device)

    @functools.cached_property
    def fingerprint(self) -> int:
        """Of its weights: a run that goes on has to be answered by the same network."""
        found = 0
        for name, tensor in self.network.state_dict().items():
            content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            found = zlib.crc32(content, zlib.crc32(name.encode(), found))
        return found

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Answer images that are normalised for the student, ``[N, C, H, W]``, with logits alone."""
        found: Tensor = self.network(self.normalised(images))
        return found

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Outputs:
        """Answer images that are normalised for the student, ``[N, C, H, W]``."""
        images = self.normalised(images)
        return Outputs(self.network(images)) if self.observe is None else self.observe(images)


def asked(statics: Sequence[StaticTeacher], images: Tensor, overlap: bool = True) -> Callable[[], list[Outputs]]:
    """Ask static networks; return what gives their answers.

    On a GPU they compute on a stream of their own, beside what is queued until the answers are fetched. Their memory
    needs no further care: that stream allocates only behind its wait for everything that used its earlier results.

    Args:
        statics: the networks.
        images: normalised for the student, ``[N, C, H, W]``.
        overlap: False to answer before anything that is queued later.
    """
    stream = side_stream(images.device, "static teacher") if overlap and statics else None
    if stream is None:
        answers = [static(images) for static in statics]
        return lambda: answers
    device = images.device
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        beside = [static(images) for static in statics]

    def fetched() -> list[Outputs]:
        torch.cuda.current_stream(device).wait_stream(stream)
        return beside

    return fetched


def renormalisation(found: Normalisation, wanted: Normalisation, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return what changes images ``[N, C, H, W]`` of one normalisation (means, standard deviations) into another."""
    if found == wanted:
        return lambda images: images
    mean, std, own_mean, own_std = (
        torch.tensor(value, dtype=torch.float64).view(1, -1, 1, 1) for value in (*found, *wanted)
    )
    kind = finest(device)
    scale, shift = (std / own_std).to(device, kind), ((mean - own_mean) / own_std).to(device, kind)
    return lambda images: images * scale.to(images.dtype) + shift.to(images.dtype)


def load_static_teachers(
    config: TrainConfig,
    facts: Facts,
    example: Tensor,
    place: Callable[[nn.Module], nn.Module] = lambda network: network,
) -> list[StaticTeacher]:
    """Load the static teacher that the settings name, and the assistants between it and the student.

    Args:
        config: settings with ``teacher``, and with ``assistant`` and ``assistant_checkpoint`` for the others.
        facts: the data of the run.
        example: normalised images ``[N, C, H, W]`` on the device of the run.
        place: gives a network the memory format of the run.

    Raises:
        InputError: the run that holds weights was of another network, or a folder is no run.
        FormatError: weights do not fit.
        ModelError: a network fails on the images, or has another number of classes.
    """
    wanted = [("--teacher", config.teacher or "", config.teacher_checkpoint)]
    averaged = config.teacher_checkpoint_ema
    if config.assistant is not None:
        names, paths = config.assistant.split(","), (config.assistant_checkpoint or "").split(",")
        if len(names) != len(paths):
            raise InputError(
                f"--assistant names {len(names)} networks and --assistant-checkpoint {len(paths)} files or runs; "
                "they go together in order"
            )
        if not all(paths):
            raise InputError("assistants are trained by `reparam train`; from Python give --assistant-checkpoint")
        wanted += [("--assistant", name, path) for name, path in zip(names, paths, strict=True)]
    loaded = [
        _load(option, spec, path, averaged and not number, config, facts, example, place)
        for number, (option, spec, path) in enumerate(wanted)
    ]
    teacher, *assistants = (count_parameters(one.network) for one in loaded)
    for (_, name, _), size in zip(wanted[1:], assistants, strict=True):
        if size > teacher:
            warnings.warn(
                f"the assistant {name} has {size:,} parameters, more than the teacher's {teacher:,}: it should stand "
                "between teacher and student",
                stacklevel=2,
            )
    return loaded


def _load(
    option: str,
    spec: str,
    checkpoint: str | None,
    averaged: bool,
    config: TrainConfig,
    facts: Facts,
    example: Tensor,
    place: Callable[[nn.Module], nn.Module],
) -> StaticTeacher:
    """Build and load one network, and try it.

    Weights are timm's, those of a file, or those of the student of a finished run. The normalisation is that of the
    run; for timm's weights and for image folders what the model's ``pretrained_cfg`` says; else that of the data.
    """
    path = Path(checkpoint).expanduser() if checkpoint else None
    model, widen = (config.model, int(spec.partition(":")[2])) if spec.startswith(GROWN) else (spec, None)
    run = None if path is None or not path.is_dir() else _read_run(option, path, spec, model, widen)
    file, ema = weights_of(checkpoint, averaged) if checkpoint else (None, False)
    weights = None if file is None else str(file)
    if weights is None and ":" in spec and not spec.startswith(TIMM_SCHEMES):
        raise InputError(f"{option} {spec} is a network without weights; give them with {option}-checkpoint")
    sizes, given = (facts.classes, facts.image_shape[0]), None if widen else weights
    try:
        network = build(model, *sizes, checkpoint=given, ema=ema, pretrained=weights is None).to(example.device)
    except ModelError as error:
        if weights is not None:
            raise
        raise ModelError(
            f"{error}; {option} {spec} needs weights: timm's, or a file or a run folder given with {option}-checkpoint"
        ) from error
    if weights is None:
        _check_head(option, spec, network, facts)
    if widen:
        network = grown(network, widen, example.float(), config.noise)
        load_weights(network, weights or "", ema=ema)
    teacher = StaticTeacher(network, facts, _normalisation(network, facts, run, weights is None))
    check_fit(teacher.network, teacher.normalised(example.float()), facts, spec, option)
    if example.dtype == torch.float64:
        network.double()
    teacher.network = place(network)
    return teacher


def _check_head(option: str, spec: str, network: nn.Module, facts: Facts) -> None:
    """Timm leaves out the classifier of its weights, silently, where another number of classes is asked for."""
    described = vars(network).get("pretrained_cfg") or {}
    classes = described.get("num_classes")
    if classes is not None and classes != facts.classes:
        raise InputError(
            f"{option} {spec}: timm's weights are for {classes} classes, and {facts.name} has {facts.classes}: the "
            f"classifier would be random. Train it on this data first and give the run as {option}-checkpoint"
        )


def _normalisation(network: nn.Module, facts: Facts, run: dict[str, Any] | None, from_timm: bool) -> Normalisation:
    same = facts.mean, facts.std
    if run is not None:
        found = tuple(run["mean"]), tuple(run["std"])
    elif (from_timm or facts.name == "folder") and isinstance(getattr(network, "pretrained_cfg", None), dict):
        described: dict[str, Any] = vars(network)["pretrained_cfg"]
        found = tuple(described.get("mean", same[0])), tuple(described.get("std", same[1]))
    else:
        found = same
    return found if len(found[0]) == len(same[0]) else same


def _read_run(option: str, path: Path, spec: str, model: str, widen: int | None) -> dict[str, Any]:
    """Return the facts about the data of the finished run in ``path``, whose student has to be ``model``."""
    lacking = [name for name in (CONFIG, STUDENT) if not (path / name).is_file()]
    if lacking:
        alone = "" if STUDENT in lacking else f"; its weights alone are {path / STUDENT}"
        raise InputError(f"{option}-checkpoint {path} is no output folder of a run: it lacks {lacking[0]}{alone}")
    if not (path / SUMMARY).is_file():
        raise InputError(
            f"{option}-checkpoint {path} is a run that has not finished: its {STUDENT} is that of an earlier epoch, or "
            f"from before the first one. Finish it with --resume auto, or name {path / STUDENT} if that is meant"
        )
    found, data = read_entries(path / CONFIG, "config", "data")
    if (found.get("model"), found.get("widen")) != (model, widen):
        wide = f" widened by {found['widen']}" if found.get("widen") else ""
        raise InputError(f"{option}-checkpoint {path} is a run of {found.get('model')}{wide}, but {option} is {spec}")
    return dict(data)
