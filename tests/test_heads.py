"""Parallel heads on the last linear operator of stages: found, trained, tapped, merged."""

import copy
import io

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import reparam
import reparam.distill.models
from reparam.errors import InputError, ModelError
from reparam.passes.head_modules import Passing
from reparam.passes.heads import Heads, add_heads, head_names, merge_heads
from reparam.passes.stages import stages

NETWORKS = {
    # name: stages, the operators that are found, the norms behind them (None: the operator's own bias, or further on)
    "cifar_resnet8": ("all", "layer1.0.conv2 layer2.0.conv2 layer3.0.conv2", "bn2"),
    "cifar_wrn_16_1": ("all", "layer1.1.conv2 layer2.1.conv2 layer3.1.conv2", None),
    "cifar_vgg8": (2, "blocks.2.0 blocks.4.0", "1"),
    "cifar_mobilenetv2_half": ("last", "last.0", "last.1"),
    "cifar_shufflenet_g3": (3, "stages.0.3.restore.0 stages.1.7.restore.0 stages.2.3.restore.0", "restore.1"),
    "cifar_shufflenetv2": (2, "stages.1.7.right.5 last.0", ""),
    "cifar10_plain4": ("all", "stages.0.3 stages.1.3", ""),
    "resnet18": ("last", "layer4.1.conv2", "bn2"),
    "seresnet18": ("last", "layer4.1.conv2", "bn2"),
    "mobilenetv3_small_050": (2, "blocks.3.1.conv_pwl blocks.5.0.conv", ""),
    "efficientnet_b0": ("last", "conv_head", "bn2"),
    "convnext_atto": (2, "stages.2.blocks.5.mlp.fc2 stages.3.blocks.1.mlp.fc2", None),
    "vit_tiny_patch16_224": (2, "blocks.2.mlp.fc2 blocks.3.mlp.fc2", None),
}
OPTIONS = {"vit_tiny_patch16_224": {"depth": 4, "img_size": 64}}
ALIKE = ("resnet18", "efficientnet_b0", "cifar_shufflenetv2")
"""As seresnet18, mobilenetv3_small_050 and cifar_shufflenet_g3 are; these run when asked for."""


def built(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **OPTIONS.get(name, {})).double().eval()


def images(name, count=2):
    size = 32 if name.startswith("cifar") else 64
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def scramble(model, seed=0):
    """Give statistics and vectors random values: those of a fresh norm hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    passing = {id(t) for m in model.modules() if isinstance(m, Passing) for t in (*m.parameters(), *m.buffers())}
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if id(tensor) in passing or not tensor.is_floating_point():
                continue
            drawn = torch.rand(tensor.shape, dtype=torch.float64, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + drawn)
            elif tensor.dim() == 1:
                tensor.add_(drawn - 0.5)
    return model


def paths(model):
    return [heads.place.path for heads in model.modules() if isinstance(heads, Heads)]


def distance(a, b):
    return float((a - b).abs().max() / b.abs().max())


# Merging -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.thorough) if name in ALIKE else name for name in NETWORKS]
)
def test_the_merged_student_equals_the_heads(name):
    chosen, operators, norms = NETWORKS[name]
    model, x = built(name), images(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wide = scramble(add_heads(model, chosen, 3, x))
    assert type(wide) is type(model)
    assert paths(wide) == operators.split()
    if norms is None:
        assert not any(isinstance(m, Passing) for m in wide.modules())
    else:
        found = [path for path, m in wide.named_modules() if isinstance(m, Passing)]
        assert len(found) == len(operators.split()) and all(path.endswith(norms) for path in found)
    with torch.no_grad():
        expected = wide(x)
        student = merge_heads(wide)
        assert distance(student(x), expected) < 1e-12
        assert distance(model(x), expected) > 1e-3
        assert torch.equal(wide(x), expected)
    assert type(student) is type(model)
    assert [type(m) for m in student.modules()] == [type(m) for m in model.modules()]
    assert {k: (v.shape, v.dtype) for k, v in student.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in model.state_dict().items()
    }
    assert [(n, p.requires_grad) for n, p in student.named_parameters()] == [
        (n, p.requires_grad) for n, p in model.named_parameters()
    ]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    fresh = built(name)
    fresh.load_state_dict(student.state_dict())
    with torch.no_grad():
        assert distance(fresh(x), expected) < 1e-12


def test_the_statistics_of_the_merged_norm():
    """Its running mean is what batches of the merged operator have; weight and variance let values pass."""
    model, x = built("cifar_resnet8"), images("cifar_resnet8", 64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    wide = add_heads(model, "last", 4).train()
    wide(x)
    student = merge_heads(wide.eval())
    seen = {}
    student.layer3[0].conv2.register_forward_hook(lambda _m, _x, y: seen.update(y=y))
    wide.train().layer3[0].conv2.register_forward_pre_hook(lambda _m, x: seen.update(x=x[0]))
    with torch.no_grad():
        wide(x)
        student.layer3[0].conv2(seen["x"])
    assert torch.allclose(seen["y"].mean((0, 2, 3)), student.layer3[0].bn2.running_mean, atol=1e-10)


def test_single_precision():
    model, x = built("cifar_resnet8").float(), images("cifar_resnet8").float()
    wide = scramble(add_heads(model, "last", 4))
    with torch.no_grad():
        assert distance(merge_heads(wide)(x), wide(x)) < 1e-5
        double = copy.deepcopy(wide).double()
        assert distance(merge_heads(double)(x.double()), double(x.double())) < 1e-12  # 1 - eps was rounded
    assert all(p.dtype == torch.float32 for p in merge_heads(wide).parameters())


@pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_wrn_16_1", "cifar_shufflenet_g3"])
def test_fold_reads_heads(name):
    x = images(name)
    wide = scramble(add_heads(built(name), "last", 3))
    folded = reparam.fold(wide, x)
    with torch.no_grad():
        assert distance(folded(x), wide(x)) < 1e-12
    assert sum(p.numel() for p in folded.parameters()) < sum(p.numel() for p in wide.parameters())


@pytest.mark.parametrize(
    "name",
    [
        "cifar_resnet8",
        "cifar_wrn_16_1",
        pytest.param("cifar_shufflenetv2", marks=pytest.mark.thorough),
        "cifar10_plain4",
    ],
)
def test_a_network_with_heads_has_the_same_stages(name):
    model = timm.create_model(name).eval()
    assert stages(add_heads(model, "all", 2)) == stages(model)


def test_heads_expand_too():
    wide, x = scramble(add_heads(built("cifar_resnet8"), "last", 2)), images("cifar_resnet8")
    teacher = reparam.expand(wide, ratio=2)
    with torch.no_grad():
        assert distance(teacher(x), wide(x)) < 1e-12
        assert distance(merge_heads(reparam.extract(teacher))(x), wide(x)) < 1e-12


def test_heads_inside_another_module():
    x = images("cifar_wrn_16_1")
    for name in ("cifar_resnet8", "cifar_wrn_16_1"):
        wide = scramble(add_heads(built(name), "all", 2))
        around = nn.ModuleDict({"net": wide})
        with torch.no_grad():
            assert distance(merge_heads(around)["net"](x), wide(x)) < 1e-12
        assert list(head_names(around)) == [f"net.{path}" for path in paths(wide)]


class Dense(nn.Module):
    """Concatenates what its convolutions return; the norm behind takes in what the last one adds."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 2, 1, bias=False), nn.Conv2d(10, 4, 3, padding=1, bias=False)
        self.shrink = nn.Sequential(nn.BatchNorm2d(14), nn.ReLU(), nn.Conv2d(14, 6, 1))

    def forward(self, x):
        x = torch.cat([x, F.relu(self.first(x))], 1)
        return self.shrink(torch.cat([x, self.second(x)], 1))


class Odd(nn.Module):
    """Operators of other kinds in front of one that takes in their bias, or has room for one."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.stage = {
            "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(8, 6, 2, 2, groups=2), nn.BatchNorm2d(6)),
            "no affine": lambda: nn.Sequential(nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6, affine=False)),
            "no affine, bias": lambda: nn.Sequential(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6, affine=False)),
            "pooled": lambda: nn.Sequential(nn.Conv2d(8, 6, 3, bias=False), nn.AdaptiveAvgPool2d(1)),
            "grouped behind": lambda: nn.Sequential(nn.Conv2d(8, 6, 3, groups=2, bias=False)),
            "dense": lambda: Dense(),
            "one": lambda: nn.Sequential(nn.Conv1d(8, 6, 3, padding=1), nn.BatchNorm1d(6)),
        }[kind]()
        self.then = nn.Conv2d(6, 6, 3, groups=3) if kind == "grouped behind" else nn.Identity()
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = self.stage(x.flatten(2) if self.kind == "one" else x)
        x = self.then(x + x if self.kind == "pooled" else x)
        return self.fc(x.flatten(2).mean(2))


@pytest.mark.parametrize(
    "kind", ["transposed", "no affine", "no affine, bias", "pooled", "grouped behind", "dense", "one"]
)
def test_other_operators(kind):
    torch.manual_seed(0)
    model, x = Odd(kind).double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    where = "stage.second" if kind == "dense" else "stage.0"
    wide = scramble(add_heads(scramble(model), where if kind == "dense" else "stage", 3, x))
    assert paths(wide) == [where]
    with torch.no_grad():
        student = merge_heads(wide)
        assert distance(student(x), wide(x)) < 1e-12
        assert distance(model(x), wide(x)) > 1e-3
    assert list(student.state_dict()) == list(model.state_dict())


# Heads ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_wrn_16_1"])
def test_training(name):
    model, x = built(name), images(name, 8)
    wide = add_heads(model, "last", 3).train()
    still = [path for path, m in wide.named_modules() if not m.training]
    assert still == ([] if name == "cifar_wrn_16_1" else ["layer3.0.bn2.norm"])
    optimizer = torch.optim.SGD([p for p in wide.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(wide(x), torch.arange(8)).backward()
        optimizer.step()
    (heads,) = (m for m in wide.modules() if isinstance(m, Heads))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in heads.parameters() if p.dim() > 1)
    with torch.no_grad():
        assert distance(merge_heads(wide).eval()(x), wide.eval()(x)) < 1e-12


def test_a_norm_that_lets_values_pass_is_exact_in_both_modes():
    model, x = built("mobilenetv3_small_050"), images("mobilenetv3_small_050", 4)
    wide = add_heads(model, "last", 3, x)
    seen = {}
    wide.blocks[5][0].conv.register_forward_hook(lambda _m, _x, y: seen.update(mean=y.clone()))
    wide.blocks[5][0].bn1.register_forward_hook(lambda _m, _x, y: seen.update(out=y.clone()))
    for mode in (True, False):
        wide.train(mode)
        wide(x)
        assert torch.allclose(seen["out"], F.hardswish(seen["mean"]), rtol=1e-14, atol=1e-15)  # its activation stays
        assert not any(p.requires_grad for p in wide.blocks[5][0].bn1.parameters())
    student = merge_heads(wide.train())
    assert all(m.training for m in student.modules())


def test_features_through_a_tap():
    wide, x = scramble(add_heads(built("cifar_shufflenet_g3"), "last", 4)), images("cifar_shufflenet_g3")
    ((path, names),) = head_names(wide).items()
    assert path == "stages.2.3.restore.0" and len(names) == 4
    with torch.no_grad():
        output, values = reparam.tap(wide, [*names, path, f"{path}:input"])(x)
        heads = wide.get_submodule(path)
        features = heads.features(values[f"{path}:input"])
    assert torch.equal(output, wide(x))
    assert all(torch.equal(values[name], feature) for name, feature in zip(names, features, strict=True))
    assert torch.allclose(values[path], torch.stack(features).mean(0))
    assert values[names[0]].shape == (2, 960, 4, 4)
    assert not torch.allclose(values[names[0]], values[names[1]])


def test_features_have_variance_one_from_the_start():
    wide, x = add_heads(built("resnet18"), "last", 3).train(), images("resnet18", 8)  # starts its branches as zero
    (names,) = head_names(wide).values()
    with torch.no_grad():
        _, values = reparam.tap(wide, names)(x)
    for name in names:
        assert torch.allclose(values[name].var((0, 2, 3), correction=0), torch.ones(512).double(), atol=1e-2)


def test_features_of_tokens_are_normalised_over_batch_and_places():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=4, img_size=64).double()
    wide, x = add_heads(model, "last", 2).train(), images("resnet18")
    (names,) = head_names(wide).values()
    with torch.no_grad():
        _, values = reparam.tap(wide, names)(x)
    assert values[names[1]].shape == (2, 17, 192)
    assert torch.allclose(values[names[1]].mean((0, 1)), torch.zeros(192).double(), atol=1e-10)


def test_independent_weights_of_the_size_of_the_old_ones():
    model = built("cifar_resnet8")
    make = lambda seed: add_heads(model, "last", 3, generator=torch.Generator().manual_seed(seed))
    one, again, other = make(0), make(0), make(1)
    keys = [k for k in one.state_dict() if ".operators." in k]
    assert len(keys) == 3
    assert all(torch.equal(one.state_dict()[k], again.state_dict()[k]) for k in keys)
    assert not any(torch.equal(one.state_dict()[k], other.state_dict()[k]) for k in keys)
    weights = [one.state_dict()[k] for k in keys]
    assert not torch.allclose(weights[0], weights[1])
    spread = model.layer3[0].conv2.weight.detach().std()
    assert all(float(w.std() / spread) == pytest.approx(1, rel=0.05) for w in weights)
    with torch.no_grad():
        model.layer3[0].conv2.weight.zero_()
    assert add_heads(model, "last", 2).layer3[0].conv2.operators[0].weight.std() > 0


def test_random_heads():
    wide, x = add_heads(built("cifar_resnet8"), "last", 3, combine="random"), images("cifar_resnet8")
    heads = next(m for m in wide.modules() if isinstance(m, Heads))
    value = torch.randn(2, 64, 8, 8, dtype=torch.float64)
    wide.train()
    drawn = [heads(value) for _ in range(20)]
    features = heads.features(value)
    chosen = {next(k for k, f in enumerate(features) if torch.allclose(f, y)) for y in drawn}
    assert chosen == {0, 1, 2}
    wide.eval()
    with torch.no_grad():
        assert torch.equal(heads(value), heads(value))
        assert distance(merge_heads(wide)(x), wide(x)) < 1e-12


def test_copies_and_files():
    wide, x = scramble(add_heads(built("cifar_wrn_16_1"), 2, 3)), images("cifar_wrn_16_1")
    other = add_heads(built("cifar_wrn_16_1"), 2, 3)
    assert set(other.state_dict()) == set(wide.state_dict())
    other.load_state_dict(wide.state_dict())
    buffer = io.BytesIO()
    torch.save(wide, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        for twin in (other, copy.deepcopy(wide), loaded):
            assert torch.equal(twin(x), wide(x))
            assert distance(merge_heads(twin)(x), wide(x)) < 1e-12


def test_operators_by_name():
    model, x = built("cifar_resnet8"), images("cifar_resnet8")
    wide = scramble(add_heads(model, ["layer1", "layer2.0.conv1", "layer3.0.downsample"], 2))
    assert paths(wide) == ["layer1.0.conv2", "layer2.0.conv1", "layer3.0.downsample.0"]
    assert [h.place.stage for h in wide.modules() if isinstance(h, Heads)][1] == "layer2.0.conv1"
    with torch.no_grad():
        assert distance(merge_heads(wide)(x), wide(x)) < 1e-12


# Bad input -----------------------------------------------------------------------------------------------------------


class Strange(nn.Module):
    """Ends of stages that no heads fit."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.act, self.pool = nn.ReLU(), nn.MaxPool2d(2)
        self.twice = nn.Conv2d(4, 4, 1)
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        self.functional = Functional()
        self.fc = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.fc.weight
        self.plain = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x):
        x = self.act(self.conv(F.conv2d(x, self.weight)))
        x = self.functional(self.twice(self.twice(self.pool(x))))
        x = self.tied(self.fc(x.flatten(2).mean(2)))
        return self.plain(x)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 4, 1, 1))

    def forward(self, x):
        return F.conv2d(x, self.kernel)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layer", r"no module 'layer'$|no module 'layer'; did you mean"),
        ("pool", r"'pool' has no linear operator at its end: the last one before it is conv2d in conv, outside"),
        ("conv", r"'conv' has no bias and no batch norm behind it.*relu.* cannot take it in; give the operator a bias"),
        ("twice", "is called 2 times"),
        ("functional", r"conv2d in functional .*a functional operator.*no module to replace"),
        ("fc", r"fc.weight is shared"),
        ("plain", "whose weight is computed"),
        ("attention", "'attention': it is not called"),
    ],
)
def test_stages_without_an_operator_to_replace(name, message):
    with pytest.raises(InputError, match=message):
        add_heads(Strange(), [name], 2, torch.randn(2, 3, 16, 16))


class Pooled(nn.Module):
    """Its second and third resolution are made by convolutions, but what comes behind them is something else."""

    def __init__(self, last):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.three = last
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.three(self.two(self.one(x))).mean((2, 3)))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return torch.einsum("nchw,dc->ndhw", x, self.matrix)


def test_stages_end_with_something_else():
    x = torch.randn(2, 3, 16, 16)
    with pytest.raises(InputError, match=r"'three' has no linear operator at its end: it ends with einsum in three"):
        add_heads(Pooled(Mixer()).eval(), "three", 2, x)
    with pytest.raises(InputError, match="'three' has no linear operator at its end"):
        add_heads(Pooled(nn.MaxPool2d(2)).eval(), "three", 2, x)


def test_computed_weights_are_no_operators_to_replace():
    model = Pooled(nn.Sequential(timm.layers.StdConv2d(4, 4, 3, padding=1), nn.ReLU())).eval()
    with pytest.raises(InputError, match=r"three.0 .*whose weight is computed.*choose another operator"):
        add_heads(model, "three", 2, torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 1}, "at least 2, got 1: one head is the operator itself"),
        ({"count": 2.0}, r"got 2\.0"),
        ({"stages": "layer33"}, r"no module 'layer33'; did you mean 'layer3'"),
        ({"stages": ["layer3", 5]}, "no module 5"),
        ({"stages": 4}, "number from 1 to 3; the stages of CifarResNet are layer1, layer2, layer3"),
        ({"stages": 0}, "number from 1 to 3"),
        ({"stages": True}, "number from 1 to 3"),
        ({"stages": None}, "number from 1 to 3"),
        ({"stages": []}, "stages is empty"),
        ({"stages": ["layer3", "layer3.0.conv2"]}, r"'layer3' and 'layer3.0.conv2' both end with 'layer3.0.conv2'"),
        ({"combine": "sum"}, "combine='sum'; choose from mean, random"),
        ({"example_input": torch.randn(2, 1, 32, 32)}, "does not accept the example_input"),
    ],
)
def test_bad_arguments(arguments, message):
    model = timm.create_model("cifar_resnet8").eval()
    with pytest.raises(InputError, match=message):
        add_heads(model, **arguments)


def test_what_has_heads_and_what_has_none():
    model = timm.create_model("cifar_resnet8").eval()
    wide = add_heads(model, count=2)
    with pytest.raises(InputError, match="has heads already"):
        add_heads(wide)
    with pytest.raises(InputError, match="no heads to merge"):
        merge_heads(model)
    with pytest.raises(InputError, match="no heads to merge"):
        merge_heads(merge_heads(wide))
    with torch.no_grad():
        next(m for m in wide.modules() if isinstance(m, Heads)).norms[1].running_var.fill_(-1)
    with pytest.raises(ModelError, match=r"layer3.0.conv2: the merged heads hold NaN"):
        merge_heads(wide)
    with pytest.raises(InputError, match=r"no stages are found: .*give names"):
        add_heads(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), example_input=torch.randn(2, 3, 2, 2))
