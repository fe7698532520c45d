"""How surgery grows with the size of a network: one architecture, ten thousand times as many parameters."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import reparam

SIZES = (1e6, 3e6, 1e7, 3e7, 1e8, 3e8, 1e9)
"""Parameters of the networks, about."""

_BYTES_PER_PARAMETER = 60
"""Student, teacher of four times the size, and what is needed on the way."""


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        inner = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(x + inner)


class ResidualNetwork(nn.Module):
    """A stem, eight residual blocks of one width, and a classifier: about ``144 width**2`` parameters.

    Args:
        width: channels of all blocks.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*[_Block(width) for _ in range(8)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[N, 10]`` of images ``[N, 3, H, W]``."""
        return self.head(F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1))


def growth(device: torch.device, runs: int, sizes: Sequence[float] = SIZES) -> dict[str, Any]:
    """Measure plan (on the meta device) and expand without verification over the sizes, and fit exponents.

    Expand stops at the size that the memory of the device no longer holds. An exponent is the slope of the logarithm of
    the time over that of the parameters: 1 is linear growth; a constant part makes it smaller.
    """
    limit = _free_bytes(device) / _BYTES_PER_PARAMETER
    rows: list[dict[str, Any]] = []
    for size in sizes:
        width = max(1, round(math.sqrt(size / 144)))
        with torch.device("meta"):
            blank = ResidualNetwork(width).eval()
        count = sum(parameter.numel() for parameter in blank.parameters())
        image = torch.empty(1, 3, 16, 16, device="meta")
        plan = _median(lambda blank=blank, image=image: reparam.plan(blank, 2, example_input=image), runs, device)  # type: ignore[misc]
        rows.append({"width": width, "parameters": count, "plan_seconds": plan, "expand_seconds": None})
        if count <= limit:
            rows[-1]["expand_seconds"] = _expand_seconds(width, device, runs)
    return {
        "network": "stem, eight residual blocks of two 3x3 convolutions, classifier",
        "sizes": rows,
        "exponents": {name: _exponent(rows, f"{name}_seconds") for name in ("plan", "expand")},
        "expand_stops": "at the first size that needs more memory than is free" if limit < max(sizes) else "nowhere",
    }


def _expand_seconds(width: int, device: torch.device, runs: int) -> float:
    model = ResidualNetwork(width).eval().to(device)
    image = torch.zeros(1, 3, 16, 16, device=device)
    return _median(lambda: reparam.expand(model, 2, example_input=image, verify=False), runs, device)


def _median(run: Callable[[], object], runs: int, device: torch.device) -> float:
    """Return the median time; the first call warms up, and where calls take seconds three have to do."""
    seconds: list[float] = []
    for number in range(runs + 1):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken = time.perf_counter() - started
        seconds += [taken] if number else []
        if number >= 3 and taken > 2:
            break
    return float(f"{statistics.median(seconds):.5g}")


def _exponent(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    """Return the slope of the least squares line through the logarithms, or None for less than two points."""
    points = [(math.log(row["parameters"]), math.log(row[name])) for row in rows if row[name]]
    if len(points) < 2:
        return None
    return round(statistics.linear_regression(*zip(*points, strict=True)).slope, 3)


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 4e9
    line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return 1024.0 * int(line.split()[1])
