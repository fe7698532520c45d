"""Batches of a data set: from tensors that stay on the device, or from image folders.

Everything random in a batch is a function of seed, epoch, order and position in the epoch alone. The number of worker
processes, the number of training processes and the step where an epoch was started do not change it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from reparam.distill.config import TrainConfig, options
from reparam.distill.data import Arrays, Facts, Normalisation, Source
from reparam.distill.folders import FolderLoader
from reparam.distill.methods.base import Batch
from reparam.distill.ranges import flag
from reparam.distill.resident import ResidentLoader, augment
from reparam.distill.sampling import WHOLE, Shard, epoch_seed, seed_everything
from reparam.errors import InputError

_FOLDERS_ONLY = ("auto_augment", "crop_scale", "crop_pct", "color_jitter", "interpolation", "repeats", "max_bad_images")


class Loader(Protocol):
    """Batches of one data set.

    Attributes:
        facts: what a run reports about the data.
        steps: optimizer steps per epoch.
        batch_size: images per step over all processes; less than asked for where the training set is smaller.
        labels: class of every training image, ``[M]``, on the CPU.
    """

    facts: Facts
    steps: int
    batch_size: int
    labels: Tensor

    def train(self, epoch: int, start: int = 0, order: int = 0) -> Iterator[Batch]:
        """Yield this process's part of the shuffled, augmented batches of an epoch.

        An incomplete last batch is left out.

        Args:
            epoch: number of the epoch.
            start: first step, from 0; skipping costs nothing.
            order: another number gives another order and other augmentation, for a second try after a roll-back.
        """

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels of this process's share of the test set, without augmentation.

        The shares of all processes are the test set, each image once; their sizes may differ by one.
        """


def make_loader(
    source: Source,
    config: TrainConfig,
    model: nn.Module,
    device: torch.device,
    shard: Shard = WHOLE,
    normalisation: Normalisation | None = None,
) -> Loader:
    """Build the loader for ``source``.

    Args:
        source: the data.
        config: the settings of the run.
        model: asked for its image size and normalisation if the source is a folder.
        device: where the batches appear.
        shard: which part of each batch this process gets.
        normalisation: of the images; default: statistics of resident data, for folders what the model asks for.

    Raises:
        InputError: a setting has no effect on this kind of data, or the batch cannot be shared among the processes.
    """
    if isinstance(source, Arrays):
        _refuse_folder_settings(config, source.name)
        return ResidentLoader(source, config, device, shard, normalisation)
    if config.shift is not None:
        raise InputError("--shift is for data sets that fit into memory; images from folders are cropped at random")
    return FolderLoader(source, config, model, device, shard, normalisation)


def without_idle(config: TrainConfig, source: Source) -> TrainConfig:
    """Return the settings without those that have no effect on this kind of data."""
    idle = _FOLDERS_ONLY if isinstance(source, Arrays) else ("shift",)
    return dataclasses.replace(config, **{name: options()[name][1] for name in idle})


def _refuse_folder_settings(config: TrainConfig, name: str) -> None:
    known = options()
    for setting in _FOLDERS_ONLY:
        value = getattr(config, setting)
        if value != known[setting][1]:
            raise InputError(f"{flag(setting)} {value} is for folder data and has no effect on {name}; leave it out")


__all__ = [
    "Batch",
    "Facts",
    "Loader",
    "Shard",
    "augment",
    "epoch_seed",
    "make_loader",
    "seed_everything",
    "without_idle",
]
