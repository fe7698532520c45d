"""MobileNetV2 of half width for small images.

Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (CVPR 2018), table 2, in the form for
CIFAR of Tian et al., "Contrastive Representation Distillation" (ICLR 2020): expansion 6, half the channels in front
of the last convolution, stride 1 in the second stage, ReLU in place of ReLU6. First values: convolutions as in He et
al. (ICCV 2015), fan-out, the classifier N(0, 0.01^2).
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from reparam.distill.models.base import CIFAR, ImageClassifier, conv_norm, he_normal

__all__ = ["CifarMobileNetV2"]

_STAGES = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
"""Channels at full width, blocks, stride of the first block."""


class InvertedResidual(nn.Module):
    """1x1 to the hidden channels, depthwise 3x3, 1x1 back: ``[N, in, H, W] -> [N, out, H / stride, W / stride]``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *conv_norm(in_channels, hidden, 1),
            *conv_norm(hidden, hidden, 3, stride, groups=hidden),
            *conv_norm(hidden, out_channels, 1, relu=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class CifarMobileNetV2(ImageClassifier):
    """MobileNetV2 for small images: ``[N, in_chans, H, W]`` to logits ``[N, num_classes]``.

    Args:
        width: factor of all channels but the last 1280.
        expansion: hidden channels of a block per input channel, from the second stage on.
        num_classes: number of logits.
        in_chans: image channels.
    """

    def __init__(self, width: float = 0.5, expansion: int = 6, num_classes: int = 100, in_chans: int = 3) -> None:
        super().__init__(num_classes, in_chans)
        channels = int(32 * width)
        self.stem = nn.Sequential(*conv_norm(in_chans, channels, 3, 2))
        self.stages = nn.Sequential()
        for index, (full, count, stride) in enumerate(_STAGES):
            outputs, blocks = int(full * width), []
            for block in range(count):
                factor = expansion if index else 1
                blocks.append(InvertedResidual(channels, outputs, 1 if block else stride, factor))
                channels = outputs
            self.stages.append(nn.Sequential(*blocks))
        self.last = nn.Sequential(*conv_norm(channels, 1280, 1))
        self.add_classifier(1280)
        he_normal(self)
        if isinstance(self.fc, nn.Linear):
            nn.init.normal_(self.fc.weight, std=0.01)
            nn.init.zeros_(self.fc.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map ``[N, 1280, H / 16, W / 16]`` (sizes rounded up)."""
        return self.last(self.stages(self.stem(x)))


_CONFIG = {**CIFAR, "pool_size": (2, 2), "first_conv": "stem.0"}
default_cfgs = generate_default_cfgs({"cifar_mobilenetv2_half": _CONFIG})


@register_model
def cifar_mobilenetv2_half(pretrained: bool = False, **kwargs: Any) -> CifarMobileNetV2:
    """MobileNetV2, half width, expansion 6: 812,836 parameters for 100 classes."""
    model: CifarMobileNetV2 = build_model_with_cfg(CifarMobileNetV2, "cifar_mobilenetv2_half", pretrained, **kwargs)
    return model
