"""Kdiffusion: the posterior's coefficients, the chain and its options, the guided loss, the connector."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reparam.distill.kdiffusion import (
    SCHEDULES,
    LayerLoss,
    Options,
    average,
    chain,
    check_joinable,
    coefficients,
    diffusion,
    guided,
    permutation,
    scaled,
    trace,
)
from reparam.distill.kdiffusion.steps import last_prediction
from reparam.errors import InputError

TABLES = {
    ("linear", 10): "0.383,.014 .423,.032 .466,.065 .509,.118 .543,.193 .554,.286 .526,.397 .438,.536 .259,.737 0,1",
    ("linear", 4): "0.109,.057 .191,.269 .200,.668 0,1",
    ("cosine", 10): "0.001,.155 .470,.234 .599,.267 .639,.296 .638,.330 .608,.377 .548,.446 .445,.553 .265,.735 0,1",
}

chains = st.tuples(st.sampled_from(SCHEDULES), st.integers(2, 24), st.integers(0, 2000)).map(
    lambda drawn: (drawn[0], drawn[1] + drawn[2], drawn[1])
)

# Coefficients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "features"), TABLES)
def test_tables(schedule, features):
    rows = [tuple(map(float, row.split(","))) for row in TABLES[schedule, features].split()]
    u, v = coefficients(schedule, 1000, features)
    assert len(u) == len(v) == features
    assert np.allclose(list(zip(u, v, strict=True)), rows, atol=1.01e-3 if schedule == "cosine" else 5.01e-4)


@pytest.mark.parametrize(("schedule", "features"), [("linear", 10), ("cosine", 10), ("linear", 4)])
def test_coefficients_are_a_regression_of_samples(schedule, features):
    """Draw both noises, and fit x_s to x_n and x_0."""
    found = diffusion(schedule, 1000, features)
    generator = np.random.default_rng(0)
    count = 400_000
    for k in range(features):
        a = found.signal[k] / found.signal[k + 1]
        x0, first, second = generator.normal(size=(3, count))
        x_s = found.signal[k + 1] * x0 + found.noise[k + 1] * first
        x_n = a * x_s + math.sqrt(1 - a * a) * second
        design = np.stack([x_n, x0])
        (u, v) = np.linalg.solve(design @ design.T, design @ x_s)
        w = np.var(x_s - u * x_n - v * x0)
        assert (u, v, w) == pytest.approx((found.u[k], found.v[k], found.w[k]), rel=0.02, abs=4e-3)


@given(chains)
def test_coefficients_condition_a_gaussian(arguments):
    """The posterior by the rule for conditioning normal vectors, from the covariances of (x_s, x_n, x_0)."""
    found = diffusion(*arguments)
    for k in range(len(found)):
        big, small = found.signal[k + 1], found.signal[k]
        a = small / big
        variance = found.noise[k + 1] ** 2
        given_x0 = np.array([[variance, a * variance], [a * variance, a * a * variance + 1 - a * a]])
        u = given_x0[0, 1] / given_x0[1, 1]
        assert found.u[k] == pytest.approx(u, rel=1e-7, abs=1e-12)
        assert found.v[k] == pytest.approx(big - u * small, rel=1e-7, abs=1e-12)
        assert found.w[k] == pytest.approx(given_x0[0, 0] - u * given_x0[0, 1], rel=1e-6, abs=1e-12)


@given(chains)
def test_what_every_chain_is(arguments):
    found = diffusion(*arguments)
    assert found.times[0] == arguments[1] and found.times[-1] == 0
    assert all(a > b for a, b in itertools.pairwise(found.times))
    assert found.u[-1] == 0 and found.v[-1] == 1 and found.w[-1] == 0
    assert found.signal[-1] == 1 and all(0 <= a < b <= 1 for a, b in itertools.pairwise(found.signal))
    assert all(0 <= x <= 1 for x in (*found.u, *found.v, *found.w))
    for k in range(len(found)):
        assert found.u[k] * found.signal[k] + found.v[k] == pytest.approx(found.signal[k + 1])
        spread = found.u[k] ** 2 * found.noise[k] ** 2 + found.w[k]
        assert spread == pytest.approx(found.noise[k + 1] ** 2, abs=1e-12)


def test_the_betas_of_ddpm():
    """Every step of the schedule, from the betas themselves."""
    kept = np.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    found = diffusion("linear", 1000, 1000)
    assert np.allclose(found.signal[::-1], [1, *kept], rtol=1e-12, atol=0)


def test_a_schedule_hardly_depends_on_its_steps():
    for schedule in SCHEDULES:
        long = np.array(coefficients(schedule, 100_000, 8))
        assert np.allclose(coefficients(schedule, 1000, 8), long, atol=2e-3)
    assert np.allclose(coefficients("linear", 10, 10), coefficients("linear", 1000, 10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linar", 1000, 10), "unknown noise schedule 'linar'; did you mean 'linear'"),
        (("linear", 1000, 1), r"at least 2 features, got 1.*hint"),
        (("linear", 9, 10), "as many diffusion steps, got 9"),
        (("linear", 1e3, 10), r"steps must be a whole number, got 1000\.0"),
        (("cosine", 1000, True), "features must be a whole number"),
    ],
)
def test_bad_coefficients(arguments, message):
    with pytest.raises(InputError, match=message):
        coefficients(*arguments)


# The chain -----------------------------------------------------------------------------------------------------------


def problem(count=4, shape=(3, 5, 4, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count + 1, *shape, dtype=torch.float64, generator=generator)
    return (
        [value.clone().requires_grad_() for value in values[1:]],
        3 * values[0].detach() + 1,
        diffusion("linear", 1000, count),
    )


def reference(features, teacher, numbers, order, options):
    """The pseudo-algorithm, element by element of the list."""
    y = [features[p].detach().numpy() for p in order]
    x = teacher.numpy()
    if options.standardise:
        x = (x - x.mean((0, 2, 3), keepdims=True)) / x.std((0, 2, 3), keepdims=True)
    f = y[0] if options.start == "first" else 0 * x
    loss = 0.0
    for k in range(len(y)):
        begin = f if options.noise == "chain" else numbers.signal[k] * x + numbers.noise[k] * y[k]
        target = numbers.u[k] * begin + numbers.v[k] * x
        f = numbers.u[k] * f + numbers.v[k] * y[k]
        loss += np.mean((f - target) ** 2)
    return loss


@pytest.mark.parametrize("start", ["first", "zero"])
@pytest.mark.parametrize("noise", ["student", "chain"])
@pytest.mark.parametrize("standardise", [False, True])
def test_the_chain_equals_the_pseudo_algorithm(start, noise, standardise):
    features, teacher, numbers = problem()
    options = Options(features=4, start=start, noise=noise, standardise=standardise)
    order = torch.tensor([2, 0, 3, 1])
    found = chain(features, teacher, numbers, order, options)
    assert float(found.detach()) == pytest.approx(reference(features, teacher, numbers, order, options), rel=1e-12)
    found.backward()
    assert all(torch.isfinite(f.grad).all() and f.grad.abs().sum() > 0 for f in features)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("start", ["first", "zero"])
def test_exact_features_give_the_data(schedule, start):
    _, teacher, _ = problem()
    options = Options(schedule=schedule, start=start)
    x = scaled(teacher).values
    found = trace([x] * 10, teacher, options.diffusion(), torch.arange(10), options)
    assert torch.equal(found.predictions[-1], x)
    assert torch.equal(found.targets[-1], x)


def test_an_exact_chain_follows_the_mean():
    """From the mean at time T, exact features lead through ``A_n x_0``, and the loss without noise is 0."""
    _, teacher, _ = problem()
    numbers = diffusion("linear", 1000, 10)
    x = scaled(teacher).values
    value = numbers.signal[0] * x
    for k in range(10):
        value = numbers.u[k] * value + numbers.v[k] * x
        assert torch.allclose(value, numbers.signal[k + 1] * x, rtol=1e-12, atol=1e-15)


def test_without_shuffling_only_the_last_feature_counts():
    features, teacher, numbers = problem()
    found = trace(features, teacher, numbers, torch.arange(4)).predictions[-1]
    assert torch.equal(found, features[3])
    assert torch.equal(trace(features, teacher, numbers, torch.tensor([3, 1, 2, 0])).predictions[-1], features[0])


def test_no_gradient_reaches_targets_or_teacher():
    features, teacher, numbers = problem()
    teacher.requires_grad_()
    found = trace(features, teacher, numbers, torch.arange(4))
    assert not any(target.requires_grad for target in found.targets)
    chain(features, teacher, numbers, torch.arange(4)).backward()
    assert teacher.grad is None


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(2, 6),
    start=st.sampled_from(["first", "zero"]),
    noise=st.sampled_from(["student", "gaussian", "chain"]),
    detach=st.booleans(),
    shuffle=st.sampled_from(["iteration", "sample", "none"]),
    format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    seed=st.integers(0, 2**31),
)
def test_the_products_are_the_chain(count, start, noise, detach, shuffle, format, seed):
    """Value and gradient of the loss, against automatic differentiation of the steps one after the other."""
    features, teacher, numbers = problem(count, seed=seed)
    features = [f.detach().contiguous(memory_format=format).requires_grad_() for f in features]
    options = Options(features=count, start=start, noise=noise, detach=detach, shuffle=shuffle)
    draw = lambda: torch.Generator().manual_seed(seed)
    order = permutation(options, len(teacher), draw())
    steps = trace(features, teacher, numbers, order, options, draw())
    expected = sum(((f - t) ** 2).mean() for f, t in zip(steps.predictions, steps.targets, strict=True))
    found = chain(features, teacher, numbers, order, options, draw())
    whole = chain(torch.stack(features), teacher, numbers, order, options, draw())
    assert torch.allclose(found, expected, rtol=1e-12) and torch.equal(found, whole)
    assert torch.equal(last_prediction(torch.stack(features), order), steps.predictions[-1])
    for ours, theirs in zip(torch.autograd.grad(found, features), torch.autograd.grad(expected, features), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-14)


def test_detached_predictions():
    features, teacher, numbers = problem()
    order = torch.arange(4)
    whole, cut = (chain(features, teacher, numbers, order, Options(features=4, detach=d)) for d in (False, True))
    assert torch.allclose(whole, cut, rtol=1e-12)
    first, second = (torch.autograd.grad(loss, features[0])[0] for loss in (whole, cut))
    x = trace(features, teacher, numbers, order, Options(features=4))
    own = 2 * (x.predictions[0] - x.targets[0]) * numbers.v[0] / x.targets[0].numel()
    assert torch.allclose(second, own.detach())  # its own step alone
    assert not torch.allclose(first, second)


def test_gaussian_noise_comes_from_its_generator():
    features, teacher, numbers = problem()
    options = Options(features=4, noise="gaussian")
    losses = [
        chain(features, teacher, numbers, torch.arange(4), options, torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_an_order_per_sample():
    features, teacher, numbers = problem()
    order = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]])
    options = Options(features=4, standardise=False)
    found = chain(features, teacher, numbers, order, options)
    parts = [chain([f[n : n + 1] for f in features], teacher[n : n + 1], numbers, order[n], options) for n in range(3)]
    assert torch.allclose(found, torch.stack(parts).mean())


@pytest.mark.parametrize("shuffle", ["iteration", "sample", "none"])
def test_permutations(shuffle):
    options = Options(shuffle=shuffle)
    draws = [permutation(options, 6, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2]) == (shuffle == "none")
    assert draws[0].shape == ((6, 10) if shuffle == "sample" else (10,))
    assert torch.equal(draws[0].sort(-1).values, torch.arange(10).expand(draws[0].shape))


def test_vectors_are_maps_of_one_place():
    features, teacher, numbers = problem(shape=(6, 5))
    maps = chain([f[:, :, None, None] for f in features], teacher[:, :, None, None], numbers, torch.arange(4))
    assert torch.equal(chain(features, teacher, numbers, torch.arange(4)), maps)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), st.sampled_from([1e-3, 1.0, 100.0]))
def test_half_precision_and_sizes(dtype, size):
    features, teacher, numbers = problem()
    given_features = [(size * f.detach()).to(dtype).requires_grad_() for f in features]
    loss = chain(given_features, (size * teacher).to(dtype), numbers, torch.arange(4))
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert all(torch.isfinite(f.grad).all() for f in given_features)


def test_standardised_teachers():
    _, teacher, _ = problem()
    teacher[:, 2] = 7.1  # a dead channel
    found = scaled(teacher)
    assert torch.allclose(found.values.mean((0, 2, 3)), torch.zeros(5, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(found.values.var((0, 2, 3), correction=0), torch.tensor([1.0, 1, 0, 1, 1]).double())
    assert torch.allclose(found.restore(found.values), teacher)
    assert torch.equal(scaled(teacher, False).values, teacher)
    with pytest.raises(InputError, match=r"fewer than two values per channel.*standardise=False"):
        scaled(torch.randn(1, 4))


def test_the_control():
    features, teacher, _ = problem()
    x = scaled(teacher).values
    assert torch.allclose(average(features, teacher), ((sum(features) / 4 - x) ** 2).mean())
    assert average([x, x], teacher) == 0


def test_bad_chains():
    features, teacher, numbers = problem()
    call = lambda f=features, o=None: chain(f, teacher, numbers, torch.arange(4) if o is None else o)
    with pytest.raises(InputError, match="chain of 4 steps needs as many features, got 3"):
        call(features[:3])
    with pytest.raises(InputError, match=r"feature 1 of the student is \[3, 4, 4, 4\].*connector"):
        call([features[0], features[1][:, :4], *features[2:]])
    with pytest.raises(InputError, match="must be tensors, one per head"):
        call([None] * 4)
    with pytest.raises(InputError, match="there are no features"):
        call([])
    with pytest.raises(InputError, match="each of the numbers 0 to 3 once"):
        call(o=torch.tensor([0, 1, 1, 3]))
    with pytest.raises(InputError, match=r"int64 numbers \[4\] or \[3, 4\]"):
        call(o=torch.arange(5))


# Options -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "frist"}, "start='frist'; did you mean 'first'"),
        ({"noise": "teacher"}, "choose from student, gaussian, chain"),
        ({"features": 1}, "at least 2 features"),
        ({"middle": -1.0}, "from 0 on, got -1"),
        ({"layer_weights": (1.0, math.nan)}, "from 0 on, got nan"),
        ({"detach": "no"}, "detach is True or False, got 'no'"),
    ],
)
def test_bad_options(settings, message):
    with pytest.raises(InputError, match=message):
        Options(**settings)


def test_weights_of_layers():
    assert Options().layer_weight(2, 3) == 1.0
    assert Options(layer_weights=(1.0, 0.5)).layer_weight(1, 2) == 0.5
    with pytest.raises(InputError, match="2 weights for 3 layers"):
        Options(layer_weights=(1.0, 0.5)).layer_weight(0, 3)


# Layers --------------------------------------------------------------------------------------------------------------


def test_guided_loss():
    torch.manual_seed(0)
    _, teacher, _ = problem()
    head = nn.Sequential(nn.Conv2d(5, 6, 3), nn.BatchNorm2d(6), nn.ReLU()).double().eval()
    x = scaled(teacher).values
    assert guided(x, teacher, head) < 1e-28  # the next layer sees the teacher's own scale
    other = torch.randn_like(x).requires_grad_()
    loss = guided(other, teacher, head)
    statistics = teacher.mean((0, 2, 3), keepdim=True), teacher.std((0, 2, 3), correction=0, keepdim=True)
    assert torch.allclose(loss, (head(other * statistics[1] + statistics[0]) - head(teacher)).square().mean())
    loss.backward()
    assert other.grad.abs().sum() > 0
    assert all(p.grad is None for p in head.parameters())
    with pytest.raises(InputError, match="train mode"):
        guided(other, teacher, head.train())


def test_guided_loss_on_vectors():
    torch.manual_seed(0)
    teacher = torch.randn(6, 5)
    classifier = nn.Linear(5, 3).eval()
    layer = LayerLoss(torch.randn(6, 4), teacher, Options(features=4))
    features = [torch.randn(6, 4) for _ in range(4)]
    order = torch.arange(4)
    assert layer(features, teacher, classifier, order) > layer(features, teacher, order=order)
    assert guided(scaled(teacher).values, teacher, classifier) < 1e-12


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((4, 3, 8, 8), (4, 5, 8, 8)), ((4, 3, 7, 7), (4, 5, 4, 4)), ((4, 3, 4, 4), (4, 3, 8, 8)), ((4, 3), (4, 5)),
     ((4, 3, 4, 4), (4, 5)), ((4, 3), (4, 5, 1, 1))],
)  # fmt: skip
@pytest.mark.parametrize("options", [Options(features=3), Options(features=3, shuffle="sample", guide_from="last")])
def test_layers_of_different_sizes(student, teacher, options):
    torch.manual_seed(0)
    layer = LayerLoss(torch.empty(student), torch.empty(teacher), options)
    features = [torch.randn(student, requires_grad=True) for _ in range(3)]
    loss = layer(features, torch.randn(teacher), generator=torch.Generator().manual_seed(0))
    loss.backward()
    assert loss.dim() == 0 and torch.isfinite(loss)
    assert all(f.grad is not None for f in features)
    assert all(p.grad is not None for p in layer.parameters())
    assert (layer.connector is None) == (student[1] == teacher[1])


def test_the_connector_is_one_affine_function_of_all_heads():
    torch.manual_seed(0)
    teacher = torch.randn(4, 5, 6, 6)
    layer = LayerLoss(torch.empty(4, 3, 8, 8), teacher, Options(features=3))
    features = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    mean = torch.stack(features).mean(0)
    joined = layer.join([*features[:2], features[2]], teacher)
    norm = layer.connector.norm
    assert norm.num_batches_tracked == 1
    norm.running_mean.copy_(torch.randn(5))
    layer.eval()
    joined = layer.join(features, teacher)
    assert torch.allclose(joined.mean(0), layer.connector(mean, (6, 6)), atol=1e-5)


def test_weights_of_both_losses():
    torch.manual_seed(0)
    teacher, features = torch.randn(4, 5, 6, 6), [torch.randn(4, 5, 6, 6) for _ in range(3)]
    head, order = nn.Conv2d(5, 2, 1).eval(), torch.tensor([1, 0, 2])
    make = lambda weight=1.0, **more: LayerLoss(features[0], teacher, Options(features=3, **more), weight)
    plain, both = make()(features, teacher, order=order), make()(features, teacher, head, order)
    assert both > plain
    assert torch.allclose(make(2.0, guide=0.0)(features, teacher, head, order), 2 * plain)
    assert torch.allclose(make(middle=0.5, guide=3.0)(features, teacher, head, order), 3 * (both - plain) + plain / 2)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((4, 3), (4, 5, 8, 8), "a vector knows nothing of places"),
        ((4, 3, 16, 4), (4, 5, 8, 8), "one is higher, the other wider"),
        ((4, 3, 8, 8), (2, 5, 8, 8), "equally many images"),
        ((4, 9, 3), (4, 5, 3, 3), "must be maps"),
        ((0, 3, 8, 8), (0, 5, 8, 8), "at least one"),
    ],
)
def test_sizes_that_no_connector_can_join(student, teacher, message):
    with pytest.raises(InputError, match=message):
        check_joinable(torch.empty(student), torch.empty(teacher))
    with pytest.raises(InputError, match=message):
        LayerLoss(torch.empty(student), torch.empty(teacher), Options())


def test_a_layer_insists_on_its_features():
    layer = LayerLoss(torch.empty(4, 3, 8, 8), torch.empty(4, 5, 8, 8), Options(features=3))
    with pytest.raises(InputError, match="expected 3 features, one per head, got 2"):
        layer([torch.randn(4, 3, 8, 8)] * 2, torch.randn(4, 5, 8, 8))
    with pytest.raises(InputError, match="made for features of 3 channels"):
        layer([torch.randn(4, 4, 8, 8)] * 3, torch.randn(4, 5, 8, 8))
