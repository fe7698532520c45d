"""``reparam bench``: the options and what they start. torch and timm wait until a measurement runs."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

from reparam.arguments import MODEL_HELP
from reparam.errors import InputError

_DESCRIPTION = """\
Measure what the library costs beside what it has to cost, and write it as JSON. Jobs run in turn, A B A B, after
rounds of warm-up; times are medians. Weights and images are random, nothing is downloaded."""

_EPILOG = """\
examples:
  reparam bench step --model resnet18 --batch 32 --size 112 --branches orepa
  reparam bench surgery
  reparam bench fold resnet18 repvgg_a0
  reparam bench scale --processes 1,2"""

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
"""What a step can compute in."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the measurements and their options to the parser of ``reparam bench``."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = parser.add_subparsers(title="measurements", metavar="WHAT", required=True)
    _step(kinds)
    _surgery(kinds)
    _fold(kinds)
    _scale(kinds)


def _add(kinds: Any, name: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of one measurement, with the options that all of them have."""
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=description, description=description)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--runs", type=int, default=11, metavar="N", help="measured rounds (default 11)")
    parser.add_argument("--folder", metavar="DIR", help="where the JSON goes (default: benchmarks/results in a "
                        "checkout, else the current folder)")  # fmt: skip
    return parser


def _finish(parser: argparse.ArgumentParser, name: str) -> None:
    defaults = {action.dest: action.default for action in parser._actions if action.dest != "help"}
    parser.set_defaults(run=_runner(name), what=name, defaults=defaults)


def _runner(name: str) -> Callable[[argparse.Namespace], int]:
    def run(options: argparse.Namespace) -> int:
        check_counts(options)
        code: int = importlib.import_module(f"reparam.bench.{name}").run(options)
        return code

    return run


def check_counts(options: argparse.Namespace) -> None:
    """Refuse numbers that are too small to mean anything.

    Raises:
        InputError: names the option, its value and what it could be.
    """
    smallest_batch = 1 if options.what == "fold" else 2  # train mode needs two values for each norm
    for name, lowest in {
        "runs": 1,
        "batch": smallest_batch,
        "size": 1,
        "classes": 2,
        "ratio": 1,
        "calls": 1,
        "threads": 1,
    }.items():
        value = getattr(options, name, None)
        if value is not None and value < lowest:
            raise InputError(f"--{name} must be at least {lowest}, got {value}")


def _step(kinds: Any) -> None:
    parser = _add(kinds, "step", "a training step of GPD against the ideal: a plain student step and a plain wide step")
    add = parser.add_argument
    _add_work(parser, "resnet18")
    add("--branches", action="append", metavar="RECIPE",
        help="a row for GPD with these branches; repeat it, or write orepa,dbb")  # fmt: skip
    add("--teacher", metavar="MODEL", help="a static teacher beside them, with random weights")
    add("--method", default="kd", metavar="NAME", help="with --teacher: the loss against it (default kd)")
    add("--wide-model", metavar="MODEL", help="a row for a network that is as wide as the teacher by its own code")
    add("--side-by-side", action="store_true",
        help="more rows for each recipe, without a wider teacher: merged, and every branch run")  # fmt: skip
    add("--cuda-graph", action="store_true", help="all steps as CUDA graphs")
    add("--no-overlap", action="store_true", help="with --teacher: it answers before the networks in training")
    add("--calls", type=int, metavar="N", help="steps in a row that make one measurement (default: 1, on CUDA 3)")
    add("--no-parts", action="store_true", help="whole steps only, not their parts")
    _finish(parser, "step")


def _surgery(kinds: Any) -> None:
    parser = _add(kinds, "surgery", "plan, expand, extract and fold beside a deepcopy and a trace, and how they grow")
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL",
        help=f"{MODEL_HELP} (default: resnet18 resnet50 vit_small_patch16_224)")  # fmt: skip
    add("--size", type=int, metavar="N", help="height and width of images (default: what the model asks for)")
    add("--batch", type=int, default=32, metavar="N", help="images for the student's view (default 32)")
    add("--large", default="regnety_2560", metavar="MODEL", help="planned on the meta device (default regnety_2560)")
    add("--only", action="append", choices=("models", "growth", "import", "large"), help="a part of it; repeatable")
    _finish(parser, "surgery")


def _fold(kinds: Any) -> None:
    parser = _add(kinds, "fold", "folding: norms left, errors and inference time, beside timm's own and torch.fx's")
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="timm names (default: 24 networks)")
    add("--batch", type=int, default=1, metavar="N", help="images (default 1)")
    _finish(parser, "fold")


def _scale(kinds: Any) -> None:
    parser = _add(kinds, "scale", "training steps in one and several processes: speed and bytes, GPD and baseline")
    add = parser.add_argument
    add("--processes", default="1,2", metavar="N,N,...", help="how many (default 1,2); one is always measured")
    _add_work(parser, "resnet18")
    add("--branches", metavar="RECIPE", help="branches of GPD (default: none)")
    _finish(parser, "scale")


def _add_work(parser: argparse.ArgumentParser, model: str) -> None:
    """Add the options that say what a step works on."""
    add = parser.add_argument
    add("--model", default=model, metavar="MODEL", help=f"the student: {MODEL_HELP} (default {model})")
    add("--ratio", type=int, default=2, metavar="R", help="replicas of every channel (default 2)")
    add("--batch", type=int, default=32, metavar="N", help="images of a process (default 32)")
    add("--size", type=int, default=112, metavar="N", help="their height and width (default 112)")
    add("--channels", type=int, default=3, metavar="N", help="their channels (default 3)")
    add("--classes", type=int, default=1000, metavar="N", help="of the classifier (default 1000)")
    add("--precision", choices=PRECISIONS, default="fp32", help="bf16 and fp16 are automatic mixed precision")
    add("--optimizer", choices=("sgd", "adamw"), default="sgd", help="of all networks (default sgd, momentum 0.9)")
    add("--clip-grad", type=float, default=5.0, metavar="X", help="clipping in all steps, as in training (default 5)")
    add("--compile", action="store_true", help="all networks through torch.compile")
    add("--channels-last", action="store_true", help="memory format of images and convolutions")
