"""One optimizer step: precision, accumulation, several processes, clipping, averaged weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import distribute_bn  # type: ignore[attr-defined]
from torch import Tensor, nn

from reparam.distill.averages import Averages
from reparam.distill.config import TrainConfig
from reparam.distill.distributed import Group, SyncStatistics
from reparam.distill.meter import Meter
from reparam.distill.methods.base import Batch, Outputs
from reparam.distill.networks import Learners, Networks, parts
from reparam.distill.optim import load_state
from reparam.distill.recording import RecordedStep
from reparam.distill.statics import StaticTeacher
from reparam.passes.skeleton import named_tensors
from reparam.passes.tf32 import tf32
from reparam.passes.view import StudentView

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Engine:
    """Runs optimizer steps over the learners of a run.

    Args:
        learners: networks and losses, on their device.
        statics: the static teacher and its assistants; empty without one.
        optimizer: over the learners' parameters.
        scheduler: of the learning rate, by steps.
        config: the settings.
        group: the processes.
    """

    def __init__(
        self,
        learners: Learners,
        statics: Sequence[StaticTeacher],
        optimizer: torch.optim.Optimizer,
        scheduler: Scheduler,
        config: TrainConfig,
        group: Group,
    ) -> None:
        self.learners, self.statics, self.config, self.group = learners, statics, config, group
        self.optimizer, self.scheduler = optimizer, scheduler
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=config.precision == "fp16")
        self.ema = Averages(learners.owner, config.ema, config.ema_warmup) if config.ema else None
        self._distributed: nn.Module = learners
        if group.world > 1:
            device_ids = [group.device] if group.device.type == "cuda" else None
            distributed = nn.parallel.DistributedDataParallel(learners, device_ids=device_ids)
            # Statistics are reduced at the end of an epoch, or synchronised in the norms (--sync-bn): never broadcast.
            # As an attribute: torch 2.13 gave the argument another name.
            distributed.broadcast_buffers = False
            self._distributed = distributed
        self._trained = [parameter for parameter in learners.parameters() if parameter.requires_grad]
        self._recorded = (
            RecordedStep(self._learn, optimizer, self._blank, self._phase, self._lasting) if config.cuda_graph else None
        )

    @property
    def networks(self) -> Networks:
        """The networks in training."""
        return self.learners.networks

    def averaged(self) -> Networks | None:
        """The networks with averaged weights, in evaluation mode; None without averaging."""
        if self.ema is None:
            return None
        networks = self.networks.of(self.ema.module)
        networks.train(False)
        return networks

    def step(self, batch: Batch, epoch: int, steps: int, meter: Meter) -> None:
        """Take optimizer step number ``steps`` (from 1) on this process's part of a batch."""
        learn = self._learn if self._recorded is None else self._recorded
        learn(self.placed(batch), epoch, meter)
        self.scheduler.step_update(steps)
        if self.ema is not None:
            self.ema.update(self.learners.owner, step=steps + 1 if self.config.ema_warmup else None)

    def _learn(self, batch: Batch, epoch: int, meter: Meter) -> None:
        """All of a step that runs on the device and is the same in each step."""
        self.optimizer.zero_grad(set_to_none=True)
        pieces = _split(batch, self.config.accumulate)
        with self.gathered():
            for number, piece in enumerate(pieces, 1):
                self._backward(piece, epoch, meter, 1 / len(pieces), number == len(pieces))
        self.update()

    def update(self) -> None:
        """Clip, and let the optimizer step on the gradients that are there."""
        if self.config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._trained, self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _blank(self) -> Meter:
        return Meter(self.learners.names, self.group)

    def _lasting(self) -> dict[str, Tensor]:
        return dict(named_tensors(self.learners))

    def _phase(self, epoch: int) -> int | bool:
        """What of the epoch a step depends on: losses against a static teacher may depend on anything of it."""
        return epoch if self.learners.losses else epoch >= self.config.kd_start_epoch

    def lr(self, steps: int) -> float:
        """Learning rate of the step after so many, without the factors of ``lr_scale``; nothing is changed."""
        values = self.scheduler._get_values(steps, on_epoch=False)
        return float(self.optimizer.defaults["lr"] if values is None else values[0])

    def placed(self, batch: Batch) -> Batch:
        """Give images and soft targets the dtype and memory format of the run."""
        targets = batch.targets if batch.targets is None else batch.targets.to(batch.images.dtype)
        return Batch(self.images(batch.images), batch.labels, targets, batch.indices)

    def images(self, images: Tensor) -> Tensor:
        """Give images the dtype and memory format of the run."""
        if self.config.precision == "fp64":
            images = images.double()
        return images.contiguous(memory_format=torch.channels_last) if self.config.channels_last else images

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which networks run."""
        return autocast(self.config, self.group.device)

    def end_epoch(self) -> None:
        """Give all processes the mean of their norm statistics, also of the averaged weights."""
        if self.group.world == 1:
            return
        for network in (self.learners, self.ema):
            if network is not None:
                distribute_bn(network, self.group.world, reduce=True)

    def _backward(self, batch: Batch, epoch: int, meter: Meter, share: float, last: bool) -> None:
        """Forward and backward of each learner; gradients travel between processes in the last of all only."""
        names = self.learners.names
        synchronised = SyncStatistics() if self.config.sync_bn and self.group.world > 1 else nullcontext()
        with synchronised, self.autocast():
            losses = parts(self.learners, self._run, self.statics, batch, self.config, epoch)
            for name in names:
                final = last and name == names[-1]
                with nullcontext() if final else self._unreduced():
                    part = next(losses)
                    meter.add(part.network, part.loss, part.logits, batch.labels, share)
                    with torch.autocast(self.group.device.type, enabled=False):
                        loss = _joined(part.loss, self._trained) if final and self.group.world > 1 else part.loss
                        self.scaler.scale(loss * share).backward()
                    del part, loss  # and with them the graph, before the next one is built

    def gathered(self) -> AbstractContextManager[Any]:
        """The student's tensors are made once per step, and their gradients brought to the parameters at its end.

        Not with several processes, because DistributedDataParallel reduces a gradient in the backward pass itself;
        nor where the view is compiled, which makes its tensors inside.
        """
        student = self.networks.student
        if not isinstance(student, StudentView) or self.group.world > 1 or self.config.compile:
            return nullcontext()
        return student.gathered()

    def _run(self, name: str, images: Tensor) -> Outputs:
        outputs: Outputs = self._distributed(name, images)
        return outputs

    def _unreduced(self) -> AbstractContextManager[Any]:
        network = self._distributed
        return network.no_sync() if isinstance(network, nn.parallel.DistributedDataParallel) else nullcontext()

    def state(self) -> dict[str, Any]:
        """Return everything that changes during training."""
        return {
            "owner": self.learners.owner.state_dict(),
            "losses": self.learners.losses.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def statistics(self) -> list[dict[str, dict[str, Tensor]]]:
        """Return what differs between processes in the middle of an epoch, by process: their norms' statistics.

        Empty where nothing does. Every process has to ask.
        """
        if self.group.world == 1:
            return []
        own = {
            place: {name: buffer.cpu() for name, buffer in network.named_buffers() if buffer.is_floating_point()}
            for place, network in self._with_statistics().items()
        }
        return self.group.gather(own)

    def _with_statistics(self) -> dict[str, nn.Module]:
        averaged = {} if self.ema is None else {"ema": self.ema.module}
        return {"owner": self.learners.owner, **averaged}

    def load_statistics(self, saved: Sequence[Mapping[str, Mapping[str, Tensor]]]) -> None:
        """Give this process its own of the `statistics`; the mean of all where there were others."""
        if saved:
            of_all = list(saved) if len(saved) != self.group.world else [saved[self.group.rank]]
            average_statistics(self._with_statistics(), of_all)

    def load(self, state: Mapping[str, Any], steps: int) -> None:
        """Go back to a state after that many steps."""
        self.learners.owner.load_state_dict(state["owner"], strict=True)
        self.learners.losses.load_state_dict(state["losses"], strict=True)
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"], strict=True)
        load_state(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.scheduler.step_update(steps)
        if self._recorded is not None:
            self._recorded.forget()


def average_statistics(networks: Mapping[str, nn.Module], saved: Sequence[Mapping[str, Mapping[str, Tensor]]]) -> None:
    """Give networks, by their place in a checkpoint, the mean of the norm statistics of some processes."""
    for place, network in networks.items():
        for name, buffer in network.named_buffers():
            if name in saved[0][place]:
                buffer.copy_(torch.stack([process[place][name] for process in saved]).mean(0))


class _Joined(torch.autograd.Function):
    """The loss itself; its backward pass visits parameters that the loss does not depend on.

    DistributedDataParallel waits for every parameter in the one backward pass that it reduces. The student's loss does
    not reach the connectors of the dynamic teacher, whose gradients come from an earlier pass, nor parameters that a
    network has and does not use.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (gradients[0], *[None] * ctx.count)


def _joined(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    result: Tensor = _Joined.apply(loss, *parameters)
    return result


def _split(batch: Batch, count: int) -> list[Batch]:
    if count == 1:
        return [batch]
    size = -(-len(batch.images) // count)
    images, labels, indices = (value.split(size) for value in (batch.images, batch.labels, batch.indices))
    targets: Sequence[Tensor | None] = [None] * len(images) if batch.targets is None else batch.targets.split(size)
    return [Batch(*columns) for columns in zip(images, labels, targets, indices, strict=True)]


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which networks run: automatic mixed precision if the settings say so."""
    dtype = _AUTOCAST.get(config.precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def precision(config: TrainConfig) -> AbstractContextManager[None]:
    """The context in which float32 products use TF32 exactly if the settings say so."""
    return tf32(config.precision in ("tf32", "bf16", "fp16"))
