"""What a forward carries from call to call outside of its graph: refused, or kept in a leaf; caches are neither."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import reparam
from reparam.errors import CaptureError, InputError


class Net(nn.Module):
    """Three layers; subclasses say what happens between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.count, self.kept, self.memory = 0, None, []

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(torch.relu(self.first(x))))

    def between(self, h: Tensor) -> Tensor:
        raise NotImplementedError


class Counter(Net):
    def between(self, h: Tensor) -> Tensor:
        self.count += 1
        return self.second(h) * 0.5**self.count


class Recurrent(Net):
    def between(self, h: Tensor) -> Tensor:
        h = h if self.kept is None else h + self.kept
        self.kept = torch.tanh(self.second(h)).detach()
        return self.kept


class Growing(Net):
    def between(self, h: Tensor) -> Tensor:
        self.memory.append(self.second(h))
        return torch.stack(self.memory).mean(0)


class Cached(Net):
    """Caches of weights and of sizes, a flag, a count and a feature that nothing reads: no state."""

    def between(self, h: Tensor) -> Tensor:
        self.count += 1
        if self.kept is None:
            self.kept = {"weight": self.second.weight * 2}
        self.seen = h
        self.memory = [h.detach()]
        return nn.functional.linear(h, self.kept["weight"]) + torch.arange(h.shape[-1], device=h.device)


class Inside(nn.Module):
    """A network around one of the others' middle parts."""

    def __init__(self, kind: type[Net]) -> None:
        super().__init__()
        self.front, self.part, self.back = nn.Linear(4, 8), Part(kind), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.part(torch.relu(self.front(x))))


class Part(nn.Module):
    def __init__(self, kind: type[Net]) -> None:
        super().__init__()
        self.second, self.count, self.kept, self.memory = nn.Linear(8, 8), 0, None, []
        self.kind = kind

    def forward(self, h: Tensor) -> Tensor:
        return self.kind.between(self, h)  # type: ignore[arg-type]


def drawn(kind: str) -> float:
    if kind == "random":
        return random.random()
    return float(np.random.uniform()) if kind == "numpy" else torch.rand(1).item()


class LayerDrop(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(8, 8), kind

    def forward(self, h: Tensor) -> Tensor:
        return h if self.training and drawn(self.kind) < 0.5 else h + torch.relu(self.layer(h))


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@pytest.mark.parametrize(("kind", "name"), [(Counter, "count"), (Recurrent, "kept"), (Growing, "memory")])
def test_state_in_attributes(kind, name):
    x = torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(CaptureError, match=rf"{kind.__name__} keeps state in {name}, .*keep it in a buffer"):
        reparam.expand(kind().double().eval(), 2, example_input=x)
    net = Inside(kind).double().eval()
    teacher = reparam.expand(net, 2, example_input=x)
    assert "part" in teacher.plan.leaves
    for _ in range(3):  # the part goes on as it is, with a state of its own
        x = torch.randn(3, 4, dtype=torch.float64)
        torch.testing.assert_close(teacher(x), net(x), rtol=1e-10, atol=1e-12)


def test_caches_are_no_state():
    net = Cached().double().eval()
    teacher = reparam.expand(net, 2, example_input=torch.randn(3, 4, dtype=torch.float64))
    assert not teacher.plan.leaves and teacher.plan.coverage == 1
    net.kept = None
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(teacher(x), net(x), rtol=1e-10, atol=1e-12)
    assert not reparam.expand(Inside(Cached), 2, example_input=x.float()).plan.leaves


class CachedInEval(nn.Module):
    """Keeps what it computed from its weights in eval mode, and does something else in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.bias = nn.Linear(8, 8), nn.Parameter(torch.randn(8))
        self.kept: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> CachedInEval:
        super().train(mode)
        if mode:
            self.kept.clear()
        return self

    def forward(self, h: Tensor) -> Tensor:
        if self.training:
            return self.layer(h) + 2 * self.bias
        if "bias" not in self.kept:
            self.kept["bias"] = 2 * self.bias
        return torch.addmm(self.kept["bias"], h, self.layer.weight.t())


@pytest.mark.parametrize("ran", [False, True])
def test_caches_of_one_mode_are_no_state(ran):
    net = nn.Sequential(nn.Linear(4, 8), CachedInEval(), nn.Linear(8, 2)).double().eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    if ran:
        net(x)
    teacher = reparam.expand(net, 2, example_input=x)
    assert not teacher.plan.leaves and teacher.plan.coverage == 1
    for mode in (True, False):
        torch.testing.assert_close(teacher.train(mode)(x), net.train(mode)(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["random", "numpy", "torch"])
def test_numbers_drawn_by_python(kind):
    net = nn.Sequential(nn.Linear(4, 8), LayerDrop(kind), nn.Linear(8, 2)).double()
    seed(0)
    teacher = reparam.expand(net, 2, example_input=torch.randn(3, 4, dtype=torch.float64))
    seen = set()
    for number in range(12):
        x = torch.randn(3, 4, dtype=torch.float64)
        seed(number)
        expected = net.train()(x)
        seed(number)
        torch.testing.assert_close(teacher.train()(x), expected, rtol=1e-10, atol=1e-12)
        seed(number)
        seen.add(drawn(kind) < 0.5)
    assert seen == {True, False}
    torch.testing.assert_close(teacher.eval()(x), net.eval()(x), rtol=1e-10, atol=1e-12)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return self.last(h + (torch.randn(8) if self.training else 0))


def test_noise_of_a_constant_size_in_the_networks_own_forward():
    """It would be the same noise for ever: train mode is not recorded, and the plan says so."""
    teacher = reparam.expand(Noisy(), 2, example_input=torch.randn(3, 4))
    assert any("train mode cannot be recorded" in note for note in teacher.plan.notes)


def test_generators_are_left_alone():
    net = nn.Sequential(nn.Linear(4, 8), LayerDrop("random"), nn.Linear(8, 2))
    before = random.getstate(), repr(np.random.get_state()), torch.get_rng_state()
    reparam.plan(net, 2, example_input=torch.zeros(3, 4))
    assert (random.getstate(), repr(np.random.get_state())) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


# Inputs that are no tensors -------------------------------------------------------------------------------------------


class Flags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(
        self, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None, deep: bool = False
    ) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.relu(self.second(x)) if deep else x
        x = x if shift is None else x + shift
        return self.last(x if scale is None else x * scale)


X, S = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)


@pytest.mark.parametrize(
    ("example", "right", "wrong"),
    [
        (X, [((X,), {}), ((X, None), {}), ((), {"x": X}), ((X,), {"deep": False})], [((X, S), {}), ((X, 2), {})]),
        ((X, None, S), [((X, None, S), {}), ((X,), {"scale": S})], [((X, S), {}), ((X, S, S), {}), ((X,), {})]),
        ((X, S, None, True), [((X, S), {"deep": True})], [((X, S), {}), ((X, None, None, True), {})]),
        ({"x": X, "deep": True}, [((X,), {"deep": True}), ((X, None, None, True), {})], [((X,), {})]),
    ],
)  # fmt: skip
def test_a_teacher_has_the_students_signature(example, right, wrong):
    net = Flags().double().eval()
    teacher = reparam.expand(net, 2, example_input=example)
    for args, kwargs in right:
        torch.testing.assert_close(teacher(*args, **kwargs), net(*args, **kwargs), rtol=1e-10, atol=1e-12)
    for args, kwargs in wrong:
        with pytest.raises(InputError, match=r"the teacher of Flags (was recorded with|needs its input)"):
            teacher(*args, **kwargs)
    assert reparam.check(net, teacher, example).passed
    for name in ("depth", "x"):
        with pytest.raises(InputError, match=r"takes no input 'depth'|needs its input|was recorded with|'x' twice"):
            teacher(X, **{name: 3})
