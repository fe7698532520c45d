"""``reparam train``: the options and what they start. Heavy imports wait until a run starts."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from reparam.distill.config import Option, TrainConfig, options
from reparam.errors import InputError

_DESCRIPTION = """\
Train a compact network together with the larger teacher it lives in (Gap Preserving Distillation), with shared
parameters; extract the student and check that the extracted network equals the trained one. Without arguments: a small
residual network on scikit-learn's digits, in well under two minutes on two cores."""

_EPILOG = """\
files of a run: summary.json, metrics.csv, config.json, student.safetensors, teacher.safetensors

examples:
  reparam train
  reparam train --data fashion-mnist:DIR --limit-train 10000 --output runs/fashion
  reparam train --baseline --lr 0.4
  reparam train --compare --seeds 0,1,2"""

_TITLES = {
    "data": "data",
    "model": "student",
    "method": "teacher and loss",
    "recipe": "recipe",
    "run": "run",
    "compare": "comparison",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``reparam train`` to ``parser``, in groups, one for every field of `TrainConfig`."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    groups = {name: parser.add_argument_group(title) for name, title in _TITLES.items()}
    for name, (option, default) in options().items():
        _add(groups[option.group], name, option, default)
    groups["compare"].add_argument(
        "--compare",
        action="store_true",
        help="run GPD, and the baseline at lr and ratio^2 lr, with every seed; print and write one table",
    )
    groups["compare"].add_argument(
        "--seeds", type=_seeds, metavar="N,N,...", help="seeds of the comparison (default: 0,1,2)"
    )


def config_from(arguments: argparse.Namespace) -> TrainConfig:
    """Return the settings that the parsed options stand for."""
    return TrainConfig(**{name: getattr(arguments, name) for name in options()})


def run(arguments: argparse.Namespace) -> int:
    """Train, or compare, as the parsed options say; return the exit code (1: the extracted student differs)."""
    config = config_from(arguments)
    if arguments.seeds is not None and not arguments.compare:
        raise InputError("--seeds belongs to --compare; a single run takes --seed")
    _require_libraries()
    if arguments.compare:
        from reparam.distill.compare import compare

        compare(config, arguments.seeds or (0, 1, 2), command=sys.argv)
        return 0
    from reparam.distill.trainer import train

    summary = train(config, command=sys.argv)
    return 0 if summary["parity_passed"] else 1


def _require_libraries() -> None:
    for module in ("timm", "torchvision", "sklearn", "tqdm"):
        try:
            __import__(module)
        except ModuleNotFoundError as error:
            raise InputError(f"training needs {error.name}; pip install 'reparam[train]'") from error


def _add(group: Any, name: str, option: Option, default: Any) -> None:
    flag = "--" + name.replace("_", "-")
    if option.type is bool:
        action = "store_true" if default is False else argparse.BooleanOptionalAction
        group.add_argument(flag, action=action, default=default, help=option.help)
        return
    shown = option.help if default is None else f"{option.help} (default: {default})"
    group.add_argument(
        flag,
        type=option.type,
        default=default,
        choices=option.choices,
        metavar=option.metavar or (None if option.choices else {int: "N", float: "X"}.get(option.type, "NAME")),
        help=shown,
    )


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0,1,2") from None
