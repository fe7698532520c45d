"""The settings of a training run: one frozen dataclass, from which command line and recipes are made as well."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from reparam.distill.ranges import check_ranges, typed

DEFAULT_MODEL = "cifar_resnet8_w8"
_OPTION = "option"


@dataclass(frozen=True)
class Option:
    """How a setting appears on the command line: its group, its help text, its parser and its allowed values.

    Attributes:
        group: key of the group in ``--help``.
        help: one line.
        type: parser of the text; ``bool`` makes a switch.
        choices: allowed values, or None.
        metavar: what stands for the value, or None for a default by type.
        rare: left out of ``--help``, shown by ``--help-all``.
    """

    group: str
    help: str
    type: Callable[[str], Any] = str
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    rare: bool = False


def numbers(text: str) -> tuple[int, ...]:
    """Read ``"30,60,90"`` as numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 30,60,90") from None


def weights(text: str) -> tuple[float, ...]:
    """Read ``"1,0.5"`` as numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,0.5") from None


def _option(default: Any, group: str, help: str, kind: Callable[[str], Any] = str, **extra: Any) -> Any:
    return dataclasses.field(default=default, metadata={_OPTION: Option(group, help, kind, **extra)})


def _rare(default: Any, group: str, help: str, kind: Callable[[str], Any] = str, **extra: Any) -> Any:
    return _option(default, group, help, kind, rare=True, **extra)


_DATA_HELP = (
    "digits | fashion-mnist:DIR | cifar10:DIR | cifar100:DIR | folder:DIR (train/ and val/ or test/, one folder per "
    "class) | npz:FILE (x_train, y_train, x_test, y_test; uint8 images [N, H, W, C])"
)
_MODEL_HELP = "a timm name, path/to/file.py:callable, or package.module:callable"
_METHOD_HELP = (
    "baseline (the student alone) | gpd | a loss against --teacher: kd, dkd, lskd, dist, rkd, at, fitnet, crd, "
    "reviewkd, annealing, kdiffusion, kdiffusion-average; with --assistant: gapkd, takd, dgkd | both: gpd+dkd, ..."
)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run; ``None`` stands for a default that depends on other settings (see ``resolved``)."""

    data: str = _option("digits", "data", _DATA_HELP, metavar="SPEC")
    limit_train: int | None = _option(
        None, "data", "train on N images only, class balanced, the same ones for every seed (default: all)", int
    )
    image_size: int | None = _rare(
        None, "data", "resize images to N x N (default: as stored; for folders what the model asks for)", int
    )
    workers: int = _option(0, "data", "processes that decode images of folder data, per process of training", int)
    auto_augment: str | None = _option(
        None, "data", "timm's policy for folder data, such as rand-m9-mstd0.5-inc1", metavar="POLICY"
    )
    mixup: float = _option(0.0, "data", "alpha of mixup; 0: off", float)
    cutmix: float = _option(0.0, "data", "alpha of cutmix; 0: off", float)
    mix_prob: float = _rare(1.0, "data", "share of the batches that are mixed", float)
    mix_switch_prob: float = _rare(0.5, "data", "share of cutmix where both are on", float)
    shift: int | None = _rare(
        None, "data", "resident data: shift at random by up to N pixels (default: by data set)", int
    )
    flip: bool | None = _rare(None, "data", "mirror training images at random (default: by data set)", bool)
    crop_scale: float = _rare(0.08, "data", "folder data: smallest area of a random crop, as a share", float)
    crop_pct: float | None = _rare(
        None,
        "data",
        "folder data: side of the crop of a test image, as a share of its shorter side (default: the model's)",
        float,
    )
    color_jitter: float = _rare(0.0, "data", "folder data: strength of colour jitter", float)
    erase: float = _rare(0.0, "data", "share of images of which a random part is erased", float)
    interpolation: str = _rare("bilinear", "data", "folder data: resizing", choices=("bilinear", "bicubic", "random"))
    repeats: int = _rare(1, "data", "folder data: repeated augmentation, copies of an image per epoch", int)
    max_bad_images: int = _rare(0, "data", "folder data: unreadable images to name and skip before giving up", int)

    model: str = _option(DEFAULT_MODEL, "model", f"student network: {_MODEL_HELP}", metavar="SPEC")
    checkpoint: str | None = _option(
        None, "model", "fine-tune: start from these weights, or those of a run (default: from scratch)", metavar="PATH"
    )
    checkpoint_ema: bool = _rare(False, "model", "start from the averaged weights that --checkpoint holds", bool)
    pretrained: bool = _option(False, "model", "fine-tune: start from timm's weights for --model", bool)
    drop_path: float | None = _rare(None, "model", "drop path rate of the student (default: the model's)", float)
    widen: int | None = _rare(None, "model", "train the student widened by N, as a network of its own", int)

    teacher: str | None = _option(
        None, "teacher", f"static teacher: {_MODEL_HELP}; in eval mode, without gradient", metavar="SPEC"
    )
    teacher_checkpoint: str | None = _option(
        None, "teacher", "its weights, or the output folder of a run (default: timm's weights)", metavar="PATH"
    )
    teacher_checkpoint_ema: bool = _rare(
        False, "teacher", "take the averaged weights that --teacher-checkpoint holds", bool
    )
    assistant: str | None = _rare(
        None,
        "teacher",
        "networks between teacher and student, trained first, for gapkd, takd, dgkd: names, or expand:RATIO for the "
        "student widened, as a network of its own",
        metavar="SPEC,...",
    )
    assistant_checkpoint: str | None = _rare(
        None, "teacher", "their weights or runs, instead of training them", metavar="PATH,..."
    )
    assistant_epochs: int | None = _rare(None, "teacher", "epochs of each assistant (default: --epochs)", int)

    method: str = _option("gpd", "method", _METHOD_HELP, metavar="NAME")
    ratio: int = _option(2, "method", "gpd: channel expansion of the dynamic teacher, one for all layers", int)
    branches: str | None = _option(
        None,
        "method",
        "branches beside the layers: orepa, orepa_small, acb, dbb, repvgg, mobileone, expandnet",
        metavar="RECIPE",
    )
    kd_weight: float = _option(3.0, "method", "gpd: weight of the soft loss from dynamic teacher to student", float)
    distill_weight: float | None = _option(
        None, "method", "weight of the loss against the static teacher (default: by method)", float
    )
    temperature: float | None = _option(None, "method", "softmax temperature of that loss (default: by method)", float)
    noise: float = _rare(0.25, "method", "gpd: size of the noise that breaks the teacher's symmetry", float)
    branch_init: str | None = _rare(
        None,
        "method",
        "how branches start: scratch has the recipe's own scales, student has 0 (default: student with weights)",
        choices=("student", "scratch"),
    )
    kd_loss: str = _rare("sce", "method", "gpd: soft loss", choices=("ce", "sce", "kl", "mse", "l1"))
    kd_smoothing: float = _rare(0.1, "method", "gpd: share of the uniform distribution in the target of sce", float)
    kd_start_epoch: int = _rare(1, "method", "gpd: first epoch with the soft loss; 1 is the first of all", int)
    teacher_distill: bool = _rare(
        True, "method", "gpd: the dynamic teacher learns from the static teacher as well", bool
    )
    ce_weight: float | None = _rare(None, "method", "weight of the cross entropy (default: by method)", float)
    alpha: float | None = _rare(
        None, "method", "weight of the target class (dkd, gapkd) or of the chain (kdiffusion)", float
    )
    beta: float | None = _rare(None, "method", "weight of the other classes, or of the guided loss (kdiffusion)", float)
    tau_schedule: str | None = _rare(
        None,
        "method",
        "temperature over the epochs, instead of --temperature (default: by method)",
        choices=("dtm", "constant", "linear", "exponential", "log", "sigmoid", "piecewise"),
    )
    tau_max: float | None = _rare(None, "method", "its highest temperature (default: 20)", float)
    tau_min: float | None = _rare(None, "method", "its lowest temperature (default: 1)", float)
    student_temperature: float | None = _rare(
        None,
        "method",
        "gapkd: constant temperature of the student's stage, as in its program (4); the schedule is the assistant's",
        float,
    )
    prefactor: bool | None = _rare(
        None,
        "method",
        "gapkd: weigh its second term by what the assistant leaves to the other classes (default: no)",
        bool,
    )
    anneal_epochs: int | None = _rare(None, "method", "annealing: epochs of its first phase (default: 2/3 of all)", int)
    distill_warmup: int | None = _rare(
        None, "method", "epochs over which distill_weight grows linearly (default: by method)", int
    )
    standardise: bool = _rare(False, "method", "kd, dkd: standardise the logits first (LSKD)", bool)
    heads: int | None = _rare(None, "method", "kdiffusion: parallel heads per stage (default: 10)", int)
    head_stages: str | None = _rare(
        None,
        "method",
        "kdiffusion: which stages get heads: last, all, a number of the deepest, or names (default: all)",
        metavar="last|all|N|NAME,...",
    )
    head_combine: str | None = _rare(
        None, "method", "kdiffusion: what goes on in training (default: mean)", choices=("mean", "random")
    )
    head_shuffle: str | None = _rare(
        None,
        "method",
        "kdiffusion: when the order of the heads is drawn (default: iteration)",
        choices=("iteration", "sample", "none"),
    )
    head_weights: tuple[float, ...] | None = _rare(
        None, "method", "kdiffusion: weight of each stage, shallow to deep (default: 1)", weights, metavar="X,X,..."
    )
    head_connector_norm: bool | None = _rare(
        None, "method", "kdiffusion: connectors end with a batch norm (default: yes)", bool
    )
    head_standardise: bool | None = _rare(
        None, "method", "kdiffusion: standardise the teacher's features (default: yes)", bool
    )
    diffusion_schedule: str | None = _rare(
        None, "method", "kdiffusion: noise schedule (default: linear)", choices=("linear", "cosine")
    )
    diffusion_steps: int | None = _rare(None, "method", "kdiffusion: steps of that schedule (default: 1000)", int)
    diffusion_start: str | None = _rare(
        None, "method", "kdiffusion: value before the first step (default: first)", choices=("first", "zero")
    )
    diffusion_noise: str | None = _rare(
        None,
        "method",
        "kdiffusion: where a step of the teacher's chain starts (default: student)",
        choices=("student", "gaussian", "chain"),
    )
    diffusion_detach: bool | None = _rare(
        None, "method", "kdiffusion: earlier steps are constants of later ones (default: no)", bool
    )
    guide_from: str | None = _rare(
        None, "method", "kdiffusion: what enters the teacher's next stage (default: mean)", choices=("mean", "last")
    )

    epochs: int = _option(40, "recipe", "passes over the training images", int)
    batch_size: int = _option(64, "recipe", "images per optimizer step, over all processes", int)
    optimizer: str = _option("sgd", "recipe", "sgd has momentum 0.9", choices=("sgd", "adamw"))
    lr: float | None = _option(None, "recipe", "learning rate (default: 0.1 for sgd, 0.002 for adamw)", float)
    weight_decay: float | None = _option(
        None, "recipe", "weight decay (default: 0.0005 for sgd, 0.05 for adamw)", float
    )
    schedule: str = _option(
        "cosine", "recipe", "learning rate over time", choices=("cosine", "step", "multistep", "constant")
    )
    warmup_epochs: int = _option(1, "recipe", "epochs of linear warm-up", int)
    clip_grad: float = _option(5.0, "recipe", "largest L2 norm of the gradient; 0 switches clipping off", float)
    label_smoothing: float = _option(0.0, "recipe", "label smoothing of the cross entropies", float)
    ema: float = _option(0.0, "recipe", "decay per step of averaged weights, such as 0.99996; 0: off", float)
    ema_warmup: bool = _rare(False, "recipe", "let the decay of the average grow from 0 (timm's warm-up)", bool)
    nesterov: bool = _rare(False, "recipe", "sgd: Nesterov momentum", bool)
    decay_norms: bool | None = _rare(
        None, "recipe", "weight decay also on biases and norms (default: yes for sgd, no for adamw)", bool
    )
    lr_scale: str = _rare(
        "none",
        "recipe",
        "gpd: student divides the lr of widened layers so that the student's effective step is that of plain training",
        choices=("none", "student"),
    )
    decay_epochs: float | None = _rare(
        None, "recipe", "step schedule: epochs between decays (default: 30%% of all epochs)", float
    )
    milestones: tuple[int, ...] | None = _rare(
        None, "recipe", "multistep schedule: epochs after which it decays, such as 30,60,90", numbers, metavar="N,N,..."
    )
    decay_rate: float = _rare(0.1, "recipe", "step schedules: factor of each decay", float)
    min_lr: float = _rare(0.0, "recipe", "cosine: learning rate at the end", float)
    warmup_lr: float | None = _rare(
        None, "recipe", "learning rate at the start of the warm-up (default: lr / 100)", float
    )
    cooldown_epochs: int = _rare(0, "recipe", "cosine: how many of the epochs at the end stay at min_lr", int)

    precision: str = _option(
        "fp32",
        "compute",
        "bf16 and fp16 are automatic mixed precision",
        choices=("fp32", "tf32", "bf16", "fp16", "fp64"),
    )
    compile: bool = _option(False, "compute", "run the networks through torch.compile", bool)
    cuda_graph: bool = _rare(
        False,
        "compute",
        "record a training step as a CUDA graph and repeat it: faster where launching its kernels takes longer than "
        "computing them, as with the networks of CIFAR; one GPU",
        bool,
    )
    overlap: bool = _rare(
        True, "compute", "CUDA: the static teacher answers beside the first network in training, not before it", bool
    )
    accumulate: int = _rare(1, "compute", "parts of a step that run one after the other, to save memory", int)
    channels_last: bool = _rare(False, "compute", "memory format of images and convolutions", bool)
    sync_bn: bool = _rare(False, "compute", "several processes: norm statistics over the whole batch", bool)

    output: str | None = _option(
        None, "run", "folder for all files of the run (default: a new one under runs/)", metavar="DIR"
    )
    resume: str | None = _option(
        None, "run", "auto: go on in --output if it holds a run; or a checkpoint file", metavar="auto|FILE"
    )
    seed: int = _option(0, "run", "seed of initialisation, data order and augmentation", int)
    device: str = _option("auto", "run", "auto, cpu, cuda, cuda:1, ...")
    fast_dev_run: bool = _option(False, "run", "one epoch of two steps, to see whether everything fits", bool)
    quiet: bool = _option(False, "run", "print nothing but errors", bool)
    limit_batches: int | None = _rare(None, "run", "end every epoch after N steps", int)
    eval_epochs: int = _rare(1, "run", "measure the test accuracy every N epochs, and after the last", int)
    threads: int | None = _rare(
        None, "run", "CPU threads (default: 1 for images up to 16 x 16, where more get in the way, else all)", int
    )
    keep_best: int = _rare(1, "run", "checkpoints of the best epochs to keep, beside the last two", int)
    save_epochs: int = _rare(1, "run", "write checkpoint and networks every N epochs, and after the last", int)
    save_steps: int | None = _rare(None, "run", "write a checkpoint every N steps as well (default: per epoch)", int)
    on_nan: str = _rare(
        "stop",
        "run",
        "NaN in a loss: stop, or roll back to the last checkpoint and go on with another data order",
        choices=("stop", "rollback"),
    )
    tensorboard: bool = _rare(False, "run", "write TensorBoard events beside metrics.csv", bool)

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        for name, value in typed(self, declared()).items():
            object.__setattr__(self, name, value)
        check_ranges(self, {name: option.choices for name, (option, _) in options().items() if option.choices})

    @property
    def baseline(self) -> bool:
        """Whether the run is the plain student alone."""
        return self.method == "baseline"

    @property
    def gpd(self) -> bool:
        """Whether the run has a dynamic teacher."""
        return "gpd" in self.method.split("+")

    @property
    def distiller(self) -> str | None:
        """Name of the loss against the static teacher, or None."""
        names = [name for name in self.method.split("+") if name not in ("gpd", "baseline")]
        return names[0] if names else None

    def resolved(self) -> TrainConfig:
        """Return a copy with the defaults filled in that depend on other settings."""
        is_sgd = self.optimizer == "sgd"
        lr = self.lr if self.lr is not None else (0.1 if is_sgd else 0.002)
        short: dict[str, Any] = (
            {"epochs": 1, "warmup_epochs": 0, "cooldown_epochs": 0, "limit_batches": 2} if self.fast_dev_run else {}
        )
        return dataclasses.replace(
            self,
            lr=lr,
            weight_decay=self.weight_decay if self.weight_decay is not None else (5e-4 if is_sgd else 0.05),
            decay_norms=is_sgd if self.decay_norms is None else self.decay_norms,
            branch_init=self._branch_init(),
            decay_epochs=self.decay_epochs if self.decay_epochs is not None else max(1.0, 0.3 * self.epochs),
            warmup_lr=self.warmup_lr if self.warmup_lr is not None else lr * 1e-2,
            **short,
        )

    def _branch_init(self) -> str | None:
        if self.branches is None or self.branch_init is not None:
            return self.branch_init
        return "scratch" if self.checkpoint is None and not self.pretrained else "student"


def options() -> dict[str, tuple[Option, Any]]:
    """Return the command line option and the default of every setting, in order of declaration."""
    return {field.name: (field.metadata[_OPTION], field.default) for field in dataclasses.fields(TrainConfig)}


def completed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings from a file, with those that an earlier version did not have at their defaults."""
    return {**{name: default for name, (_, default) in options().items()}, **saved}


@functools.cache
def declared() -> dict[str, Any]:
    """Return the declared type of every setting."""
    return typing.get_type_hints(TrainConfig)
