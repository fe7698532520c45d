"""Code inside ``torch.no_grad()`` and ``torch.autocast``: teachers and folded networks keep the blocks."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import error, randomise, sample

import reparam

OPTIONS: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda _x: contextlib.nullcontext(),
    "single": lambda x: torch.autocast(x.device.type, enabled=False),
    "named": lambda _x: torch.autocast("cpu", enabled=False),
    "half": lambda x: torch.autocast(device_type=x.device.type, dtype=torch.bfloat16),
    "stop": lambda _x: torch.no_grad(),
    "set": lambda _x: torch.set_grad_enabled(False),
    "both": lambda x: _both(x),
}


@contextlib.contextmanager
def _both(x: Tensor) -> Any:
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        yield


class Step(nn.Module):
    """A layer in two blocks, one in the other, with a value that leaves the inner one."""

    def __init__(self, outer: str, inner: str) -> None:
        super().__init__()
        self.outer, self.inner = outer, inner
        self.a, self.b, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        with OPTIONS[self.outer](x):
            h = torch.sigmoid(self.a(x.float()))
            with OPTIONS[self.inner](x):
                gate = self.norm(self.b(h.float())).mean((2, 3), keepdim=True)
            h = h + torch.tanh(gate)
        return x + h


class Net(nn.Module):
    def __init__(self, *blocks: tuple[str, str]) -> None:
        super().__init__()
        self.stem, self.steps = nn.Conv2d(3, 8, 1), nn.ModuleList(Step(*names) for names in blocks)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for step in self.steps:
            x = step(x)
        return self.head(x)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(x).float().square().mean().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


names = st.sampled_from(sorted(OPTIONS))


@settings(deadline=None, max_examples=6)
@given(blocks=st.lists(st.tuples(names, names), min_size=1, max_size=3), amp=st.booleans(), train=st.booleans())
def test_random_blocks(blocks: list[tuple[str, str]], amp: bool, train: bool) -> None:
    """With one replica every bit is the same; with two, which parameters have gradients, and the types of all."""
    model = randomise(Net(*blocks)).train(train)
    x = sample((2, 3, 6, 6), 3).float()
    limit = 3e-2 if amp or "half" in str(blocks) else 1e-5
    with torch.autocast("cpu", torch.bfloat16) if amp else contextlib.nullcontext():
        expected, output = gradients(model, x), model(x)
        same = reparam.expand(model, 1, example_input=x)
        pairs = zip(expected.values(), gradients(same, x).values(), strict=True)
        assert all(a is b is None or torch.equal(a, b) for a, b in pairs)
        wide = reparam.expand(model, 2, example_input=x)
        found = gradients(wide, x)
        assert {n for n, g in expected.items() if g is None} == {n for n, g in found.items() if g is None}
        assert wide(x).dtype == output.dtype
        if not train:
            assert error(output.detach(), wide(x).detach()) < limit


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_folded_networks_keep_them(name: str) -> None:
    model = randomise(Net((name, name), ("none", name))).eval()
    x = sample((2, 3, 6, 6), 3).float()
    folded = reparam.fold(model, x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    copies = folded, pickle.loads(pickle.dumps(folded))
    for network in copies:
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                assert error(model(x).detach(), network(x).detach()) < (3e-2 if enabled or name == "half" else 1e-5)
        expected, found = gradients(model, x), gradients(network, x)
        kept = {n for n, g in found.items() if g is None} - {n for n, g in expected.items() if g is None}
        assert not kept
        assert (found["steps.0.a.weight"] is None) == (expected["steps.0.a.weight"] is None)


class ManyResults(nn.Module):
    """What is computed in single precision shows in the type of a result."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.norm = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k = self.q(x).flatten(2), self.norm(self.k(x)).flatten(2)
        with torch.autocast(x.device.type, enabled=False):
            kept = q.float() @ k.float().transpose(1, 2)
        return kept, q @ k.transpose(1, 2)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention, self.head = nn.Conv2d(3, 4, 1), ManyResults(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.attention(self.stem(x))
        return a, self.head(b)


@pytest.mark.parametrize("made", ["teacher", "fold"])
def test_single_precision_inside_of_half(made: str) -> None:
    model = randomise(Attends()).eval()
    x = sample((2, 3, 4, 4), 3).float()
    with torch.autocast("cpu", torch.bfloat16):
        other = reparam.expand(model, 2, example_input=x) if made == "teacher" else reparam.fold(model, x)
        expected, found = model(x), other(x)
    assert [v.dtype for v in found] == [v.dtype for v in expected] == [torch.float32, torch.bfloat16]
    assert made != "teacher" or other.plan.coverage > 0.5


class Frozen(nn.Module):
    """A target branch without gradients, averages in buffers, and an error inside of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.target, self.head = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.a(x))
        with torch.no_grad():
            if x.shape[-1] != 4:
                raise ValueError("four features")
            target = torch.tanh(self.target(x))
            self.average.mul_(0.9).add_(h.mean(0), alpha=0.1)
        return self.head(h + self.average), F.mse_loss(h, target)


@pytest.fixture
def frozen() -> Any:
    torch.manual_seed(0)
    model = Frozen().double()
    return model, reparam.expand(model, 2, example_input=torch.randn(5, 4).double())


def test_a_branch_without_gradients(frozen: Any) -> None:
    _model, teacher = frozen
    x = torch.randn(5, 4).double()
    for _ in range(2):  # a buffer that had gradients would be used twice
        out, loss = teacher(x)
        (out.square().mean() + loss).backward()
    assert teacher.target.weight.grad is None
    assert teacher.a.weight.grad is not None
    assert not teacher.average.requires_grad


def test_an_error_inside_leaves_the_mode(frozen: Any) -> None:
    _model, teacher = frozen
    with pytest.raises(RuntimeError):
        teacher(torch.randn(5, 3).double())
    assert torch.is_grad_enabled()


def test_files_and_copies_keep_the_blocks(frozen: Any, tmp_path: Any) -> None:
    model, teacher = frozen
    reparam.save(teacher, tmp_path / "teacher.safetensors")
    loaded = reparam.load(tmp_path / "teacher.safetensors", model)
    for other in (loaded, copy.deepcopy(teacher)):
        out, loss = other(torch.randn(5, 4).double())
        (out.square().mean() + loss).backward()
        assert other.target.weight.grad is None and other.a.weight.grad is not None


class InTraining(nn.Module):
    """Gradients of a branch in train mode only: the two modes differ in nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        with torch.set_grad_enabled(self.training):
            x = x + torch.tanh(self.b(x))
        return self.head(x)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = InTraining(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize("build", [InTraining, Around])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_that_depend_on_the_mode(build: Callable[[], nn.Module], training: bool) -> None:
    model = build().double().train(training)
    x = torch.randn(5, 4).double()
    teacher = reparam.expand(model, 2, example_input=x)
    expected, found = gradients(model, x), gradients(teacher, x)
    assert {n for n, g in expected.items() if g is None} == {n for n, g in found.items() if g is None}


def test_taps_and_compiled_teachers(frozen: Any) -> None:
    _model, teacher = frozen
    x = torch.randn(5, 4).double()
    (_out, _loss), found = reparam.tap(teacher, ["a", "target"])(x)
    assert found["a"].requires_grad and not found["target"].requires_grad
    teacher.average.zero_()
    expected = teacher(x)
    teacher.average.zero_()
    compiled = torch.compile(teacher, fullgraph=True, backend="aot_eager")
    out, loss = compiled(x)
    assert error(out.detach(), expected[0].detach()) < 1e-12
    (out.square().mean() + loss).backward()
    assert teacher.target.weight.grad is None and teacher.a.weight.grad is not None
