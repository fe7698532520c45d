"""Folding: every rule, what it must leave, structure that stays, bad input. Comparisons are in float64."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import reparam
from reparam.errors import InputError, ModelError
from reparam.passes.fold import fold_with_report


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms statistics and weights that are not 1 and 0; float64, eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_var", None) is not None:
                for tensor in (module.running_mean, module.bias):
                    if tensor is not None:
                        tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator))
                for tensor in (module.running_var, module.weight):
                    if tensor is not None:
                        tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in ("gamma", "scale", "shift"):
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model.double().eval()


def error(model: nn.Module, folded: nn.Module, *inputs: Tensor) -> float:
    with torch.no_grad():
        expected, result = model(*inputs), folded(*inputs)
    assert expected.shape == result.shape
    return float((expected - result).abs().max() / expected.abs().max())


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.InstanceNorm2d)) for m in model.modules())


class _Calls(TorchFunctionMode):
    """Counts the norms that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: object, types: object, args: object = (), kwargs: object = None) -> object:
        self.count += func in (F.batch_norm, F.instance_norm)
        return func(*args, **(kwargs or {}))  # type: ignore


def norms_that_run(model: nn.Module, *inputs: Tensor) -> int:
    with torch.no_grad(), _Calls() as calls:
        model(*inputs)
    return calls.count


def layers(model: nn.Module) -> int:
    return sum(isinstance(m, (nn.modules.conv._ConvNd, nn.Linear)) for m in model.modules())


class Net(nn.Module):
    """Modules by name and a function of them and the input."""

    def __init__(self, function: Callable[..., Tensor], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = [function]
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function[0](self, x)


def conv(i: int = 4, o: int = 4, k: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, **{"padding": k // 2, **options})  # type: ignore[arg-type]


def scale(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(shape) + 0.5)


IMAGE = torch.randn(2, 4, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

# name -> (network, input, norms left, convolutions and linear layers left)
FOLDS: dict[str, tuple[Callable[[], nn.Module], Tensor, int, int]] = {
    "conv bn": (lambda: nn.Sequential(conv(bias=False), nn.BatchNorm2d(4)), IMAGE, 0, 1),
    "conv bn relu conv bn": (
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(inplace=True), conv(), nn.BatchNorm2d(4)),
        IMAGE, 0, 2),
    "bn without weight": (lambda: nn.Sequential(conv(), nn.BatchNorm2d(4, affine=False)), IMAGE, 0, 1),
    "grouped conv": (lambda: nn.Sequential(conv(groups=2), nn.BatchNorm2d(4)), IMAGE, 0, 1),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), nn.BatchNorm2d(6)), IMAGE, 0, 1),
    "transposed, groups": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), IMAGE, 0, 1),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(5, 3, 3), nn.BatchNorm1d(3)), TOKENS, 0, 1),
    "linear bn": (lambda: nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7)), TOKENS[0], 0, 1),
    "instance norm": (
        lambda: nn.Sequential(conv(), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), IMAGE, 0, 1),
    "circular padding": (lambda: nn.Sequential(conv(padding_mode="circular"), nn.BatchNorm2d(4)), IMAGE, 0, 1),
    "bn in front": (lambda: nn.Sequential(nn.BatchNorm2d(4), conv(padding=0)), IMAGE, 0, 1),
    "bn in front, padded": (lambda: nn.Sequential(nn.BatchNorm2d(4), conv()), IMAGE, 1, 1),
    "bn, flatten, linear": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 81, 3)), IMAGE, 0, 1),
    "bn, pool, linear": (
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
        IMAGE, 0, 1),
    "bn in front of relu": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), conv()), IMAGE, 1, 1),
    "two norms": (lambda: nn.Sequential(conv(), nn.BatchNorm2d(4), nn.Dropout(), nn.BatchNorm2d(4)), IMAGE, 0, 1),
    "zeros, conv": (lambda: nn.Sequential(nn.ZeroPad2d(1), conv(padding=0), nn.BatchNorm2d(4)), IMAGE, 0, 1),
    "two convs that shrink": (lambda: nn.Sequential(conv(4, 16, 1), conv(16, 4, 1)), IMAGE, 0, 1),
    "bottleneck": (lambda: nn.Sequential(conv(4, 1, 1), conv(1, 4, 1)), IMAGE, 0, 2),
    "depthwise, pointwise": (lambda: nn.Sequential(conv(groups=4), conv(k=1)), IMAGE, 0, 2),
    "padded sequence": (lambda: nn.Sequential(conv(4, 16, 1), conv(16, 4)), IMAGE, 0, 2),
    "used elsewhere": (
        lambda: Net(lambda m, x: (lambda y: m.bn(y) * y.sigmoid())(m.conv(x)), conv=conv(), bn=nn.BatchNorm2d(4)),
        IMAGE, 1, 1),
    "layer scale": (lambda: Net(lambda m, x: m.conv(x) * m.gamma, conv=conv(), gamma=scale(4, 1, 1)), IMAGE, 0, 1),
    "numbers": (lambda: Net(lambda m, x: 1 - (m.conv(x) + 3) / 2, conv=conv()), IMAGE, 0, 1),
    "not per channel": (lambda: Net(lambda m, x: m.conv(x) * m.gamma, conv=conv(), gamma=scale(4, 9, 1)), IMAGE, 0, 1),
    "residual": (lambda: Net(lambda m, x: x + m.conv(x), conv=conv()), IMAGE, 0, 1),
    "difference": (lambda: Net(lambda m, x: m.a(x) - m.b(x), a=conv(), b=conv(k=1)), IMAGE, 0, 1),
    "branches": (
        lambda: Net(lambda m, x: m.c(m.a(x) + m.b(x) + m.c(x)), a=conv(), b=conv(k=1), c=nn.BatchNorm2d(4)),
        IMAGE, 0, 1),
    "1x1, pool beside 3x3": (
        lambda: Net(lambda m, x: F.avg_pool2d(m.a(x), 3, 1, 1) + m.b(x), a=conv(k=1, bias=False), b=conv()),
        IMAGE, 0, 1),
    "1x1, pool": (lambda: nn.Sequential(conv(k=1), nn.AvgPool2d(2)), IMAGE, 0, 1),
    "sum of different sources": (
        lambda: Net(lambda m, x: m.bn(m.a(x) + m.b(x.relu())), a=conv(), b=conv(), bn=nn.BatchNorm2d(4)), IMAGE, 0, 2),
    "sum with something else": (
        lambda: Net(lambda m, x: m.bn(m.a(x) + x.relu()), a=conv(), bn=nn.BatchNorm2d(4)), IMAGE, 1, 1),
    "cat of different sources": (
        lambda: Net(lambda m, x: m.bn(torch.cat([m.a(x), m.b(x.relu())], 1)), a=conv(), b=conv(), bn=nn.BatchNorm2d(8)),
        IMAGE, 0, 2),
    "cat of one source": (
        lambda: Net(lambda m, x: m.bn(torch.cat([m.a(x), m.b(x)], 1)), a=conv(), b=conv(), bn=nn.BatchNorm2d(8)),
        IMAGE, 0, 1),
    "tokens": (
        lambda: Net(lambda m, x: (lambda y: m.bn(y.flatten(0, 1)).reshape_as(y))(m.fc(x)).relu(),
                    fc=nn.Linear(4, 6), bn=nn.BatchNorm1d(6)), TOKENS, 0, 1),
    "permuted": (
        lambda: Net(lambda m, x: m.bn(m.fc(x).transpose(1, 2)), fc=nn.Linear(4, 6), bn=nn.BatchNorm1d(6)),
        TOKENS, 0, 1),
    "heads": (
        lambda: Net(lambda m, x: m.bn(m.fc(x).reshape(2, 5, 2, 3).flatten(0, 1)), fc=nn.Linear(4, 6),
                    bn=nn.BatchNorm1d(2)), TOKENS, 1, 1),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(conv()), nn.BatchNorm2d(4)), IMAGE, 0, 1),
    "computed weight": (
        lambda: Net(lambda m, x: m.bn(F.conv2d(x, (m.w - m.w.mean((1, 2, 3), keepdim=True)) * m.scale, padding=1)),
                    w=scale(4, 4, 3, 3), scale=scale(4, 1, 1, 1), bn=nn.BatchNorm2d(4)), IMAGE, 0, 1),
    "in place": (
        lambda: Net(lambda m, x: (lambda y: y.mul_(2).add_(x))(m.conv(x)), conv=conv()), IMAGE, 0, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDS)
def test_rules(name: str) -> None:
    make, x, norms_left, layers_left = FOLDS[name]
    torch.manual_seed(0)
    model = randomise(make())
    before = copy.deepcopy(model.state_dict())
    folded, report = fold_with_report(model, x)
    assert error(model, folded, x) < 2e-15
    assert (norms(folded), report.norms[1]) == (norms_left, norms_left)
    assert (layers(folded), report.linear[1]) == (layers_left, layers_left)
    assert len(report.kept) == norms_left == norms_that_run(folded, x)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert not any(m.training for m in folded.modules())
    again, second = fold_with_report(folded, x)
    assert second.norms[0] == second.norms[1] == norms_left
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), folded.state_dict().values(), strict=True)
    )
    if not any("function" in vars(m) for m in folded.modules()):  # a lambda
        assert error(model, pickle.loads(pickle.dumps(folded)), x) < 2e-15


# Reasons -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bn in front, padded", "pads with zeros"),
        ("bn in front of relu", "relu in 1 follows"),
        ("used elsewhere", "used elsewhere"),
        ("sum with something else", "it follows relu"),
    ],
)
def test_the_report_says_why(name: str, words: str) -> None:
    make, x, _, _ = FOLDS[name]
    report = fold_with_report(randomise(make()), x)[1]
    assert words in str(report)


@pytest.mark.parametrize("name", ["bottleneck", "depthwise, pointwise", "1x1, pool"])
def test_growth_has_to_be_allowed(name: str) -> None:
    make, x, _, _ = FOLDS[name]
    model = randomise(make())
    assert "allow_growth=True" in str(fold_with_report(model, x)[1])
    folded, report = fold_with_report(model, x, allow_growth=True)
    assert error(model, folded, x) < 2e-15
    assert layers(folded) == 1 and not report.grown


# Blocks --------------------------------------------------------------------------------------------------------------


class RepVgg(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Sequential(conv(width, width, bias=False), nn.BatchNorm2d(width))
        self.point = nn.Sequential(conv(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.same = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.dense(x) + self.point(x) + self.same(x))


class AcNet(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.square = nn.Sequential(conv(width, width, bias=False), nn.BatchNorm2d(width))
        self.row = nn.Sequential(nn.Conv2d(width, width, (1, 3), padding=(0, 1), bias=False), nn.BatchNorm2d(width))
        self.column = nn.Sequential(nn.Conv2d(width, width, (3, 1), padding=(1, 0), bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.square(x) + self.row(x) + self.column(x))


class Dbb(nn.Module):
    """DBB with the padding in front of the first layer of each branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        norm = nn.BatchNorm2d
        self.dense = nn.Sequential(conv(width, width, bias=False), norm(width))
        self.point = nn.Sequential(conv(width, width, 1, bias=False), norm(width))
        self.serial = nn.Sequential(
            conv(width, width, 1, padding=1, bias=False), norm(width), conv(width, width, padding=0), norm(width)
        )
        self.pooled = nn.Sequential(
            conv(width, width, 1, padding=1, bias=False), norm(width), nn.AvgPool2d(3, 1), norm(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.dense(x) + self.point(x) + self.serial(x) + self.pooled(x))


@pytest.mark.parametrize("block", [RepVgg, AcNet, Dbb])
def test_blocks(block: type[nn.Module]) -> None:
    model = randomise(nn.Sequential(block(4), nn.Sequential(block(4))))
    folded = reparam.fold(model, IMAGE)
    assert type(folded) is nn.Sequential and type(folded[1]) is nn.Sequential
    assert error(model, folded, IMAGE) < 2e-15
    assert norms(folded) == 0 and layers(folded) == 2
    other = torch.randn(3, 4, 6, 7, dtype=torch.float64)
    assert error(model, folded, other) < 2e-15
    kept = {".".join(key.split(".")[:2]) for key in folded.state_dict()}
    assert kept < {".".join(key.split(".")[:2]) for key in model.state_dict()} | {"1.0"}


# Modules that are used twice -----------------------------------------------------------------------------------------


def test_a_conv_with_two_norms_becomes_two() -> None:
    model = randomise(
        Net(lambda m, x: m.b(m.conv(m.a(m.conv(x)).relu())), conv=conv(), a=nn.BatchNorm2d(4), b=nn.BatchNorm2d(4))
    )
    folded = reparam.fold(model, IMAGE)
    assert error(model, folded, IMAGE) < 2e-15
    assert norms(folded) == 0 and layers(folded) == 2


def test_a_conv_and_a_norm_that_are_called_twice_together_stay_one() -> None:
    model = randomise(Net(lambda m, x: m.block(m.block(x)), block=nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU())))
    folded = reparam.fold(model, IMAGE)
    assert type(folded) is Net and norms(folded) == 0 and layers(folded) == 1
    assert error(model, folded, IMAGE) < 2e-15


def test_a_conv_whose_second_call_has_no_norm() -> None:
    model = randomise(Net(lambda m, x: m.conv(m.a(m.conv(x)).relu()), conv=conv(), a=nn.BatchNorm2d(4)))
    folded = reparam.fold(model, IMAGE)
    assert error(model, folded, IMAGE) < 2e-15
    assert norms(folded) == 0 and layers(folded) == 2


def test_tied_weights() -> None:
    model = Net(lambda m, x: m.b(m.n(m.a(x)).relu()), a=conv(), b=conv(), n=nn.BatchNorm2d(4))
    model.b.weight = model.a.weight
    folded = reparam.fold(randomise(model), IMAGE)
    assert error(model, folded, IMAGE) < 2e-15
    assert norms(folded) == 0


def test_a_weight_that_other_code_reads() -> None:
    model = randomise(
        Net(lambda m, x: m.n(m.a(x)).relu() + m.a.weight.sum(), a=conv(), n=nn.BatchNorm2d(4))
    )  # fmt: skip
    folded = reparam.fold(model, IMAGE)
    assert error(model, folded, IMAGE) < 2e-15


# Structure -----------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(4, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block = RepVgg(8)
        self.head = nn.Linear(8, 3)
        self.pretrained_cfg = {"input_size": (4, 9, 9)}

    def forward_features(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x).mean((2, 3)))


def test_classes_and_names_stay() -> None:
    model = randomise(Small())
    folded, report = fold_with_report(model)
    assert type(folded) is Small and type(folded.stem) is nn.Sequential
    assert isinstance(folded.stem[1], nn.Identity)
    assert folded.pretrained_cfg == model.pretrained_cfg
    assert error(model, folded, IMAGE) < 2e-15
    assert (model.forward_features(IMAGE) - folded.forward_features(IMAGE)).abs().max() < 1e-13
    assert set(folded.state_dict()) == {
        f"{n}.{w}" for n in ("stem.0", "block.dense.0", "head") for w in ("weight", "bias")
    }
    assert report.norms == (4, 0) and report.linear == (4, 3)


def test_nothing_to_fold_is_a_copy() -> None:
    model = nn.Sequential(conv(), nn.ReLU(), conv()).eval()
    folded = reparam.fold(model, IMAGE.float())
    assert type(folded) is nn.Sequential and folded is not model
    assert folded[0].weight is not model[0].weight and torch.equal(folded[0].weight, model[0].weight)


def test_saving_copying_moving() -> None:
    model = randomise(Small()).float()
    x = IMAGE.float()
    folded = reparam.fold(model)
    stored = io.BytesIO()
    torch.save(folded, stored)
    stored.seek(0)
    with torch.no_grad():
        expected = folded(x)
        assert torch.equal(torch.load(stored, weights_only=False)(x), expected)
        assert torch.equal(copy.deepcopy(folded)(x), expected)
        other = reparam.fold(randomise(Small(), seed=5).float())
        assert not torch.allclose(other(x), expected)
        other.load_state_dict(folded.state_dict())
        assert torch.equal(other(x), expected)
        assert copy.deepcopy(folded).double()(IMAGE).dtype == torch.float64
    copied = copy.deepcopy(folded)
    next(copied.parameters()).data.zero_()
    assert torch.equal(folded(x), expected)


def test_export_and_trace() -> None:
    model = randomise(Small()).float()
    folded = reparam.fold(model)
    x = IMAGE.float()
    with torch.no_grad():
        with pytest.warns((FutureWarning, DeprecationWarning), match="deprecated"):
            traced = torch.jit.trace(folded, x)
        assert torch.allclose(traced(x), folded(x))
        exported = torch.export.export(folded, (x,)).module()
        assert torch.allclose(exported(x), folded(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    model = randomise(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), RepVgg(4))).to(dtype)
    folded = reparam.fold(model, IMAGE.to(dtype))
    assert {p.dtype for p in folded.parameters()} == {dtype}
    exact = reparam.fold(copy.deepcopy(model).double(), IMAGE)
    for a, b in zip(folded.parameters(), exact.parameters(), strict=True):
        assert torch.equal(a, b.to(dtype))  # computed in float64, rounded once


def test_requires_grad_follows_the_layer() -> None:
    model = randomise(nn.Sequential(conv(bias=False), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.BatchNorm2d(4)))
    model[3].requires_grad_(False)
    folded = reparam.fold(model, IMAGE)
    assert [p.requires_grad for p in folded.parameters()] == [True, True, False, False]


class Loop(nn.Module):
    """Code that no graph can hold, around code that has one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Small()

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y[y.sum(1) > y.sum(1).min()] if y.sum() > 1e9 else y


def test_code_without_a_graph() -> None:
    model = randomise(Loop())
    folded, report = fold_with_report(model, IMAGE)
    assert type(folded) is Loop and type(folded.body) is Small
    assert report.norms == (4, 0) and norms(folded) == 0
    assert error(model, folded, IMAGE) < 2e-15


# Bad input -----------------------------------------------------------------------------------------------------------


def test_train_mode_is_refused() -> None:
    with pytest.raises(ModelError, match=r"the model \(Small\) is in train mode.*model.eval\(\)"):
        reparam.fold(Small())
    model = Small().eval()
    model.block.same.train()
    with pytest.raises(ModelError, match=r"block.same \(BatchNorm2d\) is in train mode"):
        reparam.fold(model)


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match=r"must be a torch\.nn\.Module"):
        reparam.fold(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not accept the example_input"):
        reparam.fold(Small().eval(), torch.randn(2, 5, 9, 9))


def test_values_that_are_not_finite_are_refused() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(4, eps=1e-300)).eval()
    model[1].running_var.zero_()
    with pytest.raises(ModelError, match=r"^0: folding gives NaN or Inf"):
        reparam.fold(model, IMAGE.float())
    half = nn.Sequential(conv(), nn.BatchNorm2d(4)).eval().half()
    half[1].weight.data.fill_(6e4)
    half[1].running_var.fill_(1e-4)
    with pytest.raises(ModelError, match="float16"):
        reparam.fold(half, IMAGE.half())


# Random networks -----------------------------------------------------------------------------------------------------


class Random(nn.Module):
    """A random network of linear operators, with a few that are not."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps = steps
        width = 4
        for k, (kind, _, _) in enumerate(steps):
            made = {
                "conv": lambda: conv(width, width),
                "point": lambda: conv(width, width, 1),
                "depthwise": lambda: conv(width, width, groups=width),
                "norm": lambda: nn.BatchNorm2d(width),
                "pool": lambda: nn.AvgPool2d(3, 1, 1),
                "join": lambda: conv(2 * width, width, 1),
            }.get(kind)
            self.add_module(f"m{k}", nn.Identity() if made is None else made())
        self.gamma = scale(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for k, (kind, i, j) in enumerate(self.steps):
            a, b = values[i % len(values)], values[j % len(values)]
            module = getattr(self, f"m{k}")
            if kind == "add":
                value = a + b
            elif kind == "sub":
                value = a - 0.5 * b
            elif kind == "join":
                value = module(torch.cat([a, b], 1))
            elif kind == "scale":
                value = a * self.gamma
            elif kind == "relu":
                value = F.relu(a)
            else:
                value = module(a)
            values.append(value)
        return values[-1] + values[-2] if len(values) > 2 else values[-1]


KINDS = "conv point depthwise norm norm pool join add add sub scale relu".split()
STEPS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=9)


@given(STEPS, st.booleans())
@settings(max_examples=60, deadline=None)
def test_random_networks(steps: list[tuple[str, int, int]], allow_growth: bool) -> None:
    torch.manual_seed(0)
    model = randomise(Random(steps))
    folded, report = fold_with_report(model, IMAGE, allow_growth=allow_growth)
    assert error(model, folded, IMAGE) < 1e-13
    assert report.norms[1] <= report.norms[0]
    other = torch.randn(1, 4, 6, 5, dtype=torch.float64)
    assert error(model, folded, other) < 1e-13
    again, second = fold_with_report(folded, IMAGE, allow_growth=allow_growth)
    assert error(model, again, IMAGE) < 1e-13
    assert second.norms == (report.norms[1],) * 2 and second.linear == (report.linear[1],) * 2
