"""``export``: a network as a file that other programs run, compared with the network after it was written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from reparam.deploy.formats import FORMATS, quiet, reason_of, refuse_dtypes, require_packages, tensors_in
from reparam.deploy.parity import ExportReport, compared, rows, seeded
from reparam.errors import CaptureError, FormatError, InputError, ModelError
from reparam.passes.example import Inputs, batch_of, example_for, normalise
from reparam.passes.skeleton import named_tensors, rebuild, skeleton_of
from reparam.passes.teacher import Teacher
from reparam.passes.torch_modules import without_fast_paths
from reparam.passes.validate import check_eval, check_model
from reparam.passes.view import StudentView


def export(
    model: nn.Module, path: str | os.PathLike[str], example_input: Any = None, format: str | None = None
) -> ExportReport:
    """Write a network as a file that runs without its code, run the file, and compare the two.

    The batch size is left free where the network's code allows it; the report says whether it is. The file appears
    whole or not at all, and also where the comparison fails: look at ``report.passed``.

    Args:
        model: an extracted or folded network in eval mode; it is not changed. Teachers are refused.
        path: the file to write, in a folder that exists. An ONNX model of more than 1.5 GB keeps its weights in a
            second file, ``path`` and ``.data``.
        example_input: see ``reparam.plan``; found where None. For the comparison its floating point tensors are
            random, the others as given.
        format: ``"onnx"`` (run by onnxruntime in the comparison) or ``"pt2"`` (a program of ``torch.export``, read
            again for the comparison). None follows the ending of the path.

    Raises:
        InputError: an unknown format, a folder that is missing or cannot be written, missing packages, or an
            example that the network does not accept.
        ModelError: a teacher, a network in train mode, NaN or Inf among the weights, or operators that the format or
            its runtime lacks.
        CaptureError: ``torch.export`` cannot record the network.

    Example:
        >>> reparam.export(reparam.extract(teacher).eval(), "student.onnx")  # doctest: +SKIP
    """
    target, name = resolve(path, format)
    _check(model)
    with seeded(model):
        network, inputs = _prepared(model, example_input, name)
    program = _record(network, inputs)
    with _beside(target) as folder:
        written = folder / target.name
        FORMATS[name].write(program, written)
        report = compared(network, written, name, inputs, target)
        # The weights of a large ONNX model come first: a model without them would be worse than the old one.
        for file in sorted(folder.iterdir(), key=lambda file: file == written):
            os.replace(file, target.with_name(file.name))
    return report


def compare(
    model: nn.Module, path: str | os.PathLike[str], example_input: Any = None, format: str | None = None
) -> ExportReport:
    """Compare a file that ``export`` wrote with a network; arguments as there, nothing is written.

    Give it files of your own only: ``torch.export.load`` may unpickle what it reads.

    Raises:
        FormatError: the file is missing.
        ModelError: the file is damaged, or its runtime cannot run it on these inputs.
        InputError: see `export`.
    """
    target, name = resolve(path, format)
    if not target.is_file():
        raise FormatError(f"{target} does not exist")
    _check(model)
    with seeded(model):
        network, inputs = _prepared(model, example_input, name)
    return compared(network, target, name, inputs, target)


def resolve(path: str | os.PathLike[str], format: str | None = None) -> tuple[Path, str]:
    """Return the path and the name of its format, once everything but the network has been checked.

    Raises:
        InputError: see `export`.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"path must name a file, not be a {type(path).__name__}")
    target = Path(path)
    name = _format_of(target, format)
    if not target.parent.is_dir():
        raise InputError(f"cannot write {target}: there is no folder {target.parent}; make it first")
    if target.is_dir():
        raise InputError(f"cannot write {target}: it is a folder; name a file in it, such as {target / 'model.onnx'}")
    require_packages(name)
    with _beside(target):
        pass
    return target, name


def _format_of(target: Path, format: str | None) -> str:
    ending = target.suffix.removeprefix(".")
    if format is None and ending not in FORMATS:
        raise InputError(
            f"{target} does not end in .onnx (ONNX) or .pt2 (torch.export); rename it, or say format='onnx' or 'pt2'"
        )
    if format is not None and format not in FORMATS:
        raise InputError(f"format must be 'onnx', 'pt2' or None, not {format!r}")
    if format is not None and ending in FORMATS and ending != format:
        raise InputError(f"{target} ends in .{ending} and format is {format!r}; leave format out, or rename the file")
    return format or ending


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Make a folder beside the target, for files that move to their place once they are whole."""
    try:
        folder = tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}; choose another folder") from error
    with folder as name:
        yield Path(name)


# The network ---------------------------------------------------------------------------------------------------------


def _check(model: Any) -> None:
    """Refuse what cannot be exported; see `export`."""
    if isinstance(model, (Teacher, StudentView)):
        raise ModelError(
            f"the model ({type(model).__name__}) is a teacher or a view of one; extract its student first: "
            "reparam.export(reparam.extract(teacher).eval(), path)"
        )
    check_model(model)
    empty = next((path for path, tensor in named_tensors(model) if tensor.device.type == "meta"), None)
    if empty is not None:
        raise ModelError(f"{empty} is on the meta device and has no values; load weights first")
    check_eval(model, ", and the file would keep its dropout and batch statistics")


def _prepared(model: nn.Module, example: Any, name: str) -> tuple[nn.Module, Inputs]:
    """Return the network that is written, and inputs of real values, with two samples where it can."""
    shapes = example_for(model, skeleton_of(model), example)
    given = shapes if example is None else normalise(example)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    device = torch.device("cpu") if FORMATS[name].on_cpu else device

    def real(shape: Any, value: Any) -> Any:
        if not isinstance(shape, Tensor):
            return shape
        if value.device.type == "meta":
            value = torch.zeros(value.shape, dtype=value.dtype)
        return rows(value.to(device), shape.shape[0] if shape.dim() else None)

    inputs: Inputs = pytree.tree_map(real, shapes, given)
    refuse_dtypes(name, inputs, list(model.parameters()))
    return _twin(model, device), inputs


def _twin(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy on the same tensors, if they are on the device: forward passes may leave things in a module."""
    return rebuild(model, lambda _name, tensor: tensor.to(device))


def _record(model: nn.Module, inputs: Inputs) -> ExportedProgram:
    """Record a network for every batch size, or for the one of the inputs if its code allows no other."""
    if batch_of(inputs) is not None:
        shapes = ShapesCollection()
        for tensor in tensors_in(inputs):
            shapes[tensor] = {0: Dim("batch", min=1)}
        try:
            return _recorded(model, inputs, shapes)
        except Exception:
            pass  # the second attempt tells whether the batch is to blame
    try:
        return _recorded(model, inputs, None)
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot record {type(model).__name__}: {reason_of(error)}; a network whose code branches on "
            "data has to be rewritten before it can be exported (torch.cond, torch.where)"
        ) from error


def _recorded(model: nn.Module, inputs: Inputs, shapes: ShapesCollection | None) -> ExportedProgram:
    args, kwargs = inputs
    model = _twin(model, tensors_in(inputs)[0].device)
    with torch.no_grad(), without_fast_paths(), quiet():
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
