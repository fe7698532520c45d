"""Networks that take gradients inside their forward pass (energies, forces, scores), or use torch.func there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import reparam
from reparam.errors import CaptureError, VerificationError
from reparam.passes.fold import fold_with_report

X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Energy(nn.Module):
    """Returns the gradient of an energy."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b, self.o = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 1)

    def energy(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.b(torch.tanh(self.n(self.a(x)))))).sum()


class Score(Energy):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(x), x, create_graph=True)[0]


class Backward(Energy):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            self.energy(x).backward()
        return x.grad


class Hidden(Energy):
    """Takes a gradient with respect to a value inside."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            h = torch.tanh(self.a(x)).detach().requires_grad_()
            return torch.autograd.grad(self.o(torch.tanh(self.b(h))).sum(), h)[0]


class Forces(Energy):
    """Relies on its caller for gradients, as most force fields do."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.detach().requires_grad_()
        energy = self.energy(x)
        return {"energy": energy, "forces": -torch.autograd.grad(energy, [x], create_graph=True)[0]}


class Around(nn.Module):
    """A network around such a module."""

    def __init__(self, inner: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 4), inner(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(torch.relu(self.first(x)))
        return self.last(found["forces"] if isinstance(found, dict) else found)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "score": Score, "forces": Forces, "inner score": lambda: Around(Score), "inner forces": lambda: Around(Forces),
}  # fmt: skip


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model


def values(found: Tensor | dict[str, Tensor]) -> list[Tensor]:
    return list(found.values()) if isinstance(found, dict) else [found]


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(values(a(X)), values(b(X)), strict=True)
    return all(torch.allclose(x, y, rtol=1e-11, atol=1e-12) for x, y in pairs)


@pytest.mark.parametrize("name", MODELS)
def test_expansion_is_verified_and_exact(name: str) -> None:
    model = made(name)
    teacher = reparam.expand(model, 2, example_input=X)
    assert teacher.plan.wide_parameters > teacher.plan.parameters
    assert same(model, teacher) and same(model, reparam.student_view(teacher))
    assert reparam.check(model, teacher, X).passed
    assert reparam.check(model, reparam.student_view(teacher), X).passed
    values(teacher(X))[-1].square().sum().backward()
    assert teacher.get_parameter("inner.a.weight" if "inner" in name else "a.weight").grad is not None


def test_gradients_that_are_taken_in_place() -> None:
    torch.manual_seed(0)
    model = Backward().double().eval()
    teacher = reparam.expand(model, 2, example_input=X)
    assert same(model, teacher)
    with torch.no_grad():
        assert same(model, teacher)


def test_a_gradient_with_respect_to_a_wide_value() -> None:
    model = Hidden().double().eval()
    with pytest.raises(VerificationError, match=r"test_gradients\.py:\d+\) takes a gradient .*submodule"):
        reparam.expand(model, 2, example_input=X)
    teacher = reparam.expand(model, 2, example_input=X, ignore=["a"])
    assert same(model, teacher) and teacher.plan.wide_parameters > teacher.plan.parameters
    outer = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), Hidden(), nn.Linear(8, 2)).double().eval()
    assert same(outer, reparam.expand(outer, 2, example_input=X))


@pytest.mark.parametrize("name", ["score", "inner score"])
def test_a_teacher_needs_no_gradients_where_its_student_needs_none(name: str) -> None:
    model = made(name)
    teacher = reparam.expand(model, 2, example_input=X)
    with torch.no_grad():
        assert same(model, teacher)
        assert not values(teacher(X))[0].requires_grad
        if name == "score":
            output, taps = reparam.tap(teacher, ["b"])(X)
            assert torch.allclose(output, model(X)) and taps["b"].shape == (5, 16)


@pytest.mark.parametrize("name", MODELS)
def test_folding(name: str) -> None:
    model = made(name)
    folded, report = fold_with_report(model, X)
    assert same(model, folded)
    assert report.norms == (1, 1 if "inner" in name else 0)
    if "score" in name:
        with torch.no_grad():
            assert same(model, folded)


def test_a_difference_is_seen() -> None:
    model = made("score")
    teacher = reparam.expand(model, 2, example_input=X)
    with torch.no_grad():
        teacher.b.weight += 0.1
    assert not reparam.check(model, teacher, X).passed


class Transformed(nn.Module):
    """Applies a transform of torch.func to its own layers."""

    def __init__(self, function: Callable[[Transformed, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(4, 8), nn.Linear(8, 4), function
        self.w = nn.Parameter(torch.randn(5, 4))

    def layers(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


TRANSFORMS: dict[str, Callable[[Transformed, Tensor], Tensor]] = {
    "vmap": lambda m, x: torch.vmap(lambda w, v: w * m.layers(v))(m.w, x),
    "closure": lambda m, x: torch.vmap(lambda k: x * k)(torch.arange(3.0).double()).sum(0),
    "grad": lambda m, x: torch.func.grad(lambda v: m.layers(v).sum())(x),
    "grad_and_value": lambda m, x: torch.func.grad_and_value(lambda v: m.layers(v).sum())(x)[0],
    "vjp": lambda m, x: torch.func.vjp(m.layers, x)[1](x)[0],
    "jvp": lambda m, x: torch.func.jvp(m.layers, (x,), (x,))[1],
    "jacrev": lambda m, x: torch.func.jacrev(lambda v: m.layers(v).sum(0))(x).sum(0),
    "jacfwd": lambda m, x: torch.func.jacfwd(lambda v: m.layers(v).sum(0))(x).sum(0),
    "per sample": lambda m, x: torch.vmap(torch.func.grad(lambda v: m.layers(v).sum()))(x),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str) -> None:
    """A network's own are refused with their name and a way out, a submodule with one is kept as it is."""
    torch.manual_seed(0)
    inner = Transformed(TRANSFORMS[name]).double().eval()
    for run in (reparam.plan, reparam.expand):
        with pytest.raises(CaptureError, match=r"Transformed: .*test_gradients\.py:\d+: torch\.\w+.*into a submodule"):
            run(inner, 2, example_input=X)
    outer = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), inner, nn.Linear(4, 2)).double().eval()
    teacher = reparam.expand(outer, 2, example_input=X)
    assert set(teacher.plan.leaves) == {"3"} and teacher.plan.wide_parameters > teacher.plan.parameters
    assert same(outer, teacher) and same(outer, reparam.student_view(teacher))
    assert same(outer, reparam.fold(outer, X))


def test_a_transform_of_constants_is_one() -> None:
    def table(_module: Transformed, x: Tensor) -> Tensor:
        return x @ torch.vmap(lambda k: k * torch.ones(4))(torch.arange(4.0)).to(x)

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), Transformed(table)).double().eval()
    teacher = reparam.expand(model, 2, example_input=X)
    assert same(model, teacher) and not teacher.plan.leaves
