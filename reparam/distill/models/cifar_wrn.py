"""Wide residual networks for small images: three stages of pre-activation blocks.

Source: Zagoruyko and Komodakis, "Wide Residual Networks" (BMVC 2016), blocks of two 3x3 convolutions, without dropout;
first values of the convolutions as in He et al. (ICCV 2015), fan-out, and a classifier bias of zero.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from reparam.distill.models.base import CIFAR, ImageClassifier, he_normal

__all__ = ["CifarWideResNet"]


class WideBlock(nn.Module):
    """Norm, ReLU and 3x3 convolution, twice, and a shortcut: ``[N, in, H, W] -> [N, out, H / stride, W / stride]``.

    Where the channels change, the first norm and ReLU are in front of the shortcut too.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module | None = None
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(x))
        if self.shortcut is not None:
            x = self.shortcut(y)
        return x + self.conv2(self.relu(self.bn2(self.conv1(y))))


class CifarWideResNet(ImageClassifier):
    """A wide residual network of ``depth = 6 n + 4``: images ``[N, in_chans, H, W]`` to logits ``[N, num_classes]``.

    Args:
        depth: number of layers: 10, 16, 22, 28, 40, ...
        width: the stages have ``16 width``, ``32 width``, ``64 width`` channels.
        num_classes: number of logits.
        in_chans: image channels.
    """

    def __init__(self, depth: int, width: int = 1, num_classes: int = 100, in_chans: int = 3) -> None:
        super().__init__(num_classes, in_chans)
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4 with n >= 1 (10, 16, 22, ...), got {depth}")
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        self.layer1 = _stage(16, 16 * width, blocks, stride=1)
        self.layer2 = _stage(16 * width, 32 * width, blocks, stride=2)
        self.layer3 = _stage(32 * width, 64 * width, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()
        self.add_classifier(64 * width)
        he_normal(self)
        if isinstance(self.fc, nn.Linear):
            nn.init.zeros_(self.fc.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map ``[N, 64 width, H / 4, W / 4]`` (sizes rounded up), after norm and ReLU."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.relu(self.bn1(x))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = WideBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(WideBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


default_cfgs = generate_default_cfgs({f"cifar_wrn_{size}": CIFAR for size in ("16_1", "16_2", "40_1", "40_2")})


def _build(variant: str, pretrained: bool, **kwargs: Any) -> CifarWideResNet:
    model: CifarWideResNet = build_model_with_cfg(CifarWideResNet, variant, pretrained, **kwargs)
    return model


@register_model
def cifar_wrn_16_1(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """WRN-16-1, widths 16, 32, 64: 180,916 parameters for 100 classes."""
    return _build("cifar_wrn_16_1", pretrained, depth=16, **{"width": 1, **kwargs})


@register_model
def cifar_wrn_16_2(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """WRN-16-2, widths 32, 64, 128: 703,284 parameters for 100 classes."""
    return _build("cifar_wrn_16_2", pretrained, depth=16, **{"width": 2, **kwargs})


@register_model
def cifar_wrn_40_1(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """WRN-40-1, widths 16, 32, 64: 569,780 parameters for 100 classes."""
    return _build("cifar_wrn_40_1", pretrained, depth=40, **{"width": 1, **kwargs})


@register_model
def cifar_wrn_40_2(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """WRN-40-2, widths 32, 64, 128: 2,255,156 parameters for 100 classes."""
    return _build("cifar_wrn_40_2", pretrained, depth=40, **{"width": 2, **kwargs})
