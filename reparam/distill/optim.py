"""Optimizer and learning rate schedule, both from timm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from timm.optim._param_groups import param_groups_weight_decay
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch import nn

from reparam.distill.config import TrainConfig
from reparam.errors import InputError


def make_optimizer(
    model: nn.Module,
    config: TrainConfig,
    exempt: frozenset[str] = frozenset(),
    divisors: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer over the trainable parameters of ``model``.

    SGD (momentum 0.9) decays every parameter, as the paper's convolutional recipe does; AdamW leaves out biases, norms
    and what the model's ``no_weight_decay()`` names (``config.decay_norms`` says otherwise).

    Args:
        model: everything that is trained.
        config: the settings.
        exempt: names of parameters that the network itself wants without weight decay.
        divisors: with ``config.lr_scale == "student"``, by how much the student's tensor is larger than the block of
            the parameter that it is read from. Its step is the divisor squared times that of plain training with
            SGD, the divisor times with AdamW (GPD's effective step); the learning rate of the parameter is divided
            by that.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("the model has no parameter that requires a gradient: nothing to train")
    groups = _groups(model, config, exempt, divisors if config.lr_scale == "student" else None)
    options: dict[str, Any] = {"momentum": 0.9} if config.optimizer == "sgd" else {}
    # timm calls SGD without Nesterov's variant "momentum".
    name = config.optimizer if config.optimizer != "sgd" or config.nesterov else "momentum"
    # One kernel for all parameters of a group. Not with fp16: where the first step of all overflows, fused SGD keeps a
    # momentum that was never written (torch 2.14).
    parameters = [p for group in groups for p in group["params"]]
    if config.precision != "fp16" and all(map(_fusable, parameters)):
        options["fused"] = True  # where it is False torch does not choose its second best, but a loop over parameters
    made: torch.optim.Optimizer = create_optimizer_v2(
        groups, opt=name, lr=config.lr, weight_decay=config.weight_decay or 0.0, **options
    )
    _start(made)
    return made


def _fusable(parameter: nn.Parameter) -> bool:
    """Whether torch's fused kernels are right for it: on the CPU they take its memory to be one piece."""
    dense = torch.empty_like(parameter).stride() == parameter.stride()
    return parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point() and dense


def _start(optimizer: torch.optim.Optimizer) -> None:
    """Give each parameter of a fused SGD its momentum: some may get their first gradient later than others."""
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group.get("fused") and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def make_recordable(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let an optimizer step while a CUDA graph is recorded, with learning rates in tensors; return it.

    Raises:
        InputError: it has to read its learning rate on the CPU.
    """
    groups = optimizer.param_groups
    if not all(group.get("fused") for group in groups):
        raise InputError(
            "--cuda-graph needs torch's fused optimizers, which this run cannot have: a parameter is no dense "
            "floating-point tensor, or the precision is fp16; leave it out"
        )
    for settings in (optimizer.defaults, *groups):
        if "capturable" in settings:  # AdamW asks to be told
            settings["capturable"] = True
    # It says once that this costs time where nothing is recorded: the first steps are not, nor those of other sizes.
    optimizer._warned_capturable_if_run_uncaptured = True
    return optimizer


def load_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load the state of an optimizer; its tensors take the memory format of their parameters.

    torch's fused kernels on the CPU go through the memory of weight, gradient and momentum side by side and do not look
    at strides (2.14): a momentum that was saved in another memory format would be added to the wrong weights. Gradients
    need no such care, automatic differentiation gives them the strides of a parameter that is one piece of memory.
    Which kernels run is this optimizer's own choice, not that of the one that was saved.
    """
    own = {name: optimizer.defaults[name] for name in ("fused", "foreach", "capturable") if name in optimizer.defaults}
    groups = [{**group, **own} for group in state["param_groups"]]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            alike = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if alike and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    _start(optimizer)


def _groups(
    model: nn.Module, config: TrainConfig, exempt: frozenset[str], divisors: Mapping[str, float] | None
) -> list[dict[str, Any]]:
    """Groups by weight decay (timm's rule) and, inside those, by learning rate."""
    split = param_groups_weight_decay(
        model,
        config.weight_decay or 0.0,
        weight_decay_exclude_1d=not config.decay_norms,
        no_weight_decay_list=() if config.decay_norms else exempt,
    )
    if divisors is None:
        return split
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    power = 2 if config.optimizer == "sgd" else 1
    groups: list[dict[str, Any]] = []
    for group in split:
        by_scale: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            scale = divisors.get(names[id(parameter)], 1.0) ** -power
            by_scale.setdefault(scale, []).append(parameter)
        # A step shrinks weights by lr times the decay, in a teacher as in a student: a smaller rate needs more of it.
        groups += [
            {**group, "params": params, "lr_scale": scale, "weight_decay": group["weight_decay"] / scale}
            for scale, params in sorted(by_scale.items())
        ]
    return groups


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int) -> Scheduler:
    """Build the schedule; call ``step_update(number of finished steps)`` after every optimizer step."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.schedule,
        num_epochs=config.epochs - config.cooldown_epochs,
        decay_epochs=config.decay_epochs,
        # timm decays by steps where t + 1 reaches the milestone, which is one step early.
        decay_milestones=[epoch + 0.5 / steps_per_epoch for epoch in config.milestones or ()],  # type: ignore[misc]
        decay_rate=config.decay_rate,
        min_lr=config.min_lr,
        cooldown_epochs=config.cooldown_epochs,
        warmup_epochs=min(config.warmup_epochs, config.epochs - 1),
        warmup_lr=config.warmup_lr or 0.0,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return scheduler
