"""The losses on logits against independent float64 formulas written with plain NumPy loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reparam.distill.losses import (
    SOFT_LOSSES,
    correlation_distance,
    dist,
    dkd,
    kd,
    lskd,
    smoothed_cross_entropy,
    soft_loss,
    standardise,
)
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


def reference_soft(student, teacher, kind):
    rows = []
    for s, t in zip(student, teacher, strict=True):
        p, q = softmax(s), softmax(t)
        rows.append(
            {
                "ce": lambda q=q, p=p: -sum(b * math.log(a) for a, b in zip(p, q, strict=True)),
                "sce": lambda q=q, p=p: -sum((0.9 * b + 0.1 / len(p)) * math.log(a) for a, b in zip(p, q, strict=True)),
                "kl": lambda q=q, p=p: divergence(q, p),
                "mse": lambda s=s, t=t: sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s),
                "l1": lambda s=s, t=t: sum(abs(a - b) for a, b in zip(s, t, strict=True)) / len(s),
            }[kind]()
        )
    return np.mean(rows)


def reference_standardised(rows):
    """(x - mean) / sqrt(mean (x - mean)^2), row by row."""
    result = []
    for row in rows:
        mean = sum(row) / len(row)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row))
        result.append([(x - mean) / deviation for x in row])
    return np.array(result)


def correlation(a, b):
    """Pearson: covariance over the product of standard deviations."""
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return covariance / math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))


def reference_dist(student, teacher, beta, gamma, temperature):
    p = np.array([softmax(row, temperature) for row in student])
    q = np.array([softmax(row, temperature) for row in teacher])
    inter = np.mean([1 - correlation(p[i], q[i]) for i in range(len(p))])
    intra = np.mean([1 - correlation(p[:, c], q[:, c]) for c in range(p.shape[1])])
    return temperature**2 * (beta * inter + gamma * intra)


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


@settings(max_examples=40, deadline=None)
@given(logits(), st.sampled_from([0.5, 1.0, 4.0]))
def test_the_other_losses_equal_their_formulas(drawn, temperature):
    student, teacher, target = drawn
    s, t, y = (torch.from_numpy(part) for part in drawn)
    close = {"rtol": 1e-7, "atol": 1e-9}
    for kind in SOFT_LOSSES:
        np.testing.assert_allclose(soft_loss(s, t, kind), reference_soft(student, teacher, kind), **close)
    flat_s, flat_t = reference_standardised(student), reference_standardised(teacher)
    np.testing.assert_allclose(standardise(s), flat_s, **close)
    np.testing.assert_allclose(lskd(kd)(s, t, temperature), reference_kd(flat_s, flat_t, temperature), **close)
    expected = reference_dkd(flat_s, flat_t, target, 1.3, 0.7, temperature)
    np.testing.assert_allclose(lskd(dkd)(s, t, y, 1.3, 0.7, temperature=temperature), expected, **close)
    distance = np.mean([1 - correlation(a, b) for a, b in zip(student, teacher, strict=True)])
    np.testing.assert_allclose(correlation_distance(s, t), distance, **close)
    if len(student) > 1:
        expected = reference_dist(student, teacher, 1.3, 0.7, temperature)
        np.testing.assert_allclose(dist(s, t, 1.3, 0.7, temperature), expected, **close)


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
    assert torch.equal(soft_loss(s, t), smoothed_cross_entropy(s, t))
    assert dist(s, t) == dist(s, t, 1.0, 1.0, 1.0) > 0.1
    for loss in (dist, correlation_distance, lambda a, b: soft_loss(a, b, "kl"), lambda a, b: soft_loss(a, b, "mse")):
        assert abs(loss(t, t)) < 1e-12
    assert abs(lskd(dkd)(t, t, labels, 1.0, 8.0, 2.0)) < 1e-12


LABELS = torch.tensor([0, 6, 3, 3])
LOSSES = {
    "kd": lambda s, t: kd(s, t, 4.0),
    "dkd": lambda s, t: dkd(s, t, LABELS, 1.0, 8.0, 4.0),
    "lskd kd": lambda s, t: lskd(kd)(s, t, 2.0),
    "lskd dkd": lambda s, t: lskd(dkd)(s, t, LABELS, 1.0, 8.0, 2.0),
    "dist": lambda s, t: dist(s, t, temperature=4.0),
    "correlation": correlation_distance,
    **{kind: lambda s, t, kind=kind: soft_loss(s, t, kind) for kind in SOFT_LOSSES},
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_and_teachers(name):
    torch.manual_seed(0)
    student = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, teacher.detach()), (student,))
    LOSSES[name](student, teacher).backward()
    assert student.grad.abs().max() > 0
    assert (teacher.grad is not None) == (name in {"kd", "dkd"})


def test_smoothed_cross_entropy_leaves_the_teacher_to_the_caller():
    student, teacher = torch.randn(2, 4, 7, requires_grad=True).unbind()
    assert torch.autograd.grad(smoothed_cross_entropy(student, teacher), teacher)[0].abs().max() > 0
    assert not soft_loss(student.detach(), teacher).requires_grad


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_of_all(name, dtype):
    student, teacher = torch.randn(2, 4, 7).mul(3).to(dtype)
    found = LOSSES[name](student, teacher)
    assert found.dtype == torch.float32
    assert torch.equal(found, LOSSES[name](student.float(), teacher.float()))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_of_ten_thousand(name, dtype):
    """Also rows and columns without any variation, where correlations and standard deviations are not defined."""
    rows = torch.tensor([[1.0, 0, -1, 0, 0, 0, 1], [-1] * 7, [0] * 7, [1e-4, 0, 1, 1, 1, -1, 0]])
    for student, teacher in ((rows, -rows), (rows, torch.ones(4, 7)), (torch.ones(4, 7), rows), (rows, rows)):
        student = (student * 1e4).to(dtype).requires_grad_()
        loss = LOSSES[name](student, (teacher * 1e4).to(dtype))
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.isfinite() and gradient.isfinite().all()


@settings(max_examples=30, deadline=None)
@given(logits(), st.floats(0.01, 100), st.floats(-100, 100))
def test_standardised_losses_know_no_shift_and_no_scale(drawn, scale, shift):
    student, teacher, target = (torch.from_numpy(part) for part in drawn)
    for loss in (lambda s, t: lskd(kd)(s, t, 2.0), lambda s, t: lskd(dkd)(s, t, target, 1.0, 8.0, 2.0)):
        expected = loss(student, teacher)
        close = {"rtol": 1e-6, "atol": 1e-9}
        torch.testing.assert_close(loss(scale * student + shift, teacher), expected, **close)
        torch.testing.assert_close(loss(student, scale * teacher + shift), expected, **close)
    expected = correlation_distance(student, teacher)
    torch.testing.assert_close(correlation_distance(scale * student + shift, teacher), expected, **close)
    torch.testing.assert_close(correlation_distance(-student, teacher), 2 - expected, **close)


def test_dist_knows_no_affine_change_of_probabilities_and_no_shift_of_logits():
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64)
    shift = torch.randn(6, 1, dtype=torch.float64)
    torch.testing.assert_close(dist(student + shift, teacher - shift), dist(student, teacher))
    p, q = student.softmax(1), teacher.softmax(1)
    expected = correlation_distance(p, q) + correlation_distance(p.T, q.T)
    torch.testing.assert_close(dist(student, teacher), expected)
    changed = 3 * p + 0.5  # what the paper calls a relaxed match: the student need not be as confident as the teacher
    torch.testing.assert_close(correlation_distance(changed, q) + correlation_distance(changed.T, q.T), expected)


def test_rows_without_variation():
    flat = torch.full((3, 4), 0.1)
    assert torch.equal(standardise(flat), torch.zeros(3, 4))
    assert correlation_distance(flat, torch.randn(3, 4)) == 1
    rounded = torch.tensor([[0.1, 0.1, 0.1 + 1e-8, 0.1], [-3, -3 - 3e-7, -3, -3], [0, 0, 0, 0]])
    assert rounded[0, 2] != rounded[0, 0] and rounded[1, 1] != rounded[1, 0]
    assert torch.equal(standardise(rounded), torch.zeros(3, 4))
    nearly = (100 + 0.001 * torch.randn(3, 50, generator=torch.Generator().manual_seed(0))).requires_grad_()
    torch.testing.assert_close(standardise(nearly).std(1, correction=0), torch.ones(3))
    standardise(nearly).pow(3).sum().backward()
    assert nearly.grad.isfinite().all()


def test_bce_is_refused():
    a = torch.zeros(2, 3)
    with pytest.raises(InputError, match=r"'bce' is ill-formed: .*raw logits for probabilities.* use 'ce' or 'sce'"):
        soft_loss(a, a, "bce")
    with pytest.raises(InputError, match=r"unknown soft loss 'sc'; did you mean 'sce'.*known kinds: ce, sce, kl, mse"):
        soft_loss(a, a, "sc")


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


@pytest.mark.parametrize("wrong", [[0, 3], [-1, 0], [0, -100]])
def test_targets_out_of_range(wrong):
    a = torch.zeros(2, 3)
    number = min(wrong) if min(wrong) < 0 else max(wrong)
    with pytest.raises(InputError, match=rf"targets must lie in \[0, 2\], got {number}"):
        dkd(a, a, torch.tensor(wrong), 1.0, 1.0, 1.0)
    with pytest.raises(InputError, match=r"targets must be int64, got torch.int32"):
        dkd(a, a, torch.tensor([0, 1], dtype=torch.int32), 1.0, 1.0, 1.0)


@pytest.mark.parametrize("loss", [lambda s, t: kd(s, t, 4.0), lskd(smoothed_cross_entropy), dist, soft_loss])
def test_bad_logits(loss):
    a = torch.zeros(2, 3)
    for first, second in ((a, a[:1]), (a, a[:, :2]), (a[0], a[0]), (a[None], a[None])):
        with pytest.raises(InputError, match=r"must both be \[N, C\] with equal sizes"):
            loss(first, second)
    with pytest.raises(InputError, match=r"at least one image.* got logits \[0, 3\]"):
        loss(a[:0], a[:0])
    with pytest.raises(InputError, match=r"floating-point tensors, got torch.int64"):
        loss(a.long(), a.long())


def test_bad_temperatures_and_sizes():
    a = torch.zeros(2, 3)
    for temperature in (0, -1, math.nan, math.inf):
        for loss in (kd, lskd(kd), lambda s, t, temperature: dist(s, t, temperature=temperature)):
            with pytest.raises(InputError, match=f"temperature must be positive, got {temperature}"):
                loss(a, a, temperature)
    with pytest.raises(InputError, match="relations within a class need at least 2 samples, got 1"):
        dist(a[:1], a[:1])
    with pytest.raises(InputError, match=r"at least 2 numbers in the last dimension; got \[2, 1\]"):
        dist(a[:, :1], a[:, :1])
    with pytest.raises(InputError, match=r"needs logits \[N, C >= 2\], got \[2, 1\]"):
        standardise(a[:, :1])
