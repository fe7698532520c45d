"""What a job has to compute and to move, and what the device can do of both in a second."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

HOW_BYTES_ARE_COUNTED = (
    "each operator of an eager step reads its inputs and writes its outputs once, views nothing; caches and fused "
    "operators move less, so a share above 1 is possible"
)
"""Stands in the JSON beside the counts."""

_SMALL, _LARGE = (1024, 2**24), (8192, 2**28)
"""Side of the matrices and values of the copy: larger than the caches, and no more than that on a CPU."""

_DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


class _Traffic(TorchDispatchMode):
    """Adds up the bytes that operators read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not _is_view(func) and func.overloadpacket not in (torch.ops.aten.empty, torch.ops.aten.empty_strided):
            values = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor)]
            self.bytes += sum(value.numel() * value.element_size() for value in values)
        return result


def _is_view(func: Any) -> bool:
    aliases = [value.alias_info for value in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def count(run: Callable[[], object]) -> dict[str, int]:
    """Run something once, eagerly and untimed, and return its multiply-adds and the bytes that it moves.

    Multiply-adds are those of matrix products, convolutions and attention, forward and backward, half of what torch's
    flop counter says. Bytes: see `HOW_BYTES_ARE_COUNTED`.
    """
    flops, traffic = FlopCounterMode(display=False), _Traffic()
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"), flops, traffic:
        # Nothing is compiled here; the hooks that torch warns of are the counter's own.
        warnings.filterwarnings("ignore", message=".*global hooks on modules")
        run()
    return {"multiply_adds": flops.get_total_flops() // 2, "bytes_moved": traffic.bytes}


def limits(device: torch.device, precision: str) -> dict[str, Any]:
    """Measure what the device can do: a square matrix product at ``precision``, and a copy.

    The best of several runs counts: these are ceilings. TF32 has to be switched already.
    """
    side, count = _LARGE if device.type == "cuda" else _SMALL
    left, right = (torch.randn(side, side, device=device).to(_DTYPES[precision]) for _ in range(2))
    source = torch.empty(count, device=device)
    target = torch.empty_like(source)
    product = _fastest(lambda: torch.mm(left, right), device)
    copy = _fastest(lambda: target.copy_(source), device)
    return {
        "flops_per_second": float(f"{2 * side**3 / product:.4g}"),
        "bytes_per_second": float(f"{2 * source.nbytes / copy:.4g}"),
        "how": f"fastest of 10: product of {side} x {side} matrices in {precision}, copy of {source.nbytes:,} bytes",
    }


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def shares(counts: dict[str, int], seconds: float, ceiling: dict[str, Any]) -> dict[str, float]:
    """Return which share of the device's peak, bandwidth and roofline (the larger of both) a job reaches."""
    peak = 2 * counts["multiply_adds"] / ceiling["flops_per_second"] / seconds
    bandwidth = counts["bytes_moved"] / ceiling["bytes_per_second"] / seconds
    found = {"peak": peak, "bandwidth": bandwidth, "roofline": max(peak, bandwidth)}
    return {f"share_of_{name}": round(value, 4) for name, value in found.items()}
