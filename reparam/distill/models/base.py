"""What the networks of this package share: the head in timm's style, a convolution with norm, the data configurations.

Source: the interface is that of timm's models (``forward_features``, ``forward_head``, ``reset_classifier``).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["CIFAR", "IMAGENET", "ImageClassifier", "conv_norm", "he_normal"]

CIFAR: dict[str, Any] = {
    "num_classes": 100,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "fixed_input_size": False,
    "mean": (0.5071, 0.4867, 0.4408),
    "std": (0.2675, 0.2565, 0.2761),
    "first_conv": "conv1",
    "classifier": "fc",
}
"""Data configuration of the networks for 32x32 images: CIFAR-100 with its channel statistics."""

IMAGENET: dict[str, Any] = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "fixed_input_size": False,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "classifier": "fc",
}
"""Data configuration of the networks for ImageNet."""


class ImageClassifier(nn.Module):
    """Images ``[N, in_chans, H, W]`` to logits ``[N, num_classes]``: a feature map, its average, a linear classifier.

    A subclass builds its layers between ``super().__init__`` and `add_classifier`, and has ``forward_features``.

    Args:
        num_classes: number of logits; 0 leaves out the classifier.
        in_chans: image channels.
    """

    classifier_name = "fc"
    """Attribute that holds the classifier."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = 0
        self.head_hidden_size = 0
        self.pooled = True

    def add_classifier(self, features: int, hidden: int | None = None, side: int = 1) -> None:
        """Append the pooling to ``side x side`` and the classifier.

        Args:
            features: channels of the last feature map.
            hidden: inputs of the classifier, where these are not the pooled channels.
            side: rows and columns that the pooling leaves.
        """
        self.num_features = features
        self.head_hidden_size = features if hidden is None else hidden
        self.global_pool = nn.AdaptiveAvgPool2d(side)
        self.flatten = nn.Flatten()
        setattr(self, self.classifier_name, self._classifier())

    def _classifier(self) -> nn.Module:
        return nn.Linear(self.head_hidden_size, self.num_classes) if self.num_classes > 0 else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map ``[N, num_features, H', W']``."""
        raise NotImplementedError

    def forward_neck(self, x: Tensor) -> Tensor:
        """Return what the classifier reads: feature map ``[N, C, H', W']`` to ``[N, head_hidden_size]``."""
        return self.flatten(self.global_pool(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits ``[N, num_classes]`` of a feature map ``[N, C, H', W']``.

        Args:
            x: what ``forward_features`` returned.
            pre_logits: return the inputs of the classifier instead.
        """
        if not self.pooled:
            return x
        x = self.forward_neck(x)
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[N, num_classes]``."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer, or an identity where there is none."""
        classifier: nn.Module = getattr(self, self.classifier_name)
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one.

        Args:
            num_classes: number of logits; 0 removes the classifier.
            global_pool: ``"avg"``, or ``""`` for a network that returns its feature map (``num_classes`` 0);
                ``None`` leaves it as it is.

        Raises:
            ValueError: another pooling, or a classifier without pooling.
        """
        if global_pool not in (None, "avg", ""):
            raise ValueError(f"global_pool must be 'avg' or '', got {global_pool!r}")
        pooled = self.pooled if global_pool is None else global_pool == "avg"
        if num_classes and not pooled:
            raise ValueError(f"a classifier of {num_classes} classes needs global_pool='avg'")
        old = next(self.parameters())
        self.num_classes, self.pooled = num_classes, pooled
        setattr(self, self.classifier_name, self._classifier().to(old.device, old.dtype).train(self.training))


def conv_norm(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, *, relu: bool = True
) -> list[nn.Module]:
    """Return a convolution without bias that keeps the size at stride 1, its batch norm, and a ReLU if wanted."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), *([nn.ReLU()] if relu else [])]


def he_normal(model: nn.Module) -> None:
    """Draw the weights of all convolutions from N(0, 2 / (k^2 outputs)), and set their biases to zero.

    Source: He et al., "Delving Deep into Rectifiers" (ICCV 2015), eq. 14.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
