"""``reparam fold`` and ``reparam export``: the options and what they start. torch waits until a command runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam.arguments import add_input_size, add_model, example, load, parameters, require_folder
from reparam.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from reparam.deploy.parity import ExportReport


def add_fold(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``reparam fold`` to ``parser``."""
    parser.description = "Merge what a network computes in several steps into fewer layers, and compare the two."
    add_model(parser)
    add_input_size(parser)
    _add_growth(parser)
    parser.add_argument("--output", metavar="FILE", required=True, help="weight file to write (.safetensors)")
    parser.set_defaults(run=_fold)


def add_export(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``reparam export`` to ``parser``."""
    parser.description = "Write a network as ONNX or as a torch.export program, run the file, and compare the two."
    add_model(parser)
    add_input_size(parser)
    parser.add_argument("--fold", action="store_true", help="fold the network first, as reparam fold does")
    _add_growth(parser)
    parser.add_argument("--output", metavar="FILE", required=True, help="file to write (.onnx or .pt2)")
    parser.set_defaults(run=_export)


def _add_growth(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-growth", action="store_true", help="also merge layers where the result has more parameters"
    )


def _fold(options: argparse.Namespace) -> int:
    if Path(options.output).suffix != ".safetensors":
        raise InputError(
            f"fold writes weights, to a file that ends in .safetensors, not {options.output}; a file that runs "
            "without code is written by: reparam export MODEL --fold --output FILE.onnx"
        )
    require_folder(options.output)
    from reparam.weight_files import save_weights

    model = load(options, options.model, options.checkpoint).eval()
    folded, passed = _folded(model, example(options), options)
    save_weights(folded, options.output)
    print(f"wrote {options.output}")
    return 0 if passed else 1


def _export(options: argparse.Namespace) -> int:
    if options.allow_growth and not options.fold:
        raise InputError("--allow-growth belongs to --fold; leave it out, or give --fold too")
    from reparam.deploy.export import export, resolve

    resolve(options.output)
    model = load(options, options.model, options.checkpoint).eval()
    inputs, passed = example(options), True
    if options.fold:
        inputs = _found(model) if inputs is None else inputs
        model, passed = _folded(model, inputs, options)
    report = export(model, options.output, inputs)
    opset = "" if report.opset is None else f", opset {report.opset}"
    print(f"{parameters(model)} parameters{opset}, takes {_batches(report)}")
    print(report)
    print(f"wrote {options.output} ({_size_of(options.output)})")
    return 0 if report.passed and passed else 1


def _folded(model: nn.Module, inputs: Any, options: argparse.Namespace) -> tuple[nn.Module, bool]:
    """Return the folded network, and whether it computes what the network does; print both reports."""
    from reparam.passes.check import check
    from reparam.passes.fold import fold_with_report

    folded, report = fold_with_report(model, inputs, allow_growth=options.allow_growth)
    print(str(report).replace("pass allow_growth=True", "give --allow-growth"))
    print(f"network {parameters(model)} -> folded {parameters(folded)} parameters")
    parity = check(model, folded.eval(), inputs)
    print(parity)
    return folded, parity.passed


def _found(model: nn.Module) -> Any:
    """Return inputs of the model: those of the folded network, which may no longer say what it takes."""
    from reparam.passes.example import example_for, random_like
    from reparam.passes.skeleton import skeleton_of

    args, _ = random_like(example_for(model, skeleton_of(model), None), "cpu", None, None)
    return args


def _batches(report: ExportReport) -> str:
    if report.any_batch:
        return "batches of any size"
    return f"batches of {report.batches[0]} only" if report.batches else "inputs of these sizes only"


def _size_of(path: str) -> str:
    files = [Path(path), Path(path + ".data")]
    return f"{sum(file.stat().st_size for file in files if file.exists()) / 1e6:.1f} MB"
