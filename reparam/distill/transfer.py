"""Tensors from the CPU to the device of a run, and what it can hold."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for the work that is queued there."""
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


@functools.cache
def side_stream(device: torch.device, purpose: str) -> torch.cuda.Stream | None:
    """Return the stream for a purpose beside the current one; None where a device has none.

    One for all steps: each stream has memory of its own.
    """
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def finest(device: torch.device) -> torch.dtype:
    """Return the floating-point type for sums and differences on a device: float64, which MPS has not."""
    return torch.float32 if device.type == "mps" else torch.float64
