"""Networks of the papers that timm lacks. Importing this package registers them with ``timm.create_model``."""

from reparam.distill.models.cifar_resnet import (
    CifarResNet,
    cifar_resnet8,
    cifar_resnet8_w8,
    cifar_resnet20,
)

__all__ = ["CifarResNet", "cifar_resnet8", "cifar_resnet8_w8", "cifar_resnet20"]
