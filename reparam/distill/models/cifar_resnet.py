"""Residual networks for small images (8x8 to 64x64): three stages of basic blocks, no pooling in the stem.

Source: He et al., "Deep Residual Learning" (CVPR 2016), section 4.2, with 1x1 convolution shortcuts where the shape
changes. The variants x4 have four times the channels in their stages and twice in the stem, as in Tian et al.,
"Contrastive Representation Distillation" (ICLR 2020). Convolutions start as in He et al. (ICCV 2015), fan-out.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from reparam.distill.models.base import CIFAR, ImageClassifier, he_normal

__all__ = ["CifarResNet"]


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut: ``[N, in, H, W] -> [N, out, H / stride, W / stride]``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + self.downsample(x))


class CifarResNet(ImageClassifier):
    """A residual network of ``depth = 6 n + 2`` layers: images ``[N, in_chans, H, W]`` to logits ``[N, num_classes]``.

    Args:
        depth: number of layers on the longest path: 8, 14, 20, 32, ...
        width: channels of the first stage; the stages have ``width``, ``2 width``, ``4 width`` channels.
        num_classes: number of logits.
        in_chans: image channels.
        stem: channels of the stem (default: ``width``).
    """

    def __init__(
        self, depth: int, width: int = 16, num_classes: int = 100, in_chans: int = 3, stem: int | None = None
    ) -> None:
        super().__init__(num_classes, in_chans)
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6 n + 2 with n >= 1 (8, 14, 20, ...), got {depth}")
        blocks = (depth - 2) // 6
        stem = width if stem is None else stem
        self.conv1 = nn.Conv2d(in_chans, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.layer1 = _stage(stem, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.add_classifier(4 * width)
        he_normal(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map ``[N, 4 width, H / 4, W / 4]`` (sizes rounded up)."""
        x = self.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(Block(out_channels, out_channels, 1) for _ in range(blocks - 1)))


_SIZES = ("8", "8_w8", "14", "20", "32", "44", "56", "110", "8x4", "32x4")
default_cfgs = generate_default_cfgs({f"cifar_resnet{size}": CIFAR for size in _SIZES})


def _build(variant: str, pretrained: bool, **kwargs: Any) -> CifarResNet:
    model: CifarResNet = build_model_with_cfg(CifarResNet, variant, pretrained, **kwargs)
    return model


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-8, widths 16, 32, 64: 83,892 parameters for 100 classes."""
    return _build("cifar_resnet8", pretrained, depth=8, **kwargs)


@register_model
def cifar_resnet8_w8(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-8, widths 8, 16, 32: 19,810 parameters for 10 classes of grey images; the default of ``reparam train``."""
    return _build("cifar_resnet8_w8", pretrained, depth=8, **{"width": 8, **kwargs})


@register_model
def cifar_resnet14(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-14, widths 16, 32, 64: 181,108 parameters for 100 classes."""
    return _build("cifar_resnet14", pretrained, depth=14, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20, widths 16, 32, 64: 278,324 parameters for 100 classes."""
    return _build("cifar_resnet20", pretrained, depth=20, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32, widths 16, 32, 64: 472,756 parameters for 100 classes."""
    return _build("cifar_resnet32", pretrained, depth=32, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-44, widths 16, 32, 64: 667,188 parameters for 100 classes."""
    return _build("cifar_resnet44", pretrained, depth=44, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56, widths 16, 32, 64: 861,620 parameters for 100 classes."""
    return _build("cifar_resnet56", pretrained, depth=56, **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-110, widths 16, 32, 64: 1,736,564 parameters for 100 classes."""
    return _build("cifar_resnet110", pretrained, depth=110, **kwargs)


@register_model
def cifar_resnet8x4(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-8, stem 32, widths 64, 128, 256: 1,233,540 parameters for 100 classes."""
    return _build("cifar_resnet8x4", pretrained, depth=8, **{"width": 64, "stem": 32, **kwargs})


@register_model
def cifar_resnet32x4(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32, stem 32, widths 64, 128, 256: 7,433,860 parameters for 100 classes."""
    return _build("cifar_resnet32x4", pretrained, depth=32, **{"width": 64, "stem": 32, **kwargs})
