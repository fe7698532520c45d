"""Layers with branches: student, teacher, view and extracted student compute what they should, and wake up."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from branch_networks import NETS, batch, branched, made, waken
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st
from random_networks import Program, programs
from torch import Tensor, nn
from zoo import error, randomise, sample, timm_model

import reparam
from reparam.errors import InputError
from reparam.passes.teacher import Teacher

EXACT = 1e-12
NORMED = ("acb", "dbb", "repvgg", "mobileone")


def cases() -> Iterator[Any]:
    for name, net in NETS.items():
        for k, recipe in enumerate(net.recipes):
            yield pytest.param(name, recipe, 2 + k % 2, id=f"{name}-{recipe}-{2 + k % 2}")
    yield from (("cnn", "orepa", 3), ("cnn", "dbb", 1), ("cnn", "orepa", 1), ("grouped", "orepa:branches=6", 2))


CASES = list(cases())


def own_weights(teacher: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in teacher.named_parameters() if n.startswith("reparam_branches.")}


def equal_bits(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return set(first) == set(second) and all(
        torch.equal(t, second[n]) and t.dtype == second[n].dtype for n, t in first.items()
    )


# One function --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "recipe", "ratio"), CASES)
def test_the_function_of_student_and_teacher(name: str, recipe: str, ratio: int) -> None:
    """First the model's own; then, with random branches, another one, but the same for everybody."""
    model, teacher = made(name), branched(name, recipe, ratio)
    assert teacher.plan.branches and all(b.recipe.name in str(recipe) for b in teacher.plan.branches)
    x = batch(name, seed=3)
    view = reparam.student_view(teacher)
    with torch.no_grad():
        assert error(model(x), teacher(x)) <= EXACT
        assert error(model(x), view(x)) <= EXACT
        waken(teacher)
        student = reparam.extract(teacher)
        assert error(teacher(x), view(x)) <= EXACT
        assert error(view(x), student(x)) <= EXACT
        assert error(model(x), student(x)) > 1e-3
    assert type(student) is type(model) and list(student.state_dict()) == list(model.state_dict())
    assert all(t.shape == model.state_dict()[n].shape for n, t in student.state_dict().items())
    assert equal_bits(student, view)
    copy.deepcopy(model).load_state_dict(student.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("name", "recipe", "ratio"), [c for c in CASES if tuple(getattr(c, "values", c))[1].startswith(NORMED)]
)
def test_branches_with_norms_in_train_mode(name: str, recipe: str, ratio: int) -> None:
    """They run side by side, on statistics of their own for teacher and student."""
    teacher = branched(name, recipe, ratio)
    waken(teacher)
    view = reparam.student_view(teacher)
    start = {n: t.clone() for n, t in teacher.state_dict().items()}
    for module in (teacher.train(), view.train()):
        if ratio == 1:
            teacher.load_state_dict(start)  # the statistics are shared
        before = {n: t.clone() for n, t in teacher.state_dict().items()}
        with torch.no_grad():
            outputs = [module(batch(name, seed)) for seed in (3, 4)]
        moved = {n for n, t in teacher.state_dict().items() if not torch.equal(t, before[n])}
        own = {n for n in moved if n.startswith("student_statistics.")}
        assert own == (moved if module is view and ratio > 1 else set())
        assert any("reparam_branches" in n and "running_var" in n for n in moved)
        assert any("reparam_branches" in n and "num_batches" in n for n in moved)
        if module is teacher:
            wide = outputs
            with torch.no_grad():
                assert error(wide[0], teacher.eval()(batch(name, 3))) > 1e-3
    assert all(error(a, b) <= 1e-10 for a, b in zip(wide, outputs, strict=True))
    assert (ratio > 1) == any(n.startswith("student_statistics") for n in start)
    # Both sets of statistics say the same, so eval mode agrees as well.
    teacher.eval()
    view.eval()
    x, student = batch(name, seed=5), reparam.extract(teacher)
    with torch.no_grad():
        assert error(teacher(x), view(x)) <= 1e-10
        assert error(view(x), student(x)) <= EXACT
    assert not any("reparam_branches" in n for n in student.state_dict())


@pytest.mark.parametrize("init", ["student", "scratch"])
@pytest.mark.parametrize("recipe", ["orepa", "dbb", "expandnet"])
def test_from_scratch(recipe: str, init: str) -> None:
    model, x = made("cnn"), batch("cnn", 3)
    teacher = branched("cnn", recipe, 2, init=init)
    student = reparam.extract(teacher)
    with torch.no_grad():
        assert error(teacher(x), reparam.student_view(teacher)(x)) <= EXACT
        assert error(teacher(x), student(x)) <= EXACT
        far = error(model(x), teacher(x))
    assert far > 1e-2 if init == "scratch" else far <= EXACT
    assert all(branch.site.init == init for branch in teacher.plan.branches)
    first = teacher.state_dict()
    torch.manual_seed(1)
    other = reparam.expand(model, 2, branches=recipe, init=init, example_input=x).state_dict()
    assert any("reparam_branches" in n and not torch.equal(t, other[n]) for n, t in first.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "recipe"), [*((n, net.recipes[0]) for n, net in NETS.items()), ("cnn", "dbb")])
def test_round_trip(name: str, recipe: str, dtype: torch.dtype) -> None:
    """Bit for bit at ratio 2, in any dtype; nothing but rounding at 3."""
    model = made(name, dtype)
    for ratio in (2, 3):
        teacher = branched(name, recipe, ratio, dtype, verify=False, noise=0.5)
        assert {t.dtype for n, t in teacher.state_dict().items() if not n.endswith("tracked")} == {dtype}
        student = reparam.extract(teacher).state_dict()
        for key, tensor in model.state_dict().items():
            if ratio == 2 or not tensor.is_floating_point():
                assert torch.equal(student[key], tensor), key
            else:
                ulp = torch.nextafter(tensor.abs(), torch.full_like(tensor, torch.inf)) - tensor.abs()
                assert bool(((student[key] - tensor).abs() <= 4 * ulp).all()), key


@settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(programs(), st.sampled_from(("orepa", "dbb", "mobileone:branches=2", "acb", "repvgg")), st.sampled_from((2, 3)))
def test_random_networks(program: Program, recipe: str, ratio: int) -> None:
    note(f"{recipe}, ratio {ratio}\n{program}")
    model, inputs = program.build(), program.sample()
    try:
        # Asked for by type, a recipe is written for linear layers and single taps as well.
        teacher = reparam.expand(model, ratio, branches={nn.Module: recipe}, example_input=inputs)
    except InputError as message:
        event("no layer fits")
        assert "fits no layer" in str(message) or "matches no convolution" in str(message)
        return
    event("branches")
    view = reparam.student_view(teacher)
    with torch.no_grad():
        expected = model(*inputs)
        assert error(expected, teacher(*inputs)) <= EXACT
        waken(teacher)
        branched_, found, plain = teacher(*inputs), view(*inputs), reparam.extract(teacher)(*inputs)
        assert error(branched_, found) <= 1e-11
        assert error(plain, found) <= 1e-11


class Various(nn.Module):
    """Inputs with unequal replicas, padding that is no zeros, a layer that runs in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.mixed = nn.Conv2d(9, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.reflect = nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect")
        self.aux = nn.Conv2d(8, 4, 3)
        self.head = nn.Conv2d(8, 4, 3, padding=2)

    def forward(self, x: Tensor) -> Any:
        x = torch.cat([torch.relu(self.stem(x)), x], 1)
        x = torch.relu(self.reflect(torch.relu(self.norm(self.mixed(x)))))
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


OTHERS: list[dict[str, Any]] = [
    {"ratio": 2}, {"ratio": 3}, {"ratio": {"stem": 3, "reflect": 2}}, {"ratio": {"mixed": 4, "*": 2}},
    {"ratio": 2, "ignore": ["mixed"]}, {"ratio": 2, "ignore": ["stem", "reflect"]},
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "recipe"),
    [
        pytest.param(options, recipe, id=f"{options}-{recipe}", marks=() if few or k % 3 == 1 else pytest.mark.thorough)
        for recipe, few in (("orepa", True), ("dbb", False), ("mobileone:branches=2", False))
        for k, options in enumerate(OTHERS)
    ],
)
def test_other_widenings(options: dict[str, Any], recipe: str) -> None:
    model, x = randomise(Various().double()).eval(), sample((3, 3, 8, 8))
    teacher = reparam.expand(model, branches=recipe, example_input=sample((2, 3, 8, 8)), **options)
    assert {b.site.name.removesuffix(".weight") for b in teacher.plan.branches} == set(
        "stem mixed reflect aux head".split()
    )
    view = reparam.student_view(teacher)
    with torch.no_grad():
        assert error(model(x), teacher(x)) <= EXACT
        waken(teacher)
        student = reparam.extract(teacher)
        assert error(teacher(x), view(x)) <= EXACT
        assert error(student(x), view(x)) <= EXACT
        wide, narrow = teacher.train()(x), view.train()(x)
        assert len(wide) == 2 and error(wide, narrow) <= 1e-10
        teacher.eval()
        view.eval()
        assert error(teacher(x), view(x)) <= 1e-10
        assert error(model.eval()(x), view(x)) > 1e-3


# Waking up -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["teacher", "view"])
@pytest.mark.parametrize("recipe", ["orepa", "dbb", "repvgg", "acb", "mobileone", "expandnet"])
def test_branches_wake_up(recipe: str, side: str) -> None:
    """New branches have no gradient at first, their scales do; after a few steps everything has."""
    teacher = branched("cnn", recipe, 2).train()
    module = teacher if side == "teacher" else reparam.student_view(teacher).train()
    optimizer = torch.optim.SGD(teacher.parameters(), 0.05)
    own = own_weights(teacher)
    scales = {n for n in own if n.endswith((".scale", ".norm.weight", ".norm.bias"))}
    inside = {n for n in own if n not in scales}
    assert scales and inside

    def step(seed: int) -> set[str]:
        optimizer.zero_grad()
        module(batch("cnn", seed)).square().mean().backward()
        return {n for n, p in own.items() if p.grad is not None and bool(p.grad.any())}

    first = step(1)
    # A bias in front of a norm has no gradient, or one that is nothing but rounding.
    assert {n for n in scales if not n.endswith("bias")} <= first <= scales
    assert all(own[n].grad is None or not own[n].grad.any() for n in inside)
    for seed in (2, 3):
        optimizer.step()
        last = step(seed)
    assert {n for n in own if not n.endswith("bias")} <= last


def test_gradients_of_the_view_are_those_of_the_merged_student() -> None:
    """What training the extracted student would give its weights, carried to where they come from."""
    teacher, x = branched("cnn", "orepa", 2), batch("cnn", 3)
    waken(teacher)
    student = reparam.extract(teacher)
    student(x).square().mean().backward()
    reparam.student_view(teacher)(x).square().mean().backward()
    scale, weight = teacher.get_parameter("reparam_branches.body.weight.origin.scale"), teacher.body.weight
    expected = student.body.weight.grad * scale.detach()[::2].view(-1, 1, 1, 1) * 2
    assert error(expected, weight.grad[::2, ::2]) <= 1e-10
    expected = (student.body.weight.grad * 2 * weight.detach()[::2, ::2]).sum((1, 2, 3))
    assert error(expected, scale.grad[::2]) <= 1e-10
    assert not scale.grad[1::2].any() and not weight.grad[1::2].any()


# Norms and biases ----------------------------------------------------------------------------------------------------


def test_where_the_bias_of_merged_norms_goes() -> None:
    """Into the layer's own bias; into the running mean of the norm behind it where there is none."""
    model, teacher = made("cnn"), branched("cnn", "dbb", 2)
    waken(teacher)
    found = {b.site.name: (b.bias, b.norms) for b in teacher.plan.branches}
    assert found["stem.weight"] == (None, ("norm.running_mean",))
    assert found["large.weight"] == (None, ("large_norm.running_mean",))
    assert found["body.weight"] == ("body.bias", ())
    assert found["down.weight"][0] == "down.bias"
    before, after = model.state_dict(), reparam.extract(teacher).state_dict()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    weights = {b.site.name for b in teacher.plan.branches}
    assert moved == weights | {"norm.running_mean", "large_norm.running_mean", "body.bias", "down.bias"}


class ResidualNorm(nn.BatchNorm2d):
    """Reads its input a second time."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class Lone(nn.Module):
    """A convolution whose bias has no place to go."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=kind in ("fine", "shared bias"))
        self.norm = nn.BatchNorm2d(6, track_running_stats=kind != "no statistics")
        self.inner = ResidualNorm(6)
        self.body = nn.Conv2d(6, 6, 3, padding=1)
        if kind == "shared bias":
            self.stem.bias = self.body.bias
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.kind == "relu":
            x = self.norm(torch.relu(x))
        elif self.kind == "read twice":
            x = self.norm(x) + x
        elif self.kind == "called twice":
            x = self.norm(torch.tanh(self.norm(x)))
        else:
            x = (self.inner if self.kind == "read inside" else self.norm)(x)
        x = self.body(torch.relu(x))
        if self.kind == "bias read":
            x = x * self.body.bias.sigmoid().view(-1, 1, 1)
        return self.head(torch.relu(x))


@pytest.mark.parametrize("kind", ["relu", "read twice", "read inside", "called twice", "no statistics"])
def test_no_place_for_a_bias(kind: str) -> None:
    model, x = randomise(Lone(kind).double()).eval(), sample((2, 3, 8, 8))
    made_ = reparam.plan(model, 2, branches="dbb", example_input=x)
    assert [b.site.name for b in made_.branches] == ["body.weight"]
    assert "give it bias=True" in made_.unbranched["stem.weight"]
    assert "no branches for stem.weight" in str(made_)
    with pytest.raises(InputError, match=r"entry 'stem' wants it: stem.weight.*bias=True"):
        reparam.plan(model, 2, branches={"stem": "dbb"}, example_input=x)
    reparam.expand(model, 2, branches="orepa", example_input=x)


@pytest.mark.parametrize("kind", ["fine", "shared bias", "bias read"])
def test_a_bias_that_others_read_is_left_alone(kind: str) -> None:
    """The view runs the branches, the extracted student has their bias in its own: both must agree."""
    model, x = randomise(Lone(kind).double()).eval(), sample((2, 3, 8, 8))
    teacher = reparam.expand(model, 2, branches="dbb", example_input=x)
    waken(teacher)
    with torch.no_grad():
        view = reparam.student_view(teacher)
        assert error(teacher(x), view(x)) <= EXACT
        assert error(view(x), reparam.extract(teacher)(x)) <= EXACT


# Whole networks ------------------------------------------------------------------------------------------------------

WHOLE = [
    ("resnet18", "orepa", 13, 2), ("resnet18", "dbb", 16, 2), ("resnet18", "acb", 16, 3),
    ("mobilenetv1_100", "orepa", 9, 2),
]  # fmt: skip
SLENDER: dict[str, dict[str, Any]] = {"resnet18": {"channels": (16, 32, 64, 128)}}
"""All layers of the network, but fewer channels: their number decides nothing here."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recipe", "count", "ratio"), WHOLE)
def test_whole_networks(name: str, recipe: str, count: int, ratio: int) -> None:
    """As many layers as the papers' code converts."""
    torch.manual_seed(0)
    model = randomise(timm_model(name, **SLENDER.get(name, {}))()).eval()
    x = sample((2, 3, 32, 32), dtype=torch.float32)
    teacher: Teacher = reparam.expand(model, ratio, branches=recipe, example_input=x, verify=False)
    assert len([b for b in teacher.plan.branches if 3 in b.site.size]) == count
    student = reparam.extract(teacher).state_dict()
    if ratio == 2:
        assert all(torch.equal(t, student[n]) for n, t in model.state_dict().items())
    waken(teacher)
    view = reparam.student_view(teacher)
    with torch.no_grad():
        reference = view(x)
        assert error(reference, reparam.extract(teacher)(x)) <= 1e-3
        assert error(reference, teacher(x)) <= 1e-3
        assert error(reference, model(x)) > 1e-2
