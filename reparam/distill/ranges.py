"""Which values of the settings can work at all; everything that needs data or a model is checked where those are."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

from reparam.distill.values import converted
from reparam.errors import InputError

_AT_LEAST = {
    "limit_train": 1,
    "image_size": 1,
    "shift": 0,
    "workers": 0,
    "threads": 1,
    "noise": 0,
    "kd_weight": 0,
    "distill_weight": 0,
    "ce_weight": 0,
    "alpha": 0,
    "beta": 0,
    "distill_warmup": 0,
    "anneal_epochs": 1,
    "assistant_epochs": 1,
    "widen": 2,
    "heads": 2,
    "diffusion_steps": 2,
    "kd_start_epoch": 1,
    "ratio": 1,
    "epochs": 1,
    "batch_size": 2,
    "weight_decay": 0,
    "warmup_epochs": 0,
    "cooldown_epochs": 0,
    "clip_grad": 0,
    "seed": 0,
    "mixup": 0,
    "cutmix": 0,
    "color_jitter": 0,
    "repeats": 1,
    "max_bad_images": 0,
    "min_lr": 0,
    "warmup_lr": 0,
    "accumulate": 1,
    "limit_batches": 1,
    "eval_epochs": 1,
    "keep_best": 0,
    "save_steps": 1,
    "save_epochs": 1,
}
_AT_MOST = {"seed": 2**32 - 1, "threads": 16 * (os.cpu_count() or 1), "image_size": 16384}
"""NumPy takes no larger seed; far more threads than cores end in a crash of their library."""
_POSITIVE = (
    "lr",
    "decay_epochs",
    "decay_rate",
    "temperature",
    "student_temperature",
    "tau_max",
    "tau_min",
    "crop_scale",
    "crop_pct",
)
_SHARES = ("label_smoothing", "kd_smoothing", "ema", "drop_path")
_SHARES_WITH_ONE = ("mix_prob", "mix_switch_prob", "erase", "crop_scale", "crop_pct")


STATIC_ONLY = (
    "distill_weight",
    "temperature",
    "tau_schedule",
    "tau_max",
    "tau_min",
    "alpha",
    "beta",
    "student_temperature",
    "prefactor",
    "ce_weight",
    "distill_warmup",
    "anneal_epochs",
    "standardise",
    "heads",
    "head_stages",
    "head_combine",
    "head_shuffle",
    "head_weights",
    "head_connector_norm",
    "head_standardise",
    "diffusion_schedule",
    "diffusion_steps",
    "diffusion_start",
    "diffusion_noise",
    "diffusion_detach",
    "guide_from",
    "assistant",
    "assistant_checkpoint",
    "assistant_epochs",
)
"""Settings of the loss against a static teacher; without one they would have no effect."""


def typed(config: Any, annotations: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings as values of their declared types.

    Raises:
        InputError: one is of another type; names the option.
    """
    if isinstance(config.ratio, bool) or not isinstance(config.ratio, int):
        raise InputError(
            f"--ratio of a training run is one int for all layers, got {config.ratio!r}; reparam.expand and "
            "reparam.plan take a mapping"
        )
    return {name: converted(getattr(config, name), annotation, flag(name)) for name, annotation in annotations.items()}


def check_ranges(config: Any, choices: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse values out of range and settings that contradict each other.

    Raises:
        InputError: names the option, its value and what it could be.
    """
    for name, lowest in _AT_LEAST.items():
        _require(config, name, lambda value, lowest=lowest: value >= lowest, f"be at least {lowest}")
    for name, highest in _AT_MOST.items():
        _require(config, name, lambda value, highest=highest: value <= highest, f"be at most {highest}")
    for name in _POSITIVE:
        _require(config, name, lambda value: value > 0, "be positive")
    for name in _SHARES:
        _require(config, name, lambda value: 0 <= value < 1, "lie in [0, 1)")
    for name in _SHARES_WITH_ONE:
        _require(config, name, lambda value: 0 <= value <= 1, "lie in [0, 1]")
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value is not None and value not in allowed:
            raise InputError(f"{flag(name)} must be one of {', '.join(allowed)}, got {value!r}")
    _check_together(config)


_ENDS_BEFORE: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("kd_start_epoch", lambda config: config.kd_start_epoch > config.epochs, "the run ends before that epoch"),
    ("anneal_epochs", lambda config: config.anneal_epochs >= config.epochs, "the run ends before its second phase"),
    ("decay_epochs", lambda config: config.decay_epochs >= config.epochs, "the run ends before the first decay"),
    ("milestones", lambda config: config.milestones[-1] >= config.epochs, "the run ends before the last of them"),
)

_IDLE: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "ratio kd_weight kd_loss kd_smoothing kd_start_epoch teacher_distill lr_scale",
        lambda config: not config.gpd,
        "--method has no gpd",
    ),
    (
        "noise",
        lambda config: not (config.gpd or config.widen or "expand:" in (config.assistant or "")),
        "nothing is widened",
    ),
    ("overlap", lambda config: config.distiller is None, "no static teacher answers"),
    ("assistant_epochs", lambda config: config.assistant_checkpoint is not None, "the assistants are trained already"),
    ("teacher_distill", lambda config: config.distiller is None, "--method has no loss against a static teacher"),
    ("kd_smoothing", lambda config: config.kd_loss != "sce", "it belongs to --kd-loss sce"),
    ("kd_loss kd_smoothing kd_start_epoch", lambda config: config.kd_weight == 0, "--kd-weight 0 leaves out the loss"),
    ("checkpoint_ema", lambda config: config.checkpoint is None, "there is no --checkpoint"),
    ("teacher_checkpoint_ema", lambda config: config.teacher_checkpoint is None, "there is no --teacher-checkpoint"),
    ("ema_warmup", lambda config: not config.ema, "there is no --ema"),
    ("nesterov", lambda config: config.optimizer != "sgd", "it belongs to --optimizer sgd"),
    ("milestones", lambda config: config.schedule != "multistep", "they belong to --schedule multistep"),
    ("decay_epochs", lambda config: config.schedule != "step", "they belong to --schedule step"),
    ("decay_rate", lambda config: config.schedule not in ("step", "multistep"), "it belongs to step schedules"),
    ("min_lr cooldown_epochs", lambda config: config.schedule != "cosine", "it belongs to --schedule cosine"),
    (
        "tau_schedule tau_max tau_min",
        lambda config: config.student_temperature is not None and config.assistant_checkpoint is not None,
        "the student has --student-temperature, and the assistant is trained already",
    ),
    ("prefactor", lambda config: config.beta == 0, "--beta 0 leaves out the term that it weighs"),
    ("warmup_lr", lambda config: config.warmup_epochs == 0, "there is no warm-up"),
    ("tau_min", lambda config: config.tau_schedule == "constant", "a constant temperature stays at --tau-max"),
    ("guide_from", lambda config: config.beta == 0, "--beta 0 leaves out the guided loss"),
    *_ENDS_BEFORE,
)
"""Settings, when they have no effect, and why."""


def refuse_idle(config: Any, given: Collection[str]) -> None:
    """Refuse settings that a user gave and that have no effect beside the others.

    A recipe may hold such settings, for those who change its method; a user who types one expects it to do something.

    Raises:
        InputError: names the option and the reason.
    """
    for names, idle, reason in _IDLE:
        for name in names.split():
            if name in given and idle(config):
                raise InputError(f"{flag(name)} would have no effect: {reason}")


def cut_off(config: Any) -> list[str]:
    """Say which settings lie behind the end of a run: a recipe's, where ``--epochs`` makes it shorter than it was.

    Args:
        config: settings with all defaults filled in.
    """
    idle = {"kd_start_epoch": not config.gpd, "anneal_epochs": config.anneal_epochs is None}
    idle |= {"decay_epochs": config.schedule != "step", "milestones": config.schedule != "multistep"}
    found = []
    for name, behind, reason in _ENDS_BEFORE:
        if not idle[name] and behind(config):
            value = getattr(config, name)
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            found.append(f"{flag(name)} {shown} with --epochs {config.epochs}: {reason}")
    return found


def flag(name: str) -> str:
    """Return how a setting is spelled on the command line."""
    return "--" + name.replace("_", "-")


def _require(config: Any, name: str, holds: Any, what: str) -> None:
    value = getattr(config, name)
    if value is not None and not holds(value):
        raise InputError(f"{flag(name)} must {what}, got {value}")


def _check_together(config: Any) -> None:
    if config.branch_init is not None and config.branches is None:
        raise InputError("--branch-init says how branches start, and there are none; add --branches")
    if config.warmup_epochs >= config.epochs and config.warmup_epochs > 1:
        raise InputError(f"--warmup-epochs {config.warmup_epochs} leaves nothing of --epochs {config.epochs}")
    if config.cooldown_epochs and config.warmup_epochs + config.cooldown_epochs >= config.epochs:
        raise InputError(f"--cooldown-epochs {config.cooldown_epochs} leaves nothing of --epochs {config.epochs}")
    for name in ("min_lr", "warmup_lr"):
        value = getattr(config, name)
        if config.lr is not None and value is not None and value > config.lr:
            raise InputError(f"{flag(name)} {value:g} is above --lr {config.lr:g}, the largest of the schedule")
    if config.widen is not None and config.gpd:
        raise InputError(
            f"--widen trains a widened network for itself, and --method {config.method} widens its student: leave out "
            "--widen and say how much with --ratio, or use --method baseline"
        )
    if config.checkpoint is not None and config.pretrained:
        raise InputError("--checkpoint and --pretrained were both given; choose the weights to start from")
    if config.schedule == "multistep" and not config.milestones:
        raise InputError("--schedule multistep needs --milestones, the epochs after which the learning rate decays")
    late = [*(config.milestones or ())]
    if late != sorted(set(late)) or (late and late[0] < 1):
        raise InputError(
            f"--milestones {','.join(map(str, late))}: name epochs from 1 on, each once and in order, such as 30,60,90"
        )
    if config.teacher_checkpoint is not None and config.teacher is None:
        raise InputError(
            "--teacher-checkpoint holds the weights of the static teacher; name its network with --teacher"
        )
    if config.cuda_graph and config.precision == "fp16":
        raise InputError(
            "--cuda-graph: fp16 asks after each step whether its loss scale fits, which no CUDA graph can hold; use "
            "--precision bf16"
        )
    if config.batch_size % config.accumulate:
        raise InputError(f"--accumulate {config.accumulate} does not divide --batch-size {config.batch_size}")
    _check_method(config)


def _check_method(config: Any) -> None:
    names = config.method.split("+")
    static = [name for name in names if name not in ("gpd", "baseline")]
    if len(set(names)) != len(names) or "" in names or len(static) > 1 or ("baseline" in names and len(names) > 1):
        raise InputError(
            f"--method is baseline, gpd, one loss against a static teacher, or gpd+LOSS; got {config.method!r}"
        )
    if static and config.teacher is None:
        from reparam.distill.methods import get_distiller  # which know the settings

        get_distiller(static[0])  # a misspelled name needs no teacher, but another name
        raise InputError(
            f"--method {config.method}: {static[0]} compares with a static teacher; name it with --teacher"
        )
    given = [name for name in STATIC_ONLY if getattr(config, name) != getattr(type(config), name)]
    if not static and given:
        raise InputError(
            f"{flag(given[0])} belongs to a loss against a static teacher, and --method {config.method} has none"
        )
    if not static and config.teacher is not None:
        raise InputError(
            f"--teacher {config.teacher}: --method {config.method} uses no static teacher; write "
            f"{'gpd+dkd' if config.method == 'gpd' else 'dkd'}, or leave --teacher out"
        )
