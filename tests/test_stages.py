"""Feature maps and the input of the classifier, found in networks of many families."""

import itertools
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models as torchvision_models

import reparam
import reparam.distill.models
from reparam.passes.grids import Layout, grid_of, layout_of
from reparam.passes.stages import stages

PYRAMIDS = {
    # name: options, expected sides and widths, shallow to deep
    "resnet18": ([56, 28, 14, 7], [64, 128, 256, 512]),
    "resnetv2_50x1_bit": (None, None),
    "mobilenetv3_small_050": ([56, 28, 14, 7], [8, 16, 24, 288]),
    "efficientnet_b0": ([112, 56, 28, 14, 7], [16, 24, 40, 112, 1280]),
    "convnext_atto": ([56, 28, 14, 7], [40, 80, 160, 320]),
    "swin_tiny_patch4_window7_224": ([56, 28, 14, 7], [96, 192, 384, 768]),
    "densenet121": ([56, 28, 14, 7], [256, 512, 1024, 1024]),
    "regnetx_002": ([56, 28, 14, 7], [24, 56, 152, 368]),
    "inception_v3": ([147, 71, 35, 17, 8], [64, 192, 288, 768, 2048]),
    "levit_128s": ([14, 7, 4], [128, 256, 384]),
    "pvt_v2_b0": ([56, 28, 14, 7], [32, 64, 160, 256]),
    "poolformer_s12": ([56, 28, 14, 7], [64, 128, 320, 512]),
    "ghostnet_100": ([112, 56, 28, 14, 7], [16, 24, 40, 112, 960]),
    "repvgg_a0": ([56, 28, 14, 7], [48, 96, 192, 1280]),
    "mobilevit_xxs": ([128, 64, 32, 16, 8], [16, 24, 48, 64, 320]),
    "edgenext_xx_small": ([64, 32, 16, 8], [24, 48, 88, 168]),
    "pit_ti_224": ([27, 14, 7], [64, 128, 256]),
    "nasnetalarge": (None, None),
    "tv:shufflenet_v2_x0_5": ([28, 14, 7], [48, 96, 1024]),
    "tv:vgg11_bn": ([224, 112, 56, 28, 14], [64, 128, 256, 512, 512]),
    "tv:squeezenet1_1": ([55, 27, 13], [128, 256, 512]),
    "tv:googlenet": ([56, 28, 14, 7], [192, 480, 832, 1024]),
    "tv:mobilenet_v2": (None, None),
    "cifar_resnet8": ([32, 16, 8], [16, 32, 64]),
    "cifar_resnet8x4": ([32, 16, 8], [64, 128, 256]),
    "cifar_resnet50": ([32, 16, 8, 4], [256, 512, 1024, 2048]),
    "cifar_wrn_16_2": ([32, 16, 8], [32, 64, 128]),
    "cifar_vgg8": ([32, 16, 8, 4], [64, 128, 256, 512]),
    "cifar_mobilenetv2_half": ([16, 8, 4, 2], [12, 16, 48, 1280]),
    "cifar_shufflenet_g3": ([32, 16, 8, 4], [24, 240, 480, 960]),
    "cifar_shufflenetv2": ([32, 16, 8, 4], [24, 116, 232, 1024]),
    "mobilenet_v1": ([112, 56, 28, 14, 7], [64, 128, 256, 512, 1024]),
    "cifar10_plain2": ([32, 16], [16, 16]),
    "cifar100_plain10": ([32, 16, 8, 4], [32, 64, 128, 256]),
}

EQUAL = {
    # name: side, class tokens, names
    "vit_tiny_patch16_224": (14, 1, [f"blocks.{k}" for k in (2, 5, 8, 10, 11)]),
    "deit_tiny_distilled_patch16_224": (14, 2, [f"blocks.{k}" for k in (2, 5, 8, 10, 11)]),
    "vit_small_patch16_dinov3": (16, 5, [f"blocks.{k}" for k in (2, 5, 8, 10, 11)]),
    "mixer_s32_224": (7, 0, [f"blocks.{k}" for k in (1, 3, 5, 6, 7)]),
    "xcit_nano_12_p16_224": (14, 0, [f"blocks.{k}" for k in (2, 5, 8, 10, 11)]),
    "convmixer_768_32": (32, 0, [f"blocks.{k}" for k in (7, 15, 23, 30, 31)]),
    "rvt_tiny": (14, 0, [f"stages.0.{k}" for k in (1, 3, 5, 8, 9)]),
    "rvt_small": (14, 0, [f"stages.0.{k}" for k in (2, 5, 8, 10, 11)]),
}


def built(name, device="meta"):
    with torch.device(device):
        if name.startswith("tv:"):
            options = {"init_weights": False} if "googlenet" in name else {}
            return torchvision_models.get_model(name[3:], weights=None, **options).eval()
        return timm.create_model(name, **({"num_classes": 10} if "dinov3" in name else {})).eval()


@pytest.mark.parametrize("name", PYRAMIDS)
def test_pyramids(name):
    sides, widths = PYRAMIDS[name]
    model = built(name)
    found = stages(model)
    known = dict(model.named_modules())
    assert len(found.features) == len(found.layouts) == len(found.widths) == len(found.sizes) >= 2
    assert set(found.features) <= set(known) and len(set(found.features)) == len(found.features)
    areas = [height * width for height, width in found.sizes]
    assert all(large * 0.45 > small for large, small in itertools.pairwise(areas)), "sizes strictly decrease"
    if sides is not None:
        assert [size[0] for size in found.sizes] == [size[1] for size in found.sizes] == sides
        assert list(found.widths) == widths
    assert found.embedding is not None and not found.reason


@pytest.mark.parametrize("name", EQUAL)
def test_networks_of_one_size(name):
    side, prefix, names = EQUAL[name]
    found = stages(built(name))
    assert list(found.features) == names
    assert set(found.sizes) == {(side, side)} and len(set(found.widths)) == 1
    assert {layout.prefix for layout in found.layouts} == {prefix}


REAL = ["resnet18", "mobilenetv3_small_050", "convnext_atto", "densenet121", "regnetx_002", "vit_tiny_patch16_224",
        "mixer_s32_224", "rvt_tiny", "tv:shufflenet_v2_x0_5", "swin_tiny_patch4_window7_224", "cifar_wrn_16_1",
        "cifar_vgg8", "cifar_mobilenetv2_half", "pit_ti_224"]  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_values_are_those_of_the_network(name):
    """The classifier applied to the embedding gives the logits; maps have the widths and sizes that were promised."""
    torch.manual_seed(0)
    model = built(name, "cpu")
    found = stages(model)
    side = (getattr(model, "default_cfg", None) or {"input_size": (3, 224, 224)})["input_size"][-1]
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        assert found.embedding.endswith(":input")
        classifier = model.get_submodule(found.embedding.removesuffix(":input"))
        assert isinstance(classifier, nn.Linear)
        classifier.weight.normal_()  # some start with zeros
        logits, values = reparam.tap(model, [*found.features, found.embedding])(images)
        vector = found.embedding_layout.to_vector(values[found.embedding])
        torch.testing.assert_close(classifier(vector), logits, rtol=1e-4, atol=1e-4)
        assert logits.std() > 0
    for name, layout, width, size in zip(found.features, found.layouts, found.widths, found.sizes, strict=True):
        assert layout.to_map(values[name], (side, side)).shape == (2, width, *size)


def test_an_image_of_another_size_and_shape():
    model = built("cifar_resnet8", "cpu")
    found = stages(model, torch.randn(1, 3, 48, 24))
    assert found.sizes == ((48, 24), (24, 12), (12, 6))


# Classifiers without a linear module ---------------------------------------------------------------------------------


class Head(nn.Module):
    """A small network whose classifier is an operator, not a module."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.weight = nn.Parameter(torch.randn(5, 8))
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        x = self.body(x)
        if self.kind == "map":
            return self.head(x).mean((2, 3))
        if self.kind == "conv":
            return self.head(x.mean((2, 3), keepdim=True)).flatten(1)
        x = x.mean((2, 3)) * 2
        return F.linear(x, self.weight) if self.kind == "linear" else x @ self.weight.t()


@pytest.mark.parametrize("kind", ["linear", "conv", "map"])
def test_other_classifiers_for_student_view_and_teacher(kind):
    torch.manual_seed(0)
    model, images = Head(kind).double(), torch.randn(4, 3, 8, 8).double()
    found = stages(model, images)
    assert found.embedding == ("weight:input" if kind == "linear" else "head:input")
    teacher = reparam.expand(model, 2, example_input=images, noise=0.0)
    view = reparam.student_view(teacher)
    vectors = {}
    for label, network in (("student", model), ("view", view), ("teacher", teacher)):
        value = reparam.tap(network, [found.embedding])(images)[1][found.embedding]
        vectors[label] = found.embedding_layout.to_vector(value)
    wanted = model.body(images).mean((2, 3)) * (2 if kind == "linear" else 1)
    torch.testing.assert_close(vectors["student"], wanted)
    torch.testing.assert_close(vectors["view"], wanted)
    assert vectors["teacher"].shape == (4, 16)
    torch.testing.assert_close(vectors["teacher"].unflatten(1, (8, 2))[:, :, 0], wanted)


def test_a_weight_that_is_computed_has_no_name():
    found = stages(Head("product"), torch.randn(2, 3, 8, 8))
    assert found.embedding is None and "linear operator" in found.reason


def test_a_shortcut_around_the_classifier():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.body(x)
            return x + self.fc(x.relu())

    assert stages(Net(), torch.randn(2, 4)).embedding == "fc:input"


def test_teacher_and_view_have_the_names_of_the_student():
    model = built("cifar_resnet8", "cpu")
    teacher = reparam.expand(model, 2, verify=False)
    assert stages(teacher) == stages(reparam.student_view(teacher)) == stages(model)
    assert stages(teacher, torch.randn(2, 3, 32, 32)).features == stages(model).features


# Networks without maps -----------------------------------------------------------------------------------------------


def test_a_perceptron_has_no_features_but_an_embedding():
    model = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3))
    found = stages(model, torch.randn(2, 6))
    assert found.features == () and found.embedding == "2:input" and "fewer than two" in found.reason


def test_a_single_resolution_without_blocks_has_no_features():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    assert stages(model, torch.randn(2, 3, 8, 8)).features == ()


def test_code_that_branches_on_data():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(x) if bool(x.sum() > 0) else self.fc(-x)

    found = stages(Branches(), torch.randn(2, 3))
    assert found.features == () and found.embedding is None and "recorded" in found.reason


# Layouts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "grids", "expected"),
    [
        ((2, 64, 56, 56), [], (Layout("first"), (56, 56), 64)),
        ((2, 56, 56, 96), [], (Layout("last"), (56, 56), 96)),
        ((2, 8, 8, 8), [], (Layout("first"), (8, 8), 8)),
        ((2, 197, 192), [(14, 14)], (Layout("tokens", 1), (14, 14), 192)),
        ((2, 201, 64), [(14, 14)], (Layout("tokens", 5), (14, 14), 64)),
        ((2, 192, 196), [(14, 14)], (Layout("tokens first"), (14, 14), 192)),
        ((2, 49, 64), [(14, 14)], (Layout("tokens"), (7, 7), 64)),
        ((2, 16, 49, 32), [], None),
        ((2, 90, 64), [], (Layout("tokens", 9), (9, 9), 64)),
        ((2, 98, 64), [], None),
    ],
)
def test_layouts(shape, grids, expected):
    assert layout_of(shape, (224, 224), grids) == expected


@pytest.mark.parametrize("last", [False, True])
def test_a_cube_is_read_as_the_operators_around_it_read_it(last):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            layer = (lambda: nn.Linear(8, 8)) if last else (lambda: nn.Conv2d(8, 8, 1))
            self.first, self.second = layer(), layer()
            self.down, self.fc = nn.Conv2d(8, 8, 2, 2), nn.Linear(8, 2)

        def forward(self, x):
            x = self.stem(x)
            x = x.permute(0, 2, 3, 1) if last else x
            x = self.second(self.first(x).relu())
            x = x.permute(0, 3, 1, 2) if last else x
            return self.fc(self.down(x).mean((2, 3)))

    found = stages(Net(), torch.randn(2, 3, 8, 8))
    assert found.features == ("second", "down")
    assert [layout.kind for layout in found.layouts] == ["last" if last else "first", "first"]


def test_tokens_become_maps_in_rows():
    image = torch.arange(6.0).view(1, 1, 2, 3)
    tokens = torch.cat([torch.full((1, 1, 1), -1.0), image.flatten(2).transpose(1, 2)], 1)
    assert torch.equal(Layout("tokens", 1).to_map(tokens, (20, 30)), image)
    assert torch.equal(Layout("tokens first", 1).to_map(tokens.transpose(1, 2), (20, 30)), image)
    assert torch.equal(Layout("last").to_map(image.permute(0, 2, 3, 1), (20, 30)), image)
    with pytest.raises(reparam.errors.InputError, match="form no grid"):
        Layout("tokens", 1).to_map(tokens, (20, 20))
    assert grid_of(12, (3, 4)) == (3, 4) and grid_of(12, (4, 3)) == (4, 3)
    assert math.isclose(Layout("last").to_vector(image.permute(0, 2, 3, 1)).item(), 2.5)
