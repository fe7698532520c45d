"""Plain convolutional networks of 2 to 10 layers for CIFAR-10 and CIFAR-100, without shortcuts.

Source: Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant" (AAAI 2020), the "plane" networks,
which Gap-KD uses. They read the whole last map, so their classifier is made for one image size; maps of other sizes are
averaged (or repeated) to the size of that map. PyTorch's first values.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from reparam.distill.models.base import CIFAR, ImageClassifier

__all__ = ["PlainCNN"]

_Stages = tuple[tuple[int, ...], ...]

_CIFAR10: dict[int, _Stages] = {
    2: ((16,), (16,)),
    4: ((16, 16), (32, 32)),
    6: ((16, 16), (32, 32), (64, 64)),
    8: ((16, 16), (32, 32), (64, 64), (128, 128)),
    10: ((32, 32), (64, 64), (128, 128), (256, 256, 256, 256)),
}
_CIFAR100: dict[int, _Stages] = {
    2: ((32,), (32,)),
    4: ((32, 32), (64, 64)),
    6: ((32, 32), (64, 64), (128, 128)),
    8: ((32, 32), (64, 64), (128, 128), (256, 256)),
    10: ((32, 32), (64, 64), (128, 128), (256, 256, 256, 256)),
}


class PlainCNN(ImageClassifier):
    """3x3 convolutions with norm and ReLU, 2x2 max pooling, linear layers: images to logits ``[N, num_classes]``.

    Args:
        stages: output channels of the convolutions of every stage.
        hidden: width of a linear layer in front of the classifier; 0 for none.
        last_pool: whether the last stage has a pooling, as all others do.
        num_classes: number of logits.
        in_chans: image channels.
        img_size: side of the images that the linear layers are made for.
    """

    def __init__(
        self,
        stages: _Stages,
        hidden: int = 0,
        last_pool: bool = True,
        num_classes: int = 100,
        in_chans: int = 3,
        img_size: int = 32,
    ) -> None:
        super().__init__(num_classes, in_chans)
        self.stages = nn.Sequential()
        channels, side = in_chans, img_size
        for index, widths in enumerate(stages):
            layers: list[nn.Module] = []
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            if last_pool or index < len(stages) - 1:
                layers.append(nn.MaxPool2d(2))
                side //= 2
            self.stages.append(nn.Sequential(*layers))
        if side < 1:
            raise ValueError(f"images of side {img_size} are too small for {len(stages)} stages")
        inputs = channels * side**2
        self.hidden = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU()) if hidden else None
        self.add_classifier(channels, hidden or inputs, side)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map ``[N, C, H / 2^p, W / 2^p]`` behind ``p`` poolings (sizes rounded down)."""
        return self.stages(x)

    def forward_neck(self, x: Tensor) -> Tensor:
        """Return what the classifier reads: the flat map ``[N, C side side]``, or the hidden units."""
        x = super().forward_neck(x)
        return x if self.hidden is None else self.hidden(x)


def _config(num_classes: int, side: int) -> dict[str, Any]:
    return {**CIFAR, "num_classes": num_classes, "pool_size": (side, side), "first_conv": "stages.0.0"}


_SIDES = {"10_plain": (8, 8, 4, 2, 2), "100_plain": (8, 8, 8, 2, 2)}
default_cfgs = generate_default_cfgs(
    {
        f"cifar{kind}{depth}": _config(int(kind.partition("_")[0]), side)
        for kind, sides in _SIDES.items()
        for depth, side in zip(_CIFAR10, sides, strict=True)
    }
)


def _build(variant: str, pretrained: bool, stages: _Stages, **kwargs: Any) -> PlainCNN:
    model: PlainCNN = build_model_with_cfg(PlainCNN, variant, pretrained, stages=stages, **kwargs)
    return model


@register_model
def cifar10_plain2(pretrained: bool = False, **kwargs: Any) -> PlainCNN:
    """Plain network of 2 layers for CIFAR-10: 13,082 parameters for 10 classes."""
    return _build("cifar10_plain2", pretrained, _CIFAR10[2], **kwargs)


@register_model
def cifar10_plain4(pretrained: bool = False, **kwargs: Any) -> PlainCNN:
    """Plain network of 4 layers for CIFAR-10: 37,338 parameters for 10 classes."""
    return _build("cifar10_plain4", pretrained, _CIFAR10[4], **kwargs)


@register_model
def cifar10_plain6(pretrained: bool = False, **kwargs: Any) -> PlainCNN:
    """Plain network of 6 layers for CIFAR-10: 82,778 parameters for 10 classes."""
    return _build("cifar10_plain6", pretrained, _CIFAR10[6], **kwargs)


@register_model
def cifar10_plain8(pretrained: bool = False, **kwargs: Any) -> PlainCNN:
    """Plain network of 8 layers for CIFAR-10: 327,962 parameters for 10 classes."""
    return _build("cifar10_plain8", pretrained, _CIFAR10[8], **{"hidden": 64, **kwargs})


@register_model
def cifar10_plain10(pretrained: bool = False, **kwargs: Any) -> PlainCNN:
    """Plain network of 10 layers for CIFAR-10: 2,487,850 parameters for 10 classes."""
    return _build("cifar10_plain10", pretrained, _CIFAR10[10], **{"hidden": 128, **kwargs})


@register_model
def cifar100_plain2(pretrained: bool = False, **kwargs: Any) -> PlainCNN:
    """Plain network of 2 layers for CIFAR-100: 215,172 parameters for 100 classes."""
    return _build("cifar100_plain2", pretrained, _CIFAR100[2], **kwargs)


@register_model
def cifar100_plain4(pretrained: bool = False, **kwargs: Any) -> PlainCNN:
    """Plain network of 4 layers for CIFAR-100: 475,652 parameters for 100 classes."""
    return _build("cifar100_plain4", pretrained, _CIFAR100[4], **kwargs)


@register_model
def cifar100_plain6(pretrained: bool = False, **kwargs: Any) -> PlainCNN:
    """Plain network of 6 layers for CIFAR-100, two poolings: 1,107,204 parameters for 100 classes."""
    return _build("cifar100_plain6", pretrained, _CIFAR100[6], **{"last_pool": False, **kwargs})


@register_model
def cifar100_plain8(pretrained: bool = False, **kwargs: Any) -> PlainCNN:
    """Plain network of 8 layers for CIFAR-100: 1,246,276 parameters for 100 classes."""
    return _build("cifar100_plain8", pretrained, _CIFAR100[8], **{"hidden": 64, **kwargs})


@register_model
def cifar100_plain10(pretrained: bool = False, **kwargs: Any) -> PlainCNN:
    """Plain network of 10 layers for CIFAR-100: 2,931,460 parameters for 100 classes."""
    return _build("cifar100_plain10", pretrained, _CIFAR100[10], **{"hidden": 512, **kwargs})
