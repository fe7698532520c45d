"""``check``: two networks on the same inputs."""

import math

import pytest
import torch
from torch import nn

import reparam
from reparam.errors import InputError

X = torch.randn(3, 4)


class Keeps(nn.Module):
    """Keeps what it computed from its weights in eval mode, as some attention modules do, and forgets it in train."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.bias = nn.Linear(4, 4), nn.Parameter(torch.randn(4))
        self.kept: dict[str, torch.Tensor] = {}

    def train(self, mode: bool = True) -> "Keeps":
        super().train(mode)
        if mode:
            self.kept.clear()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return self.layer(x) + 2 * self.bias
        if "bias" not in self.kept:
            self.kept["bias"] = 2 * self.bias
        return torch.addmm(self.kept["bias"], x, self.layer.weight.t())


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.layer = factor, nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.layer.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.factor


def test_neither_network_is_changed():
    model = Keeps().eval()
    expected = model(X)
    kept = dict(model.kept)
    report = reparam.check(model, model, X)
    assert report.passed and report.max_abs == 0.0
    assert model.kept.keys() == kept.keys() and model.kept["bias"] is kept["bias"]
    assert torch.equal(model(X), expected) and not model.training


def test_what_a_network_keeps_is_not_read():
    model = Keeps().eval()
    model(X)
    other = Keeps().eval()
    other.load_state_dict(model.state_dict())
    other.kept["bias"] = torch.zeros(4)
    assert reparam.check(model, other, X).passed


def test_a_network_that_ran_with_gradients_can_be_expanded():
    model = nn.Sequential(nn.Linear(4, 4), Keeps(), nn.Linear(4, 2)).eval()
    assert model(X).requires_grad and not model[1].kept["bias"].is_leaf
    assert reparam.check(model, reparam.expand(model, 2, example_input=X), X).passed


@pytest.mark.parametrize(("a", "b"), [(math.inf, 1.0), (1.0, math.inf), (math.nan, 1.0), (1.0, math.nan), (1.0, 1.01)])
def test_different_networks_fail(a, b):
    report = reparam.check(Times(a), Times(b), X)
    assert not report.passed and "FAIL" in str(report)


def test_a_small_difference_is_measured():
    report = reparam.check(Times(1.0), Times(1.0 + 1e-7), X)
    assert report.passed and report.max_rel == pytest.approx(1e-7, rel=1e-3)
    assert report.sqnr_db == pytest.approx(140, abs=1)
    assert not reparam.check(Times(1.0), Times(1.0 + 1e-7), X, tolerance=1e-8).passed


def test_other_shapes_are_an_error():
    with pytest.raises(InputError, match=r"the outputs have different shapes: \[\(2, 4\)\] and \[\(2, 2\)\]|\(3, 2\)"):
        reparam.check(Times(1.0), nn.Linear(4, 2), X)
    with pytest.raises(InputError, match="Times does not accept the example input"):
        reparam.check(Times(1.0), Times(1.0), torch.randn(3, 5))
