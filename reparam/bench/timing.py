"""The timing core: named jobs in interleaved rounds, and what is said about their times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Job:
    """Something to measure.

    Attributes:
        run: does it once; what it returns is dropped.
        tensors: all that it keeps between two calls (weights, gradients, optimizer state), for its peak memory; asked
            for before each call, since gradients come and go.
    """

    run: Callable[[], object]
    tensors: Callable[[], Iterable[Tensor]] = tuple


@dataclass
class Measured:
    """What was measured of one job.

    Attributes:
        seconds: of one call, one value for each round.
        peak: bytes: what the job keeps plus what a call needs beyond that, the largest of all rounds; None on a CPU.
    """

    seconds: list[float] = field(default_factory=list)
    peak: int | None = None


def interleaved(
    jobs: Mapping[str, Job], runs: int, *, warmup: int = 2, calls: int = 1, device: torch.device | None = None
) -> dict[str, Measured]:
    """Measure jobs in rounds A B C, A B C, ..., so that a machine that slows down does so for all of them.

    Args:
        jobs: by name.
        runs: measured rounds.
        warmup: rounds before those, not measured.
        calls: of a job in each round, one behind the other; the mean counts.
        device: where the jobs compute. On CUDA the time is that between two events on the device, and peak memory is
            measured; on the CPU it is that of ``time.perf_counter``.
    """
    found = {name: Measured() for name in jobs}
    on_cuda = device is not None and device.type == "cuda"
    for number in range(warmup + runs):
        for name, job in jobs.items():
            seconds, peak = _on_cuda(job, calls) if on_cuda else (_on_cpu(job, calls), None)
            if number >= warmup:
                found[name].seconds.append(seconds)
                if peak is not None:
                    found[name].peak = max(peak, found[name].peak or 0)
    return found


def _on_cpu(job: Job, calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        job.run()
    return (time.perf_counter() - started) / calls


def _on_cuda(job: Job, calls: int) -> tuple[float, int]:
    """Return the seconds of a call and its peak memory without what other jobs keep."""
    torch.cuda.synchronize()
    others = torch.cuda.memory_allocated() - nbytes(job.tensors())
    torch.cuda.reset_peak_memory_stats()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        job.run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / calls, torch.cuda.max_memory_allocated() - others


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, each storage counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def kept(network: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Tensor]:
    """Return all tensors that training a network keeps between two steps."""
    parameters = list(network.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return [*parameters, *network.buffers(), *gradients, *(states(optimizer) if optimizer else ())]


def states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the tensors of an optimizer's state."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return [value for value in values if isinstance(value, Tensor)]


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Return median, extremes, quartiles and number of some times, in seconds."""
    times = sorted(values)
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    found = {"median": statistics.median(times), "min": times[0], "max": times[-1]}
    rounded = {name: _short(value) for name, value in found.items()}
    return {**rounded, "quartiles": [_short(low), _short(high)], "runs": len(times)}


def ratio(times: Measured, reference: Measured) -> dict[str, float]:
    """Return how many times as long a job takes as another of the same rounds.

    ``of_medians`` compares the medians; ``median`` is that of the ratios of each round, which a change of the machine's
    speed between rounds does not touch, and ``low`` and ``high`` are their quartiles.
    """
    pairs = spread(a / b for a, b in zip(times.seconds, reference.seconds, strict=True))
    low, high = pairs["quartiles"]
    medians = statistics.median(times.seconds) / statistics.median(reference.seconds)
    return {"of_medians": _short(medians), "median": pairs["median"], "low": low, "high": high}


def _short(value: float) -> float:
    return float(f"{value:.5g}")
