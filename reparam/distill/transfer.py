"""Tensors from the CPU to the device of a run, and what it can hold."""

from __future__ import annotations

import torch
from torch import Tensor


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for the work that is queued there."""
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def finest(device: torch.device) -> torch.dtype:
    """Return the floating-point type for sums and differences on a device: float64, which MPS has not."""
    return torch.float32 if device.type == "mps" else torch.float64
