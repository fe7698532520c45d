"""Folding real networks: exact with random statistics, no norm left that could go, names and classes kept."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from test_fold import error, norms_that_run, randomise
from timm.utils.model import reparameterize_model
from torch import nn
from torch.fx.experimental import optimization

import reparam
from reparam.passes.fold import fold_with_report

# name -> norms left: each stands in front of an activation, behind something that is not linear
PLAIN = {
    "resnet18": 0,
    "regnetx_002": 0,
    "mobilenetv3_small_050": 0,
    "test_efficientnet": 0,
    "test_resnet": 0,
    "test_byobnet": 0,
}
"""Conv-norm networks."""

MULTI_BRANCH = {"repvgg_a0": 0, "levit_128s": 0}
"""Networks of families for which timm has a fusion of its own, in the default run."""
OPTIONS = {"levit_128s": {"img_size": 64}}
SIDE = 64
"""Of the images in the default run: networks of convolutions take any."""

MORE = """
mobileone_s0 repghostnet_050 efficientvit_m0 efficientnet_lite0 fastvit_t8 repvit_m1 ghostnetv3_050 efficientvit_m1
shvit_s1 tiny_vit_5m_224 efficientformerv2_s0 nextvit_small lcnetv2_base hgnetv2_b0 starnet_s1 iformer_t
edgenext_xx_small efficientvim_m1 repvgg_b0 mobileone_s4 ghostnet_050 efficientnet_b0 tf_efficientnet_b0 mixnet_s
mnasnet_small hrnet_w18_small inception_v3 xception41 vovnet39a dla34 res2net50_26w_4s resnest14d skresnet18
selecsls42 cspresnet50 darknet53 rexnet_100 tresnet_m visformer_tiny coat_tiny regnety_002 hardcorenas_a nf_resnet50
gcresnext26ts maxvit_pico_rw_256 convnext_atto
""".split()
LEFT = {"densenet121": 62, "resnetv2_50": 17, "dpn48b": 21}


def check(name: str, left: int, side: int | None = None) -> None:
    torch.manual_seed(0)
    options = OPTIONS.get(name, {}) if side else {}
    model = randomise(timm.create_model(name, num_classes=10, **options))
    size_of_input = (3, side, side) if side else model.pretrained_cfg["input_size"]
    x = torch.randn(2, *size_of_input, dtype=torch.float64)
    folded, report = fold_with_report(model, x)
    single = reparam.fold(copy.deepcopy(model).float(), example_input=x.float())
    with torch.no_grad():
        exact = model(x)
        size = exact.abs().max()
        own = (copy.deepcopy(model).float()(x.float()) - exact).abs().max() / size
        folded_single = (single(x.float()) - exact).abs().max() / size
    # A network that magnifies rounding does so in float64 too.
    assert error(model, folded, x) < max(1e-14, 16 * float(own) * 2.0**-29)
    assert folded_single < 4 * own
    assert norms_that_run(folded, x) == report.norms[1] == left == len(report.kept)
    assert all("follow" in why or "elsewhere" in why for why in report.kept.values())
    assert left <= norms_that_run(reparameterize_model(copy.deepcopy(model)).double(), x)
    again, second = fold_with_report(folded, x)
    assert second.norms == (left, left)
    assert list(again.state_dict()) == list(folded.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), folded.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("name", PLAIN)
def test_networks_of_convolutions_and_norms(name: str) -> None:
    check(name, PLAIN[name], SIDE)


@pytest.mark.slow
@pytest.mark.parametrize("name", MULTI_BRANCH)
def test_networks_with_branches(name: str) -> None:
    check(name, MULTI_BRANCH[name], SIDE)


@pytest.mark.thorough
@pytest.mark.parametrize("name", MORE)
def test_more_networks(name: str) -> None:
    check(name, 0)


@pytest.mark.thorough
@pytest.mark.parametrize("name", LEFT)
def test_networks_with_norms_in_front_of_activations(name: str) -> None:
    check(name, LEFT[name])


def test_a_folded_network_is_what_it_was() -> None:
    model = randomise(timm.create_model("resnet18", num_classes=10)).float()
    folded = reparam.fold(model)
    assert type(folded) is type(model) and type(folded.layer1[0]) is type(model.layer1[0])
    assert folded.num_classes == 10 and folded.pretrained_cfg == model.pretrained_cfg
    assert set(folded.state_dict()) == {
        name.replace("bn", "conv") if "downsample" not in name else name.replace(".1.", ".0.")
        for name in model.state_dict()
        if "running" not in name and "num_batches" not in name
    }
    x = torch.randn(3, 3, 96, 64)
    with torch.no_grad():
        assert torch.allclose(folded.forward_features(x), model.forward_features(x), rtol=1e-3, atol=1e-4)
    folded.reset_classifier(4)
    assert folded(x).shape == (3, 4)


def test_norms_that_torch_and_timm_leave() -> None:
    model = randomise(timm.create_model("test_efficientnet", num_classes=10))
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert norms_that_run(optimization.fuse(copy.deepcopy(model)), x) == norms_that_run(model, x) > 0
    assert norms_that_run(reparam.fold(model), x) == 0


def test_a_block_is_one_layer_under_the_name_of_its_main_one() -> None:
    model = timm.create_model("repvgg_a0", num_classes=10).eval()
    folded = reparam.fold(model)
    names = {n.rpartition(".")[0] for n in folded.state_dict() if n.startswith("stages")}
    assert names < {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert len(names) == 21


@pytest.mark.slow
def test_a_detection_network() -> None:
    detection = pytest.importorskip("torchvision").models.detection
    model = randomise(
        detection.fasterrcnn_mobilenet_v3_large_320_fpn(
            weights=None, weights_backbone=None, num_classes=5, min_size=64, max_size=96
        )
    ).float()  # fmt: skip
    images = [torch.rand(3, 64, 72)]
    folded, report = fold_with_report(model, (images,))
    assert type(folded) is type(model)
    assert report.norms[1] == 0 < report.norms[0]
    with torch.no_grad():
        features = [network.backbone(torch.stack(images)) for network in (model, folded)]
    for name, value in features[0].items():
        assert torch.allclose(value, features[1][name], rtol=1e-3, atol=1e-4 * float(value.abs().max()))
