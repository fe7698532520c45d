"""Runs in a row: assistants between teacher and student are trained first, each as a run of its own, then the student.

Gap-KD's first stage, TAKD's chain and DGKD's dense chain differ in what an assistant learns from
(``Distiller.hands_down``). Each stage is a run in a folder inside the output folder, so that stopping and going on
works between the stages and inside each of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reparam.distill import files
from reparam.distill.config import TrainConfig
from reparam.distill.data import Source, load_source
from reparam.distill.methods import get_distiller
from reparam.distill.statics import GROWN
from reparam.distill.trainer import train
from reparam.errors import InputError


def train_all(config: TrainConfig, command: Sequence[str] = (), source: Source | None = None) -> dict[str, Any]:
    """Train the assistants that the settings name and have no weights for, then the student.

    Args:
        config: the settings of the student's run. Assistants are trained with the same recipe, but for
            ``assistant_epochs``, from scratch, without a dynamic teacher.
        command: what the user typed.
        source: the data, if it is loaded already.

    Returns:
        The content of the student's summary.json.

    Raises:
        InputError: the method has no assistants, needs one, or takes one only.
        ReparamError: see ``train``.
    """
    _check(config)
    if config.assistant is None or config.assistant_checkpoint is not None:
        return train(config, source=source, command=command)
    if config.resume is None:
        files.check_output(config)
    output = Path(config.output).expanduser() if config.output else files.open_run_folder(config).path
    source = source if source is not None else load_source(config.data, config.limit_train)
    names, places = config.assistant.split(","), []
    for number, name in enumerate(names, 1):
        places.append(str(output / f"assistant-{number}-{name.replace(':', '-').replace('/', '-')}"))
        stage = _stage(config, names[:number], places)
        if not config.quiet:
            print(f"assistant {number} of {len(names)}: {name}, in {places[-1]}", flush=True)
        train(stage, source=source, command=command)
    if not config.quiet:
        print(f"student: {config.model}, in {output}", flush=True)
    student = dataclasses.replace(config, output=str(output), assistant_checkpoint=",".join(places))
    return train(student, source=source, command=command)


def _stage(config: TrainConfig, names: list[str], places: list[str]) -> TrainConfig:
    """The settings of the last assistant in ``names``; ``places`` are the folders of all of them."""
    kind = get_distiller(config.distiller or "")
    name, before = names[-1], names[:-1]
    learns: dict[str, Any] = {"method": "kd"}
    if before and kind.hands_down == "previous":
        learns |= {"teacher": before[-1], "teacher_checkpoint": places[-2]}
    elif before and kind.hands_down == "all":
        earlier = {"assistant": ",".join(before), "assistant_checkpoint": ",".join(places[:-1])}
        learns |= {"method": config.distiller, **earlier}
    if learns["method"] == "kd":
        schedule = config.tau_schedule or (kind.schedule[0] if kind.schedule else None)
        learns |= {"alpha": None, "beta": None, "distill_warmup": None, "ce_weight": None, "distill_weight": None}
        learns |= {"tau_schedule": schedule, "assistant": None, "assistant_checkpoint": None}
        if kind.schedule is not None:
            learns |= {"tau_max": config.tau_max or kind.schedule[1], "tau_min": config.tau_min or kind.schedule[2]}
    model, widen = (config.model, int(name.removeprefix(GROWN))) if name.startswith(GROWN) else (name, None)
    return dataclasses.replace(
        config,
        **learns,
        model=model,
        widen=widen,
        epochs=config.assistant_epochs or config.epochs,
        assistant_epochs=None,
        checkpoint=None,
        pretrained=False,
        branches=None,
        branch_init=None,
        output=places[-1],
        resume=None if config.resume is None else "auto",
    )


def _check(config: TrainConfig) -> None:
    kind = get_distiller(config.distiller) if config.distiller else None
    wanted = 0 if kind is None else kind.assistants
    if config.assistant is None:
        if wanted:
            raise InputError(
                f"--method {config.method} needs a network between teacher and student; name it with --assistant, such "
                "as --assistant cifar_resnet20 or --assistant expand:2"
            )
        return
    names = config.assistant.split(",")
    if wanted == 0 or (wanted is not None and len(names) != wanted):
        raise InputError(f"--method {config.method} has {wanted} assistants, --assistant names {len(names)}")
    for name in names:
        ratio = name.removeprefix(GROWN)
        if name.startswith(GROWN) and (not ratio.isdigit() or int(ratio) < 2):
            raise InputError(f"--assistant {name}: write expand: and a ratio of 2 or more, such as expand:2")
