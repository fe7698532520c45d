"""Networks of the papers that timm lacks. Importing this package registers them with ``timm.create_model``."""

from reparam.distill.models.cifar_mobilenetv2 import CifarMobileNetV2
from reparam.distill.models.cifar_resnet import (
    CifarResNet,
    cifar_resnet8,
    cifar_resnet8_w8,
    cifar_resnet20,
)
from reparam.distill.models.cifar_resnet_four import CifarFourStageResNet
from reparam.distill.models.cifar_shufflenet import CifarShuffleNet, CifarShuffleNetV2
from reparam.distill.models.cifar_vgg import CifarVGG
from reparam.distill.models.cifar_wrn import CifarWideResNet
from reparam.distill.models.mobilenet_v1 import MobileNetV1
from reparam.distill.models.plain_cnn import PlainCNN
from reparam.distill.models.rvt import RobustVisionTransformer

__all__ = [
    "CifarFourStageResNet",
    "CifarMobileNetV2",
    "CifarResNet",
    "CifarShuffleNet",
    "CifarShuffleNetV2",
    "CifarVGG",
    "CifarWideResNet",
    "MobileNetV1",
    "PlainCNN",
    "RobustVisionTransformer",
    "cifar_resnet8",
    "cifar_resnet8_w8",
    "cifar_resnet20",
]
