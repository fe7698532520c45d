"""Steps of a GPU that are recorded once and then repeated: CUDA graphs.

A CUDA graph repeats kernels on the same memory. So all that changes from step to step lies in tensors that stay where
they are: the batch is copied into them, the learning rates are filled in. What Python decided while the step was
recorded holds for all repetitions; where it may decide otherwise, another recording is made.
"""

from __future__ import annotations

import functools
import pickle
import random
from collections.abc import Callable, Hashable, Mapping

import numpy as np
import torch
from torch import Tensor

from reparam.distill.config import TrainConfig
from reparam.distill.distributed import Group
from reparam.distill.meter import Meter
from reparam.distill.methods.base import Batch
from reparam.distill.optim import make_recordable
from reparam.distill.transfer import side_stream
from reparam.errors import InputError

WARM = 3
"""Calls before a recording: libraries make their handles and choose their kernels in the first ones."""


def check_recordable(config: TrainConfig, group: Group) -> None:
    """Refuse ``--cuda-graph`` where it cannot work.

    Raises:
        InputError: there is no GPU, or more than one process.
    """
    if not config.cuda_graph:
        return
    if group.device.type != "cuda":
        raise InputError(f"--cuda-graph records work of a CUDA GPU, and this run is on {group.device}; leave it out")
    if group.world > 1:
        raise InputError(
            f"--cuda-graph records the steps of one process, and there are {group.world}; leave it out, or use one GPU"
        )


class Recording:
    """Work without arguments that is recorded after a few calls, and repeated from then on.

    Args:
        run: the work; it reads and writes the same tensors each time.
        device: where.
        what: the work in words, for errors.
        lasting: returns the tensors that live on from one call to the next, by name.
    """

    def __init__(
        self,
        run: Callable[[], object],
        device: torch.device,
        what: str,
        lasting: Callable[[], Mapping[str, Tensor]] = dict,
    ) -> None:
        self._run, self._what, self._lasting = run, what, lasting
        self._calls = 0
        self._stream = side_stream(device, "recording")
        self._replay: Callable[[], None] | None = None

    def __call__(self) -> None:
        """Do the work.

        Raises:
            InputError: it cannot be recorded.
        """
        if self._replay is None:
            if self._calls < WARM:
                self._calls += 1
                beside(self._run, self._stream)
                return
            self._replay = self._recorded()
        self._replay()

    def _recorded(self) -> Callable[[], None]:
        way_out = "leave out --cuda-graph"
        drawn, places = _drawn_on_cpu(), _places(self._lasting())
        try:
            replay = recorded(self._run, self._stream)
        except RuntimeError as error:
            # The end of a capture that failed raises as well, and only the first error says what it was.
            reason = str(error.__context__ or error).splitlines()[0]
            raise InputError(f"--cuda-graph: {self._what} cannot be recorded ({reason}); {way_out}") from error
        if drawn != _drawn_on_cpu():
            raise InputError(
                f"--cuda-graph: {self._what} draws random numbers on the CPU, which a recording would repeat; {way_out}"
            )
        moved = [name for name, place in _places(self._lasting()).items() if places.get(name) != place]
        if moved:
            raise InputError(
                f"--cuda-graph: {self._what} puts a new tensor in the place of {moved[0]}, and a recording would start "
                f"from the old one each time; change it in place, or {way_out}"
            )
        return replay


def beside(run: Callable[[], object], stream: torch.cuda.Stream | None) -> None:
    """Run on another stream, between what is queued on the current one now and later."""
    if stream is None:
        run()
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        run()
    current.wait_stream(stream)


def recorded(run: Callable[[], object], stream: torch.cuda.Stream | None) -> Callable[[], None]:
    """Return what repeats the work of ``run`` on a GPU; nothing is computed yet."""
    graph = torch.cuda.CUDAGraph()
    # The outer context also ends if the inner one fails to. Other threads go on meanwhile: one of them pins memory.
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        run()
    return graph.replay


def _places(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def _drawn_on_cpu() -> bytes:
    """Where the generators of the CPU stand."""
    return pickle.dumps((torch.get_rng_state().numpy(), random.getstate(), np.random.get_state()))


class RecordedStep:
    """The step of an engine, recorded for each phase of a run.

    Args:
        learn: takes the step: ``(batch, epoch, meter)``.
        optimizer: the one that steps in it.
        blank: makes an empty meter.
        phase: what of the epoch ``learn`` depends on.
        lasting: returns the tensors of the networks and losses by name; those of the optimizer are known.
    """

    def __init__(
        self,
        learn: Callable[[Batch, int, Meter], None],
        optimizer: torch.optim.Optimizer,
        blank: Callable[[], Meter],
        phase: Callable[[int], Hashable],
        lasting: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        self._learn, self._optimizer, self._phase = learn, make_recordable(optimizer), phase
        self._of_networks = lasting
        self._meter = blank()
        self._place: Hashable = None
        self._batch: Batch | None = None
        self._rates: list[Tensor] = []
        self._recording: Recording | None = None

    def __call__(self, batch: Batch, epoch: int, meter: Meter) -> None:
        """Take a step."""
        place = self._phase(epoch), *(None if value is None else _layout(value) for value in _tensors(batch))
        if self._recording is None or place != self._place:
            self.forget()
            self._place = place
            self._begin(batch, epoch)
        assert self._batch is not None and self._recording is not None
        for kept, value in zip(_tensors(self._batch), _tensors(batch), strict=True):
            if kept is not None and value is not None:
                kept.copy_(value)
        groups = self._optimizer.param_groups
        numbers = [group["lr"] for group in groups]
        for group, rate, number in zip(groups, self._rates, numbers, strict=True):
            group["lr"] = rate.fill_(number)
        try:
            self._recording()
        finally:
            for group, number in zip(groups, numbers, strict=True):
                group["lr"] = number
        meter.take(self._meter)

    def forget(self) -> None:
        """Record anew: tensors of the step were replaced."""
        self._recording = self._batch = None

    def _begin(self, batch: Batch, epoch: int) -> None:
        kept = self._batch = Batch(*(None if value is None else torch.empty_like(value) for value in _tensors(batch)))  # type: ignore[arg-type]
        device = batch.images.device
        # On a GPU torch's fused kernels read a rate in float32, whatever the parameters are.
        kind = torch.float32 if device.type == "cuda" else torch.float64
        self._rates = [torch.zeros((), dtype=kind, device=device) for _ in self._optimizer.param_groups]
        step = functools.partial(self._learn, kept, epoch, self._meter)
        self._recording = Recording(step, device, "the training step", self._lasting)

    def _lasting(self) -> dict[str, Tensor]:
        found = dict(self._of_networks())
        for number, state in enumerate(self._optimizer.state.values()):
            for name, value in state.items():
                if isinstance(value, Tensor):
                    found[f"{name} of parameter {number}"] = value
        return found


def _tensors(batch: Batch) -> tuple[Tensor | None, ...]:
    return batch.images, batch.labels, batch.targets, batch.indices


def _layout(value: Tensor) -> Hashable:
    return value.shape, value.stride(), value.dtype
