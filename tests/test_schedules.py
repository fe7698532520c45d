"""Temperatures by epoch: Gap-KD's dynamic temperature module and the schedules of its table 7."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reparam.distill.schedules import SCHEDULES, temperature
from reparam.errors import InputError

FORMULAS = {
    "dtm": lambda hi, lo, e, n: hi * (lo / hi) ** ((e - 1) / (n - 1)),
    "constant": lambda hi, lo, e, n: hi,
    "linear": lambda hi, lo, e, n: hi - (hi - lo) * e / n,
    "exponential": lambda hi, lo, e, n: hi * (lo / hi) ** (e / n),
    "log": lambda hi, lo, e, n: hi - (hi - lo) * math.log(e + 1) / math.log(n + 1),
    "sigmoid": lambda hi, lo, e, n: lo + (hi - lo) / (1 + math.exp((e - n / 2) / (0.1 * n))),
    "piecewise": lambda hi, lo, e, n: hi - (hi - lo) * e / (n / 2) if e < n / 2 else lo,
}

temperatures = st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)).map(lambda pair: sorted(pair, reverse=True))


def test_every_schedule_has_a_formula():
    assert set(FORMULAS) == set(SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
@given(ends=temperatures, epochs=st.integers(2, 300))
def test_formulas_and_ends(name, ends, epochs):
    hi, lo = ends
    found = temperature(name, hi, lo, epochs)
    assert found == pytest.approx([FORMULAS[name](hi, lo, e, epochs) for e in range(1, epochs + 1)], rel=1e-9)
    assert all(lo <= tau <= hi * (1 + 1e-12) for tau in found)
    if name == "sigmoid":
        assert lo <= found[-1] <= lo + 0.007 * (hi - lo)
    else:
        assert found[-1] == (hi if name == "constant" else lo)  # to the last bit
    assert all(a >= b - 1e-9 * hi for a, b in itertools.pairwise(found))


def test_the_module_of_the_paper():
    found = temperature("dtm", 24.0, 1.0, 240)
    assert found[0] == 24.0 and found[-1] == 1.0 and len(found) == 240
    ratios = [b / a for a, b in itertools.pairwise(found)]
    assert ratios == pytest.approx([(1 / 24) ** (1 / 239)] * 239)


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_epoch(name):
    assert temperature(name, 4.0, 4.0, 1) == [4.0]
    if name == "dtm":
        with pytest.raises(InputError, match=r"one epoch cannot do; .*'constant'"):
            temperature(name, 20.0, 1.0, 1)
    else:
        assert temperature(name, 20.0, 1.0, 1) == pytest.approx([FORMULAS[name](20.0, 1.0, 1, 1)])


@pytest.mark.parametrize("name", SCHEDULES)
def test_equal_ends_are_constant(name):
    assert temperature(name, 3.0, 3.0, 7) == pytest.approx([3.0] * 7)


def test_numbers_are_floats():
    assert all(type(tau) is float for name in SCHEDULES for tau in temperature(name, 20, 1, 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("liner", 20, 1, 5), r"unknown temperature schedule 'liner'; did you mean 'linear'"),
        ((None, 20, 1, 5), "unknown temperature schedule None"),
        (("dtm", 1, 20, 5), r"tau_max=1 < tau_min=20"),
        (("dtm", 20, 0, 5), "tau_min must be a positive temperature, got 0"),
        (("dtm", -1, -2, 5), "tau_max must be a positive temperature, got -1"),
        (("dtm", math.inf, 1, 5), "tau_max must be"),
        (("dtm", 20, math.nan, 5), "tau_min must be"),
        (("linear", 20, 1, 0), "at least 1, got 0"),
        (("linear", 20, 1, 2.5), r"whole number of epochs.*2\.5"),
        (("linear", 20, 1, True), "whole number of epochs"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        temperature(*arguments)
