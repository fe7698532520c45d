"""ResNet-18 and ResNet-50 for small images: the widths of the ImageNet networks, a 3x3 stem, no pooling in front.

Source: He et al., "Deep Residual Learning" (CVPR 2016), table 1, in the form of Tian et al., "Contrastive
Representation Distillation" (ICLR 2020): four stages on maps of 32, 16, 8 and 4 pixels. A bottleneck strides in its 3x3
convolution. Convolutions start as in He et al. (ICCV 2015), fan-out.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from reparam.distill.models.base import CIFAR, ImageClassifier, conv_norm, he_normal

__all__ = ["CifarFourStageResNet"]


class Residual(nn.Module):
    """A block of convolutions with a shortcut: ``[N, in, H, W] -> [N, out, H / stride, W / stride]``.

    Args:
        inputs: channels of the map.
        width: channels inside of the block.
        stride: of the first 3x3 convolution.
        bottleneck: 1x1, 3x3 and 1x1 convolution to ``4 width`` channels; otherwise two 3x3 ones to ``width``.
    """

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        if bottleneck:
            layers = [*conv_norm(inputs, width, 1), *conv_norm(width, width, 3, stride)]
            layers += conv_norm(width, outputs, 1, relu=False)
        else:
            layers = [*conv_norm(inputs, width, 3, stride), *conv_norm(width, width, 3, relu=False)]
        self.body = nn.Sequential(*layers)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(*conv_norm(inputs, outputs, 1, stride, relu=False))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.downsample(x))


class CifarFourStageResNet(ImageClassifier):
    """Residual network of four stages, 64 to 512 channels wide: images ``[N, in_chans, H, W]`` to logits.

    Args:
        depths: blocks of the four stages.
        bottleneck: kind of the blocks; bottlenecks have four times the channels outside.
        num_classes: number of logits.
        in_chans: image channels.
    """

    def __init__(
        self, depths: tuple[int, int, int, int], bottleneck: bool, num_classes: int = 100, in_chans: int = 3
    ) -> None:
        super().__init__(num_classes, in_chans)
        self.conv1 = nn.Conv2d(in_chans, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        channels, stages = 64, []
        for index, depth in enumerate(depths):
            width = 64 * 2**index
            stages.append(nn.Sequential())
            for block in range(depth):
                stages[-1].append(Residual(channels, width, 2 if index and not block else 1, bottleneck))
                channels = 4 * width if bottleneck else width
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.add_classifier(channels)
        he_normal(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map ``[N, num_features, H / 8, W / 8]`` (sizes rounded up)."""
        x = self.relu(self.bn1(self.conv1(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


_CONFIG = {**CIFAR, "pool_size": (4, 4)}
default_cfgs = generate_default_cfgs({"cifar_resnet18": _CONFIG, "cifar_resnet50": _CONFIG})


@register_model
def cifar_resnet18(pretrained: bool = False, **kwargs: Any) -> CifarFourStageResNet:
    """ResNet-18 for small images, widths 64 to 512: 11,220,132 parameters for 100 classes."""
    return _build("cifar_resnet18", pretrained, **{"depths": (2, 2, 2, 2), "bottleneck": False, **kwargs})


@register_model
def cifar_resnet50(pretrained: bool = False, **kwargs: Any) -> CifarFourStageResNet:
    """ResNet-50 for small images, bottlenecks of 64 to 512 channels: 23,705,252 parameters for 100 classes."""
    return _build("cifar_resnet50", pretrained, **{"depths": (3, 4, 6, 3), "bottleneck": True, **kwargs})


def _build(variant: str, pretrained: bool, **kwargs: Any) -> CifarFourStageResNet:
    model: CifarFourStageResNet = build_model_with_cfg(CifarFourStageResNet, variant, pretrained, **kwargs)
    return model
