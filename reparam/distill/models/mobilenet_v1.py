"""MobileNet, the first version, as in the distillation benchmarks for ImageNet.

Source: Howard et al., "MobileNets" (2017), table 1, with ReLU. PyTorch's first values.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from reparam.distill.models.base import IMAGENET, ImageClassifier, conv_norm

__all__ = ["MobileNetV1"]

_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
"""Output channels and stride of every pair of depthwise and 1x1 convolution."""


class MobileNetV1(ImageClassifier):
    """A 3x3 convolution and 13 pairs of depthwise and 1x1 convolution: images to logits ``[N, num_classes]``.

    Args:
        num_classes: number of logits.
        in_chans: image channels.
    """

    def __init__(self, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__(num_classes, in_chans)
        channels = 32
        self.model = nn.Sequential(nn.Sequential(*conv_norm(in_chans, channels, 3, 2)))
        for width, stride in _BLOCKS:
            depthwise = conv_norm(channels, channels, 3, stride, groups=channels)
            self.model.append(nn.Sequential(*depthwise, *conv_norm(channels, width, 1)))
            channels = width
        self.add_classifier(channels)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map ``[N, 1024, H / 32, W / 32]`` (sizes rounded up)."""
        return self.model(x)


default_cfgs = generate_default_cfgs({"mobilenet_v1": {**IMAGENET, "first_conv": "model.0.0"}})


@register_model
def mobilenet_v1(pretrained: bool = False, **kwargs: Any) -> MobileNetV1:
    """MobileNet: 4,231,976 parameters for 1000 classes."""
    model: MobileNetV1 = build_model_with_cfg(MobileNetV1, "mobilenet_v1", pretrained, **kwargs)
    return model
