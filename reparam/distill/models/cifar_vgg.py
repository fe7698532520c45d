"""VGG networks with batch norm for small images: five blocks, three poolings, one linear layer.

Source: Simonyan and Zisserman, "Very Deep Convolutional Networks" (ICLR 2015), configurations A, B, D, E and one with
8 layers, in the form for CIFAR of Tian et al., "Contrastive Representation Distillation" (ICLR 2020): batch norm, no
pooling behind the fourth block, global average pooling and a single linear layer. First values: convolutions as in
He et al. (ICCV 2015), fan-out, the classifier N(0, 0.01^2).
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from reparam.distill.models.base import CIFAR, ImageClassifier, he_normal

__all__ = ["CifarVGG"]

_WIDTHS = (64, 128, 256, 512, 512)
_LAYERS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class CifarVGG(ImageClassifier):
    """A VGG network: images ``[N, in_chans, H, W]``, sides of 8 or more, to logits ``[N, num_classes]``.

    Args:
        depth: number of layers as in the name: 8, 11, 13, 16 or 19.
        num_classes: number of logits.
        in_chans: image channels.
    """

    def __init__(self, depth: int, num_classes: int = 100, in_chans: int = 3) -> None:
        super().__init__(num_classes, in_chans)
        if depth not in _LAYERS:
            raise ValueError(f"depth must be one of {', '.join(map(str, _LAYERS))}, got {depth}")
        self.blocks = nn.Sequential()
        channels = in_chans
        for count, width in zip(_LAYERS[depth], _WIDTHS, strict=True):
            layers: list[nn.Module] = []
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            self.blocks.append(nn.Sequential(*layers))
        self.pool = nn.MaxPool2d(2)
        self.add_classifier(channels)
        he_normal(self)
        if isinstance(self.fc, nn.Linear):
            nn.init.normal_(self.fc.weight, std=0.01)
            nn.init.zeros_(self.fc.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map ``[N, 512, H / 8, W / 8]`` (sizes rounded down)."""
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index < 3:
                x = self.pool(x)
        return x


_CONFIG = {**CIFAR, "pool_size": (4, 4), "first_conv": "blocks.0.0"}
default_cfgs = generate_default_cfgs({f"cifar_vgg{depth}": _CONFIG for depth in _LAYERS})


def _build(depth: int, pretrained: bool, **kwargs: Any) -> CifarVGG:
    model: CifarVGG = build_model_with_cfg(CifarVGG, f"cifar_vgg{depth}", pretrained, depth=depth, **kwargs)
    return model


@register_model
def cifar_vgg8(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-8: 3,965,028 parameters for 100 classes."""
    return _build(8, pretrained, **kwargs)


@register_model
def cifar_vgg11(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-11: 9,277,284 parameters for 100 classes."""
    return _build(11, pretrained, **kwargs)


@register_model
def cifar_vgg13(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-13: 9,462,180 parameters for 100 classes."""
    return _build(13, pretrained, **kwargs)


@register_model
def cifar_vgg16(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-16: 14,774,436 parameters for 100 classes."""
    return _build(16, pretrained, **kwargs)


@register_model
def cifar_vgg19(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-19: 20,086,692 parameters for 100 classes."""
    return _build(19, pretrained, **kwargs)
