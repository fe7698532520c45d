"""Whole networks that the exactness tests run on: builder, input shapes, and the coverage that each must reach."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from reparam.coverage.weights import randomise


class Entry(NamedTuple):
    """One network.

    ``shape`` is what it is captured with, ``other`` another batch size and resolution that the teacher must accept.
    ``size`` is the spatial side at which 64 values per normalised channel need ``batch`` samples in train mode;
    ``batch`` 0: the network has no batch statistics, or is too large for it.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    other: tuple[int, ...]
    coverage: float = 1.0
    reason: str = ""
    batch: int = 0
    slow: bool = False


def timm_model(name: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=10, **options)

    return build


def torchvision_model(name: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        return models.get_model(name, weights=None, num_classes=10, **options)

    return build


# Hand-written networks -----------------------------------------------------------------------------------------------


class Net1d(nn.Module):
    """Dilated 1-D convolutions with a residual and a gate, as in audio networks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 12, 7, stride=2, padding=3)
        self.norm = nn.BatchNorm1d(12)
        self.filters = nn.ModuleList(nn.Conv1d(12, 24, 3, padding=d, dilation=d) for d in (1, 2, 4))
        self.mix = nn.ModuleList(nn.Conv1d(12, 12, 1) for _ in range(3))
        self.pool = nn.AdaptiveAvgPool1d(3)
        self.head = nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.stem(x)))
        for conv, mix in zip(self.filters, self.mix, strict=True):
            signal, gate = conv(x).chunk(2, dim=1)
            x = x + mix(torch.tanh(signal) * torch.sigmoid(gate))
        return self.head(self.pool(x).flatten(1))


class Net3d(nn.Module):
    """3-D convolutions, a depthwise one among them, instance norm and a strided residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.BatchNorm3d(8), nn.LeakyReLU(0.1))
        self.depthwise = nn.Conv3d(8, 16, 3, stride=2, padding=1, groups=8, bias=False)
        self.inner = nn.InstanceNorm3d(16, affine=True)
        self.point = nn.Conv3d(16, 16, 1)
        self.short = nn.Conv3d(8, 16, 1, stride=2)
        self.pool = nn.MaxPool3d(2, ceil_mode=True)
        self.head = nn.Conv3d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.silu(self.point(self.inner(self.depthwise(x)))) + self.short(x)
        return self.head(self.pool(x))


class UNet(nn.Module):
    """Two levels down, two up with transposed convolutions, skips by concatenation."""

    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="reflect", bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
                nn.Conv2d(outputs, outputs, 3, padding=1),
                nn.GroupNorm(2, outputs),
                nn.PReLU(outputs),
            )

        self.down = nn.ModuleList([block(3, width), block(width, 2 * width)])
        self.middle = block(2 * width, 4 * width)
        self.up = nn.ModuleList(
            [
                nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2),
                nn.ConvTranspose2d(2 * width, width, 3, stride=2, padding=1, output_padding=1),
            ]
        )
        self.join = nn.ModuleList([block(4 * width, 2 * width), block(2 * width, width)])
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([up(x), skips.pop()], dim=1))
        return self.head(x)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Dropout(0.0),
        nn.Linear(32, 24),
        nn.LayerNorm(24),
        nn.GELU(),
        nn.Linear(24, 24, bias=False),
        nn.Tanh(),
        nn.Linear(24, 7),
    )


def big_transfer() -> nn.Module:
    """BiT: weight-standardised convolutions with group norm, pre-activation; one block per stage."""
    from timm.layers import GroupNormAct, StdConv2d
    from timm.models.resnetv2 import ResNetV2

    return ResNetV2(
        [1, 1, 1, 1],
        channels=(128, 128, 256, 256),
        num_classes=10,
        stem_type="fixed",
        conv_layer=StdConv2d,
        norm_layer=GroupNormAct,
    )


def weight_norm_net() -> nn.Module:
    norm = parametrizations.weight_norm
    return nn.Sequential(
        norm(nn.Conv2d(3, 8, 3, padding=1)),
        nn.ReLU(),
        norm(nn.Conv2d(8, 16, 3, padding=1, stride=2)),
        nn.ReLU(),
        norm(nn.ConvTranspose2d(16, 8, 2, stride=2), dim=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        norm(nn.Linear(32, 16)),
        nn.ReLU(),
        norm(nn.Linear(16, 4)),
    )


def hook_weight_norm_net() -> nn.Module:
    """The older weight_norm, which recomputes a plain attribute in a hook."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        norm = nn.utils.weight_norm
        return nn.Sequential(
            norm(nn.Conv1d(3, 8, 3, padding=1)),
            nn.ReLU(),
            norm(nn.Conv1d(8, 8, 3, padding=1)),
            nn.ReLU(),
            norm(nn.Conv1d(8, 4, 1)),
        )


def spectral_norm_net() -> nn.Module:
    norm = parametrizations.spectral_norm
    return nn.Sequential(
        norm(nn.Conv2d(3, 8, 3, padding=1)),
        nn.LeakyReLU(0.2),
        norm(nn.Conv2d(8, 16, 4, stride=2, padding=1)),
        nn.LeakyReLU(0.2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        norm(nn.Linear(64, 16)),
        nn.LeakyReLU(0.2),
        norm(nn.Linear(16, 1)),
    )


class Tied(nn.Module):
    """One convolution called twice, and an encoder and decoder that share one matrix, once transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.encode = nn.Linear(8, 12, bias=False)
        self.decode = nn.Linear(8, 12, bias=False)
        self.decode.weight = self.encode.weight
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm in self.norms:
            x = torch.relu(norm(self.again(x)))
        x = x.mean((2, 3))
        x = F.linear(torch.tanh(self.encode(x)), self.encode.weight.t()) + x
        return self.head(torch.relu(self.decode(x)))


# Short versions of networks whose blocks come in dozens: every kind of block, once or twice ------------------------


def short_densenet() -> nn.Module:
    from timm.models.densenet import DenseNet

    return DenseNet(growth_rate=16, block_config=(2, 3, 2), num_classes=10)


def short_ghostnet() -> nn.Module:
    from timm.models.ghostnet import GhostNet

    stages = [[[3, 16, 16, 0, 1]], [[3, 48, 24, 0, 2]], [[5, 72, 40, 0.25, 2], [5, 120, 40, 0.25, 1]]]
    return GhostNet(stages, num_classes=10, width=0.5)


def short_dla() -> nn.Module:
    from timm.models.dla import DLA, DlaBottleneck

    widths = [16, 32, 64, 64, 128, 256]
    return DLA([1, 1, 1, 2, 1, 1], widths, cardinality=32, base_width=4, block=DlaBottleneck, num_classes=10)


_IMAGE, _OTHER = (2, 3, 64, 64), (3, 3, 96, 64)

ZOO = [
    Entry("resnet18", timm_model("resnet18"), _IMAGE, _OTHER, batch=16),
    Entry("resnext26ts", timm_model("resnext26ts"), _IMAGE, _OTHER),
    Entry("densenet121", timm_model("densenet121"), _IMAGE, _OTHER, slow=True),
    Entry("efficientnet_b0", timm_model("efficientnet_b0"), _IMAGE, _OTHER, slow=True),
    Entry("mobilenetv3_small_050", timm_model("mobilenetv3_small_050"), _IMAGE, _OTHER, batch=16),
    Entry("regnetx_002", timm_model("regnetx_002"), _IMAGE, _OTHER, batch=16),
    Entry("hrnet_w18_small", timm_model("hrnet_w18_small"), _IMAGE, _OTHER),
    Entry("inception_v3", timm_model("inception_v3"), (2, 3, 96, 96), (1, 3, 112, 96), slow=True),
    Entry("convnext_atto", timm_model("convnext_atto"), _IMAGE, _OTHER),
    Entry("repvgg_a0", timm_model("repvgg_a0"), _IMAGE, _OTHER),
    Entry("res2net50_26w_4s", timm_model("res2net50_26w_4s"), _IMAGE, _OTHER, slow=True),
    Entry("dla46x_c", timm_model("dla46x_c"), _IMAGE, _OTHER, slow=True),
    Entry("resnest14d", timm_model("resnest14d"), _IMAGE, _OTHER),
    Entry("ghostnet_050", timm_model("ghostnet_050"), _IMAGE, _OTHER, slow=True),
    Entry("nfnet", timm_model("test_nfnet"), _IMAGE, _OTHER),
    Entry("nfnet_l0", timm_model("nfnet_l0"), _IMAGE, _OTHER, slow=True),
    Entry("resnetv2_bit", big_transfer, _IMAGE, _OTHER),
    Entry("resnetv2_50x1_bit", timm_model("resnetv2_50x1_bit"), _IMAGE, _OTHER, slow=True),
    Entry("shufflenet_v2_x0_5", torchvision_model("shufflenet_v2_x0_5"), _IMAGE, _OTHER, batch=16),
    Entry("googlenet", torchvision_model("googlenet", init_weights=False), _IMAGE, _OTHER, slow=True),
    Entry("squeezenet1_1", torchvision_model("squeezenet1_1"), _IMAGE, _OTHER),
    Entry("mnasnet0_5", torchvision_model("mnasnet0_5"), _IMAGE, _OTHER, slow=True),
    Entry("fcn_resnet50", torchvision_model("fcn_resnet50", weights_backbone=None), _IMAGE, _OTHER, slow=True),
    Entry(
        "deeplabv3_mobilenet_v3_large",
        torchvision_model("deeplabv3_mobilenet_v3_large", weights_backbone=None),
        _IMAGE,
        _OTHER,
    ),
    Entry(
        "lraspp_mobilenet_v3_large",
        torchvision_model("lraspp_mobilenet_v3_large", weights_backbone=None),
        _IMAGE,
        _OTHER,
        slow=True,
    ),
    Entry("densenet", short_densenet, _IMAGE, _OTHER),
    Entry("ghostnet", short_ghostnet, _IMAGE, _OTHER),
    Entry("dla", short_dla, _IMAGE, _OTHER),
    Entry("efficientnet", timm_model("test_efficientnet"), _IMAGE, _OTHER),
    Entry("net1d", Net1d, (2, 2, 64), (3, 2, 101), batch=4),
    Entry("net3d", Net3d, (2, 1, 8, 8, 8), (1, 1, 9, 12, 6), batch=2),
    Entry("unet", UNet, (2, 3, 32, 32), (1, 3, 48, 32), batch=2),
    Entry("mlp", mlp, (4, 20), (9, 20), batch=64),
    Entry("weight_norm", weight_norm_net, (2, 3, 16, 16), (3, 3, 20, 16), batch=2),
    Entry("hook_weight_norm", hook_weight_norm_net, (2, 3, 16), (3, 3, 20), batch=2),
    Entry("spectral_norm", spectral_norm_net, (2, 3, 16, 16), (3, 3, 20, 16), batch=2),
    Entry(
        "tied",
        Tied,
        (2, 3, 8, 8),
        (3, 3, 10, 8),
        batch=2,
    ),
]

BY_NAME = {entry.name: entry for entry in ZOO}


def built(entry: Entry, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A network with random weights and statistics, in eval mode."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the model libraries
        model = entry.build()
    return randomise(model.to(dtype), seed).eval()


def sample(shape: tuple[int, ...], seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tensors(value: object) -> list[Tensor]:
    """The tensors of an output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors(item)]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in tensors(item)]
    return []


def error(reference: object, found: object) -> float:
    """Largest max|difference| / max|reference| over the tensors of two outputs; absolute where the reference is 0."""
    pairs = list(zip(tensors(reference), tensors(found), strict=True))
    assert pairs
    worst = 0.0
    for a, b in pairs:
        assert a.shape == b.shape
        scale = float(a.abs().max())
        difference = float((a.double() - b.double()).abs().max())
        assert difference == difference
        worst = max(worst, difference / scale if scale else difference)
    return worst
