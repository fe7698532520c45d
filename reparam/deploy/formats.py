"""The file formats of ``reparam.export``: how a recorded program is written, and how its file is run again."""

from __future__ import annotations

import importlib
import importlib.util
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from reparam.errors import InputError, ModelError
from reparam.passes.example import Inputs

_CHATTY = ("torch.onnx", "torch.export", "torch.fx.experimental.symbolic_shapes")
_TRACE = "pkg.torch.onnx.stack_trace"


@dataclass(frozen=True)
class Opened:
    """A file, ready to run.

    Attributes:
        run: inputs to the tensors of the outputs.
        any_batch: whether it takes batches of any size.
        runtime: what runs it, with its version.
        opset: the ONNX opset; None for other formats.
    """

    run: Callable[[Inputs], list[Tensor]]
    any_batch: bool
    runtime: str
    opset: int | None = None


@dataclass(frozen=True)
class Format:
    """One format: what it needs, how it is written and read.

    Attributes:
        packages: modules that writing and reading import.
        on_cpu: whether the network goes to the CPU first.
        write: a program, and the path to write it to.
        open: read the file.
    """

    packages: tuple[str, ...]
    on_cpu: bool
    write: Callable[[ExportedProgram, Path], None]
    open: Callable[[Path], Opened]


def require_packages(name: str) -> None:
    """Refuse a format whose packages are missing.

    Raises:
        InputError: with the command that installs them.
    """
    missing = [package for package in FORMATS[name].packages if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(f'writing {name} needs {", ".join(missing)}: pip install "reparam[export]"')


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's exporters from reporting what they do: they warn about their own insides and print graphs."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ONNX ----------------------------------------------------------------------------------------------------------------


def _write_onnx(program: ExportedProgram, path: Path) -> None:
    try:
        with quiet():
            translated = torch.onnx.export(program, dynamo=True, verbose=False)
    except Exception as error:  # the exporter has many kinds of its own
        reason = reason_of(error)
        raise ModelError(
            f"torch cannot translate the network to ONNX: {reason}; a file that ends in .pt2 needs no translation"
        ) from error
    if translated is None:
        raise ModelError("torch returned no ONNX program; a file that ends in .pt2 needs no translation")
    _tidy(translated.model)
    translated.save(path)


def _tidy(model: Any) -> None:
    """Call the free dimension ``batch``, and drop the stack traces: they name files of this machine."""
    graph = model.graph
    values = [*graph.inputs, *graph.outputs]
    for node in graph.all_nodes():
        node.metadata_props.pop(_TRACE, None)
        values += node.outputs
    symbols = {str(value.shape[0].value) for value in graph.inputs if value.shape and _is_free(value.shape[0])}
    if not symbols:
        return
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, symbols))})\b")
    for value in {id(value): value for value in values if value.shape is not None}.values():
        for axis, size in enumerate(value.shape):
            if _is_free(size):
                value.shape[axis] = pattern.sub("batch", str(size.value))


def _is_free(size: Any) -> bool:
    return not isinstance(size, int) and size.value is not None


def _open_onnx(path: Path) -> Opened:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(inputs: Inputs) -> list[Tensor]:
        arrays = [tensor.detach().cpu().numpy() for tensor in tensors_in(inputs)]
        return [torch.from_numpy(array) for array in session.run(None, dict(zip(names, arrays, strict=True)))]

    model = importlib.import_module("onnx").load(str(path), load_external_data=False)
    return Opened(
        run=run,
        any_batch=any(isinstance(entry.shape[0], str) for entry in session.get_inputs() if entry.shape),
        runtime=f"onnxruntime {runtime.__version__}",
        opset=next((entry.version for entry in model.opset_import if entry.domain == ""), None),
    )


# torch.export --------------------------------------------------------------------------------------------------------


def _write_program(program: ExportedProgram, path: Path) -> None:
    with quiet():
        torch.export.save(program, path)


def _open_program(path: Path) -> Opened:
    with quiet():
        program = torch.export.load(path)
        module = program.module()

    def run(inputs: Inputs) -> list[Tensor]:
        args, kwargs = inputs
        with torch.no_grad(), quiet():
            return outputs_in(module(*args, **kwargs))

    inputs = [node.meta.get("val") for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    return Opened(
        run=run,
        any_batch=any(isinstance(v, Tensor) and v.dim() and isinstance(v.shape[0], torch.SymInt) for v in inputs),
        runtime=f"torch.export, torch {torch.__version__}",
    )


FORMATS = {
    "onnx": Format(("onnx", "onnxscript", "onnxruntime"), True, _write_onnx, _open_onnx),
    "pt2": Format((), False, _write_program, _open_program),
}
"""The formats by name, which is also the ending of their files."""


def refuse_dtypes(name: str, inputs: Inputs, weights: list[Tensor]) -> None:
    """Refuse what a format cannot compute in.

    Raises:
        ModelError: bfloat16 for ONNX, whose runtime takes numpy arrays.
    """
    if name == "onnx" and any(t.dtype == torch.bfloat16 for t in [*weights, *tensors_in(inputs)]):
        raise ModelError("the network is in bfloat16, which onnxruntime does not run on CPUs; export model.float()")


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of nested containers, in their order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def outputs_in(value: Any) -> list[Tensor]:
    """Return what a network returned as a list of tensors; numbers, such as a size, become tensors too."""
    leaves = pytree.tree_leaves(value)
    return [torch.as_tensor(leaf) for leaf in leaves if isinstance(leaf, (Tensor, int, float))]


def reason_of(error: BaseException) -> str:
    """Return, in one line, what started an error of torch: it comes wrapped several times, with pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    where = re.search(r'File "[^"]*?([^"/\\]+)", line (\d+), in \S+\n[ \t]+(\S.*)', text)
    place = f" (at {where[1]}:{where[2]}: {where[3].strip()})" if where else ""
    return (lines[0] if lines else type(error).__name__) + place
