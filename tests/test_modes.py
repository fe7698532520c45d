"""Both modes: teachers that use dropout, drop path and statistics in train mode, and code that branches on its mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath, PatchDropout
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from zoo import error, randomise, sample

import reparam
from reparam.passes.modes import choose
from reparam.passes.teacher import Teacher

# Networks ------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Dropout inside torch's attention, chosen by the flag: the same operators with another number."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.drop = nn.Dropout(0.3)
        self.path = DropPath(0.3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop.p if self.training else 0.0)
        return x + self.path(self.proj(y.transpose(1, 2).flatten(2)))


class Cached(nn.Module):
    """A table of biases, indexed anew in train mode and kept in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 5))
        self.register_buffer("index", torch.arange(8) % 5, persistent=False)
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Cached:
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def bias(self) -> Tensor:
        if self.training:
            return self.table[:, self.index]
        if "bias" not in self.cache:
            self.cache["bias"] = self.table[:, self.index]
        return self.cache["bias"]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias()[None, :, None, : x.shape[3]]


class Two(nn.Module):
    """Train mode takes another way, and both ways need edits inside."""

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return torch.cat([self.drop(self.first(x))[:, 4:], x[:, :4]], 1)
        return torch.cat([self.second(x)[:, 4:], x[:, :4]], 1)


def between(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *layers, nn.Conv2d(8, 4, 1))


def tokens(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), *layers, nn.LayerNorm(8), nn.Linear(8, 5))


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **options)


IMAGE, TOKENS, PHOTO = (4, 3, 8, 8), (4, 9, 6), (2, 3, 160, 160)
RATES = {"attn_drop_rate": 0.2, "proj_drop_rate": 0.2, "drop_path_rate": 0.2}

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool, int]] = {
    # builder, input, whether train mode is random, number of programs
    "norm": (lambda: between(nn.BatchNorm2d(8), nn.ReLU()), IMAGE, False, 1),
    "dropout": (lambda: between(nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.5)), IMAGE, True, 1),
    "attention": (lambda: tokens(Attention()), TOKENS, True, 1),
    "patch-dropout": (lambda: tokens(PatchDropout(0.5, num_prefix_tokens=1), Attention()), TOKENS, True, 2),
    "cache": (lambda: between(Cached(), nn.BatchNorm2d(8)), IMAGE, False, 1),
    "two-programs": (lambda: between(Two(), nn.BatchNorm2d(8)), IMAGE, True, 2),
    "vit": (timm_model("test_vit", **RATES), PHOTO, True, 1),
    "vit-patches": (timm_model("test_vit", patch_drop_rate=0.5), PHOTO, True, 2),
}
SLOW = {"levit": (timm_model("levit_128s", drop_path_rate=0.2), (2, 3, 224, 224), True, 1)}


def made(name: str) -> tuple[nn.Module, Teacher, Tensor]:
    build, shape, _random, _programs = {**NETWORKS, **SLOW}[name]
    torch.manual_seed(0)
    model = randomise(build().double()).eval()
    x = sample(shape)
    return model, reparam.expand(model, 2, example_input=x), x


def average(teacher: Teacher) -> nn.Module:
    return AveragedModel(teacher).module


def ema(teacher: Teacher) -> nn.Module:
    return ModelEmaV3(teacher).module


COPIES = {"itself": lambda t: t, "deepcopy": copy.deepcopy, "averaged": average, "ema": ema}


def check_modes(name: str, copied: str) -> None:
    model, teacher, x = made(name)
    is_random, programs = {**NETWORKS, **SLOW}[name][2:]
    assert len(teacher._programs) == programs
    assert teacher.plan.coverage == 1.0
    other = COPIES[copied](teacher)
    with torch.no_grad():
        before = other.eval()(x)
        assert error(model(x), before) <= 1e-11
        state = {key: value.clone() for key, value in other.state_dict().items()}
        other.train()
        first, second = other(x), other(x)
        assert torch.equal(first, second) != is_random
        statistics = [key for key in state if key.endswith("running_mean") and "student_statistics" not in key]
        assert all(not torch.equal(state[key], other.state_dict()[key]) for key in statistics)
        other.eval()
        assert torch.equal(other(x), other(x))
        assert torch.equal(other(x), before) != bool(statistics)
        other.load_state_dict(state)
        assert torch.equal(other(x), before)


# The large ones go through one copy; the others through all.
CASES = [(n, c) for n in NETWORKS for c in COPIES if not n.startswith("vit") or c in ("itself", "ema")]


@pytest.mark.parametrize(("name", "copied"), CASES)
def test_train_mode_is_used_and_eval_mode_comes_back(name: str, copied: str) -> None:
    check_modes(name, copied)


@pytest.mark.thorough
@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("name", SLOW)
def test_train_mode_of_a_large_network(name: str, copied: str) -> None:
    check_modes(name, copied)


# Code that branches on its mode, against the student in train mode ---------------------------------------------------


class Inner(nn.Module):
    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def heads(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2).unflatten(2, (2, 4)).transpose(1, 2)


def attend(x: Tensor, scale: float) -> Tensor:
    y = F.scaled_dot_product_attention(heads(x), heads(x), heads(x), scale=scale)
    return y.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, x.shape[2:])


BRANCHES: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], bool]] = {
    # function, whether the two modes become one program with a chosen constant
    "factor": (lambda m, x: x * (0.5 if m.training else 0.25), True),
    "clamp": (lambda m, x: x.clamp(max=0.1 if m.training else 6.0), True),
    "attention-scale": (lambda m, x: attend(x, 0.5 if m.training else 0.3), True),
    "eps": (lambda m, x: F.normalize(x, dim=1, eps=1.0 if m.training else 2.0), True),
    # A whole number or a flag may decide where the replicas are.
    "start": (lambda m, x: torch.cat([x.narrow(1, 0 if m.training else 4, 4)] * 2, 1), False),
    "shift": (lambda m, x: x.roll(1 if m.training else 3, 1), False),
    "dim": (lambda m, x: x.softmax(1 if m.training else 2), False),
    "kept-dim": (lambda m, x: x + x.mean(3 if m.training else 1, keepdim=True), False),
    "groups": (lambda m, x: F.group_norm(x, 2 if m.training else 4), False),
    "flag": (lambda m, x: x / x.std(1, keepdim=True, unbiased=bool(m.training)), False),
    "slice": (lambda m, x: torch.cat([x[:, : 4 if m.training else 2]] * (2 if m.training else 4), 1), False),
    "more-operators": (lambda m, x: torch.cat(x.chunk(2, 1)[::-1], 1) if m.training else x, False),
}


@pytest.mark.parametrize("start", [False, True], ids=["expanded in eval", "expanded in train"])
@pytest.mark.parametrize("name", BRANCHES)
def test_both_modes_compute_what_the_student_computes(name: str, start: bool) -> None:
    function, merged = BRANCHES[name]
    torch.manual_seed(0)
    model = randomise(between(Inner(function), nn.Conv2d(8, 8, 3, padding=1)).double()).train(start)
    teacher = reparam.expand(model, 2, example_input=sample((2, 3, 8, 8)))
    chosen = [n for p in teacher._programs for n in p.graph.nodes if n.target is choose]
    assert bool(chosen) == merged
    x = sample((3, 3, 9, 10))
    view = reparam.student_view(teacher)
    outputs = []
    for mode in (False, True, False):
        for network in (model, teacher, view):
            network.train(mode)
        with torch.no_grad():
            outputs.append(model(x))
            assert error(outputs[-1], teacher(x)) <= 1e-12
            assert error(outputs[-1], view(x)) <= 1e-12
    assert error(outputs[0], outputs[1]) > 1e-3  # else the test sees nothing
    assert torch.equal(outputs[0], outputs[2])


class Freezing(nn.Module):
    """Sets the mode of its norm when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        self.norm.eval()
        return self.norm(self.conv(x))


class Frozen(Freezing):
    """Keeps its norm in eval mode, as code for fine-tuning does."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class FrozenRoot(Frozen):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.other = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.other(super().forward(self.stem(x))))


FROZEN = {"in-forward": lambda: between(Freezing()), "in-train": lambda: between(Frozen()), "root": FrozenRoot}


@pytest.mark.parametrize("copied", ["itself", "deepcopy"])
@pytest.mark.parametrize("name", FROZEN)
def test_frozen_norms_stay_frozen(name: str, copied: str) -> None:
    torch.manual_seed(0)
    model = randomise(FROZEN[name]().double()).eval()
    teacher = COPIES[copied](reparam.expand(model, 2, example_input=sample(IMAGE)))
    x = sample(IMAGE, 5)
    path = "norm" if name == "root" else "1.norm"
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    for network in (model, teacher):
        network.train()
    with torch.no_grad():
        assert error(model(x), teacher(x)) <= 1e-12
    assert torch.equal(before[f"{path}.running_mean"], teacher.state_dict()[f"{path}.running_mean"])
    if name == "root":
        assert not torch.equal(before["other.running_mean"], teacher.state_dict()["other.running_mean"])
    assert teacher.training and not teacher.get_submodule(path).training


def test_a_module_in_another_mode_than_the_network() -> None:
    """Two programs follow the mode of the network; one module in another mode is an error that says so."""
    _model, teacher, x = made("two-programs")
    teacher.train()
    teacher.get_submodule("1").eval()
    message = (
        r"1 is in eval mode and the network as a whole in the other one; it does different things in both modes, so a "
        r"teacher needs it in the mode of the whole network"
    )
    with pytest.raises(RuntimeError, match=message):
        teacher(x)
    teacher.eval()
    teacher(x)
    teacher.get_submodule("1").train()
    with pytest.raises(RuntimeError, match="1 is in train mode"):
        teacher(x)


def test_a_merged_module_can_be_switched_alone() -> None:
    _model, teacher, x = made("attention")
    teacher.get_submodule("1").train()
    with torch.no_grad():
        assert not torch.equal(teacher(x), teacher(x))
        teacher.get_submodule("1").eval()
        teacher.get_submodule("1.path").eval()
        assert torch.equal(teacher(x), teacher(x))


def test_attention_dropout_is_that_of_the_student() -> None:
    """The mean over many draws comes back to the output without dropout; a rate of 0 would vary nothing."""
    torch.manual_seed(0)
    model = randomise(tokens(Attention()).double()).eval()
    model[1].path = nn.Identity()
    teacher = reparam.expand(model, 2, example_input=sample(TOKENS)).train()
    flags = [n for n in teacher._programs[0].graph.nodes if n.target is choose]
    assert [n.args[1:] for n in flags] == [(0.3, 0.0)]
    x = sample(TOKENS)[:1]
    with torch.no_grad():
        attended = [reparam.tap(teacher, "1.proj")(x)[1]["1.proj"] for _ in range(400)]
        teacher.eval()
        quiet = reparam.tap(teacher, "1.proj")(x)[1]["1.proj"]
    mean = torch.stack(attended).mean(0)
    assert error(quiet, mean) < 0.2
    assert error(quiet, attended[0]) > 0.05


# Compilation ---------------------------------------------------------------------------------------------------------


def check_compiled(name: str, backend: str) -> None:
    model, teacher, x = made(name)
    view = reparam.student_view(teacher)
    with torch.no_grad():
        for network in (teacher, view):
            torch._dynamo.reset()
            compiled = torch.compile(network, backend=backend)
            assert error(model(x), compiled(x)) <= 1e-11
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize(
    "name", ["norm", pytest.param("attention", marks=pytest.mark.thorough), "cache", "patch-dropout"]
)
def test_compiled_teacher_and_view(name: str) -> None:
    check_compiled(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_by_inductor() -> None:
    check_compiled("two-programs", "inductor")


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_all_compiled_by_inductor(name: str) -> None:
    check_compiled(name, "inductor")


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_teacher_follows_its_mode() -> None:
    """Without randomness, so that train mode can be compared with the student's."""
    torch.manual_seed(0)
    model = randomise(between(Two(dropout=0.0)).double())
    x = sample(IMAGE)
    teacher = reparam.expand(model, 2, example_input=x)
    torch._dynamo.reset()
    compiled = torch.compile(teacher, backend="aot_eager")
    for mode in (False, True, False):
        model.train(mode)
        teacher.train(mode)
        with torch.no_grad():
            assert error(model(x), compiled(x)) <= 1e-12
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "vit-patches"])
def test_the_extracted_student_can_be_exported(name: str) -> None:
    model, teacher, x = made(name)
    student = reparam.extract(teacher).eval()
    with torch.no_grad():
        plain = torch.export.export(model, (x,)).module()(x)
        assert error(plain, torch.export.export(student, (x,)).module()(x)) <= 1e-12
