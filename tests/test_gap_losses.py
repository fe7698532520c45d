"""Gap-KD's double decoupling against an independent float64 formula."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reparam.distill.losses import dkd, double_decoupled
from reparam.errors import InputError


def softmax(row, temperature):
    weights = [math.exp((x - max(row)) / temperature) for x in row]
    return [w / sum(weights) for w in weights]


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def binary(row, y, temperature):
    p = softmax(row, temperature)
    return [p[y], sum(p[:y]) + sum(p[y + 1 :])]


def others(row, y, temperature):
    p = softmax(row, temperature)
    rest = p[:y] + p[y + 1 :]
    return [x / sum(rest) for x in rest]


def reference(student, teacher, assistant, target, alpha, beta, temperature, prefactor):
    rows = []
    for s, t, a, y in zip(student.tolist(), teacher.tolist(), assistant.tolist(), target.tolist(), strict=True):
        first = divergence(binary(t, y, temperature), binary(s, y, temperature))
        second = divergence(others(a, y, temperature), others(s, y, temperature))
        if prefactor:
            second *= binary(a, y, temperature)[1]
        rows.append(temperature**2 * (alpha * first + beta * second))
    return sum(rows) / len(rows)


@st.composite
def problems(draw):
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count, classes = draw(st.integers(1, 5)), draw(st.integers(2, 7))
    logits = generator.normal(0, draw(st.sampled_from([0.1, 1.0, 5.0])), (3, count, classes))
    return [torch.from_numpy(part) for part in logits], torch.from_numpy(generator.integers(0, classes, count))


@settings(max_examples=80, deadline=None)
@given(problems(), st.sampled_from([0.5, 1.0, 4.0, 20.0]), st.floats(0, 9), st.floats(0, 9), st.booleans())
def test_the_loss_equals_its_formula(drawn, temperature, alpha, beta, prefactor):
    (s, t, a), y = drawn
    found = double_decoupled(s, t, a, y, alpha, beta, temperature, prefactor)
    expected = reference(s, t, a, y, alpha, beta, temperature, prefactor)
    assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-11)


@settings(max_examples=40, deadline=None)
@given(problems(), st.sampled_from([0.5, 1.0, 4.0]))
def test_the_teacher_as_its_own_assistant_gives_dkd(drawn, temperature):
    (s, t, a), y = drawn
    assert torch.equal(double_decoupled(s, t, t, y, 1.3, 0.7, temperature), dkd(s, t, y, 1.3, 0.7, temperature))
    if not torch.allclose(a, t) and s.shape[1] > 2:
        other = double_decoupled(s, t, a, y, 1.3, 0.7, temperature)
        assert not torch.equal(other, dkd(s, t, y, 1.3, 0.7, temperature))


def test_each_term_looks_at_one_network():
    s, t, a = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 5, 2, 2])
    assert double_decoupled(s, t, a, y, 1.0, 0.0, 4.0) == dkd(s, t, y, 1.0, 0.0, 4.0)
    assert double_decoupled(s, t, a, y, 0.0, 1.0, 4.0) == dkd(s, a, y, 0.0, 1.0, 4.0)
    assert double_decoupled(s, s, s, y, 1.0, 1.0, 4.0).abs() < 1e-15


def test_the_prefactor_lies_between_nothing_and_all():
    s, t, a = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([0, 5, 2, 2])
    whole = double_decoupled(s, t, a, y, 0.0, 1.0, 1.0)
    assert 0 < double_decoupled(s, t, a, y, 0.0, 1.0, 1.0, prefactor=True) < whole
    # A temperature without end makes every class equally likely: the factor is (C - 1) / C.
    hot = double_decoupled(s, t, a, y, 0.0, 1.0, 1e4, prefactor=True) / double_decoupled(s, t, a, y, 0.0, 1.0, 1e4)
    assert float(hot) == pytest.approx(5 / 6, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("prefactor", [False, True])
@pytest.mark.parametrize("size", [1.0, 300.0, 3e4])
def test_values_and_gradients_are_finite(dtype, prefactor, size):
    base = torch.tensor([[1.0, -1.0, 0.5], [-1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    s, t, a = ((size * factor * base).to(dtype).requires_grad_() for factor in (1, -1, -0.5))
    loss = double_decoupled(s, t, a, torch.tensor([0, 0, 2]), 1.0, 8.0, 4.0, prefactor)
    loss.backward()
    assert loss.dtype == (torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(x.grad).all() for x in (s, t, a))
    assert s.grad.abs().sum() > 0


@pytest.mark.parametrize("prefactor", [False, True])
def test_gradients(prefactor):
    logits = torch.randn(3, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    y = torch.tensor([1, 0, 3])
    assert torch.autograd.gradcheck(lambda x: double_decoupled(x[0], x[1], x[2], y, 1.5, 2.0, 4.0, prefactor), logits)


def test_two_classes_have_no_second_term():
    s, t, a = torch.randn(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert double_decoupled(s, t, a, torch.tensor([0, 1, 1, 0]), 0.0, 1.0, 4.0) == 0


def test_bad_input():
    logits, y = torch.zeros(2, 3), torch.tensor([0, 2])
    call = lambda s=logits, t=logits, a=logits, y=y, T=4.0: double_decoupled(s, t, a, y, 1.0, 1.0, T)
    with pytest.raises(InputError, match=r"equal sizes.*\[2, 4\]"):
        call(a=torch.zeros(2, 4))
    with pytest.raises(InputError, match="equal sizes"):
        call(t=torch.zeros(3, 3))
    with pytest.raises(InputError, match="double_decoupled needs logits"):
        call(*torch.zeros(3, 2, 1), y=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InputError, match=r"double_decoupled needs .*not one-hot"):
        call(y=torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(InputError, match=r"targets must lie in \[0, 2\], got 3"):
        call(y=torch.tensor([0, 3]))
    with pytest.raises(InputError, match="temperature must be positive"):
        call(T=0.0)
