"""A file against the network it was made from: what both compute on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from reparam.deploy.formats import FORMATS, Opened, outputs_in, reason_of, tensors_in
from reparam.errors import ModelError
from reparam.passes import seeds
from reparam.passes.example import Inputs, batch_of
from reparam.passes.skeleton import first_floating_dtype
from reparam.passes.tf32 import tf32
from reparam.passes.torch_modules import without_fast_paths

Pair = tuple[Tensor, Tensor]
"""An output of the network, and the same of the file."""

Run = tuple[Inputs, list[Tensor]]
"""Inputs, and what the network makes of them."""

_TOLERANCES = {torch.float64: 1e-10, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_TOLERANCE = 1e-4
"""Relative tolerance of float32: runtimes fuse and reorder sums. The table has those of the other dtypes."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far the file is from the network.

    Args:
        path: the file.
        format: ``"onnx"`` or ``"pt2"``.
        runtime: what ran the file for the comparison, with its version.
        opset: the ONNX opset; None for other formats.
        any_batch: whether the file takes batches of any size.
        batches: the batch sizes that were compared; empty where the inputs have no common first size.
        max_abs: largest absolute difference of the outputs.
        max_rel: the same relative to the largest output.
        argmax_agreement: share of samples whose largest output is at the same place, in [0, 1].
        tolerance: relative tolerance.
        dtype: the dtype of the weights, in which both ran.
    """

    path: str
    format: str
    runtime: str
    opset: int | None
    any_batch: bool
    batches: tuple[int, ...]
    max_abs: float
    max_rel: float
    argmax_agreement: float
    tolerance: float
    dtype: str

    @property
    def passed(self) -> bool:
        """Whether the relative difference is within the tolerance."""
        return self.max_rel <= self.tolerance

    def __str__(self) -> str:
        sizes = f" on batches of {_joined(self.batches)}" if self.batches else ""
        return (
            f"{'PASS' if self.passed else 'FAIL'}: {self.runtime} against the network in {self.dtype}{sizes}: max abs "
            f"{self.max_abs:.2e}, max rel {self.max_rel:.2e} (tolerance {self.tolerance:.0e}); argmax agreement "
            f"{self.argmax_agreement:.1%}"
        )


def compared(model: nn.Module, file: Path, name: str, inputs: Inputs, target: Path) -> ExportReport:
    """Run a network and a file that holds it, and report how far they are apart; messages say ``target``.

    Raises:
        ModelError: the file is damaged, or its runtime cannot run it on these inputs.
    """
    try:
        opened = FORMATS[name].open(file)
    except Exception as error:  # every runtime has kinds of its own
        raise ModelError(f"{target}: the file cannot be opened again: {reason_of(error)}") from error
    runs = _runs(model, inputs, opened.any_batch, target)
    pairs = _pairs(runs, opened, target)
    max_abs, max_rel = _differences(pairs)
    dtype = first_floating_dtype(model) or torch.float32
    return ExportReport(
        path=str(target),
        format=name,
        runtime=opened.runtime,
        opset=opened.opset,
        any_batch=opened.any_batch,
        batches=tuple(size for size in (batch_of(sample) for sample, _outputs in runs) if size is not None),
        max_abs=max_abs,
        max_rel=max_rel,
        argmax_agreement=_agreement(pairs),
        tolerance=_TOLERANCES.get(dtype, _TOLERANCE),
        dtype=str(dtype).removeprefix("torch."),
    )


def seeded(model: nn.Module) -> AbstractContextManager[None]:
    """Draw the same numbers in every call, and leave the state of the generators alone."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return seeds.seeded(0, device)


def rows(value: Tensor, batch: int | None) -> Tensor:
    """Return as many samples of a tensor, in turn; floating point numbers are drawn anew."""
    if batch is not None and value.dim():
        value = value[torch.arange(batch, device=value.device) % max(value.shape[0], 1)]
    return torch.randn_like(value) if value.is_floating_point() or value.is_complex() else value


def _sizes(batch: int | None, free: bool) -> list[int | None]:
    """Return the batch sizes to compare: that of the recording, and where it is free a single sample and more."""
    return [batch] if batch is None or not free else list(dict.fromkeys((batch, 1, batch + 3)))


def _resized(inputs: Inputs, batch: int | None) -> Inputs:
    resized: Inputs = pytree.tree_map(lambda v: rows(v, batch) if isinstance(v, Tensor) else v, inputs)
    return resized


def _runs(model: nn.Module, inputs: Inputs, free: bool, target: Path) -> list[Run]:
    """Run the network on samples of every size, except for those that its own code refuses."""
    batch = batch_of(inputs)
    with seeded(model):
        samples = [_resized(inputs, size) for size in _sizes(batch, free)]
    runs: list[Run] = []
    for sample in samples:
        try:
            with torch.no_grad(), without_fast_paths(), tf32(False):
                runs.append((sample, outputs_in(model(*sample[0], **sample[1]))))
        except Exception as error:
            if not runs:
                raise ModelError(
                    f"{target}: the network does not run on {_shapes(sample)}: {reason_of(error)}"
                ) from error
    return runs


def _pairs(runs: Sequence[Run], opened: Opened, target: Path) -> list[Pair]:
    """Run the file on the same samples and return the outputs side by side."""
    pairs: list[Pair] = []
    for inputs, ours in runs:
        try:
            with torch.no_grad(), tf32(False):
                theirs = opened.run(inputs)
        except Exception as error:
            reason = reason_of(error)
            raise ModelError(f"{target}: {opened.runtime} cannot run it on {_shapes(inputs)}: {reason}") from error
        if [t.shape for t in ours] != [t.shape for t in theirs]:
            raise ModelError(
                f"{target}: the network returns {[tuple(t.shape) for t in ours]}, and the file "
                f"{[tuple(t.shape) for t in theirs]}; return tensors only"
            )
        pairs += zip(ours, theirs, strict=True)
    return pairs


def _shapes(inputs: Inputs) -> str:
    return "inputs of " + ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(inputs))


def _differences(pairs: Sequence[Pair]) -> tuple[float, float]:
    worst = relative = 0.0
    for ours, theirs in pairs:
        a, b = ours.detach().cpu().double(), theirs.detach().cpu().double()
        finite = a.isfinite()
        if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()) or not bool(b[finite].isfinite().all()):
            return math.inf, math.inf
        difference = float((a - b)[finite].abs().max()) if finite.any() else 0.0
        scale = float(a[finite].abs().max()) if finite.any() else 0.0
        worst = max(worst, difference)
        relative = max(relative, difference / scale if scale > 0 else difference)
    return worst, relative


def _agreement(pairs: Sequence[Pair]) -> float:
    """Return the share of samples (and positions) whose largest value along the second dimension is at one place."""
    both = [(a.detach().cpu().double(), b.detach().cpu().double()) for a, b in pairs if a.dim() > 1 and a.numel()]
    same = torch.cat([(a.argmax(1) == b.argmax(1)).flatten() for a, b in both] or [torch.ones(1, dtype=torch.bool)])
    return float(same.double().mean())


def _joined(sizes: Sequence[int]) -> str:
    *some, last = map(str, sizes)
    return f"{', '.join(some)} and {last}" if some else last
