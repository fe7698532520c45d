"""Code that branches on sizes: a leaf that takes every size where it can be, else a recording with guards."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import error, randomise, sample

import reparam
from reparam.errors import CaptureError, GuardError, ReparamError
from reparam.passes.modes import require
from reparam.passes.teacher import Teacher


class Inner(nn.Module):
    def __init__(self, function: Callable[[Inner, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def turned(x: Tensor) -> Tensor:
    """Needs an edit: the halves are cut at a channel."""
    return torch.cat([x[:, 4:], x[:, :4]], 1)


def plain(m: Inner, x: Tensor) -> Tensor:
    return m.conv(x) if x.shape[2] > 8 else m.conv(torch.relu(x))


def edited(m: Inner, x: Tensor) -> Tensor:
    x = m.conv(turned(x))
    if x.shape[2] > 8:
        x = torch.relu(x)
    return turned(x)


def padded(m: Inner, x: Tensor) -> Tensor:
    """Windows: pads to a multiple of 4, as often as needed."""
    missing = (-x.shape[2]) % 4
    if missing > 0:
        x = nn.functional.pad(x, (0, 0, 0, missing))
    return turned(m.conv(x))


def by_batch(m: Inner, x: Tensor) -> Tensor:
    x = m.conv(turned(x))
    return turned(torch.relu(x) if x.shape[0] > 100 else x)


def over_batch(m: Inner, x: Tensor) -> Tensor:
    return m.conv(torch.stack([turned(x[k : k + 1])[0] for k in range(x.shape[0])]))


def by_count(m: Inner, x: Tensor) -> Tensor:
    """A number of windows in the batch dimension."""
    x = turned(m.conv(x))
    windows = x.shape[0] * 2
    return x * 2 if windows // 4 == 1 else x * 3


def as_float(m: Inner, x: Tensor) -> Tensor:
    return m.conv(turned(x)) / float(x.shape[1])


def as_int(m: Inner, x: Tensor) -> Tensor:
    half = int(x.shape[1] * 0.5)
    return m.conv(torch.cat([x[:, half:], x[:, :half]], 1))


def as_range(m: Inner, x: Tensor) -> Tensor:
    parts = [x[:, 2 * k : 2 * k + 2] * (k + 1) for k in range(x.shape[1] // 2)]
    return m.conv(turned(torch.cat(parts, 1)))


def network(function: Callable[[Inner, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 1), Inner(function), nn.Conv2d(8, 4, 1))
    return randomise(layers.double()).eval()


def made(function: Callable[[Inner, Tensor], Tensor]) -> tuple[nn.Module, Teacher]:
    model = network(function)
    return model, reparam.expand(model, 2, example_input=sample((2, 3, 10, 9)))


def guards(teacher: Teacher) -> list[str]:
    return [str(n.args[2]) for p in teacher._programs for n in p.graph.nodes if n.target is require]


def check(model: nn.Module, teacher: nn.Module, *shapes: tuple[int, ...]) -> None:
    with torch.no_grad():
        for shape in shapes:
            x = sample(shape, 7)
            assert error(model(x), teacher(x)) <= 1e-12


@pytest.mark.parametrize("function", [plain], ids=lambda f: f.__name__)
def test_without_edits_inside_every_size_works(function: Callable[[Inner, Tensor], Tensor]) -> None:
    model, teacher = made(function)
    assert teacher.plan.coverage == 1.0
    assert list(teacher.plan.leaves) == ["1"]
    assert not teacher.plan.specialised and not guards(teacher)
    check(model, teacher, (2, 3, 10, 9), (3, 3, 6, 5), (1, 3, 33, 4))


@pytest.mark.parametrize("function", [edited, padded], ids=lambda f: f.__name__)
def test_with_edits_inside_the_branch_of_the_example_works(
    function: Callable[[Inner, Tensor], Tensor], tmp_path: Path
) -> None:
    model, teacher = made(function)
    assert teacher.plan.coverage == 1.0
    assert teacher.plan.specialised == ("1",)
    line = r"test_guards\.py:\d+: the network branches on a size here and was recorded for \w+; expand it again with an"
    check(model, teacher, (2, 3, 10, 9), (1, 3, 10, 4), (5, 3, 10, 20))
    check(model, teacher, (2, 3, 14, 9)) if function is padded else check(model, teacher, (2, 3, 33, 9))
    reparam.save(teacher, tmp_path / "teacher.safetensors")
    loaded = reparam.load(tmp_path / "teacher.safetensors", network(function))
    check(model, loaded, (5, 3, 10, 20))
    for wide in (teacher, loaded):
        with pytest.raises(AssertionError, match=line):
            wide(sample((2, 3, 8, 9)))
    # The student has no guards: its view and what is extracted take every size.
    check(model, reparam.student_view(teacher), (2, 3, 8, 9))
    check(model, reparam.extract(teacher), (2, 3, 8, 9))


def edited_for_one(m: Inner, x: Tensor) -> Tensor:
    return m.conv(turned(x) if x.shape[0] == 1 else x)


def positions(m: Inner, x: Tensor) -> Tensor:
    """What language models do: positions are expanded to the batch, unless there is one sample."""
    places = torch.arange(x.shape[2], dtype=x.dtype, device=x.device).unsqueeze(0)
    if x.shape[0] != places.shape[0]:
        places = places.expand(x.shape[0], -1)
    return m.conv(turned(x) * places[:, None, :, None])


def computed(m: Inner, x: Tensor) -> Tensor:
    """Operators of both ways, on what is widened too."""
    x = m.conv(turned(x))
    if x.shape[0] > 100:
        low = x.mean((2, 3), keepdim=True) * m.conv.bias[:, None, None]
    else:
        low = torch.relu(x).sum(2, keepdim=True)
    return turned(x + low)


def asked_twice(m: Inner, x: Tensor) -> Tensor:
    x = turned(x) if x.shape[0] == 1 else x
    x = m.conv(torch.tanh(x))
    return x if x.shape[0] == 1 else torch.relu(x)


WAYS = {positions: 1.0, computed: 1.0, by_batch: 0.9, by_count: 0.9, edited_for_one: 0.05, asked_twice: 0.0}
"""Operators of one way only keep the student's width, and so does what follows them."""


@pytest.mark.parametrize("function", WAYS, ids=lambda f: f.__name__)
def test_both_ways_of_a_branch_on_the_batch_are_joined(
    function: Callable[[Inner, Tensor], Tensor], tmp_path: Path
) -> None:
    model, teacher = made(function)
    assert teacher.plan.specialised == ("1",) and teacher.plan.coverage >= WAYS[function]
    reasons = {c.reason for c in teacher.plan.contractions}
    assert ("it runs on one way of a branch on sizes only" in reasons) == (function is not positions)
    shapes = [(2, 3, 10, 9), (1, 3, 10, 9), (3, 3, 6, 5), (101, 3, 4, 4), (1, 3, 5, 8)]
    check(model, teacher, *shapes)
    check(model.train(), teacher.train(), *shapes)
    check(model.eval(), copy.deepcopy(teacher).eval(), *shapes)
    reparam.save(teacher, tmp_path / "teacher.safetensors")
    check(model, reparam.load(tmp_path / "teacher.safetensors", network(function)), *shapes)
    check(model, reparam.extract(teacher), *shapes)


def test_both_ways_of_a_root_are_joined() -> None:
    class Batched(Root):
        def forward(self, x: Tensor) -> Tensor:
            x = self.body(self.stem(x))
            return self.head(x * 2 if x.shape[0] == 1 else x)

    model = randomise(Batched().double()).eval()
    teacher = reparam.expand(model, 2, example_input=sample((2, 3, 10, 9)))
    assert teacher.plan.coverage > 0.7 and not guards(teacher)
    check(model, teacher, (1, 3, 10, 9), (2, 3, 4, 4), (5, 3, 4, 4))


DEVICES: dict[str, Callable[[Tensor], bool]] = {
    "not on meta": lambda x: x.device.type != "meta",
    "on the CPU": lambda x: x.device == torch.device("cpu"),
    "one of two": lambda x: x.device.type in ("cpu", "cuda"),
    "is_cpu": lambda x: x.is_cpu,
    "not is_cuda": lambda x: not x.is_cuda,
    "not is_meta": lambda x: not x.is_meta,
    "by letter": lambda x: x.device.type.startswith("c"),
}


@pytest.mark.parametrize("question", DEVICES)
@pytest.mark.parametrize("at_root", [False, True])
def test_questions_about_the_device_are_those_of_the_network(question: str, at_root: bool) -> None:
    """Recording runs on the meta device, and the teacher runs where the student is: no guard, no leaf."""

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return torch.sigmoid(x) if DEVICES[question](x) else torch.tanh(x)

    model = Asks() if at_root else nn.Sequential(nn.Conv2d(3, 3, 1), Asks(), nn.Conv2d(3, 3, 1))
    model = randomise(model.double()).eval()
    x = sample((2, 3, 6, 6))
    teacher = reparam.expand(model, 2, example_input=x)
    assert not teacher.plan.leaves and not teacher.plan.specialised and not guards(teacher)
    check(model, teacher, (2, 3, 6, 6), (1, 3, 4, 4))
    check(model, reparam.fold(model, x), (2, 3, 6, 6), (1, 3, 4, 4))
    assert not any(name.startswith("reparam") for name in vars(reparam.extract(teacher)))


def calls_one(m: Inner, x: Tensor) -> Tensor:
    """Another layer for one sample: an operator that is called as a module."""
    return m.conv(turned(x)) if x.shape[0] == 1 else turned(x)


def in_place(m: Inner, x: Tensor) -> Tensor:
    x = m.conv(turned(x))
    if x.shape[0] > 100:
        x.mul_(2)
    return turned(x)


def two_questions(m: Inner, x: Tensor) -> Tensor:
    """A second branch that goes another way for some batches only."""
    x = m.conv(turned(x)) * (2 if x.shape[0] > 2 else 1)
    return turned(torch.relu(x) if x.shape[0] > 100 else x)


@pytest.mark.parametrize("function", [over_batch, calls_one, in_place, two_questions], ids=lambda f: f.__name__)
def test_other_branches_on_the_batch_are_never_recorded(function: Callable[[Inner, Tensor], Tensor]) -> None:
    model, teacher = made(function)
    assert list(teacher.plan.leaves) == ["1"]
    assert not teacher.plan.specialised and not guards(teacher)
    assert teacher.plan.coverage < 0.2
    reason = teacher.plan.leaves["1"]
    assert "test_guards.py:" in reason
    check(model, teacher, (2, 3, 10, 9), (1, 3, 10, 9), (3, 3, 10, 9), (101, 3, 6, 6))


def edited_below(m: Inner, x: Tensor) -> Tensor:
    if x.shape[0] > 1:
        return m.conv(x)
    return m.conv(x) if x.shape[2] > 8 else m.conv(turned(x))


def edited_when_low(m: Inner, x: Tensor) -> Tensor:
    return m.conv(turned(x) if x.shape[2] < 8 else x)


def test_an_edit_in_a_branch_that_the_example_does_not_take() -> None:
    """A leaf accepts every size, so every branch inside it counts: this one is not widened."""
    model, teacher = made(edited_below)
    assert list(teacher.plan.leaves) == ["1"] and not teacher.plan.specialised and teacher.plan.coverage < 0.2
    check(model, teacher, (2, 3, 10, 9), (1, 3, 10, 9), (1, 3, 6, 6), (101, 3, 6, 6))


def test_such_a_branch_on_something_else_than_the_batch_is_recorded_with_a_guard() -> None:
    model, teacher = made(edited_when_low)
    assert teacher.plan.specialised == ("1",) and teacher.plan.coverage == 1.0
    check(model, teacher, (2, 3, 10, 9), (1, 3, 12, 9))
    with pytest.raises(AssertionError, match="the network branches on a size here"):
        teacher(sample((2, 3, 6, 9)))


def test_sizes_that_the_code_refuses_are_no_branch() -> None:
    def strict(m: Inner, x: Tensor) -> Tensor:
        assert x.shape[2] % 2 == 0, "even heights only"
        return m.conv(x)

    model, teacher = made(strict)
    assert teacher.plan.coverage == 1.0 and not teacher.plan.specialised
    check(model, teacher, (2, 3, 10, 9), (1, 3, 6, 9))


@pytest.mark.parametrize("function", [as_float, as_int, as_range], ids=lambda f: f.__name__)
def test_a_width_as_a_number(function: Callable[[Inner, Tensor], Tensor]) -> None:
    model, teacher = made(function)
    assert teacher.plan.coverage == 1.0
    check(model, teacher, (2, 3, 10, 9), (1, 3, 10, 9), (5, 3, 7, 20))


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.shape[2] > 8:
            x = self.body(x)
        return self.head(x)


def test_a_root_that_branches_on_a_size() -> None:
    model = randomise(Root().double()).eval()
    teacher = reparam.expand(model, 2, example_input=sample((2, 3, 10, 9)))
    assert teacher.plan.coverage == 1.0
    check(model, teacher, (1, 3, 12, 12))
    with pytest.raises(
        AssertionError, match=r"test_guards\.py:\d+: the network branches on a size here and was .*True"
    ):
        teacher(sample((1, 3, 6, 6)))
    small = reparam.expand(model, 2, example_input=sample((2, 3, 6, 6)))
    check(model, small, (1, 3, 7, 6))


class Tokens(nn.Module):
    """As many tokens as the data say, in a network's own code and in a module of it."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.select = Selected() if inside else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x[:, x[0, :, 0] > 0] if self.select is None else self.select(x)
        return self.head(torch.relu(self.mix(x)))


class Selected(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, x[0, :, 0] > 0]


def test_a_number_of_tokens_that_the_data_decide() -> None:
    """Single layers between code without a graph have nothing to widen: the error names the line of the mask."""
    with pytest.raises(CaptureError, match=r"Tokens: the forward pass cannot be recorded .*test_guards\.py:\d+: "):
        reparam.expand(Tokens(inside=False), 2, example_input=torch.randn(2, 5, 6))
    model = randomise(Tokens(inside=True).double()).eval()
    x = sample((2, 5, 6))
    teacher = reparam.expand(model, 2, example_input=x)
    assert "test_guards.py:" in teacher.plan.leaves["select"]
    contracted = {c.module: (c.source, c.reason) for c in teacher.plan.contractions}
    source, reason = contracted["select"]
    assert "test_guards.py:" in source + reason
    check(model, teacher, (2, 9, 6), (1, 5, 6))


class Blocks(nn.Module):
    """Blocks that branch on a size, in a body that does so itself: opening the body alone widens nothing yet."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Inner(edited) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] > 20:
            x = torch.tanh(x)
        for block in self.blocks:
            x = block(x)
        return x


class Nested(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 8, 1), body, nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))


def test_leaves_inside_leaves_are_looked_into() -> None:
    model = randomise(Nested(Blocks()).double()).eval()
    teacher = reparam.expand(model, 2, example_input=sample((2, 3, 8, 8)))
    assert teacher.plan.coverage == 1.0
    assert teacher.plan.specialised == ("body", "body.blocks.0", "body.blocks.1")
    check(model, teacher, (2, 3, 8, 8), (1, 3, 7, 9))


def same_batch(m: Inner, x: Tensor) -> Tensor:
    """Asks whether two values have as many samples, which they have in every batch."""
    shifted = turned(x)
    return m.conv(shifted) if shifted.shape[0] == x.shape[0] else m.conv(x)


def single(m: Inner, x: Tensor) -> Tensor:
    x = m.conv(turned(x))
    return turned(torch.relu(x) if x.shape[0] == 1 else x)


def test_a_question_about_the_batch_with_one_answer_is_recorded() -> None:
    model = randomise(Nested(Inner(same_batch)).double()).eval()
    teacher = reparam.expand(model, 2, example_input=sample((2, 3, 8, 8)))
    assert teacher.plan.coverage == 1.0
    check(model, teacher, (1, 3, 8, 8), (2, 3, 8, 8), (5, 3, 6, 6))


def test_a_question_about_a_batch_of_one_is_recorded_for_both_answers() -> None:
    model = randomise(Nested(Inner(single)).double()).eval()
    teacher = reparam.expand(model, 2, example_input=sample((4, 3, 8, 8)))
    assert teacher.plan.specialised == ("body",) and teacher.plan.coverage > 0.9
    check(model, teacher, (1, 3, 8, 8), (4, 3, 8, 8))


class Given(nn.Module):
    """Gives up being recorded after it has used an attribute that it was given."""

    def forward(self, x: Tensor, kind: torch.dtype) -> Tensor:
        x = x.to(kind)
        return x if x.sum() < 1e9 else -x


class Giving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(6, 8), Given(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.dtype
        return self.head(self.inner(torch.relu(self.stem(x)), kind).to(kind))


def test_an_attribute_survives_the_module_that_used_it_first() -> None:
    model = randomise(Giving().double()).eval()
    teacher = reparam.expand(model, 2, example_input=sample((2, 6)))
    assert list(teacher.plan.leaves) == ["inner"]
    check(model, teacher, (3, 6))


def refuses_if(m: Inner, x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    if height % 2 or width > 20:
        raise ValueError(f"even heights and at most 20 columns, not {height} and {width}")
    if not x.shape[1] == 8:
        raise ValueError("8 channels, not " + str(x.shape[1]))
    return turned(m.conv(x))


def refuses_batches(m: Inner, x: Tensor) -> Tensor:
    if x.shape[0] != 1 and x.shape[0] % 2 == 1:
        raise RuntimeError("one image or pairs of images")
    return turned(m.conv(turned(x)))


@pytest.mark.parametrize("function", [refuses_if, refuses_batches], ids=lambda f: f.__name__)
def test_an_error_that_the_code_raises_is_no_branch(function: Callable[[Inner, Tensor], Tensor]) -> None:
    model, teacher = made(function)
    assert teacher.plan.coverage == 1.0 and not guards(teacher) and not teacher.plan.leaves
    check(model, teacher, (2, 3, 10, 9), (1, 3, 6, 20), (4, 3, 8, 8))
    for shape in [(2, 3, 9, 9), (2, 3, 8, 21)] if function is refuses_if else [(3, 3, 8, 8), (5, 3, 4, 4)]:
        with pytest.raises((ValueError, RuntimeError)):
            model(sample(shape))
        with pytest.raises(RuntimeError, match=r"test_guards\.py:\d+: the network refuses this input"):
            teacher(sample(shape))


def falls_back(m: Inner, x: Tensor) -> Tensor:
    """An error that the code itself catches: no size may take the other way unnoticed."""

    def even(x: Tensor) -> Tensor:
        if x.shape[2] % 2:
            raise ValueError("even heights")
        return turned(x)

    try:
        x = even(x)
    except ValueError:
        x = torch.relu(x)
    return m.conv(x)


def test_an_error_that_the_code_catches_itself_is_refused() -> None:
    model, teacher = made(falls_back)
    check(model, teacher, (2, 3, 10, 9), (1, 3, 6, 5))
    model(sample((2, 3, 9, 9)))
    with pytest.raises(RuntimeError, match="refuses this input"):
        teacher(sample((2, 3, 9, 9)))


class Caught(nn.Module):
    """Its train mode does other things, so it is a leaf; and it catches its own error, where it goes on otherwise."""

    edited: bool

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        try:
            if x.shape[2] % 2:
                raise ValueError("even heights")
        except ValueError:
            x = turned(x) if self.edited else torch.relu(x)
        return self.conv(torch.tanh(x) if self.training else x * 2)


@pytest.mark.parametrize("edited", [True, False])
def test_an_error_that_a_leaf_catches_is_a_branch_of_it(edited: bool) -> None:
    body = Caught()
    body.edited = edited
    model = randomise(Nested(body).double()).eval()
    teacher = reparam.expand(model, 2, example_input=sample((2, 3, 8, 8)))
    assert teacher.plan.coverage == 1.0 and bool(teacher.plan.leaves) is not edited
    for mode in (True, False):
        check(model.train(mode), teacher.train(mode), (2, 3, 8, 8), (1, 3, 6, 4))
        with pytest.raises(RuntimeError, match="refuses this input") if edited else contextlib.nullcontext():
            check(model, teacher, (2, 3, 7, 8))


class Loop(nn.Module):
    """Iterates over a tensor that is made from the input."""

    def __init__(self, items: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.items, self.first, self.last = items, nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for item in self.items(x):
            y = torch.relu(y + item.mean())
        return self.last(y)


@pytest.mark.parametrize(
    "items", [lambda x: x, lambda x: x[:, 0], lambda x: x.transpose(0, 1), lambda x: x.flatten(0, 1)]
)
def test_iterating_over_samples_or_positions_is_refused(items: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CaptureError, match="control flow depends on the length of"):
        reparam.plan(Loop(items), 2, example_input=torch.randn(2, 4, 5))


def test_a_length_that_no_size_changes_is_a_constant() -> None:
    torch.manual_seed(0)
    model = Loop(lambda x: F.linear(x, torch.ones(3, 5)).movedim(-1, 0)).eval()
    teacher = reparam.expand(model, 2, example_input=torch.randn(2, 4, 5))
    assert teacher.plan.coverage == 1
    for shape in ((1, 4, 5), (3, 7, 5)):
        x = torch.randn(shape)
        assert torch.allclose(teacher(x), model(x), atol=1e-6)


def test_another_length_than_the_recorded_one_is_refused() -> None:
    torch.manual_seed(0)
    model = Loop(lambda x: x[:, :4].transpose(0, 1)).eval()  # longer inputs have four items all the same
    teacher = reparam.expand(model, 2, example_input=torch.randn(2, 4, 5))
    x = torch.randn(3, 6, 5)
    assert torch.allclose(teacher(x), model(x), atol=1e-6)
    with pytest.raises(RuntimeError, match="iterates over a tensor here and was recorded for 4 items"):
        teacher(torch.randn(2, 3, 5))


class Chosen(nn.Module):
    """Takes the channels that a mask chooses."""

    def __init__(self, mask: list[int]) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor(mask, dtype=torch.bool))
        self.last = nn.Linear(sum(mask), 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(x[:, self.mask])
        return x.relu() if x.shape[0] > 2 else x  # a leaf: the graph inside it is analysed


def test_equal_modules_with_other_masks() -> None:
    torch.manual_seed(0)
    masks = [1, 0, 1, 1, 0, 1, 1, 0], [0, 1, 0, 1, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0, 0]
    model = nn.Sequential(nn.Linear(3, 8), *map(Chosen, masks), nn.Linear(8, 2)).double().eval()
    teacher = reparam.expand(model, 2, example_input=torch.randn(2, 3).double())
    for batch in (1, 3):
        x = torch.randn(batch, 3).double()
        assert torch.allclose(teacher(x), model(x), atol=1e-12)


class Number(nn.Module):
    """Uses a number that is read from a buffer or parameter."""

    def __init__(self, number: Callable[[Number], float]) -> None:
        super().__init__()
        self.number, self.first, self.last = number, nn.Linear(3, 8), nn.Linear(8, 2)
        self.register_buffer("scale", torch.tensor([0.5, 2.0]))
        self.register_buffer("calls", torch.tensor(1.0))
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)) * self.number(self))


def counted(m: Number) -> float:
    m.calls += 1
    return float(m.calls)


def counted_later(m: Number) -> float:
    before = float(m.calls)
    m.calls.add_(1)
    return before


def test_a_number_from_a_buffer_is_guarded() -> None:
    torch.manual_seed(0)
    model = Number(lambda m: float(m.scale[0]) if (m.scale > 0).all() else 0.0).eval()
    teacher = reparam.expand(model, 2, example_input=torch.randn(2, 3))
    assert teacher.plan.coverage == 1
    x = torch.randn(3, 3)
    assert torch.allclose(teacher(x), model(x), atol=1e-6)
    teacher.scale[0] = 0.25  # type: ignore[index, operator]
    with pytest.raises(AssertionError, match=r"was recorded for 0\.5"):
        teacher(x)


@pytest.mark.parametrize("number", [counted, counted_later, lambda m: float(m.weight[0])])
def test_a_number_that_changes_is_refused(number: Callable[[Number], float]) -> None:
    with pytest.raises(CaptureError, match="control flow depends on the value of"):
        reparam.plan(Number(number), 2, example_input=torch.randn(2, 3))


def test_a_mask_that_data_make_is_named() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(x[x.mean(1) > 0])

    with pytest.raises(CaptureError, match=r"test_guards\.py:\d+: getitem: .*nonzero"):
        reparam.plan(Masked(), 2, example_input=torch.randn(2, 3))


def test_cumulative_averages_in_train_mode() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8, momentum=None)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 4, 1)).double().train()
    teacher = reparam.expand(model, 2, example_input=torch.randn(2, 3, 8, 8).double())
    assert teacher.plan.coverage == 1 and norm.momentum is None
    for batch in (2, 3, 4):
        x = torch.randn(batch, 3, 8, 8).double()
        assert torch.allclose(teacher(x), model(x), atol=1e-12)
    x = torch.randn(2, 3, 8, 8).double()
    assert torch.allclose(teacher.eval()(x), model.eval()(x), atol=1e-12)


class Asking(nn.Module):
    """Asks whether its input has gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.b(h * 2 if x.requires_grad else h)


def test_a_guard_says_what_the_code_asks_for(tmp_path: Path) -> None:
    model, x = Asking().double().eval(), sample((3, 4))
    teacher = reparam.expand(model, 2, example_input=x)
    assert "sizes or other properties: the network itself; inputs that" in teacher.plan.notes[0]
    reparam.save(teacher, tmp_path / "teacher.safetensors")
    for found in (teacher, copy.deepcopy(teacher), reparam.load(tmp_path / "teacher.safetensors", Asking().double())):
        assert torch.allclose(found(x), model(x))
        with pytest.raises(
            GuardError, match=r"test_guards\.py:\d+: .* branches on whether a tensor has gradients here"
        ):
            found(x.clone().requires_grad_())


@pytest.mark.parametrize("base", [ReparamError, AssertionError])
def test_a_guard_is_an_error_of_both_kinds(base: type[Exception]) -> None:
    model = Root().double().eval()
    with pytest.raises(base, match="the network branches on a size here"):
        reparam.expand(model, 2, example_input=sample((2, 3, 10, 9)))(sample((1, 3, 6, 6)))
    folded = pickle.loads(pickle.dumps(reparam.fold(model, sample((2, 3, 10, 9)))))
    with pytest.raises(base, match="the network branches on a size here"):
        folded(sample((1, 3, 6, 6)))
