"""Building the student that the settings name, and checking that it fits the data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reparam.distill.config import TrainConfig
from reparam.distill.loaders import Facts
from reparam.distill.methods.base import logits_of
from reparam.errors import InputError, ModelError, ReparamError
from reparam.models import load_model


def build_student(config: TrainConfig, num_classes: int, in_chans: int) -> nn.Module:
    """Build the network ``config.model`` for that many classes and channels, with ``config.checkpoint`` if given.

    A callable that has no such arguments is called without them; whether its sizes are right is for `check_fit`.
    """
    wishes: list[dict[str, int]] = [{"num_classes": num_classes, "in_chans": in_chans}]
    if ":" in config.model:
        wishes += [{"num_classes": num_classes}, {"in_chans": in_chans}, {}]
    refused: InputError | None = None
    for wish in wishes:
        try:
            return load_model(config.model, checkpoint=config.checkpoint, **wish)  # type: ignore[arg-type]
        except InputError as error:
            refused = refused or error
    raise refused or InputError(f"--model {config.model} could not be built")


def check_fit(student: nn.Module, example: Tensor, facts: Facts, name: str) -> None:
    """Run the student on two images and compare its number of logits with the number of classes.

    Raises:
        ModelError: the student fails on the images, or its output is not ``[N, classes]``.
    """
    was_training = student.training
    student.eval()
    try:
        with torch.no_grad():
            logits = logits_of(student, example)
    except (RuntimeError, ValueError, AssertionError) as error:
        if isinstance(error, ReparamError):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"model {name} fails on images of {facts.name}, shape {list(example.shape)}: {reason} "
            "(--image-size N resizes the images; a callable with an argument in_chans is told their channels)"
        ) from error
    finally:
        student.train(was_training)
    if logits.shape[1] != facts.classes:
        raise ModelError(
            f"model {name} returns {logits.shape[1]} logits, but {facts.name} has {facts.classes} classes; "
            f"build the model with num_classes={facts.classes}"
        )
