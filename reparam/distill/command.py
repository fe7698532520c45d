"""``reparam train``: the options and what they start. Heavy imports wait until a run starts."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from reparam.distill.config import Option, TrainConfig, options
from reparam.distill.ranges import refuse_idle
from reparam.errors import InputError

_DESCRIPTION = """\
Train a compact network together with the larger teacher it lives in (Gap Preserving Distillation), with shared
parameters; extract the student and check that the extracted network equals the trained one. Without arguments: a small
residual network on scikit-learn's digits, in well under two minutes on two cores. Several GPUs: torchrun
--nproc-per-node N -m reparam train ..."""

_EPILOG = """\
files of a run: summary.json, metrics.csv, curves.png, config.json, recipe.yaml, student.safetensors,
teacher.safetensors, the same with _ema, checkpoints/

examples:
  reparam train
  reparam train --data fashion-mnist:DIR --limit-train 10000 --output runs/fashion
  reparam train --list-recipes
  reparam train --recipe cifar100/resnet8x4-gpd --data cifar100:DIR --output runs/gpd --resume auto
  reparam train --method gpd+dkd --teacher resnet34.tv_in1k --model resnet18 --data folder:DIR
  reparam train --method baseline --lr 0.4
  reparam train --compare --seeds 0,1,2"""

_TITLES = {
    "data": "data",
    "model": "student",
    "teacher": "static teacher",
    "method": "method",
    "recipe": "recipe",
    "compute": "computation",
    "run": "run",
    "compare": "comparison",
}


def add_arguments(parser: argparse.ArgumentParser, everything: bool = False) -> None:
    """Add the options of ``reparam train`` to ``parser``, in groups, one for every field of `TrainConfig`.

    Args:
        parser: to fill.
        everything: show rare options in the help as well.
    """
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    groups = {name: parser.add_argument_group(title) for name, title in _TITLES.items()}
    groups["recipe"].add_argument(
        "--recipe", metavar="NAME|FILE", help="settings to start from; other options override"
    )
    groups["recipe"].add_argument(
        "--list-recipes", action="store_true", help="print the recipes that come with reparam"
    )
    for name, (option, default) in options().items():
        _add(groups[option.group], name, option, default, everything or not option.rare)
    groups["compare"].add_argument(
        "--compare",
        action="store_true",
        help="run the method, and the baseline at lr and ratio^2 lr, with every seed; print and write one table",
    )
    groups["compare"].add_argument(
        "--seeds", type=_seeds, metavar="N,N,...", help="seeds of the comparison (default: 0,1,2)"
    )
    parser.add_argument("--help-all", action=_HelpAll, nargs=0, help="show this message with all options and exit")


class _HelpAll(argparse.Action):
    """Prints the help with rare options."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        full = argparse.ArgumentParser(prog=parser.prog)
        add_arguments(full, everything=True)
        full.print_help()
        parser.exit()


def config_from(arguments: argparse.Namespace) -> TrainConfig:
    """Return the settings that the parsed options stand for: defaults, then the recipe, then options."""
    given = {name: getattr(arguments, name) for name in options() if hasattr(arguments, name)}
    if arguments.recipe is None:
        config = TrainConfig(**given)
    else:
        from reparam.distill.recipes import apply_recipe, load_recipe

        config = apply_recipe(load_recipe(arguments.recipe), given)
    refuse_idle(config, given)
    return config


def run(arguments: argparse.Namespace) -> int:
    """Train, or compare, as the parsed options say; return the exit code.

    1: the extracted student differs, or so many runs of a comparison failed that it has no verdict.
    """
    if arguments.list_recipes:
        return _list_recipes()
    _require_libraries()
    config = config_from(arguments)
    if arguments.seeds is not None and not arguments.compare:
        raise InputError("--seeds belongs to --compare; a single run takes --seed")
    if arguments.compare:
        from reparam.distill.compare import compare

        content = compare(config, arguments.seeds or (0, 1, 2), command=sys.argv)
        return 1 if content["verdict"] is None else 0
    from reparam.distill.chain import train_all

    summary = train_all(config, command=sys.argv)
    return 0 if summary["parity_passed"] else 1


def _list_recipes() -> int:
    from reparam.distill.recipes import load_recipe, recipe_names

    width = max(map(len, recipe_names()))
    for name in recipe_names():
        print(f"{name:<{width}}  {load_recipe(name).description.splitlines()[0]}")
    return 0


def _require_libraries() -> None:
    # Looked for, not imported: some runs need no scikit-learn or matplotlib, which take seconds to import.
    for module in ("timm", "torchvision", "sklearn", "tqdm", "yaml", "matplotlib"):
        found = importlib.util.find_spec(module)
        if found is None or found.loader is None:  # a bare folder of that name is no package
            raise InputError(f"training needs {module}; pip install 'reparam[train]'")


def _add(group: Any, name: str, option: Option, default: Any, shown: bool) -> None:
    flag = "--" + name.replace("_", "-")
    text = option.help if default is None or option.type is bool else f"{option.help} (default: {default})"
    text = text if shown else argparse.SUPPRESS
    if option.type is bool:
        # A switch that is off can only be switched on; but a recipe may have switched it on.
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        return
    kinds: dict[Any, str] = {int: "N", float: "X"}
    group.add_argument(
        flag,
        type=_or_none(option) if default is None else option.type,
        default=argparse.SUPPRESS,
        choices=None if default is None else option.choices,
        metavar=option.metavar or _metavar(option, default, kinds),
        help=text,
    )


def _metavar(option: Option, default: Any, kinds: dict[Any, str]) -> str | None:
    if option.choices is None:
        return kinds.get(option.type, "NAME")
    return "{" + ",".join(option.choices) + "}" if default is None else None


def _or_none(option: Option) -> Callable[[str], Any]:
    """A parser that also takes ``none``, which takes back what a recipe says."""

    def parse(text: str) -> Any:
        if text == "none":
            return None
        if option.choices and text not in option.choices:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(option.choices)}, none")
        return option.type(text)

    parse.__name__ = getattr(option.type, "__name__", "value")
    return parse


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0,1,2") from None
