"""Batches from image folders: decoding and timm's transforms in worker processes, normalisation on the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from reparam.distill.config import TrainConfig
from reparam.distill.data import Facts, Folders, Normalisation, UnreadableImage
from reparam.distill.methods.base import Batch
from reparam.distill.mixing import make_mixing
from reparam.distill.sampling import Positions, Shard, generators_kept, make_positions, seed_cpu
from reparam.errors import DataError, InputError

_Key = tuple[int, int]
"""Seed of the transforms and index of an image."""
_Bad = tuple[str, str, str]
"""Path of an unreadable file, what is wrong with it, and the whole message."""
_Item = tuple[Tensor | None, int, int, list[_Bad]]
"""Image, label, index and the unreadable files on the way to it; no image: none was found."""


class FolderLoader:
    """Batches from image folders (see ``loaders.Loader``): random crops for training, centre crops for the test.

    Args:
        source: the folders.
        config: batch size, seed, workers, augmentation and mixing are read.
        model: its ``pretrained_cfg``, if any, gives image size and normalisation.
        device: where the batches appear.
        shard: which part of each batch is wanted.
        normalisation: of the images; default: what ``model`` asks for.
    """

    def __init__(
        self,
        source: Folders,
        config: TrainConfig,
        model: nn.Module,
        device: torch.device,
        shard: Shard,
        normalisation: Normalisation | None = None,
    ) -> None:
        from timm.data.config import resolve_model_data_config

        self._positions = make_positions(len(source.train), len(source.test), config, shard)
        self._mixing = make_mixing(config, len(source.classes))
        self._device, self._limit = device, config.max_bad_images
        self._bad: dict[str, str] = {}
        self.labels = torch.tensor(source.train.targets)
        self.steps, self.batch_size = self._positions.steps, self._positions.batch
        described = resolve_model_data_config(model)
        size = config.image_size or described["input_size"][-1]
        mean, std = normalisation or (described["mean"], described["std"])
        self.facts = Facts(
            name=source.name,
            classes=len(source.classes),
            train_images=len(source.train),
            test_images=len(source.test),
            image_shape=(3, size, size),
            mean=tuple(mean),
            std=tuple(std),
            shift=None,
            flip=True if config.flip is None else config.flip,
        )
        self._mean, self._std = (
            torch.tensor(value, device=device).view(1, -1, 1, 1) for value in (self.facts.mean, self.facts.std)
        )
        self._sampler = _TrainKeys(self._positions)
        train = _Images(source.train, _train_transform(config, self.facts), replace=self._limit)
        test = _Images(
            source.test, _test_transform(config, self.facts, config.crop_pct or described["crop_pct"]), replace=0
        )
        keys = [(0, index) for index in range(shard.rank, len(source.test), shard.world)]
        self._train = self._loader(train, config.workers, batch_sampler=self._sampler)
        self._test = self._loader(test, config.workers, sampler=keys, batch_size=self._positions.local)

    def train(self, epoch: int, start: int = 0, order: int = 0) -> Iterator[Batch]:
        """Yield the training batches of an epoch (see ``loaders.Loader``)."""
        self._sampler.epoch, self._sampler.start, self._sampler.order = epoch, start, order
        for step, (images, labels, indices, bad) in enumerate(self._train, start):
            self._note(bad, "another image takes its place")
            if len(labels) < self._positions.local:
                raise DataError("folder: none of the training images is readable")
            labels, indices, targets = self._moved(labels), self._moved(indices), None
            images = self._normalised(images)
            if self._mixing is not None:
                images, labels, targets = self._mixing(images, labels, self._positions.mix_seed(epoch, order, step))
            yield Batch(images, labels, targets, indices)

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's test batches (see ``loaders.Loader``)."""
        for images, labels, _, bad in self._test:
            self._note(bad, "the test leaves it out")
            if len(labels):
                yield self._normalised(images), self._moved(labels)

    def _loader(self, images: _Images, workers: int, **extra: Any) -> DataLoader[Any]:
        return DataLoader(
            images,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self._device.type == "cuda",
            collate_fn=_collate,
            generator=torch.Generator(),  # else each epoch would draw from the trainer's generator
            **extra,
        )

    def _note(self, bad: Sequence[_Bad], consequence: str) -> None:
        """Name each unreadable file once and give up where there are too many. It is counted here, in one place."""
        for path, reason, message in bad:
            if path in self._bad:
                continue
            self._bad[path] = reason
            if self._limit == 0:
                raise DataError(f"{message}, or allow some with --max-bad-images N")
            if len(self._bad) > self._limit:
                named = ", ".join(f"{path} ({reason})" for path, reason in self._bad.items())
                raise DataError(
                    f"folder: {len(self._bad)} unreadable images, --max-bad-images allows {self._limit}: {named}; "
                    "repair or remove them"
                )
            warnings.warn(f"folder: {path} is not a readable image ({reason}); {consequence}", stacklevel=3)

    def _moved(self, values: Tensor) -> Tensor:
        return values.to(self._device, non_blocking=True)

    def _normalised(self, images: Tensor) -> Tensor:
        images = self._moved(images)
        if images.dtype != torch.uint8:  # random erasing comes after normalisation, so the transform did both
            return images
        return images.float().div_(255).sub_(self._mean).div_(self._std)


class _TrainKeys:
    """Batch sampler: the keys of this process's part of each step of the epoch, from ``start`` on."""

    def __init__(self, positions: Positions) -> None:
        self._positions = positions
        self.epoch, self.start, self.order = 0, 0, 0

    def __iter__(self) -> Iterator[list[_Key]]:
        return self._keys(self.epoch, self.start, self.order)  # bound now: the attributes may be set again meanwhile

    def _keys(self, epoch: int, start: int, order: int) -> Iterator[list[_Key]]:
        positions = self._positions
        mine = positions.sequence(epoch, order)[:, positions.shard.part(positions.batch)]
        for step in range(start, positions.steps):
            yield list(zip(positions.image_seeds(epoch, order, step), mine[step].tolist(), strict=True))


class _Images(Dataset[_Item]):
    """An ``ImageFolder`` seen through a transform that draws from the seed in the key, in whatever process.

    Args:
        folder: the images.
        transform: from PIL image to tensor.
        replace: how many unreadable images in a row the next one stands in for.
    """

    def __init__(self, folder: Any, transform: Any, replace: int) -> None:
        self._folder, self._transform, self._replace = folder, transform, replace

    def __len__(self) -> int:
        return len(self._folder.samples)

    def __getitems__(self, keys: list[_Key]) -> list[_Item]:
        """Read a whole batch, as the ``DataLoader`` asks for it; other generators notice nothing of its seeds."""
        with generators_kept():
            return [self._read(*key) for key in keys]

    def _read(self, seed: int, first: int) -> _Item:
        bad: list[_Bad] = []
        for index in range(first, first + 1 + self._replace):
            path, label = self._folder.samples[index % len(self)]
            try:
                image = self._folder.loader(path)
            except UnreadableImage as error:
                bad.append((error.path, error.reason, str(error)))
                continue
            seed_cpu(seed)
            return self._transform(image), label, index % len(self), bad
        return None, -1, first, bad


def _collate(items: list[_Item]) -> tuple[Tensor, Tensor, Tensor, list[_Bad]]:
    """Stack what could be read; in training, where nothing may be missing, the list of bad files is too long then."""
    read = [(image, label, index) for image, label, index, _ in items if image is not None]
    images = torch.stack([image for image, _, _ in read]) if read else torch.empty(0)
    labels, indices = torch.tensor([[label, index] for _, label, index in read]).view(-1, 2).long().unbind(1)
    return images, labels.contiguous(), indices.contiguous(), [entry for *_, bad in items for entry in bad]


def _train_transform(config: TrainConfig, facts: Facts) -> Any:
    from timm.data.transforms_factory import create_transform

    if config.auto_augment and config.color_jitter:
        raise InputError(
            f"--color-jitter {config.color_jitter:g} has no effect with --auto-augment, which replaces it in timm; "
            "give one of them"
        )
    jitter: Any = config.color_jitter or None  # None is right, though timm's annotation leaves it out
    try:
        transform = create_transform(
            facts.image_shape,
            is_training=True,
            scale=(config.crop_scale, 1.0),
            hflip=0.5 if facts.flip else 0.0,
            color_jitter=jitter,
            auto_augment=config.auto_augment,
            interpolation=config.interpolation,
            mean=facts.mean,
            std=facts.std,
            re_prob=config.erase,
            re_mode="pixel",
            normalize=config.erase > 0,
        )
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        if config.auto_augment is None:
            raise
        raise InputError(
            f"--auto-augment {config.auto_augment!r} is no policy of timm's; examples: rand-m9-mstd0.5-inc1, "
            "augmix-m3-w3, original, v0, 3a"
        ) from error
    for step in transform.transforms:
        operations = [*getattr(step, "ops", []), *(entry for policy in getattr(step, "policy", []) for entry in policy)]
        for operation in operations:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Any, bits: int, **_: Any) -> Any:
    """Keep the highest bits of an image; timm also asks for none of them, which Pillow refuses since version 13."""
    from PIL import Image
    from timm.data.auto_augment import posterize

    return posterize(image, bits) if bits else Image.new(image.mode, image.size)


def _test_transform(config: TrainConfig, facts: Facts, crop_pct: float) -> Any:
    from timm.data.transforms_factory import create_transform

    interpolation = "bilinear" if config.interpolation == "random" else config.interpolation
    return create_transform(facts.image_shape, interpolation=interpolation, crop_pct=crop_pct, normalize=False)
