"""Runs in a row: assistants between teacher and student are trained first, each as a run of its own, then the student.

Gap-KD's first stage, TAKD's chain and DGKD's dense chain differ in what an assistant learns from
(``Distiller.hands_down``). Each stage is a run in a folder inside the output folder, so that stopping and going on
works between the stages and inside each of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reparam.distill import files
from reparam.distill.config import TrainConfig
from reparam.distill.data import Source, load_source
from reparam.distill.distributed import Group, joined
from reparam.distill.methods import get_distiller, weights_of
from reparam.distill.runs import check_start
from reparam.distill.signals import termination
from reparam.distill.states import finished, resumed
from reparam.distill.statics import GROWN
from reparam.distill.trainer import train
from reparam.errors import InputError, StoppedError


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
        StoppedError: the process got SIGTERM, in a run or between two of them.
        ReparamError: see ``train``.
    """
    _check(config)
    if config.assistant is None or config.assistant_checkpoint is not None:
        return train(config, source=source, command=command)
    with termination() as asked_to_stop, joined(config.device) as group:  # once for all stages
        output = Path(group.decide(lambda: _output(config)))
        source = source if source is not None else load_source(config.data, config.limit_train)
        names = config.assistant.split(",")
        places = [str(output / f"assistant-{n}-{_as_file(name)}") for n, name in enumerate(names, 1)]
        student = dataclasses.replace(config, output=str(output), assistant_checkpoint=",".join(places))
        stages = [_stage(config, names[:number], places[:number]) for number in range(1, len(names) + 1)]
        _check_stages([*stages, student], source, group)
        for number, (name, stage) in enumerate(zip(names, stages, strict=True), 1):
            which, way_out = f"assistant {number} of {len(names)}", f"go on with --resume auto --output {output}"
            _say(f"{which}: {name}, in {stage.output}", config, group)
            try:
                train(stage, source=source, command=command)
            except StoppedError as error:
                raise StoppedError(
                    f"stopped by SIGTERM while {which} was trained; the state is saved, {way_out}"
                ) from error
            if group.any(asked_to_stop())[0]:  # too late for the stage, which has finished
                raise StoppedError(f"stopped by SIGTERM after {which} was trained; {way_out}")
        _say(f"student: {config.model}, in {output}", config, group)
        return train(student, source=source, command=command)


def _check_stages(stages: Sequence[TrainConfig], source: Source, group: Group) -> None:
    """Find what cannot work in any of the runs, the student's last, before hours of training for it."""
    student = stages[-1].resolved()
    group.decide(lambda: resumed(student))
    weights_of(student, get_distiller(student.distiller or ""))
    for stage in stages:
        settings = dataclasses.replace(stage.resolved(), quiet=True)
        if group.decide(functools.partial(finished, settings)) is None:
            check_start(settings, source, group)


def _output(config: TrainConfig) -> str:
    """The folder of the student's run, with those of the assistants inside."""
    if config.output is not None:
        if "," in config.output:
            raise InputError(
                f"--output {config.output}: the folders of the assistants inside are listed with commas between them; "
                "name a folder without a comma"
            )
        if config.resume is None:
            files.check_output(config)
        return str(Path(config.output).expanduser())
    if config.resume is not None:
        raise InputError("--resume goes on with the assistants in --output, which was not given")
    return str(files.open_run_folder(config).path)


def _as_file(name: str) -> str:
    return name.replace(":", "-").replace("/", "-")


def _say(line: str, config: TrainConfig, group: Group) -> None:
    if group.main and not config.quiet:
        print(line, flush=True)


def _stage(config: TrainConfig, names: list[str], places: list[str]) -> TrainConfig:
    """The settings of the last assistant in ``names``; ``places`` are the folders of all of them."""
    kind = get_distiller(config.distiller or "")
    name, before = names[-1], names[:-1]
    learns: dict[str, Any] = {"method": "kd"}
    if before and kind.hands_down == "previous":
        learns |= {"teacher": before[-1], "teacher_checkpoint": places[-2], "teacher_checkpoint_ema": False}
    elif before and kind.hands_down == "all":
        earlier = {"assistant": ",".join(before), "assistant_checkpoint": ",".join(places[:-1])}
        learns |= {"method": config.distiller, **earlier}
    if learns["method"] == "kd":
        learns |= {"alpha": None, "beta": None, "assistant": None, "assistant_checkpoint": None}
        learns |= dict.fromkeys(kind.settings)  # of the student's loss alone
        if kind.hands_down == "teacher":  # a loss of another kind, with weights of its own
            learns |= {"distill_warmup": None, "ce_weight": None, "distill_weight": None}
        if kind.schedule is not None and config.temperature is None:
            name_, highest, lowest = kind.schedule
            learns |= {"tau_schedule": config.tau_schedule or name_}
            learns |= {"tau_max": config.tau_max or highest, "tau_min": config.tau_min or lowest}
    model, widen = (config.model, int(name.removeprefix(GROWN))) if name.startswith(GROWN) else (name, None)
    return dataclasses.replace(
        config,
        **learns,
        model=model,
        widen=widen,
        epochs=config.assistant_epochs or config.epochs,
        assistant_epochs=None,
        checkpoint=None,
        checkpoint_ema=False,
        pretrained=False,
        drop_path=config.drop_path if widen else None,
        standardise=False,
        branches=None,
        branch_init=None,
        output=places[-1],
        resume=None if config.resume is None else "auto",
    )


def _check(config: TrainConfig) -> None:
    kind = get_distiller(config.distiller) if config.distiller else None
    wanted = 0 if kind is None else kind.assistants
    if config.assistant is None:
        if wanted != 0:
            raise InputError(
                f"--method {config.method} needs a network between teacher and student; name it with --assistant, such "
                "as --assistant cifar_resnet20 or --assistant expand:2"
            )
        if config.assistant_checkpoint is not None or config.assistant_epochs is not None:
            raise InputError("--assistant-checkpoint and --assistant-epochs belong to --assistant, which was not given")
        return
    names = config.assistant.split(",")
    if wanted == 0:
        raise InputError(
            f"--assistant {config.assistant}: --method {config.method} has no network between teacher and student; "
            "gapkd, takd and dgkd have"
        )
    if wanted is not None and len(names) != wanted:
        raise InputError(f"--method {config.method} has {wanted} assistants, --assistant names {len(names)}")
    for name in names:
        ratio = name.removeprefix(GROWN)
        if name.startswith(GROWN) and (not ratio.isdigit() or int(ratio) < 2):
            raise InputError(f"--assistant {name}: write expand: and a ratio of 2 or more, such as expand:2")
    grown = [name.startswith(GROWN) for name in names]
    if sorted(grown) != grown:
        raise InputError(
            f"--assistant {config.assistant}: an assistant grown from the student comes behind those with a name, "
            "because the next one would be taken for its student"
        )
