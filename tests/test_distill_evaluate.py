"""Accuracy, parity and the check for NaN, against numbers worked out by hand."""

import pytest
import torch
from torch import nn

from reparam.distill.evaluate import all_finite, count_parameters, parity, top1


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))

    def forward(self, x):
        return x * self.factor


BATCHES = [
    (torch.tensor([[1.0, 2.0], [4.0, 3.0]]), torch.tensor([1, 1])),
    (torch.tensor([[0.0, 1.0]]), torch.tensor([1])),
]


def test_top1_is_in_percent():
    assert top1(Scaled(1), BATCHES) == pytest.approx(200 / 3)
    assert top1(Scaled(-1), BATCHES) == pytest.approx(100 / 3)


def test_parity():
    same = parity(Scaled(2), Scaled(2), BATCHES)
    assert same.as_dict() == {"max_abs": 0, "max_rel": 0, "argmax_agreement": 1} and same.passed
    other = parity(Scaled(2), Scaled(1), BATCHES)
    assert other.as_dict() == {"max_abs": 4, "max_rel": 0.5, "argmax_agreement": 1} and not other.passed
    assert parity(Scaled(1), Scaled(-1), BATCHES).argmax_agreement == 0


def test_parity_does_not_pass_on_nan():
    broken = parity(Scaled(1), Scaled(float("nan")), BATCHES)
    assert broken.max_abs != broken.max_abs and not broken.passed


def test_all_finite_allows_masks():
    assert all_finite(Scaled(1)) and all_finite(nn.ReLU())
    assert not all_finite(Scaled(float("inf")))
    norm = nn.BatchNorm2d(3)
    norm.running_mean[1] = float("nan")
    assert not all_finite(norm)


def test_parameters_are_counted_once():
    shared = nn.Linear(3, 4)
    assert count_parameters(nn.Sequential(shared, shared)) == 16
