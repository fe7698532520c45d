"""Whether float32 products use TF32 on GPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def tf32(wanted: bool) -> Iterator[None]:
    """Inside this context float32 products use TF32 on GPUs, or do not; torch's default is that convolutions do.

    torch has two sets of switches. Those of old refuse to be read where they contradict the new ones, which both the
    user and torch.compile may have to do with: both sets are made to say the same, and put back.
    """
    switches = _switches()
    before = [switch.fp32_precision for switch in switches]
    matmul = _readable(torch.get_float32_matmul_precision)
    cudnn = _readable(lambda: torch.backends.cudnn.allow_tf32)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = wanted
    for switch in switches[:-1]:
        switch.fp32_precision = "tf32" if wanted else "ieee"
    switches[-1].fp32_precision = "none" if wanted else "ieee"  # only so that it is no contradiction
    try:
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if cudnn is not None:
            torch.backends.cudnn.allow_tf32 = cudnn
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def uses_tf32() -> dict[str, bool]:
    """Return whether products of matrices, and convolutions, use TF32 on a GPU that has it."""
    matmul, convolutions, *_ = _switches()
    return {"matmul": matmul.fp32_precision == "tf32", "cudnn": convolutions.fp32_precision == "tf32"}


def _switches() -> tuple[Any, ...]:
    """The new switches: of GPUs, and that of the CPU, which the old one for products writes as well."""
    backends: Any = torch.backends
    return backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul


def _readable(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:
        return None
