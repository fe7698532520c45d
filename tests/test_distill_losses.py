"""The public losses against independent float64 formulas written with plain NumPy loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reparam.distill.losses import dkd, kd, smoothed_cross_entropy
from reparam.errors import InputError


def softmax(row, temperature=1.0):
    weights = np.exp((row - row.max()) / temperature)
    return weights / weights.sum()


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def reference_kd(student, teacher, temperature):
    rows = [divergence(softmax(t, temperature), softmax(s, temperature)) for s, t in zip(student, teacher, strict=True)]
    return temperature**2 * np.mean(rows)


def reference_dkd(student, teacher, target, alpha, beta, temperature):
    rows = []
    for s, t, y in zip(student, teacher, target, strict=True):
        p_s, p_t = softmax(s, temperature), softmax(t, temperature)
        binary = divergence([p_t[y], np.delete(p_t, y).sum()], [p_s[y], np.delete(p_s, y).sum()])
        others = divergence(softmax(np.delete(t, y), temperature), softmax(np.delete(s, y), temperature))
        rows.append(alpha * binary + beta * others)
    return temperature**2 * np.mean(rows)


def reference_sce(student, teacher, smoothing):
    rows = []
    for s, t in zip(student, teacher, strict=True):
        log_p = np.log(softmax(s))
        rows.append(-(1 - smoothing) * (softmax(t) * log_p).sum() - smoothing * log_p.mean())
    return np.mean(rows)


@st.composite
def logits(draw):
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count, classes = draw(st.integers(1, 6)), draw(st.integers(2, 9))
    scale = draw(st.sampled_from([0.1, 1.0, 5.0]))
    student, teacher = generator.normal(0, scale, (2, count, classes))
    return student, teacher, generator.integers(0, classes, count)


@settings(max_examples=60, deadline=None)
@given(logits(), st.sampled_from([0.5, 1.0, 4.0]), st.floats(0, 1))
def test_losses_equal_their_formulas(drawn, temperature, smoothing):
    student, teacher, target = drawn
    s, t, y = torch.from_numpy(student), torch.from_numpy(teacher), torch.from_numpy(target)
    close = {"rtol": 1e-9, "atol": 1e-11}
    np.testing.assert_allclose(kd(s, t, temperature), reference_kd(student, teacher, temperature), **close)
    expected = reference_dkd(student, teacher, target, 1.3, 0.7, temperature)
    np.testing.assert_allclose(dkd(s, t, y, 1.3, 0.7, temperature), expected, **close)
    np.testing.assert_allclose(
        smoothed_cross_entropy(s, t, smoothing), reference_sce(student, teacher, smoothing), **close
    )


@settings(max_examples=30, deadline=None)
@given(logits(), st.sampled_from([1.0, 4.0]))
def test_dkd_decomposes_kd(drawn, temperature):
    """KD = TCKD + (1 - p_teacher(target)) NCKD, image by image."""
    student, teacher, target = (torch.from_numpy(part) for part in drawn)
    for s, t, y in zip(student.split(1), teacher.split(1), target.split(1), strict=True):
        others = 1 - torch.softmax(t / temperature, 1)[0, y].item()
        torch.testing.assert_close(dkd(s, t, y, 1.0, others, temperature), kd(s, t, temperature), rtol=1e-9, atol=1e-11)


def test_defaults_and_zero_at_equality():
    s, t = torch.randn(2, 4, 7, dtype=torch.float64)
    torch.testing.assert_close(smoothed_cross_entropy(s, t), smoothed_cross_entropy(s, t, 0.1))
    labels = torch.tensor([0, 6, 3, 3])
    assert abs(kd(t, t, 4.0)) < 1e-12
    assert abs(dkd(t, t, labels, 1.0, 8.0, 4.0)) < 1e-12
    assert kd(s, t, 4.0) > 1e-3


EXTREME = [1e4, 1e20, 1e38]


@pytest.mark.parametrize("size", EXTREME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(size, dtype):
    rows = torch.tensor([[1.0, 0, -1], [-1, 1, 0], [1, 1, -1], [0, 0, 0], [1e-3, 0, 1]], dtype=dtype)
    student = (rows * size).requires_grad_()
    teacher = (-rows.flip(1) * size).requires_grad_()
    labels = torch.tensor([0, 0, 2, 1, 2])
    for loss in (
        kd(student, teacher, 4.0) / size,
        dkd(student, teacher, labels, 1.0, 2.0, 4.0) / size,
        smoothed_cross_entropy(student, teacher) / size,
    ):
        gradients = torch.autograd.grad(loss, [student, teacher])
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_certain_teacher_gives_no_nan():
    """A target probability that rounds to 1 or 0: the direct formula takes log 0 here."""
    student = torch.tensor([[90.0, 0, 0], [-90, 0, 0]], requires_grad=True)
    teacher = torch.tensor([[-90.0, 0, 1], [200, 0, 1]])
    loss = dkd(student, teacher, torch.tensor([0, 0]), 1.0, 2.0, 1.0)
    loss.backward()
    assert loss.isfinite() and loss > 50
    assert student.grad.isfinite().all() and student.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = torch.randn(2, 5, 9).to(dtype)
    assert kd(student, teacher, 2.0).dtype == torch.float32
    torch.testing.assert_close(kd(student, teacher, 2.0), kd(student.float(), teacher.float(), 2.0))


def test_gradcheck():
    student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 3])
    assert torch.autograd.gradcheck(lambda s, t: kd(s, t, 4.0), (student, teacher))
    assert torch.autograd.gradcheck(lambda s, t: dkd(s, t, labels, 1.0, 8.0, 4.0), (student, teacher))
    assert torch.autograd.gradcheck(smoothed_cross_entropy, (student, teacher))


def test_bad_input():
    a, b = torch.zeros(2, 3), torch.zeros(2, 4)
    with pytest.raises(InputError, match=r"got \[2, 3\] and \[2, 4\]"):
        kd(a, b, 1.0)
    with pytest.raises(InputError, match="temperature must be positive, got 0"):
        kd(a, a, 0)
    with pytest.raises(InputError, match=r"smoothing must lie in \[0, 1\], got 1.5"):
        smoothed_cross_entropy(a, a, 1.5)
    with pytest.raises(InputError, match=r"targets \[2, 3\] \(class indices, not one-hot\)"):
        dkd(a, a, a.long(), 1.0, 1.0, 1.0)
