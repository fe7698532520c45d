"""The command line: ``reparam plan | expand | extract | check | fold | export | train | evaluate | ...``.

Each command is a thin shell around one public function. Errors that reparam raises itself are printed as
``error: ...`` with exit code 2; a check that fails exits with 1. torch and timm are imported by the command that
needs them, so ``reparam --help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam.arguments import (
    MODEL_HELP,
    Parser,
    add_building,
    add_input_size,
    add_model,
    example,
    load,
    parameters,
    require_folder,
)
from reparam.deploy import command as deploy
from reparam.errors import FormatError, InputError, ReparamError, StoppedError

if TYPE_CHECKING:
    from torch import nn

    from reparam.passes.plan import Plan

_EPILOG = """\
examples:
  reparam plan resnet18 --ratio 2
  reparam plan resnet18 --ratio "layer4.*=4" "*=2"
  reparam expand resnet18 --ratio 2 --output teacher.safetensors
  reparam extract teacher.safetensors resnet18 --output student.safetensors
  reparam check resnet18 teacher.safetensors --checkpoint-a student.safetensors
  reparam fold resnet18 --checkpoint student.safetensors --output folded.safetensors
  reparam export resnet18 --checkpoint student.safetensors --fold --output student.onnx
  reparam train
  reparam coverage resnet18 convnext_atto
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 fine, 1 a failed check, 2 bad input."""
    arguments = _spread_entries(sys.argv[1:] if argv is None else argv)
    parser = build_parser(train_options=arguments[:1] == ["train"])
    try:
        options = parser.parse_args(arguments)
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader of our output has gone (`reparam plan ... | head`); keep the shutdown from complaining again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except StoppedError as error:
        print(error, file=sys.stderr)
        return 143
    except (ReparamError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def build_parser(*, train_options: bool = True) -> argparse.ArgumentParser:
    """Return the parser; ``train_options=False`` leaves out those of ``train``, whose module imports torch."""
    parser = Parser(
        prog="reparam",
        description="Expand a network exactly into a larger teacher, train both, extract the student.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_plan(commands)
    _add_expand(commands)
    _add_extract(commands)
    _add_check(commands)
    deploy.add_fold(commands.add_parser("fold", help="write a model with fewer layers: same function, less to compute"))
    deploy.add_export(commands.add_parser("export", help="write a model as a file that runs without its code"))
    train = commands.add_parser("train", help="train a student and its teacher together, and extract the student")
    if train_options:
        command = importlib.import_module("reparam.distill.command")
        command.add_arguments(train)
        train.set_defaults(run=command.run)
    _add_evaluate(commands.add_parser("evaluate", help="measure the networks of a training run again, with parity"))
    coverage = commands.add_parser("coverage", help="plan, expand, verify and extract a list of models, and report")
    importlib.import_module("reparam.coverage.command").add_arguments(coverage)
    bench = commands.add_parser("bench", help="measure steps of training, surgery and folding, and write JSON")
    importlib.import_module("reparam.bench.command").add_arguments(bench)
    return parser


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    def run(options: argparse.Namespace) -> int:
        code: int = importlib.import_module("reparam.distill.evaluation").run(options)
        return code

    parser.description = (
        "Measure the networks of a run again, from its files: the student as trained, extracted and folded, the "
        "dynamic teacher, with raw and with averaged weights, in one table with parity."
    )
    parser.add_argument("folder", metavar="RUN", help="output folder of reparam train, or one of its checkpoints")
    parser.add_argument("--data", metavar="SPEC", help="test data (default: that of the run)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="folder data: images at a time (default: that of the run)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON as well")
    parser.add_argument("--output", metavar="DIR", help="write the networks of a checkpoint into this new folder")
    parser.add_argument(
        "--tsne",
        metavar="FILE",
        help="draw the logits of student and teachers by t-SNE, as PNG: 10 classes, 2000 images",
    )
    parser.set_defaults(run=run)


class _Version(argparse.Action):
    """Print the version; the import waits until it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **_: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import reparam

        print(f"reparam {reparam.__version__}")
        parser.exit()


# Options -------------------------------------------------------------------------------------------------------------


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser("plan", help="show what would be widened, what not, and why; change nothing")
    add_model(parser, checkpoint=False)
    _add_widening(parser)
    parser.add_argument("--json", metavar="FILE", help="write the plan as JSON ('-': print it instead of the table)")
    parser.add_argument("--dot", metavar="FILE", help="write the plan as a graph in graphviz's DOT language")
    parser.add_argument("--svg", metavar="FILE", help="draw that graph (needs graphviz; writes DOT text without it)")
    parser.add_argument("--png", metavar="FILE", help="the same as PNG")
    parser.set_defaults(run=_plan)


def _add_expand(commands: Any) -> None:
    parser = commands.add_parser("expand", help="write the teacher of a model: same function, more parameters")
    add_model(parser)
    _add_widening(parser)
    parser.add_argument("--noise", type=float, default=0.25, help="size of the exact symmetry breaking (default 0.25)")
    parser.add_argument("--no-verify", action="store_true", help="skip the node by node comparison with the student")
    parser.add_argument("--output", metavar="FILE", required=True, help="teacher file to write (safetensors)")
    parser.set_defaults(run=_expand)


def _add_extract(commands: Any) -> None:
    parser = commands.add_parser("extract", help="read a teacher and write the student inside it")
    parser.add_argument("teacher", metavar="TEACHER", help="teacher file that expand or train wrote")
    add_model(parser, checkpoint=False)
    parser.add_argument("--output", metavar="FILE", required=True, help="weight file to write (safetensors)")
    parser.set_defaults(run=_extract)


def _add_check(commands: Any) -> None:
    parser = commands.add_parser("check", help="compare two models on random inputs; exit code 1 if they differ")
    parser.add_argument("model", metavar="MODEL_A", help=MODEL_HELP)
    parser.add_argument("other", metavar="MODEL_B", help="the same, or a teacher file made from MODEL_A")
    parser.add_argument("--checkpoint-a", metavar="FILE", help="weights of MODEL_A: safetensors or torch.save")
    parser.add_argument("--checkpoint-b", metavar="FILE", help="weights of MODEL_B")
    add_building(parser)
    add_input_size(parser)
    parser.set_defaults(run=_check)


def _add_widening(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ratio", type=_ratio, action="append", metavar="R",
                        help="replicas of every channel (default 2), or PATTERN=R ... for parts of the network: module "
                        "names, globs, or re: and a regular expression; the first that matches decides")  # fmt: skip
    parser.add_argument("--ignore", nargs="+", action="extend", default=[], metavar="PATTERN",
                        help="module names or globs that stay as they are")  # fmt: skip
    parser.add_argument(
        "--heads",
        choices=("auto", "count", "width"),
        default="auto",
        help="what attention widens: the number of heads or their width (default: what widens more)",
    )
    parser.add_argument("--branches", action="append", metavar="RECIPE",
                        help="branches beside layers: orepa, acb, dbb, repvgg, mobileone, expandnet, with options "
                        "behind a colon (orepa:branches=4); or PATTERN=RECIPE ... for parts of the network, none for "
                        "no branches")  # fmt: skip
    parser.add_argument(
        "--init",
        choices=("student", "scratch"),
        default="student",
        help="how branches start: at scale 0, so that the function stays (default), or with the recipe's own scales",
    )
    add_input_size(parser)


def _ratio(text: str) -> int | tuple[str, int]:
    """Read a ratio for all layers, or ``PATTERN=R``."""
    pattern, equals, number = text.rpartition("=")
    try:
        return (pattern, int(number)) if equals else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"invalid int value: {number!r}; a ratio is an int, or PATTERN=R such as 'layer4.*=4'"
        ) from None


def _spread_entries(arguments: Sequence[str]) -> list[str]:
    """Give each of ``--ratio A=2 B=3`` an option of its own: one that takes many would take a MODEL behind them too."""
    result: list[str] = []
    inside = ""
    for argument in arguments:
        if inside and "=" in argument and not argument.startswith("-"):
            result.append(inside)
        else:
            last = result[-1] if result else ""
            flag = last if last in _ENTRIES else argument.partition("=")[0]
            inside = flag if flag in _ENTRIES and (flag == last or "=" in argument) else ""
        result.append(argument)
    return result


_ENTRIES = ("--ratio", "--branches")
"""Options that take one value for all, or any number of PATTERN=VALUE."""


def _branches(options: argparse.Namespace) -> str | dict[str, str | None] | None:
    """Return the recipe, or those of the layers in their order."""
    if not options.branches:
        return None
    from reparam.ops.recipes import names

    entries: dict[str, str | None] = {}
    for word in options.branches:
        pattern, equals, recipe = word.partition("=")
        if not equals or pattern.partition(":")[0] in names():
            pattern, recipe = "*", word
        if pattern in entries:
            raise InputError(f"--branches has two recipes for {pattern!r}; leave one out")
        entries[pattern] = None if recipe == "none" else recipe
    return entries["*"] if list(entries) == ["*"] else entries


def _ratios(options: argparse.Namespace) -> int | dict[str, int]:
    """Return the ratio, or those of the layers in their order."""
    given = options.ratio or [2]
    entries = [item for item in given if isinstance(item, tuple)]
    plain = [item for item in given if not isinstance(item, tuple)]
    if not entries:
        return int(plain[-1])
    if plain:
        raise InputError(f"--ratio {plain[-1]} is for all layers; beside PATTERN=R write '*={plain[-1]}', as the last")
    names = [name for name, _number in entries]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"--ratio has {twice!r} twice; the first entry that matches a layer decides")
    return dict(entries)


# Commands ------------------------------------------------------------------------------------------------------------


def _plan(options: argparse.Namespace) -> int:
    import reparam

    model = load(options, options.model)
    plan = reparam.plan(model, _ratios(options), **_widening(options))
    print(plan.to_json() if options.json == "-" else plan)
    if options.json and options.json != "-":
        _write(options.json, plan.to_json())
    if options.dot:
        _write(options.dot, plan.to_dot())
    for kind in ("svg", "png"):
        if getattr(options, kind):
            _draw(plan, kind, getattr(options, kind))
    return 0


def _widening(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "branches": _branches(options),
        "init": options.init,
        "example_input": example(options),
        "ignore": tuple(options.ignore),
        "heads": options.heads,
    }


def _expand(options: argparse.Namespace) -> int:
    import reparam

    require_folder(options.output)
    model = load(options, options.model, options.checkpoint)
    ratio = _ratios(options)
    teacher = reparam.expand(
        model,
        ratio,
        noise=options.noise,
        verify=not options.no_verify,
        **_widening(options),
    )
    reparam.save(teacher, options.output)
    print(f"student {parameters(model)} -> teacher {parameters(teacher)} parameters, ratio {ratio}")
    what = "what the student does" if options.init == "student" else "what the student with branches does"
    print(f"the teacher computes {what}: every node compared in float64"
          if not options.no_verify else "the teacher computes an unverified function (--no-verify)")  # fmt: skip
    print(f"wrote {options.output}")
    return 0


def _extract(options: argparse.Namespace) -> int:
    import reparam
    from reparam.weight_files import save_weights

    require_folder(options.output)
    teacher = reparam.load(options.teacher, load(options, options.model))
    student = reparam.extract(teacher)
    save_weights(student, options.output)
    print(f"teacher {parameters(teacher)} -> student {parameters(student)} parameters")
    print(f"wrote {options.output}")
    return 0


def _check(options: argparse.Namespace) -> int:
    import reparam

    if options.ema and not (options.checkpoint_a or options.checkpoint_b):
        raise InputError("--ema chooses the averaged weights of a checkpoint, and no checkpoint was given")
    model = load(options, options.model, options.checkpoint_a, ema=options.ema)
    if options.other.endswith(".safetensors"):
        if options.checkpoint_b:
            raise InputError(f"{options.other} is a teacher file with its own weights; leave out --checkpoint-b")
        other: nn.Module = _load_teacher(options.other, model, options.model)
    else:
        other = load(options, options.other, options.checkpoint_b, ema=options.ema)
    report = reparam.check(model.eval(), other.eval(), example_input=example(options))
    print(report)
    return 0 if report.passed else 1


# Helpers -------------------------------------------------------------------------------------------------------------


def _load_teacher(path: str, model: nn.Module, spec: str) -> nn.Module:
    """Read a teacher; where the file holds plain weights instead, say how those are compared."""
    import reparam
    from reparam.weight_files import read_weights

    try:
        return reparam.load(path, model)
    except FormatError as error:
        try:
            read_weights(path)
        except FormatError:
            raise error from None
        raise FormatError(
            f"{error}; to compare plain weights: reparam check {spec} {spec} --checkpoint-b {path}"
        ) from error


def _write(path: str, text: str) -> None:
    Path(path).write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)


def _draw(plan: Plan, kind: str, path: str) -> None:
    if Path(path).suffix != f".{kind}":
        raise InputError(f"--{kind} writes a file that ends in .{kind}, not {path}")
    try:
        written = plan.draw(path)
    except subprocess.CalledProcessError as error:
        raise ReparamError(
            f"graphviz could not draw {path}: {error.stderr.decode(errors='replace').strip()}"
        ) from error
    if written != Path(path):
        print(f"graphviz's `dot` is not installed, so {path} was not drawn; its source follows", file=sys.stderr)
    print(f"wrote {written}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
