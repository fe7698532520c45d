"""Residual networks for small images (8x8 to 64x64): three stages of basic blocks, no pooling in the stem.

Source: He et al., "Deep Residual Learning" (CVPR 2016), section 4.2, with 1x1 convolution shortcuts where the shape
changes. Parameter counts for 100 classes: resnet8 83,892, resnet20 278,324.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

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


class CifarResNet(nn.Module):
    """A residual network of ``depth = 6 n + 2`` layers: images ``[N, in_chans, H, W]`` to logits ``[N, num_classes]``.

    Args:
        depth: number of layers on the longest path: 8, 14, 20, 32, ...
        width: channels of stem and first stage; the stages have ``width``, ``2 width``, ``4 width`` channels.
        num_classes: number of logits.
        in_chans: image channels.
    """

    def __init__(self, depth: int, width: int = 16, num_classes: int = 100, in_chans: int = 3) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6 n + 2 with n >= 1 (8, 14, 20, ...), got {depth}")
        blocks = (depth - 2) // 6
        self.num_classes = num_classes
        self.num_features = 4 * width
        self.conv1 = nn.Conv2d(in_chans, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map ``[N, 4 width, H / 4, W / 4]`` (sizes rounded up)."""
        x = self.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[N, num_classes]``."""
        return self.fc(self.flatten(self.global_pool(self.forward_features(x))))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(Block(out_channels, out_channels, 1) for _ in range(blocks - 1)))


_CONFIG = {
    "num_classes": 100,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "fixed_input_size": False,
    "mean": (0.5071, 0.4867, 0.4408),
    "std": (0.2675, 0.2565, 0.2761),
    "first_conv": "conv1",
    "classifier": "fc",
}

_NAMES = ("cifar_resnet8", "cifar_resnet8_w8", "cifar_resnet20")
default_cfgs = generate_default_cfgs({name: _CONFIG for name in _NAMES})


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
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20, widths 16, 32, 64: 278,324 parameters for 100 classes."""
    return _build("cifar_resnet20", pretrained, depth=20, **kwargs)
