"""Networks that keep values in attributes: hooks that close over the network, and state of earlier calls."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import reparam
from reparam.errors import CaptureError


def batch(seed: int, size: int = 3) -> Tensor:
    return torch.randn(size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Hooked(nn.Module):
    """Takes a feature through a forward hook."""

    def __init__(self, register: Callable[[Hooked], object]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))
        self.lateral, self.head, self.kept = nn.Linear(8, 8), nn.Linear(8, 2), {}
        register(self)

    def keep(self, _module: nn.Module, _args: object, value: Tensor) -> None:
        self.kept["a"] = value

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.head(y + self.lateral(self.kept["a"]))


def _over_attribute(model: Hooked) -> None:
    kept = model.kept
    model.body[0].register_forward_hook(lambda _m, _a, value: kept.__setitem__("a", value))


def _before(model: Hooked) -> None:
    model.body[3].register_forward_pre_hook(lambda _m, args: model.kept.__setitem__("a", args[0]))


HOOKS: dict[str, Callable[[Hooked], object]] = {
    "closure": lambda m: m.body[0].register_forward_hook(lambda _m, _a, value: m.kept.__setitem__("a", value)),
    "default": lambda m: m.body[0].register_forward_hook(lambda _m, _a, value, m=m: m.kept.__setitem__("a", value)),
    "attribute": _over_attribute,
    "before": _before,
    "method": lambda m: m.body[0].register_forward_hook(m.keep),
}


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_of_a_copy_belong_to_the_copy(name: str, ran: bool) -> None:
    torch.manual_seed(0)
    model = Hooked(HOOKS[name]).double().eval()
    if ran:
        model(batch(0))
    hooks = [list(m._forward_hooks.values()) for m in model.modules()]
    kept = dict(model.kept)
    teacher = reparam.expand(model, 2, example_input=batch(0))
    folded = reparam.fold(model, batch(0))
    assert model.kept == kept and hooks == [list(m._forward_hooks.values()) for m in model.modules()]
    others = [teacher, reparam.student_view(teacher), reparam.extract(teacher), copy.deepcopy(teacher), folded]
    for seed, size in ((1, 3), (2, 5)):
        found = [other(batch(seed, size)) for other in others]
        for value in found:
            assert torch.allclose(value, model(batch(seed, size)), rtol=1e-11, atol=1e-12)


class Recurrent(nn.Module):
    """Computes with what its last call left behind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.kept = nn.Linear(4, 8), nn.Linear(8, 4), None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        if self.kept is not None:
            h = h + self.kept
        self.kept = h
        return self.b(h)


class Listed(Recurrent):
    def __init__(self) -> None:
        super().__init__()
        self.kept = []

    def forward(self, x: Tensor) -> Tensor:
        self.kept = [*self.kept, torch.relu(self.a(x))][-2:]
        return self.b(torch.stack(self.kept).mean(0))


@pytest.mark.parametrize("kind", [Recurrent, Listed])
def test_what_an_earlier_call_left_is_no_constant(kind: type[Recurrent]) -> None:
    model = kind().double().eval()
    with torch.no_grad():
        model(batch(0))
        model(batch(1))
    with pytest.raises(CaptureError, match=f"{kind.__name__} keeps state in kept, and a graph would repeat"):
        reparam.expand(model, 2, example_input=batch(2))


class Table(nn.Module):
    """Has a table that is no buffer, made in __init__ or by the first call."""

    def __init__(self, lazy: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)
        self.table = None if lazy else torch.linspace(0, 1, 8, dtype=torch.float64)
        self.tables = {"x": torch.linspace(1, 2, 8, dtype=torch.float64)}

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0, 1, 8, dtype=torch.float64)
        return self.b(torch.relu(self.a(x)) + self.table * self.tables["x"])


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("ran", [False, True])
def test_tables_stay_constants(lazy: bool, ran: bool) -> None:
    model = Table(lazy).double().eval()
    if ran:
        model(batch(0))
    teacher = reparam.expand(model, 2, example_input=batch(0))
    assert torch.allclose(teacher(batch(1, 5)), model(batch(1, 5)), rtol=1e-11, atol=1e-12)
