"""The static teacher: another network, trained before, that only answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reparam.distill.config import TrainConfig
from reparam.distill.files import CONFIG, STUDENT
from reparam.distill.loaders import Facts
from reparam.distill.methods.base import Outputs
from reparam.distill.students import build, check_fit
from reparam.errors import FormatError, InputError

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


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
        device = next(network.parameters()).device
        mean, std, own_mean, own_std = (
            torch.tensor(value, dtype=torch.float64).view(1, -1, 1, 1) for value in (facts.mean, facts.std, *own)
        )
        self._scale = (std / own_std).float().to(device)
        self._shift = ((mean - own_mean) / own_std).float().to(device)
        self._same = (facts.mean, facts.std) == own

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Outputs:
        """Answer images that are normalised for the student, ``[N, C, H, W]``."""
        images = self.normalised(images)
        return Outputs(self.network(images)) if self.observe is None else self.observe(images)

    def normalised(self, images: Tensor) -> Tensor:
        """Change the student's normalisation into the teacher's."""
        return images if self._same else images * self._scale.to(images.dtype) + self._shift.to(images.dtype)


def load_static_teacher(config: TrainConfig, facts: Facts, example: Tensor) -> StaticTeacher:
    """Build and load the network that ``config.teacher`` names, and try it.

    Weights are timm's, those of a file, or those of the student of a finished run. The normalisation is that of the
    run; for timm's weights and for image folders what the model's ``pretrained_cfg`` says; else that of the data.

    Args:
        config: settings with ``teacher``.
        facts: the data of the run.
        example: normalised images ``[N, C, H, W]`` on the device of the run.

    Raises:
        InputError: the run that holds the weights was of another network, or the folder is no run.
        FormatError: the weights do not fit.
        ModelError: the network fails on the images, or has another number of classes.
    """
    spec = config.teacher or ""
    path = None if config.teacher_checkpoint is None else Path(config.teacher_checkpoint).expanduser()
    run = None if path is None or not path.is_dir() else _read_run(path, spec)
    weights = None if path is None else str(path / STUDENT if path.is_dir() else path)
    network = build(spec, facts.classes, facts.image_shape[0], checkpoint=weights, pretrained=weights is None)
    network.to(example.device)
    teacher = StaticTeacher(network, facts, _normalisation(network, facts, run, weights is None))
    check_fit(teacher.network, teacher.normalised(example.float()), facts, spec, "--teacher")
    if example.dtype == torch.float64:
        network.double()
    return teacher


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


def _read_run(path: Path, spec: str) -> dict[str, Any]:
    """Return the facts about the data of the run in ``path``, whose student has to be ``spec``."""
    if not (path / CONFIG).is_file() or not (path / STUDENT).is_file():
        raise InputError(f"--teacher-checkpoint {path} is no output folder of a run: it lacks {CONFIG} or {STUDENT}")
    try:
        content = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        model, data = content["config"]["model"], content["data"]
    except (ValueError, KeyError) as error:
        raise FormatError(f"{path / CONFIG} is damaged or was written by another version: {error!r}") from error
    if model != spec:
        raise InputError(f"--teacher-checkpoint {path} is a run of {model}, but --teacher is {spec}")
    return dict(data)
