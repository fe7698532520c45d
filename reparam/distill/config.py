"""The settings of a training run: one frozen dataclass, from which the command line is made as well."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from reparam.errors import InputError

DEFAULT_MODEL = "cifar_resnet8_w8"
_OPTION = "option"


@dataclass(frozen=True)
class Option:
    """How a setting appears on the command line: its group, its help text, its parser and its allowed values."""

    group: str
    help: str
    type: type = str
    choices: tuple[str, ...] | None = None
    metavar: str | None = None


def _option(default: Any, group: str, help: str, kind: type = str, **extra: Any) -> Any:
    return dataclasses.field(default=default, metadata={_OPTION: Option(group, help, kind, **extra)})


_DATA_HELP = (
    "digits | fashion-mnist:DIR | cifar10:DIR | cifar100:DIR | folder:DIR (train/ and val/ or test/, one folder per "
    "class) | npz:FILE (x_train, y_train, x_test, y_test; uint8 images [N, H, W, C])"
)
_MODEL_HELP = "student network: a timm name, path/to/file.py:callable, or package.module:callable"


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run; ``None`` stands for a default that depends on other settings (see ``resolved``)."""

    data: str = _option("digits", "data", _DATA_HELP, metavar="SPEC")
    limit_train: int | None = _option(
        None, "data", "train on N images only, class balanced, the same ones for every seed (default: all)", int
    )
    image_size: int | None = _option(
        None, "data", "resize images to N x N (default: as stored; for folders what the model asks for)", int
    )
    shift: int | None = _option(
        None, "data", "shift training images at random by up to N pixels (default: by data set; folders: crops)", int
    )
    flip: bool | None = _option(None, "data", "mirror training images at random (default: by data set)", bool)
    workers: int = _option(0, "data", "processes that decode images of folder data", int)

    model: str = _option(DEFAULT_MODEL, "model", _MODEL_HELP, metavar="SPEC")
    checkpoint: str | None = _option(None, "model", "start from these weights (default: from scratch)", metavar="FILE")

    baseline: bool = _option(False, "method", "train the plain student alone, with the identical recipe", bool)
    ratio: int = _option(2, "method", "channel expansion of the teacher, one for all layers", int)
    noise: float = _option(0.25, "method", "size of the noise that breaks the teacher's symmetry", float)
    branches: str | None = _option(
        None, "method", "branches beside the layers: orepa, acb, dbb, repvgg, mobileone, expandnet", metavar="RECIPE"
    )
    branch_init: str | None = _option(
        None,
        "method",
        "how branches start: scratch has the recipe's own scales, student has 0 (default: student with --checkpoint)",
        choices=("student", "scratch"),
    )
    kd_weight: float = _option(3.0, "method", "weight of the soft loss from teacher to student", float)
    kd_smoothing: float = _option(0.1, "method", "share of the uniform distribution in the soft target", float)

    epochs: int = _option(40, "recipe", "passes over the training images", int)
    batch_size: int = _option(64, "recipe", "images per step", int)
    optimizer: str = _option("sgd", "recipe", "sgd has momentum 0.9", choices=("sgd", "adamw"))
    lr: float | None = _option(None, "recipe", "learning rate (default: 0.1 for sgd, 0.002 for adamw)", float)
    weight_decay: float | None = _option(
        None,
        "recipe",
        "weight decay (default: 0.0005 on all parameters for sgd, 0.05 without biases and norms for adamw)",
        float,
    )
    schedule: str = _option("cosine", "recipe", "learning rate over time", choices=("cosine", "step", "constant"))
    decay_epochs: float | None = _option(
        None, "recipe", "step schedule: epochs between decays (default: 30%% of all epochs)", float
    )
    decay_rate: float = _option(0.1, "recipe", "step schedule: factor of each decay", float)
    warmup_epochs: int = _option(1, "recipe", "epochs of linear warm-up", int)
    clip_grad: float = _option(5.0, "recipe", "largest L2 norm of the gradient; 0 switches clipping off", float)
    label_smoothing: float = _option(0.0, "recipe", "label smoothing of both cross entropies", float)

    output: str | None = _option(
        None, "run", "folder for all files of the run (default: a new one under runs/)", metavar="DIR"
    )
    seed: int = _option(0, "run", "seed of initialisation, data order and augmentation", int)
    device: str = _option("auto", "run", "auto, cpu, cuda, cuda:1, ...")
    threads: int | None = _option(
        None,
        "run",
        "CPU threads (default: 1 for images up to 16 x 16, where more get in the way, else all)",
        int,
    )
    quiet: bool = _option(False, "run", "print nothing but errors", bool)

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        _check_ranges(self)

    @property
    def method(self) -> str:
        """Name of the training method in ``reparam.distill.methods``."""
        return "baseline" if self.baseline else "gpd"

    def resolved(self) -> TrainConfig:
        """Return a copy with the defaults filled in that depend on the optimizer or on the number of epochs."""
        is_sgd = self.optimizer == "sgd"
        return dataclasses.replace(
            self,
            lr=self.lr if self.lr is not None else (0.1 if is_sgd else 0.002),
            weight_decay=self.weight_decay if self.weight_decay is not None else (5e-4 if is_sgd else 0.05),
            branch_init=self._branch_init(),
            decay_epochs=self.decay_epochs if self.decay_epochs is not None else max(1.0, 0.3 * self.epochs),
        )

    def _branch_init(self) -> str | None:
        if self.branches is None or self.branch_init is not None:
            return self.branch_init
        return "scratch" if self.checkpoint is None else "student"


def options() -> dict[str, tuple[Option, Any]]:
    """Return the command line option and the default of every setting, in order of declaration."""
    return {field.name: (field.metadata[_OPTION], field.default) for field in dataclasses.fields(TrainConfig)}


def _check_ranges(config: TrainConfig) -> None:
    if isinstance(config.ratio, bool) or not isinstance(config.ratio, int):
        raise InputError(
            f"--ratio of a training run is one int for all layers, got {config.ratio!r}; reparam.expand and "
            "reparam.plan take a mapping"
        )
    at_least = {"limit_train": 1, "image_size": 1, "shift": 0, "workers": 0, "threads": 1, "noise": 0, "kd_weight": 0}
    at_least |= {
        "ratio": 1,
        "epochs": 1,
        "batch_size": 2,
        "weight_decay": 0,
        "warmup_epochs": 0,
        "clip_grad": 0,
        "seed": 0,
    }
    for name, lowest in at_least.items():
        value = getattr(config, name)
        if value is not None and not value >= lowest:
            raise InputError(f"{_flag(name)} must be at least {lowest}, got {value}")
    for name in ("lr", "decay_epochs", "decay_rate"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise InputError(f"{_flag(name)} must be positive, got {value}")
    for name in ("label_smoothing", "kd_smoothing"):
        if not 0 <= getattr(config, name) < 1:
            raise InputError(f"{_flag(name)} must lie in [0, 1), got {getattr(config, name)}")
    for name, (option, _) in options().items():
        if option.choices and getattr(config, name) not in (*option.choices, None):
            raise InputError(f"{_flag(name)} must be one of {', '.join(option.choices)}, got {getattr(config, name)!r}")
    if config.branch_init is not None and config.branches is None:
        raise InputError("--branch-init says how branches start, and there are none; add --branches")
    if config.warmup_epochs >= config.epochs and config.warmup_epochs > 1:
        raise InputError(f"--warmup-epochs {config.warmup_epochs} leaves nothing of --epochs {config.epochs}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
