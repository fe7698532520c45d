"""Optimizer and learning rate schedule, both from timm."""

from __future__ import annotations

import torch
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch import nn

from reparam.distill.config import TrainConfig
from reparam.errors import InputError

_TIMM_NAMES = {"sgd": "momentum", "adamw": "adamw"}  # timm's "sgd" is the Nesterov variant


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build the optimizer over the trainable parameters of ``model``.

    SGD (momentum 0.9, no Nesterov) decays every parameter, as the paper's convolutional recipe does; AdamW leaves out
    biases, norms and what the model's ``no_weight_decay()`` names.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("the model has no parameter that requires a gradient: nothing to train")
    return create_optimizer_v2(
        model,
        opt=_TIMM_NAMES[config.optimizer],
        lr=config.lr,
        weight_decay=config.weight_decay or 0.0,
        momentum=0.9,
        filter_bias_and_bn=config.optimizer == "adamw",
    )


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int) -> Scheduler:
    """Build the schedule; call ``step_update(number of finished steps)`` after every optimizer step."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.schedule,
        num_epochs=config.epochs,
        decay_epochs=config.decay_epochs,
        decay_rate=config.decay_rate,
        warmup_epochs=min(config.warmup_epochs, config.epochs - 1),
        warmup_lr=(config.lr or 0.0) * 1e-2,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return scheduler
