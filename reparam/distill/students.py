"""Building the networks that the settings name, and checking that they fit the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import reparam
from reparam.distill.config import TrainConfig
from reparam.distill.files import weights_of
from reparam.distill.loaders import Facts
from reparam.distill.methods.base import logits_of
from reparam.errors import InputError, ModelError, ReparamError
from reparam.models import load_model


def build_student(config: TrainConfig, num_classes: int, in_chans: int) -> nn.Module:
    """Build the network ``config.model``, with ``config.checkpoint`` or timm's weights if the settings ask for them.

    A checkpoint may be the output folder of another run, and may be for other classes: the classifier then starts anew.
    """
    path, ema = (None, False) if config.checkpoint is None else weights_of(config.checkpoint, config.checkpoint_ema)
    return build(
        config.model,
        num_classes,
        in_chans,
        checkpoint=None if path is None else str(path),
        ema=ema,
        new_classifier=True,
        pretrained=config.pretrained,
        drop_path=config.drop_path,
    )


def build(
    spec: str,
    num_classes: int,
    in_chans: int,
    *,
    checkpoint: str | None = None,
    ema: bool = False,
    pretrained: bool = False,
    drop_path: float | None = None,
    new_classifier: bool = False,
) -> nn.Module:
    """Build a network for that many classes and channels.

    A callable that has no such arguments is called without them; whether its sizes are right is for `check_fit`.

    Args:
        spec: see ``reparam.models.load_model``.
        num_classes: number of logits.
        in_chans: channels of an image.
        checkpoint: file of weights.
        ema: whether to read its averaged weights.
        pretrained: start from timm's weights.
        drop_path: drop path rate, if the network has that argument.
        new_classifier: whether a checkpoint may be for other classes, see ``reparam.models.load_weights``.
    """
    wishes: list[dict[str, Any]] = [{"num_classes": num_classes, "in_chans": in_chans}]
    if ":" in spec:
        wishes += [{"num_classes": num_classes}, {"in_chans": in_chans}, {}]
    refused: InputError | None = None
    for wish in wishes:
        try:
            return load_model(
                spec,
                checkpoint=checkpoint,
                ema=ema,
                pretrained=pretrained,
                drop_path=drop_path,
                new_classifier=new_classifier,
                **wish,
            )
        except InputError as error:
            refused = refused or error
    raise refused or InputError(f"the network {spec} could not be built")


def grown(network: nn.Module, ratio: int, example: Tensor, noise: float) -> nn.Module:
    """Return a network widened by ``ratio`` that is to be trained, or was, as a network of its own.

    It starts with the function of ``network``: an assistant whose distance to the student is chosen.
    """
    return reparam.expand(network, ratio, example_input=example, noise=noise)


def check_fit(network: nn.Module, example: Tensor, facts: Facts, name: str, option: str = "--model") -> None:
    """Run a network on two images and compare its number of logits with the number of classes.

    Raises:
        ModelError: the network fails on the images, or its output is not ``[N, classes]``.
    """
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            logits = logits_of(network, example)
    except (RuntimeError, ValueError, AssertionError) as error:
        if isinstance(error, ReparamError):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{option} {name} fails on images of {facts.name}, shape {list(example.shape)}: {reason} "
            "(--image-size N resizes the images; a callable with an argument in_chans is told their channels)"
        ) from error
    finally:
        network.train(was_training)
    if logits.shape[1] != facts.classes:
        raise ModelError(
            f"{option} {name} returns {logits.shape[1]} logits, but {facts.name} has {facts.classes} classes; "
            f"build it with num_classes={facts.classes}"
        )
