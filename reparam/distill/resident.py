"""Batches from tensors that stay on the device: augmentation there, drawn on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from reparam.distill.config import TrainConfig
from reparam.distill.data import Arrays, Facts, Normalisation
from reparam.distill.methods.base import Batch
from reparam.distill.mixing import Erasing, make_mixing
from reparam.distill.sampling import WHOLE, Shard, make_positions
from reparam.distill.transfer import on_device


class ResidentLoader:
    """Batches from uint8 tensors that stay on the device (see ``loaders.Loader``).

    Args:
        source: the data.
        config: batch size, seed, image size, shift, flip, erasing and mixing are read.
        device: where the images stay and the batches appear.
        shard: which part of each batch is wanted.
        normalisation: of the images; default: their statistics.
    """

    def __init__(
        self,
        source: Arrays,
        config: TrainConfig,
        device: torch.device,
        shard: Shard,
        normalisation: Normalisation | None = None,
    ) -> None:
        self._positions = make_positions(len(source.x_train), len(source.x_test), config, shard)
        self._mixing = make_mixing(config, len(source.classes))
        self._erasing = Erasing(config.erase) if config.erase else None
        resized = [_resized(images, config.image_size) for images in (source.x_train, source.x_test)]
        self._x_train, self._x_test = (images.to(device) for images in resized)
        self._y_train, self._y_test = source.y_train.to(device), source.y_test.to(device)
        self.labels = source.y_train.cpu()
        self.steps, self.batch_size = self._positions.steps, self._positions.batch
        given = None if normalisation is None else tuple(torch.tensor(values) for values in normalisation)
        mean, std = given or _statistics(resized[0])  # where the data came from: not every device has float64
        self._mean, self._std = (value.view(1, -1, 1, 1).to(device) for value in (mean, std))
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

    def train(self, epoch: int, start: int = 0, order: int = 0) -> Iterator[Batch]:
        """Yield the training batches of an epoch (see ``loaders.Loader``)."""
        positions, device = self._positions, self._x_train.device
        part = positions.shard.part(positions.batch)
        sequence = on_device(positions.sequence(epoch, order)[:, part], device)
        generator = torch.Generator()
        for step in range(start, self.steps):
            indices = sequence[step]
            generator.manual_seed(positions.step_seed("augment", epoch, order, step))
            images = self._normalised(self._x_train[indices])
            images = augment(images, self.facts.shift or 0, self.facts.flip, generator, positions.shard)
            if self._erasing is not None:
                images = self._erasing(images, positions.image_seeds(epoch, order, step))
            labels, targets = self._y_train[indices], None
            if self._mixing is not None:
                images, labels, targets = self._mixing(images, labels, positions.mix_seed(epoch, order, step))
            yield Batch(images, labels, targets, indices)

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's test batches (see ``loaders.Loader``)."""
        shard = self._positions.shard
        mine = slice(shard.rank, None, shard.world)
        for images, labels in zip(self._x_test[mine].split(512), self._y_test[mine].split(512), strict=True):
            yield self._normalised(images), labels

    def _normalised(self, images: Tensor) -> Tensor:
        return images.float().div_(255).sub_(self._mean).div_(self._std)


def augment(images: Tensor, shift: int, flip: bool, generator: torch.Generator, shard: Shard = WHOLE) -> Tensor:
    """Shift each image by its own random offset of up to ``shift`` pixels (zeros move in) and mirror half of them.

    Args:
        images: normalised images ``[N, C, H, W]``, so that zero is the mean grey.
        shift: largest offset in pixels, in both directions.
        flip: mirror left and right with probability 1/2.
        generator: CPU generator, so that the draw is the same on every device.
        shard: which part of the batch the images are; what is drawn for an image does not depend on it.
    """
    if not shift and not flip:
        return images
    count, channels, height, width = images.shape
    part = shard.part(count * shard.world)
    offset = torch.randint(0, 2 * shift + 1, (2, count * shard.world, 1), generator=generator)[:, part]
    rows, columns = torch.arange(height) + offset[0], torch.arange(width) + offset[1]
    if flip:
        mirrored = torch.rand(count * shard.world, 1, generator=generator)[part] < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = nn.functional.pad(images, (shift,) * 4)
    pixel = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
    pixel = on_device(pixel.view(count, 1, -1), images.device).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, pixel).view(images.shape)


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
