"""The papers' networks: parameters and multiply-adds from formulas, timm's interface, image sizes, exact expansion."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import reparam
from reparam.coverage.weights import randomise
from reparam.distill.config import TrainConfig
from reparam.distill.data import load_source
from reparam.distill.models import CifarResNet, CifarVGG, CifarWideResNet, PlainCNN
from reparam.distill.trainer import train

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
FAMILIES = (
    "cifar_resnet cifar_resnet_four cifar_wrn cifar_vgg cifar_mobilenetv2 cifar_shufflenet plain_cnn mobilenet_v1 rvt"
).split()

# Parameter counts, from the papers' tables ----------------------------------------------------------------------------


def conv(inputs: int, outputs: int, kernel: int, groups: int = 1, bias: bool = False) -> int:
    return inputs // groups * outputs * kernel**2 + bias * outputs


def conv_bn(inputs: int, outputs: int, kernel: int, groups: int = 1, bias: bool = False) -> int:
    return conv(inputs, outputs, kernel, groups, bias) + 2 * outputs


def linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def resnet(depth: int, stem: int, width: int) -> int:
    blocks, total, channels = (depth - 2) // 6, conv_bn(3, stem, 3), stem
    for out in (width, 2 * width, 4 * width):
        total += conv_bn(channels, out, 3) + (2 * blocks - 1) * conv_bn(out, out, 3)
        total += conv_bn(channels, out, 1) if channels != out else 0
        channels = out
    return total + linear(channels, 100)


def four_stages(bottleneck: bool, *depths: int) -> int:
    total, channels = conv_bn(3, 64, 3), 64
    for width, depth in zip((64, 128, 256, 512), depths, strict=True):
        out = 4 * width if bottleneck else width
        total += conv_bn(channels, out, 1) if channels != out else 0
        for _ in range(depth):
            if bottleneck:
                total += conv_bn(channels, width, 1) + conv_bn(width, width, 3) + conv_bn(width, out, 1)
            else:
                total += conv_bn(channels, width, 3) + conv_bn(width, width, 3)
            channels = out
    return total + linear(channels, 100)


def wide_resnet(depth: int, width: int) -> int:
    blocks, total, channels = (depth - 4) // 6, conv(3, 16, 3), 16
    for out in (16 * width, 32 * width, 64 * width):
        total += 2 * channels + conv(channels, out, 3) + (2 * blocks - 1) * (2 * out + conv(out, out, 3))
        total += conv(channels, out, 1) if channels != out else 0
        channels = out
    return total + 2 * channels + linear(channels, 100)


def vgg(*layers: int) -> int:
    total, channels = 0, 3
    for count, width in zip(layers, (64, 128, 256, 512, 512), strict=True):
        for _ in range(count):
            total, channels = total + conv_bn(channels, width, 3, bias=True), width
    return total + linear(512, 100)


def mobilenet_v2() -> int:
    total, channels = conv_bn(3, 16, 3), 16
    for t, c, n in ((1, 8, 1), (6, 12, 2), (6, 16, 3), (6, 32, 4), (6, 48, 3), (6, 80, 3), (6, 160, 1)):
        for _ in range(n):
            h = t * channels
            total += conv_bn(channels, h, 1) + conv_bn(h, h, 3, groups=h) + conv_bn(h, c, 1)
            channels = c
    return total + conv_bn(160, 1280, 1) + linear(1280, 100)


def shufflenet(classes: int = 100, stem: int = 1) -> int:
    total, channels = conv_bn(3, 24, stem), 24
    for out, count in ((240, 4), (480, 8), (960, 4)):
        for block in range(count):
            made = out if block else out - channels
            h = made // 4
            total += conv_bn(channels, h, 1, 1 if channels == 24 else 3) + conv_bn(h, h, 3, h) + conv_bn(h, made, 1, 3)
            channels = out
    return total + linear(960, classes)


def shufflenet_v2(classes: int = 100, stem: int = 1) -> int:
    total, channels = conv_bn(3, 24, stem), 24
    for out, count in ((116, 3), (232, 7), (464, 3)):
        h = out // 2
        total += conv_bn(channels, channels, 3, channels) + 2 * conv_bn(channels, h, 1)
        total += conv_bn(h, h, 3, h) + conv_bn(h, h, 1) + count * (2 * conv_bn(h, h, 1) + conv_bn(h, h, 3, h))
        channels = out
    return total + conv_bn(464, 1024, 1) + linear(1024, classes)


def plain(layers: str) -> int:
    """The paper's notation: C is a convolution, M a pooling, F a linear layer; images of 32 x 32."""
    total, channels, side = 0, 3, 32
    for entry in layers.split():
        kind, size = entry[0], int(entry[1:] or 0)
        if kind == "C":
            total, channels = total + conv_bn(channels, size, 3, bias=True), size
        elif kind == "M":
            side //= 2
        else:
            total, channels, side = total + linear(channels * side**2, size), size, 1
    return total


def mobilenet_v1() -> int:
    widths = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    pairs = [conv_bn(a, a, 3, a) + conv_bn(a, b, 1) for a, b in itertools.pairwise(widths)]
    return conv_bn(3, 32, 3) + sum(pairs) + linear(1024, 1000)


def rvt_block(d: int, convolutional: bool = True) -> int:
    mlp = conv_bn(d, 4 * d, 1, bias=True) + conv_bn(4 * d, 4 * d, 3, 4 * d, bias=True) + conv_bn(4 * d, d, 1, bias=True)
    mlp = mlp if convolutional else linear(d, 4 * d) + linear(4 * d, d)
    return 4 * d + linear(d, 3 * d) + linear(d, d) + mlp


def rvt(d: int) -> int:
    return conv_bn(3, 32, 7, bias=True) + conv(32, d, 4, bias=True)


class Case(NamedTuple):
    """A network: parameters by formula and as published or measured elsewhere, millions of multiply-adds."""

    name: str
    formula: int
    parameters: int
    macs: float | None = None
    mark: Any = ()
    """Of its expansion."""


SLOW, THOROUGH = pytest.mark.slow, pytest.mark.thorough
RVT_TINY = rvt(192) + 10 * rvt_block(192) + conv(192, 384, 3, 192, bias=True) + 2 * rvt_block(384) + 768
RVT_TINY += linear(384, 1000)
RVT_SMALL = rvt(384) + 12 * rvt_block(384) + 768 + linear(384, 1000)
RVT_BASE = rvt(768) + 12 * rvt_block(768, convolutional=False) + 1536 + linear(768, 1000)
SCALING = 6 * (14 * 14) ** 2
CASES = [
    Case("cifar_resnet8", resnet(8, 16, 16), 83_892, 12.5),
    Case("cifar_resnet14", resnet(14, 16, 16), 181_108, 26.7, THOROUGH),
    Case("cifar_resnet20", resnet(20, 16, 16), 278_324, 40.8, THOROUGH),
    Case("cifar_resnet32", resnet(32, 16, 16), 472_756, 69.1, THOROUGH),
    Case("cifar_resnet44", resnet(44, 16, 16), 667_188, 97.4, THOROUGH),
    Case("cifar_resnet56", resnet(56, 16, 16), 861_620, 125.8, THOROUGH),
    Case("cifar_resnet110", resnet(110, 16, 16), 1_736_564, 253.2, THOROUGH),
    Case("cifar_resnet8x4", resnet(8, 32, 64), 1_233_540, 177.1),
    Case("cifar_resnet32x4", resnet(32, 32, 64), 7_433_860, 1083.0, THOROUGH),
    Case("cifar_resnet18", four_stages(False, 2, 2, 2, 2), 11_220_132, 555.5, THOROUGH),
    Case("cifar_resnet50", four_stages(True, 3, 4, 6, 3), 23_705_252, 1298.0, THOROUGH),
    Case("cifar_wrn_16_1", wide_resnet(16, 1), 180_916),
    Case("cifar_wrn_16_2", wide_resnet(16, 2), 703_284, 101.1, THOROUGH),
    Case("cifar_wrn_40_1", wide_resnet(40, 1), 569_780, 83.3, THOROUGH),
    Case("cifar_wrn_40_2", wide_resnet(40, 2), 2_255_156, 327.6, THOROUGH),
    Case("cifar_vgg8", vgg(1, 1, 1, 1, 1), 3_965_028, 96.2),
    Case("cifar_vgg11", vgg(1, 1, 2, 2, 2), 9_277_284, None, THOROUGH),
    Case("cifar_vgg13", vgg(2, 2, 2, 2, 2), 9_462_180, 284.9, THOROUGH),
    Case("cifar_vgg16", vgg(2, 2, 3, 3, 3), 14_774_436, None, THOROUGH),
    Case("cifar_vgg19", vgg(2, 2, 4, 4, 4), 20_086_692, None, THOROUGH),
    Case("cifar_mobilenetv2_half", mobilenet_v2(), 812_836, 6.5, SLOW),
    Case("cifar_shufflenet_g3", shufflenet(), 949_258, 38.7, SLOW),
    Case("cifar_shufflenetv2", shufflenet_v2(), 1_355_528, 44.5, SLOW),
    Case("cifar10_plain2", plain("C16 M C16 M F10"), 13_082),
    Case("cifar10_plain4", plain("C16 C16 M C32 C32 M F10"), 37_338),
    Case("cifar10_plain6", plain("C16 C16 M C32 C32 M C64 C64 M F10"), 82_778),
    Case("cifar10_plain8", plain("C16 C16 M C32 C32 M C64 C64 M C128 C128 M F64 F10"), 327_962),
    Case(
        "cifar10_plain10",
        plain("C32 C32 M C64 C64 M C128 C128 M" + 4 * " C256" + " M F128 F10"),
        2_487_850,
        None,
        THOROUGH,
    ),
    Case("cifar100_plain2", plain("C32 M C32 M F100"), 215_172),
    Case("cifar100_plain4", plain("C32 C32 M C64 C64 M F100"), 475_652),
    Case("cifar100_plain6", plain("C32 C32 M C64 C64 M C128 C128 F100"), 1_107_204),
    Case("cifar100_plain8", plain("C32 C32 M C64 C64 M C128 C128 M C256 C256 M F64 F100"), 1_246_276),
    Case(
        "cifar100_plain10",
        plain("C32 C32 M C64 C64 M C128 C128 M" + 4 * " C256" + " M F512 F100"),
        2_931_460,
        None,
        THOROUGH,
    ),
    Case("mobilenet_v1", mobilenet_v1(), 4_231_976, 568.7, SLOW),
    Case("shufflenet_g3", shufflenet(1000, 3), 1_814_734, 127.1, THOROUGH),
    Case("shufflenetv2", shufflenet_v2(1000, 3), 2_278_604, 144.9, THOROUGH),
    Case("rvt_tiny", RVT_TINY, 8_646_376, 1284.3, THOROUGH),
    Case("rvt_tiny_plus", RVT_TINY + 10 * SCALING, 10_951_336, 1284.3, THOROUGH),
    Case("rvt_small", RVT_SMALL, 22_148_392, 4645.2, THOROUGH),
    Case("rvt_small_plus", RVT_SMALL + 5 * SCALING, 23_300_872, 4645.2, THOROUGH),
    Case("rvt_base", RVT_BASE, 86_223_784, 17491.1, THOROUGH),
]
every = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **options)


def images(side: int, channels: int = 3) -> torch.Tensor:
    return torch.zeros(2, channels, side, side, device="meta")


def test_the_cases_are_all_of_them() -> None:
    registered = {name for family in FAMILIES for name in timm.list_models(module=family)}
    assert registered == {case.name for case in CASES} | {"cifar_resnet8_w8"}


@every
def test_parameters_and_multiply_adds(case: Case) -> None:
    model = on_meta(case.name).eval()
    assert count(model) == case.formula == case.parameters
    side = model.default_cfg["input_size"][1]
    with FlopCounterMode(display=False) as counter:
        assert model(images(side)).shape == (2, model.num_classes)
    if case.macs is not None:
        assert counter.get_total_flops() / 4e6 == pytest.approx(case.macs, abs=0.06)  # two images, two flops each


def test_slim_variant_for_grey_digits() -> None:
    model = timm.create_model("cifar_resnet8_w8", num_classes=10, in_chans=1)
    assert count(model) == 19_810
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_the_page_lists_every_network() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {name: int(number.replace(",", "")) for name, number in rows} == {c.name: c.parameters for c in CASES}
    assert len(rows) == len(CASES)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CifarResNet(9), r"depth must be 6 n \+ 2 .* got 9"),
        (lambda: CifarWideResNet(20), r"depth must be 6 n \+ 4 .* got 20"),
        (lambda: CifarVGG(12), "depth must be one of 8, 11, 13, 16, 19, got 12"),
        (lambda: PlainCNN(((8,), (8,), (8,)), img_size=4), "images of side 4 are too small for 3 stages"),
    ],
)
def test_sizes_that_do_not_exist(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# timm's interface -----------------------------------------------------------------------------------------------------


OWN_FORM = ("rvt_tiny", "rvt_tiny_plus", "cifar10_plain10", "cifar_resnet18")
"""Networks whose expansion takes long, and whose classes or sizes no smaller one has."""


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=() if c.name in OWN_FORM else c.mark) for c in CASES]
)
def test_what_timm_expects(case: Case) -> None:
    model = on_meta(case.name, num_classes=7, in_chans=1)
    config = model.default_cfg
    assert model.get_submodule(config["first_conv"]).in_channels == model.in_chans == 1
    assert model.get_submodule(config["classifier"]) is model.get_classifier()
    assert model.get_classifier().out_features == model.num_classes == 7

    features = model.forward_features(images(config["input_size"][1], channels=1))
    assert features.shape == (2, model.num_features, *config["pool_size"])
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model.forward_head(features).shape == (2, 7)

    # The patches of a vision transformer and the fourth pooling of the deep plain networks leave nothing of 8 x 8.
    # Attention scaling belongs to one size of image.
    for side in (8, 16, 28, 32):
        if case.name.endswith("_plus"):
            with pytest.raises((RuntimeError, ValueError)):
                model(images(side, channels=1))
        elif side == 8 and re.fullmatch(r"rvt_\w+|cifar\d+_plain(8|10)", case.name):
            with pytest.raises(RuntimeError):
                model(images(side, channels=1))
        else:
            assert model(images(side, channels=1)).shape == (2, 7)


ONE_EACH = (
    "cifar_resnet8 cifar_wrn_16_1 cifar_vgg8 cifar_mobilenetv2_half cifar_shufflenet_g3 cifar_shufflenetv2".split()
)


@pytest.mark.parametrize(
    "name", [*ONE_EACH, "cifar10_plain2", "cifar100_plain8", "mobilenet_v1", "rvt_tiny", "cifar_resnet18"]
)
def test_another_classifier(name: str) -> None:
    model, x = on_meta(name, num_classes=7).eval(), images(32)
    features = model.forward_features(x)
    model.reset_classifier(4)
    assert model(x).shape == (2, 4) and not model.get_classifier().training
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size) and not list(model.get_classifier().parameters())
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    with pytest.raises(ValueError, match="classifier of 5 classes needs global_pool='avg'"):
        model.reset_classifier(5)
    with pytest.raises(ValueError, match="global_pool must be 'avg' or '', got 'max'"):
        model.reset_classifier(5, "max")
    model.reset_classifier(5, "avg")
    assert model(x).shape == (2, 5) and model.get_classifier().weight.device.type == "meta"
    assert on_meta(name, num_classes=0)(x).shape == (2, model.head_hidden_size)


def test_plain_networks_for_another_size_and_on_another_size() -> None:
    torch.manual_seed(0)
    made_for = timm.create_model("cifar10_plain2", img_size=28, in_chans=1).eval()
    assert made_for.fc.in_features == 16 * 7 * 7
    x = torch.randn(2, 3, 32, 32)
    model = timm.create_model("cifar10_plain8").eval()
    head = torch.relu(model.hidden[0](model.forward_features(x).flatten(1)))  # the pooling is an identity at 32 x 32
    assert torch.equal(model(x), model.fc(head))


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_wrn_16_2", "cifar_vgg8", "cifar_mobilenetv2_half"])
def test_first_values(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name)
    model.requires_grad_(False)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    scaled = torch.cat([m.weight.flatten() * (m.out_channels * m.kernel_size[0] ** 2 / 2) ** 0.5 for m in convs])
    assert scaled.std() == pytest.approx(1, abs=0.01) and abs(scaled.mean()) < 0.01
    assert all(m.bias is None or not m.bias.any() for m in convs)
    if name != "cifar_resnet20":
        assert not model.fc.bias.any()
    if name in ("cifar_vgg8", "cifar_mobilenetv2_half"):
        assert model.fc.weight.std() == pytest.approx(0.01, rel=0.02)


def test_rvt_drops_paths_linearly_and_decays_everything_but_norms_and_biases() -> None:
    model = on_meta("rvt_tiny", drop_path_rate=0.12, drop_rate=0.5)
    blocks = [block for stage in model.stages for block in stage]
    assert [block.drop_path.drop_prob for block in blocks] == pytest.approx([0.01 * k for k in range(12)])
    assert {block.mlp.drop.p for block in blocks} == {0.5}
    assert model.no_weight_decay() == set()


def test_attention_scaling_multiplies_the_logits() -> None:
    torch.manual_seed(0)
    scaled = timm.create_model("rvt_tiny_plus", depths=(2, 1), scaled_blocks=1, img_size=48).double().eval()
    plain = timm.create_model("rvt_tiny", depths=(2, 1)).double().eval()
    state = scaled.state_dict()
    factors = state.pop("stages.0.0.attn.scaling")
    assert factors.shape == (6, 9, 9) and 0.01 < factors.std() < 0.03 and list(state) == list(plain.state_dict())
    plain.load_state_dict(state)
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    assert not torch.allclose(scaled(x), plain(x), rtol=1e-3)
    torch.nn.init.constant_(scaled.stages[0][0].attn.scaling, 50.0)  # a factor of 1
    assert torch.allclose(scaled(x), plain(x), rtol=1e-12)

    attention, tokens = scaled.stages[0][0].attn, torch.randn(1, 9, 192, dtype=torch.float64)
    attention.scaling.data.copy_(factors * 50)
    query, key, value = (part.view(1, 9, 6, 32) for part in attention.qkv(tokens).chunk(3, dim=-1))
    logits = torch.einsum("nqhd,nkhd->nhqk", query, key) / 32**0.5 / (1 + (-50 * factors).exp())
    mixed = torch.einsum("nhqk,nkhd->nqhd", logits.softmax(-1), value).reshape(1, 9, 192)
    assert torch.allclose(attention(tokens), attention.proj(mixed), rtol=1e-10)
    with pytest.raises(ValueError, match="made for 9 tokens, the image gives 4; build the model with img_size=N"):
        scaled(torch.zeros(1, 3, 32, 32, dtype=torch.float64))
    assert timm.create_model("rvt_tiny_plus", depths=(1, 1), img_size=(48, 32)).stages[0][0].attn.scaling.shape[1] == 6


def test_shuffling_deals_channels() -> None:
    from reparam.distill.models.cifar_shufflenet import shuffle

    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert shuffle(x, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]
    assert shuffle(x, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]


# Expansion ------------------------------------------------------------------------------------------------------------


def check_expansion(name: str, side: int, **options: Any) -> None:
    torch.manual_seed(0)
    student = randomise(timm.create_model(name, num_classes=7, **options).double()).eval()
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    teacher = reparam.expand(student, 2, example_input=x, verify=True)
    assert reparam.plan(student, 2, example_input=x).coverage == 1
    assert count(teacher) > 1.8 * count(student)
    with torch.no_grad():
        expected, found = student(x), teacher(x)
    assert (expected - found).abs().max() <= 1e-12 * expected.abs().max() and expected.std() > 0
    state, back = student.state_dict(), reparam.extract(teacher).state_dict()
    assert list(state) == list(back) and all(torch.equal(value, back[key]) for key, value in state.items())
    wider = teacher.state_dict()
    assert any(wider[key].shape != value.shape for key, value in state.items())


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=case.mark) for case in CASES])
def test_expansion_is_exact(case: Case) -> None:
    options = {"img_size": 48} if case.name.endswith("_plus") else {}
    check_expansion(case.name, 48 if case.name.startswith("rvt") else 16, **options)


@SLOW
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rvt_tiny", {"depths": (1, 1)}),
        ("rvt_tiny_plus", {"depths": (2, 1), "img_size": 48}),
        ("rvt_base", {"depths": (1,), "dims": (96,), "heads": (3,)}),
        ("cifar_resnet18", {"depths": (1, 1, 1, 1)}),
        ("cifar_resnet50", {"depths": (1, 1, 1, 1)}),
    ],
)
def test_expansion_of_short_variants_is_exact(name: str, options: dict[str, Any]) -> None:
    check_expansion(name, 48 if name.startswith("rvt") else 16, **options)


# Training -------------------------------------------------------------------------------------------------------------


@SLOW
@pytest.mark.parametrize("name", ["cifar10_plain2", "cifar_wrn_16_1"])
def test_training_on_digits(name: str, tmp_path: Path) -> None:
    config = TrainConfig(model=name, epochs=2, batch_size=25, output=str(tmp_path / "run"), quiet=True)
    summary = train(config, source=load_source("digits", limit_train=50), command=["reparam", "train"])
    assert summary["parity"]["max_rel"] <= 1e-5
    assert (tmp_path / "run" / "student.safetensors").is_file()
