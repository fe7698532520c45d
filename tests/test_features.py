"""Features and embeddings of students, views and teachers as `Outputs`; which levels of two networks are compared."""

import copy

import pytest
import timm
import torch
from torch import nn

import reparam
import reparam.distill.models
from reparam.distill.features import Needs, Observed, needs
from reparam.distill.losses import match_levels, pair_embeddings
from reparam.distill.methods.base import Distiller
from reparam.errors import InputError, ModelError

BOTH = Needs(features=True, embedding=True)


def network(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **options)


def images(side, count=4):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}
TINY_SWIN = {"img_size": 64, "embed_dim": 16, "depths": (1, 1, 1), "num_heads": (1, 2, 4), "window_size": 4,
             "drop_path_rate": 0.0}  # fmt: skip
CASES = {
    "cifar_resnet8": (32, {}, [(16, 32), (32, 16), (64, 8)], 64),
    "mobilenetv3_small_050": (64, {}, [(8, 16), (16, 8), (24, 4), (288, 2)], 1024),
    "vit_tiny_patch16_224": (32, TINY_VIT, [(24, 4)] * 4, 24),
    "swin_tiny_patch4_window7_224": (64, TINY_SWIN, [(16, 16), (32, 8), (64, 4)], 64),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("training", [False, True])
def test_student_view_and_teacher(name, training):
    side, options, levels, width = CASES[name]
    student, x = network(name, **options).double().train(training), images(side).double()
    wanted = BOTH.stages(student, x)
    teacher = reparam.expand(student, 2, example_input=x, noise=0.25).train(training)
    view = reparam.student_view(teacher).train(training)
    plain = copy.deepcopy(student)
    outputs = {label: Observed(n, wanted)(x) for label, n in (("s", student), ("v", view), ("t", teacher))}
    torch.testing.assert_close(outputs["s"].logits, plain(x))
    assert [(m.shape[1], m.shape[2]) for m in outputs["s"].features] == levels
    assert outputs["s"].embedding.shape == (4, width)
    for mine, compact, wide in zip(*(outputs[k].features for k in "svt"), strict=True):
        torch.testing.assert_close(mine, compact)
        assert wide.shape == (4, 2 * mine.shape[1], *mine.shape[2:])
    torch.testing.assert_close(outputs["s"].embedding, outputs["v"].embedding)
    assert outputs["t"].embedding.shape == (4, 2 * width)
    for label, module in (("v", view), ("t", teacher)):
        teacher.zero_grad()
        values = [*outputs[label].features, outputs[label].embedding]
        sum(value.square().sum() for value in values).backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_tokens_are_maps_in_rows_without_the_class_token():
    student, x = network("vit_tiny_patch16_224", **TINY_VIT).eval(), images(32)
    wanted = BOTH.stages(student, x)
    name = wanted.stages.features[1]
    tokens = reparam.tap(student, [name])(x)[1][name]
    assert tokens.shape == (4, 17, 24)
    level = Observed(student, wanted)(x).features[1]
    assert torch.equal(level[:, :, 2, 3], tokens[:, 1 + 2 * 4 + 3])


def test_channels_last_maps_become_channels_first():
    student, x = network("swin_tiny_patch4_window7_224", **TINY_SWIN).eval(), images(64)
    wanted = BOTH.stages(student, x)
    name = wanted.stages.features[0]
    value = reparam.tap(student, [name])(x)[1][name]
    assert torch.equal(Observed(student, wanted)(x).features[0][:, :, 3, 5], value[:, 3, 5])


def test_nothing_wanted_is_a_plain_call():
    calls = []

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            calls.append((len(self.fc._forward_hooks), len(self.fc._forward_pre_hooks)))
            return self.fc(x)

    model = Counted()
    assert Needs().stages(model, torch.randn(2, 4)) is None and needs(Distiller) == Needs()
    outputs = Observed(model)(torch.randn(2, 4))
    assert calls == [(0, 0)] and outputs.features == () and outputs.embedding is None
    assert not list(Observed(model).parameters()) and not Observed(model).state_dict()
    with pytest.raises(ModelError, match="logits"):
        Observed(nn.Identity())(torch.randn(2, 4, 4))


def test_only_what_is_asked_for():
    student, x = network("cifar_resnet8").eval(), images(32)
    maps = Observed(student, Needs(features=True).stages(student, x))(x)
    vector = Observed(student, Needs(embedding=True).stages(student, x))(x)
    assert len(maps.features) == 3 and maps.embedding is None
    assert vector.features == () and vector.embedding.shape == (4, 64)
    torch.testing.assert_close(student.fc(vector.embedding), vector.logits)


def test_autocast():
    student, x = network("cifar_resnet8").train(), images(32)
    wanted = BOTH.stages(student, x)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = Observed(student, wanted)(x)
    assert all(value.dtype == torch.bfloat16 for value in (outputs.logits, outputs.embedding))


def test_a_compiled_network_runs_as_it_is():
    student, x = network("cifar_resnet8").eval(), images(32)
    wanted = BOTH.stages(student, x)
    outputs = Observed(torch.compile(student), wanted)(x)
    assert torch.equal(outputs.logits, student(x)) and len(outputs.features) == 3


class Late(nn.Module):
    """Changes what a module returned in place."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(nn.functional.relu(self.norm(x), inplace=True).mean((2, 3)))


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_tap_sees_values_before_they_are_changed(context):
    model, x = Late().train(), torch.randn(4, 3, 5, 5)
    teacher = reparam.expand(model, 2, example_input=x)
    with context():
        for tapped in (reparam.tap(model, ["norm"]), reparam.tap(teacher, ["norm"])):
            for _ in range(3):
                assert tapped(x)[1]["norm"].min() < 0


def test_gradients_through_a_tap_do_not_depend_on_earlier_calls():
    """A run that is taken up again has to compute, bit for bit, what it would have computed."""
    torch.manual_seed(0)
    model, x = Late().train(), torch.randn(4, 3, 5, 5)
    tapped, found = reparam.tap(model, ["norm", "fc"]), []
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        model.load_state_dict(state)
        model.zero_grad()
        output, values = tapped(x)
        (output.square().sum() + sum(value.sin().sum() for value in values.values())).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for later in found[1:] for a, b in zip(found[0], later, strict=True))


def test_inputs_that_are_no_single_tensor():
    class Adds(nn.Module):
        def forward(self, a, b):
            return a + b

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.add = nn.Linear(3, 4), Adds()

        def forward(self, x):
            return self.add(self.fc(x), self.fc(x * 2))

    model, x = Net(), torch.randn(2, 3)
    teacher = reparam.expand(model, 2, example_input=x)
    with pytest.raises(InputError, match="'add:input' asks for the tensor that enters"):
        reparam.tap(model, ["add:input"])(x)
    with pytest.raises(InputError, match="'add:input' asks for the tensor that enters"):
        reparam.tap(teacher, ["add:input"])
    for network_ in (model, teacher, reparam.student_view(teacher)):
        torch.testing.assert_close(reparam.tap(network_, ["fc:input"])(x)[1]["fc:input"], 2 * x)
        with pytest.raises(InputError, match="no module 'fc2'; did you mean 'fc'"):
            reparam.tap(network_, ["fc2:input"])


# Messages ------------------------------------------------------------------------------------------------------------


def test_a_model_without_features():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 3))
    x = torch.randn(2, 3, 2, 2)
    message = r"mymodel \(Sequential\): a method that needs features from a model without any.*such as kd, dkd or dist"
    with pytest.raises(InputError, match=message):
        BOTH.stages(model, x, "mymodel")
    assert Observed(model, Needs(embedding=True).stages(model, x))(x).embedding.shape == (2, 7)
    with pytest.raises(InputError, match="without one"):
        Needs(embedding=True).stages(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())[1:], x)


# Levels --------------------------------------------------------------------------------------------------------------


def levels(*sides):
    return [torch.zeros(1, 2, side, side) for side in sides]


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ((32, 16, 8), (32, 16, 8), [(0, 0), (1, 1), (2, 2)]),
        ((32, 16, 8), (16, 8, 4), [(0, 0), (1, 1), (2, 2)]),
        ((112, 56, 28, 14, 7), (56, 28, 14, 7), [(1, 0), (2, 1), (3, 2), (4, 3)]),
        ((56, 28, 14, 7), (112, 56, 28, 14, 7), [(0, 1), (1, 2), (2, 3), (3, 4)]),
        ((56, 7), (112, 56, 28, 14, 7), [(0, 1), (1, 4)]),
        ((14, 14, 14, 14, 14), (56, 28, 14, 7), [(1, 0), (2, 1), (3, 2), (4, 3)]),
        ((8,), (32, 16, 8), [(0, 2)]),
    ],
)
def test_levels_are_matched_from_the_deep_end(student, teacher, expected):
    assert match_levels(levels(*student), levels(*teacher)) == tuple(expected)
    swapped = tuple((b, a) for a, b in expected)
    assert match_levels(levels(*teacher), levels(*student)) == swapped


def test_nothing_to_match():
    with pytest.raises(InputError, match=r"0 and 1 maps. Use a method that compares logits"):
        match_levels([], levels(8))
    with pytest.raises(InputError, match="maps"):
        match_levels([torch.zeros(2, 3)], levels(8))
    with pytest.raises(InputError, match=r"got None and \[2, 3\]"):
        pair_embeddings(None, torch.zeros(2, 3))
