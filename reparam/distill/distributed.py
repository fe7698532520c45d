"""One process or many: who this process is, sums over all of them, and norm statistics of the whole batch.

Processes are started by ``torchrun``, which tells each one its number in the environment. Without it there is one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from reparam.errors import InputError, ReparamError, TrainingError

_LOST = ("Connection closed", "Connection reset", "gloo/transport")
"""What gloo says when another process is gone."""


@dataclass(frozen=True)
class Group:
    """The processes of a run.

    Attributes:
        rank: number of this process, from 0.
        local_rank: its number on this machine, which is also the number of its GPU.
        world: how many there are.
        device: where this process computes.
    """

    rank: int
    local_rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of ``value`` over all processes."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag whether it is set in any process."""
        return tuple(bool(value) for value in self.largest(*flags))

    def largest(self, *values: float) -> tuple[float, ...]:
        """Return for each value the largest in any process."""
        if self.world == 1:
            return values
        found = torch.tensor([float(value) for value in values], device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return tuple(found.tolist())

    def decide(self, question: Callable[[], Any]) -> Any:
        """Let the main process answer, and give its answer, or its error, to all.

        Files of a run are asked for in this way: other processes may be on machines that do not see them.
        """
        if self.world == 1:
            return question()
        answer: list[Any] = [None, None]
        if self.main:
            try:
                answer[0] = question()
            except ReparamError as error:
                answer[1] = error
        dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in their order."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def joined(device_name: str) -> Iterator[Group]:
    """Join the processes that torchrun started, and leave them at the end.

    Raises:
        InputError: the device cannot be used, or there are fewer GPUs than processes on this machine.
        TrainingError: another process died.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or dist.is_initialized():
        rank = dist.get_rank() if dist.is_initialized() else 0
        world = dist.get_world_size() if dist.is_initialized() else 1
        device = _local(device_name, world)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield Group(rank, int(os.environ.get("LOCAL_RANK", "0")), world, device)
        return
    device = _local(device_name, world)
    on_cuda = device.type == "cuda"
    dist.init_process_group("nccl" if on_cuda else "gloo", device_id=device if on_cuda else None)
    try:
        yield Group(dist.get_rank(), int(os.environ.get("LOCAL_RANK", "0")), world, device)
    except RuntimeError as error:  # gloo has no class of its own
        if isinstance(error, dist.DistError) or any(sign in str(error) for sign in _LOST):
            reason = str(error).splitlines()[0]
            raise TrainingError(
                f"process {dist.get_rank()} of {world} lost the others ({reason}): one of them has died, see its "
                "message above; the last checkpoint is intact, go on with --resume auto"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def resolve_device(name: str) -> torch.device:
    """Return the device of that name; "auto" prefers a GPU.

    Raises:
        InputError: torch cannot use it here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"--device {name} cannot be used here: {reason}") from error
    return device


def _local(name: str, world: int) -> torch.device:
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if world > 1 and name in ("auto", "cuda") and local < there:
        torch.cuda.set_device(local)  # first of all: who touches another GPU takes memory there until it ends
    device = resolve_device(name)
    if device.type != "cuda" or world == 1:
        return device
    if device.index is not None:
        raise InputError(f"--device {name} names one GPU for {world} processes; say --device cuda, each takes its own")
    if local >= there:
        raise InputError(f"torchrun started more processes on this machine than it has GPUs ({there})")
    return torch.device("cuda", local)


class SyncStatistics(TorchFunctionMode):
    """Inside this context batch norms in train mode use the statistics of all processes' batches.

    It works on the operator, so that modules, functional calls and recorded graphs are treated alike, on every device;
    student, view and teacher keep their layers. Differentiable: gradients pass through the statistics of all processes.
    Every process needs the same number of images.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace ``F.batch_norm`` and leave everything else alone."""
        if function is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    dims = [d for d in range(input.ndim) if d != 1]
    shape = [1, -1, *[1] * (input.ndim - 2)]
    values = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    count = values.numel() // values.shape[1] * dist.get_world_size()
    mean = _summed(values.sum(dims)) / count
    centred = values - mean.view(shape)
    variance = _summed(centred.square().sum(dims)) / count
    with torch.no_grad():
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)
    result = centred * (variance + eps).rsqrt().view(shape)
    result = result if weight is None else result * weight.view(shape)
    result = result if bias is None else result + bias.view(shape)
    return result.to(input.dtype)


class _Summed(torch.autograd.Function):
    """The sum over all processes. The loss of each depends on the summand of each, so gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def _summed(value: Tensor) -> Tensor:
    result: Tensor = _Summed.apply(value)
    return result
