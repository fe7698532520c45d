"""Batches: resident tensors with augmentation on their device, or timm's loader for image folders.

Both loaders yield ``(images float32 [N, C, H, W], labels int64 [N])`` on the device of the run. The order and the
augmentation of an epoch depend only on the seed and the epoch's number (folders: without worker processes).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from reparam.distill.config import TrainConfig
from reparam.distill.data import Arrays, Folders, Source
from reparam.errors import InputError

Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Facts:
    """What a run reports about its data: counts, image shape ``(C, H, W)``, normalisation of images in [0, 1]."""

    name: str
    classes: int
    train_images: int
    test_images: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shift: int | None
    flip: bool


class Loader(Protocol):
    """Batches of one data set."""

    facts: Facts
    steps: int

    def train(self, epoch: int) -> Batches:
        """Yield the shuffled, augmented training batches of an epoch; an incomplete last batch is left out."""

    def test(self) -> Batches:
        """Yield all test images in order, without augmentation."""


def make_loader(source: Source, config: TrainConfig, model: nn.Module, device: torch.device) -> Loader:
    """Build the loader for ``source``; ``model`` is asked for its image size and normalisation if that is a folder."""
    if isinstance(source, Arrays):
        return ResidentLoader(source, config, device)
    if config.shift is not None:
        raise InputError("--shift is for data sets that fit into memory; images from folders are cropped at random")
    return FolderLoader(source, config, model, device)


class ResidentLoader:
    """Batches from uint8 tensors that stay on the device.

    Args:
        source: the data.
        config: batch size, seed, image size, shift and flip are read.
        device: where the images stay and the batches appear.
    """

    def __init__(self, source: Arrays, config: TrainConfig, device: torch.device) -> None:
        resized = [_resized(images, config.image_size) for images in (source.x_train, source.x_test)]
        self._x_train, self._x_test = (images.to(device) for images in resized)
        self._y_train, self._y_test = source.y_train.to(device), source.y_test.to(device)
        self._batch, self._seed = min(config.batch_size, len(self._x_train)), config.seed
        self.steps = len(self._x_train) // self._batch
        mean, std = _statistics(self._x_train)
        self._mean, self._std = (value.view(1, -1, 1, 1) for value in (mean, std))
        channels, height, width = self._x_train.shape[1:]
        self.facts = Facts(
            name=source.name,
            classes=len(source.classes),
            train_images=len(self._x_train),
            test_images=len(self._x_test),
            image_shape=(channels, height, width),
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
            shift=source.shift if config.shift is None else config.shift,
            flip=source.flip if config.flip is None else config.flip,
        )

    def train(self, epoch: int) -> Batches:
        """Yield the training batches of an epoch (see `Loader`)."""
        generator = torch.Generator().manual_seed(epoch_seed(self._seed, epoch))
        order = torch.randperm(len(self._x_train), generator=generator)
        for start in range(0, self.steps * self._batch, self._batch):
            chosen = order[start : start + self._batch].to(self._x_train.device)
            images = augment(self._normalised(self._x_train[chosen]), self.facts.shift or 0, self.facts.flip, generator)
            yield images, self._y_train[chosen]

    def test(self) -> Batches:
        """Yield the test batches (see `Loader`)."""
        for images, labels in zip(self._x_test.split(512), self._y_test.split(512), strict=True):
            yield self._normalised(images), labels

    def _normalised(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self._mean) / self._std


class FolderLoader:
    """Batches from image folders through timm: random resized crops and mirroring for training, centre crops for test.

    Args:
        source: the folders.
        config: batch size, seed, workers and flip are read.
        model: its ``pretrained_cfg``, if any, gives image size and normalisation.
        device: where the batches appear.
    """

    def __init__(self, source: Folders, config: TrainConfig, model: nn.Module, device: torch.device) -> None:
        from timm.data.config import resolve_model_data_config
        from timm.data.loader import create_loader

        described = resolve_model_data_config(model)
        size = config.image_size or described["input_size"][-1]
        flip = True if config.flip is None else config.flip
        common: dict[str, Any] = {
            "input_size": (3, size, size),
            "mean": described["mean"],
            "std": described["std"],
            "use_prefetcher": False,
            "num_workers": config.workers,
            "persistent_workers": config.workers > 0,
            "pin_memory": device.type == "cuda",
        }
        batch = min(config.batch_size, len(source.train))
        augmentation: dict[str, Any] = {"hflip": 0.5 if flip else 0.0, "color_jitter": 0.0, "interpolation": "bilinear"}
        self._train = create_loader(source.train, batch_size=batch, is_training=True, **augmentation, **common)
        self._test = create_loader(source.test, batch_size=batch, is_training=False, **common)
        self._device, self._seed = device, config.seed
        self.steps = len(source.train) // batch
        self.facts = Facts(
            name=source.name,
            classes=len(source.classes),
            train_images=len(source.train),
            test_images=len(source.test),
            image_shape=(3, size, size),
            mean=tuple(described["mean"]),
            std=tuple(described["std"]),
            shift=None,
            flip=flip,
        )

    def train(self, epoch: int) -> Batches:
        """Yield the training batches of an epoch (see `Loader`)."""
        seed_everything(epoch_seed(self._seed, epoch))  # timm's transforms draw from the global generators
        yield from self._on_device(self._train)

    def test(self) -> Batches:
        """Yield the test batches (see `Loader`)."""
        yield from self._on_device(self._test)

    def _on_device(self, loader: Any) -> Batches:
        for images, labels in loader:
            yield images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)


def augment(images: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift each image by its own random offset of up to ``shift`` pixels (zeros move in) and mirror half of them.

    Args:
        images: normalised images ``[N, C, H, W]``, so that zero is the mean grey.
        shift: largest offset in pixels, in both directions.
        flip: mirror left and right with probability 1/2.
        generator: CPU generator, so that the draw is the same on every device.
    """
    if not shift and not flip:
        return images
    count, channels, height, width = images.shape
    offset = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator)
    rows, columns = torch.arange(height) + offset[0], torch.arange(width) + offset[1]
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = nn.functional.pad(images, (shift,) * 4)
    rows, columns = rows.to(images.device), columns.to(images.device)
    picture = torch.arange(count, device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
    return padded[picture, channel, rows[:, None, :, None], columns[:, None, None, :]]


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed of one epoch of the run with that seed."""
    return seed * 1_000_003 + epoch


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _resized(images: Tensor, size: int | None) -> Tensor:
    if size is None or tuple(images.shape[2:]) == (size, size):
        return images
    from torchvision.transforms.v2.functional import resize

    return torch.cat([resize(part, [size, size], antialias=True) for part in images.split(1024)])


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of uint8 images ``[N, C, H, W]``, in units of full scale."""
    total, squares = torch.zeros(2, images.shape[1], dtype=torch.float64, device=images.device)
    for part in images.split(1024):
        scaled = part.double() / 255
        total += scaled.sum(dim=(0, 2, 3))
        squares += scaled.square().sum(dim=(0, 2, 3))
    count = images.numel() / images.shape[1]
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(1e-6).sqrt()
    return mean.float(), std.float()
