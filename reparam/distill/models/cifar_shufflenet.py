"""ShuffleNet (three groups) and ShuffleNetV2 (1x), for small images and for ImageNet: a stem and three stages.

Source: Zhang et al., "ShuffleNet" (CVPR 2018), table 1, and Ma et al., "ShuffleNet V2" (ECCV 2018), table 5, in the
form for CIFAR of Tian et al., "Contrastive Representation Distillation" (ICLR 2020): the stem is a 1x1 convolution with
stride 1; the blocks of the first ShuffleNet have a ReLU behind the depthwise convolution too, and count their narrow
channels from what they make, without what they pass on. For ImageNet the stem is that of the papers; the blocks are the
same, which for ShuffleNetV2 are the paper's. PyTorch's first values.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from reparam.distill.models.base import CIFAR, IMAGENET, ImageClassifier, conv_norm

__all__ = ["CifarShuffleNet", "CifarShuffleNetV2"]


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Deal the channels ``[N, C, H, W]`` of ``groups`` groups to new ones: one of each, then the next of each."""
    batch, channels, height, width = x.shape
    return x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(x.shape)


class ShuffleBlock(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; a sum, or at stride 2 a concatenation with the pooled input.

    ``[N, in, H, W] -> [N, out, H / stride, W / stride]``; ``out == in`` at stride 1.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, first_groups: int, groups: int) -> None:
        super().__init__()
        made = out_channels - in_channels if stride == 2 else out_channels
        middle = made // 4
        self.groups = first_groups
        self.reduce = nn.Sequential(*conv_norm(in_channels, middle, 1, groups=first_groups))
        self.spatial = nn.Sequential(*conv_norm(middle, middle, 3, stride, groups=middle))
        self.restore = nn.Sequential(*conv_norm(middle, made, 1, groups=groups, relu=False))
        self.pool = nn.AvgPool2d(3, 2, 1) if stride == 2 else None
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.restore(self.spatial(shuffle(self.reduce(x), self.groups)))
        return self.relu(x + y if self.pool is None else torch.cat([y, self.pool(x)], dim=1))


def _stem(in_chans: int, large: bool) -> nn.Sequential:
    """A 1x1 convolution, or for large images one of 3x3 with stride 2 and a pooling: ``[N, 24, H / 4, W / 4]``."""
    if large:
        return nn.Sequential(*conv_norm(in_chans, 24, 3, 2), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(*conv_norm(in_chans, 24, 1))


class CifarShuffleNet(ImageClassifier):
    """ShuffleNet: ``[N, in_chans, H, W]`` to logits ``[N, num_classes]``.

    Args:
        widths: channels of the stages.
        groups: groups of the 1x1 convolutions; the first one, behind the stem, has one.
        num_classes: number of logits.
        in_chans: image channels.
        large: whether the stem is that for ImageNet, which divides the sides by 4.
    """

    def __init__(
        self,
        widths: tuple[int, int, int] = (240, 480, 960),
        groups: int = 3,
        num_classes: int = 100,
        in_chans: int = 3,
        large: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans)
        channels = 24
        self.stem = _stem(in_chans, large)
        self.stages = nn.Sequential()
        for index, (width, count) in enumerate(zip(widths, (4, 8, 4), strict=True)):
            blocks = [ShuffleBlock(channels, width, 2, groups if index else 1, groups)]
            blocks += [ShuffleBlock(width, width, 1, groups, groups) for _ in range(count - 1)]
            self.stages.append(nn.Sequential(*blocks))
            channels = width
        self.add_classifier(channels)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map ``[N, widths[2], H / 8, W / 8]`` of the stem's map (sizes rounded up)."""
        return self.stages(self.stem(x))


class DownBlock(nn.Module):
    """Two branches of stride 2, concatenated and shuffled: ``[N, in, H, W] -> [N, out, H / 2, W / 2]``."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.left = nn.Sequential(
            *conv_norm(in_channels, in_channels, 3, 2, groups=in_channels, relu=False),
            *conv_norm(in_channels, half, 1),
        )
        self.right = _branch(in_channels, half, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return shuffle(torch.cat([self.left(x), self.right(x)], dim=1), 2)


class SplitBlock(nn.Module):
    """One half of the channels passes, the other is computed; both are shuffled: shape ``[N, C, H, W]`` is kept."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.right = _branch(channels // 2, channels // 2, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        return shuffle(torch.cat([left, self.right(right)], dim=1), 2)


def _branch(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        *conv_norm(in_channels, out_channels, 1),
        *conv_norm(out_channels, out_channels, 3, stride, groups=out_channels, relu=False),
        *conv_norm(out_channels, out_channels, 1),
    )


class CifarShuffleNetV2(ImageClassifier):
    """ShuffleNetV2: ``[N, in_chans, H, W]`` to logits ``[N, num_classes]``.

    Args:
        widths: channels of the stages and of the last convolution.
        num_classes: number of logits.
        in_chans: image channels.
        large: whether the stem is that for ImageNet, which divides the sides by 4.
    """

    def __init__(
        self,
        widths: tuple[int, int, int, int] = (116, 232, 464, 1024),
        num_classes: int = 100,
        in_chans: int = 3,
        large: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans)
        channels = 24
        self.stem = _stem(in_chans, large)
        self.stages = nn.Sequential()
        for width, count in zip(widths[:3], (3, 7, 3), strict=True):
            self.stages.append(nn.Sequential(DownBlock(channels, width), *(SplitBlock(width) for _ in range(count))))
            channels = width
        self.last = nn.Sequential(*conv_norm(channels, widths[3], 1))
        self.add_classifier(widths[3])

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map ``[N, widths[3], H / 8, W / 8]`` of the stem's map (sizes rounded up)."""
        return self.last(self.stages(self.stem(x)))


_CONFIG = {**CIFAR, "pool_size": (4, 4), "first_conv": "stem.0"}
_LARGE = {**IMAGENET, "first_conv": "stem.0"}
default_cfgs = generate_default_cfgs(
    {
        "cifar_shufflenet_g3": _CONFIG,
        "cifar_shufflenetv2": _CONFIG,
        "shufflenet_g3": _LARGE,
        "shufflenetv2": _LARGE,
    }
)


@register_model
def cifar_shufflenet_g3(pretrained: bool = False, **kwargs: Any) -> CifarShuffleNet:
    """ShuffleNet, three groups: 949,258 parameters for 100 classes."""
    model: CifarShuffleNet = build_model_with_cfg(CifarShuffleNet, "cifar_shufflenet_g3", pretrained, **kwargs)
    return model


@register_model
def cifar_shufflenetv2(pretrained: bool = False, **kwargs: Any) -> CifarShuffleNetV2:
    """ShuffleNetV2 1x: 1,355,528 parameters for 100 classes."""
    model: CifarShuffleNetV2 = build_model_with_cfg(CifarShuffleNetV2, "cifar_shufflenetv2", pretrained, **kwargs)
    return model


@register_model
def shufflenet_g3(pretrained: bool = False, **kwargs: Any) -> CifarShuffleNet:
    """ShuffleNet, three groups, for ImageNet: 1,814,734 parameters for 1000 classes."""
    model: CifarShuffleNet = build_model_with_cfg(
        CifarShuffleNet, "shufflenet_g3", pretrained, **{"large": True, **kwargs}
    )
    return model


@register_model
def shufflenetv2(pretrained: bool = False, **kwargs: Any) -> CifarShuffleNetV2:
    """ShuffleNetV2 1x for ImageNet: 2,278,604 parameters for 1000 classes."""
    model: CifarShuffleNetV2 = build_model_with_cfg(
        CifarShuffleNetV2, "shufflenetv2", pretrained, **{"large": True, **kwargs}
    )
    return model
