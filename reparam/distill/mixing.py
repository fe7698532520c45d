"""What is done to a batch of normalised images: random erasing, mixup and cutmix, all of them timm's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reparam.distill.config import TrainConfig
from reparam.distill.sampling import generators_kept, seed_cpu
from reparam.distill.transfer import on_device
from reparam.errors import InputError


class Mixing:
    """Mixup and cutmix of the images of one process.

    Args:
        config: the strengths, the shares and the label smoothing are read.
        classes: number of classes.
    """

    def __init__(self, config: TrainConfig, classes: int) -> None:
        from timm.data.mixup import Mixup

        self._mixup = Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            prob=config.mix_prob,
            switch_prob=config.mix_switch_prob,
            label_smoothing=config.label_smoothing,
            num_classes=classes,
        )

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mix each image with its mirror in the batch.

        Args:
            images: ``[N, C, H, W]`` with an even N; overwritten.
            labels: class indices ``[N]``.
            seed: of the draw.

        Returns:
            The images, the class with the larger share in each of them, and soft targets ``[N, classes]``.
        """
        with generators_kept():
            seed_cpu(seed)
            images, targets = self._mixup(images, labels)
        return images, targets.argmax(dim=1), targets


def make_mixing(config: TrainConfig, classes: int) -> Mixing | None:
    """Return the mixing that the settings ask for, or None.

    Raises:
        InputError: shares are given of something that is off.
    """
    if config.mix_prob != 1.0 and not (config.mixup or config.cutmix):
        raise InputError(f"--mix-prob {config.mix_prob:g} has no effect without --mixup or --cutmix")
    if config.mix_switch_prob != 0.5 and not (config.mixup and config.cutmix):
        raise InputError(
            f"--mix-switch-prob {config.mix_switch_prob:g} chooses between --mixup and --cutmix; it needs both"
        )
    return Mixing(config, classes) if config.mixup or config.cutmix else None


class Erasing:
    """Random erasing: fills a random rectangle of some images with noise.

    Args:
        share: share of the images that are changed.
    """

    def __init__(self, share: float) -> None:
        from timm.data.random_erasing import RandomErasing

        self._erase = RandomErasing(share, mode="pixel", device="cpu")

    def __call__(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return the images, each erased by its own seed; the draw is the same on every device."""
        noise = torch.full(images.shape, torch.nan)
        with generators_kept():
            for image, seed in zip(noise, seeds, strict=True):
                seed_cpu(seed)
                self._erase(image)
        noise = on_device(noise, images.device)  # one transfer per batch, instead of one per rectangle
        return torch.where(noise.isnan(), images, noise)
