"""The losses on features against independent float64 formulas: plain loops, one number at a time."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reparam.distill.losses import (
    ABF,
    CRD,
    Connector,
    FitNet,
    ReviewKD,
    attention_map,
    attention_transfer,
    hcl,
    hint,
    noise_contrast,
    rkd,
    rkd_angle,
    rkd_distance,
)
from reparam.errors import InputError

CLOSE = {"rtol": 1e-8, "atol": 1e-10}
HALVES = [torch.float16, torch.bfloat16]


def normal(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def huber(x):
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def length(vector):
    return math.sqrt(sum(x * x for x in vector))


def mean_square(a, b):
    a, b = np.asarray(a).ravel(), np.asarray(b).ravel()
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)


# RKD -----------------------------------------------------------------------------------------------------------------


def reference_distance(student, teacher):
    pairs = list(itertools.permutations(range(len(student)), 2))
    own, other = ([length(rows[i] - rows[j]) for i, j in pairs] for rows in (student, teacher))
    mean_own, mean_other = sum(own) / len(pairs), sum(other) / len(pairs)
    return sum(huber(a / mean_own - b / mean_other) for a, b in zip(own, other, strict=True)) / len(pairs)


def reference_angle(student, teacher):
    triples = list(itertools.permutations(range(len(student)), 3))

    def cosine(rows, i, j, k):
        a, b = rows[i] - rows[j], rows[k] - rows[j]
        product = sum(x * y for x, y in zip(a, b, strict=True))
        return product / (length(a) * length(b)) if length(a) * length(b) else 0.0

    return sum(huber(cosine(student, *triple) - cosine(teacher, *triple)) for triple in triples) / len(triples)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 6), st.integers(1, 5), st.integers(2, 4))
def test_rkd_equals_its_formulas(seed, count, width, other_width):
    student, teacher = normal(seed, count, width), normal(seed + 1, count, other_width)
    distance = reference_distance(student.numpy(), teacher.numpy())
    angle = reference_angle(student.numpy(), teacher.numpy())
    np.testing.assert_allclose(rkd_distance(student, teacher), distance, **CLOSE)
    np.testing.assert_allclose(rkd_angle(student, teacher), angle, **CLOSE)
    np.testing.assert_allclose(rkd(student, teacher), 25 * distance + 50 * angle, **CLOSE)
    np.testing.assert_allclose(rkd(student, teacher, 2, 0), 2 * distance, **CLOSE)


def test_large_differences_are_on_the_straight_part():
    """One student pair far off, so that Huber's quadratic part does not do for all."""
    student, teacher = torch.tensor([[0.0], [0.1], [100.0]]).double(), torch.tensor([[0.0], [5.0], [5.1]]).double()
    expected = reference_distance(student.numpy(), teacher.numpy())
    np.testing.assert_allclose(rkd_distance(student, teacher), expected, **CLOSE)
    np.testing.assert_allclose(rkd_angle(student, teacher), reference_angle(student.numpy(), teacher.numpy()), **CLOSE)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
def test_rkd_knows_no_translation_no_scale_and_no_rotation(seed, scale, shift):
    student, teacher = normal(seed, 5, 4), normal(seed + 1, 5, 3)
    turn = torch.linalg.qr(normal(seed + 2, 4, 4))[0]
    for loss in (rkd_distance, rkd_angle):
        expected = loss(student, teacher)
        for changed in (scale * student, student + shift, student @ turn, scale * student @ turn + shift):
            torch.testing.assert_close(loss(changed, teacher), expected, rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(loss(student, scale * teacher + shift), expected, rtol=1e-7, atol=1e-10)
        assert loss(student, scale * student + shift) < 1e-15


def test_equal_samples_have_distance_and_gradient_zero():
    student = torch.zeros(4, 3, requires_grad=True)
    teacher = torch.randn(4, 3)
    rkd(student, teacher).backward()
    assert student.grad.abs().max() == 0
    pair = torch.tensor([[1.0, 2], [1, 2], [0, 1], [5, 5]], dtype=torch.float64, requires_grad=True)
    numbers = pair.detach().numpy(), teacher.double().numpy()
    expected = 25 * reference_distance(*numbers) + 50 * reference_angle(*numbers)
    np.testing.assert_allclose(rkd(pair, teacher.double()).detach(), expected, **CLOSE)
    rkd(pair, teacher).backward()
    assert pair.grad.isfinite().all() and pair.grad.abs().max() > 0


# AT ------------------------------------------------------------------------------------------------------------------


def pooled(plane, height, width):
    """Average pooling to a size, bin by bin: bin i covers floor(i h / H) to ceil((i + 1) h / H)."""
    rows, columns = plane.shape
    result = np.empty((height, width))
    for i, j in itertools.product(range(height), range(width)):
        top, bottom = i * rows // height, -(-(i + 1) * rows // height)
        left, right = j * columns // width, -(-(j + 1) * columns // width)
        result[i, j] = plane[top:bottom, left:right].mean()
    return result


def reference_attention(student, teacher, power):
    total = 0
    for own, other in zip(student, teacher, strict=True):
        size = [min(a, b) for a, b in zip(own.shape[2:], other.shape[2:], strict=True)]
        errors = []
        for a, b in zip(own, other, strict=True):
            vectors = []
            for image in (a, b):
                plane = sum(np.abs(channel) ** power for channel in image) / len(image)
                vector = pooled(plane, *size).ravel()
                vectors.append(vector / length(vector))
            errors.append(mean_square(*vectors))
        total += sum(errors) / len(errors)
    return total


@pytest.mark.parametrize("power", [1, 2, 3])
def test_attention_transfer_equals_its_formula(power):
    student = [normal(0, 3, 4, 6, 5), normal(1, 3, 2, 3, 3), normal(2, 3, 5, 1, 1)]
    teacher = [normal(3, 3, 7, 6, 5), normal(4, 3, 2, 7, 2), normal(5, 3, 5, 1, 1)]
    expected = reference_attention([x.numpy() for x in student], [x.numpy() for x in teacher], power)
    np.testing.assert_allclose(attention_transfer(student, teacher, power), expected, **CLOSE)


def test_attention_knows_no_scale_and_no_order_of_channels():
    student, teacher = [normal(0, 3, 4, 6, 5)], [normal(1, 3, 7, 6, 5)]
    expected = attention_transfer(student, teacher)
    torch.testing.assert_close(attention_transfer([1e3 * student[0].flip(1)], [-1e-3 * teacher[0]]), expected)
    expected = sum(abs(student[0][:, c]) ** 3 for c in range(4)) / 4
    torch.testing.assert_close(attention_map(student[0], 3), expected)
    assert attention_transfer(student, [2 * student[0]]) < 1e-30
    blank = torch.zeros(3, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    attention_transfer([blank], teacher).backward()
    assert blank.grad.abs().max() == 0


# FitNet --------------------------------------------------------------------------------------------------------------


def test_hint_equals_its_formula():
    student, teacher = normal(0, 2, 3, 4, 5), normal(1, 2, 3, 4, 5)
    np.testing.assert_allclose(hint(student, teacher), mean_square(student, teacher), **CLOSE)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("size", [(4, 6), (2, 3), (8, 12), (3, 9)])
def test_fitnet_equals_its_formula(norm, size):
    student, teacher = normal(0, 3, 2, 4, 6), normal(1, 3, 5, *size)
    module = FitNet(student, teacher, norm).double()
    weight = module.connector.conv.weight.detach().numpy()[:, :, 0, 0]
    bias = np.zeros(5) if norm else module.connector.conv.bias.detach().numpy()
    maps = np.einsum("oc,nchw->nohw", weight, student.numpy()) + bias[:, None, None]
    maps = np.array([[pooled(plane, min(4, size[0]), min(6, size[1])) for plane in image] for image in maps])
    if norm:
        mean, variance = maps.mean((0, 2, 3), keepdims=True), maps.var((0, 2, 3), keepdims=True)
        maps = (maps - mean) / np.sqrt(variance + 1e-5)
    fitted = np.empty((3, 5, *size))
    for n, o in itertools.product(range(3), range(5)):
        plane = maps[n, o]
        for i, j in itertools.product(*map(range, size)):
            fitted[n, o, i, j] = plane[i * plane.shape[0] // size[0], j * plane.shape[1] // size[1]]
    np.testing.assert_allclose(module(student, teacher).detach(), mean_square(fitted, teacher), **CLOSE)


def test_fitnet_takes_vectors_and_learns():
    torch.manual_seed(0)
    student, teacher = torch.randn(8, 5), torch.randn(8, 3)
    module = FitNet(student, teacher)
    assert set(dict(module.named_parameters())) == {
        "connector.conv.weight",
        "connector.norm.weight",
        "connector.norm.bias",
    }
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    first = module(student, teacher).item()
    for _ in range(50):
        optimizer.zero_grad()
        loss = module(student, teacher)
        loss.backward()
        optimizer.step()
    assert loss < 0.7 * first


# CRD -----------------------------------------------------------------------------------------------------------------


def reference_contrast(positive, negative, images, normaliser, temperature):
    """h = P / (P + K / M), P = exp(u / T) / Z; the mean of -log h(positive) - sum log(1 - h(negative))."""
    rows = []
    for right, wrong in zip(positive, negative, strict=True):
        bias = len(wrong) / images
        chance = math.exp(right / temperature) / normaliser
        loss = -math.log(chance / (chance + bias))
        for entry in wrong:
            chance = math.exp(entry / temperature) / normaliser
            loss -= math.log(bias / (chance + bias))
        rows.append(loss)
    return sum(rows) / len(rows)


@pytest.mark.parametrize("normaliser", [1.0, 37.0])
def test_noise_contrast_equals_its_formula(normaliser):
    positive, negative = normal(0, 4).tanh(), normal(1, 4, 6).tanh()
    expected = reference_contrast(positive.tolist(), negative.tolist(), 20, normaliser, 0.2)
    found = noise_contrast(positive, negative, 20, math.log(normaliser), 0.2)
    np.testing.assert_allclose(found, expected, **CLOSE)


def crd(labels=None, **options):
    torch.manual_seed(0)
    options = {"negatives": 5, "width": 4, "temperature": 0.3, **options}
    return CRD(torch.zeros(1, 3), torch.zeros(1, 6), 10, labels, **options).double()


def test_crd_equals_its_formula():
    """Two batches, written out: embeddings, both directions, the normaliser of the first batch, the memory after it."""
    module = crd()
    memory = {name: getattr(module, f"{name}_memory").numpy().copy() for name in ("student", "teacher")}
    normalisers = {}
    for batch in range(2):
        indices, negatives = (
            torch.tensor([7, 0, 3]),
            torch.from_numpy(np.random.default_rng(batch).integers(0, 10, (3, 5))),
        )
        features = {"student": normal(10 + batch, 3, 3), "teacher": normal(20 + batch, 3, 6)}
        vectors = {}
        for name, rows in features.items():
            layer = getattr(module, f"{name}_embedding")
            rows = rows.numpy() @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
            vectors[name] = [row / length(row) for row in rows]
        expected = 0
        for name, against in (("student", "teacher"), ("teacher", "student")):
            right = [float(v @ memory[against][i]) for v, i in zip(vectors[name], indices, strict=True)]
            wrong = [
                [float(v @ memory[against][i]) for i in row] for v, row in zip(vectors[name], negatives, strict=True)
            ]
            everything = right + [entry for row in wrong for entry in row]
            mean = sum(math.exp(entry / 0.3) for entry in everything) / len(everything)
            normalisers.setdefault(name, 10 * mean)
            expected += reference_contrast(right, wrong, 10, normalisers[name], 0.3)
        found = module(features["student"], features["teacher"], indices, negatives)
        np.testing.assert_allclose(found.detach(), expected, **CLOSE)
        for name, rows in vectors.items():
            for row, i in zip(rows, indices, strict=True):
                renewed = 0.5 * memory[name][i] + 0.5 * row
                memory[name][i] = renewed / length(renewed)
            np.testing.assert_allclose(getattr(module, f"{name}_memory"), memory[name], **CLOSE)
    np.testing.assert_allclose(module.estimate.exp(), list(normalisers.values()), **CLOSE)


def test_crd_is_changed_in_training_mode_only_and_is_all_in_its_state():
    module = crd()
    batch = normal(0, 4, 3), normal(1, 4, 6), torch.tensor([1, 2, 3, 9])
    module.eval()
    before = copy.deepcopy(module.state_dict())
    module(*batch)
    assert before["estimate"].isinf().all()
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    module.train()
    module(*batch)
    copied = crd()
    copied.load_state_dict(module.state_dict())
    losses = []
    for one in (module, copied):
        torch.manual_seed(3)
        losses.append(one(*batch))
    assert losses[0] == losses[1]
    assert (module.student_memory[0] == before["student_memory"][0]).all()
    assert (module.student_memory[1] != before["student_memory"][1]).all()


@pytest.mark.parametrize("labels", [None, torch.tensor([2, 0, 0, 2, 1, 1, 1, 1, 1, 7])])
def test_negatives_are_uniform_over_the_other_classes(labels):
    module = crd(labels, negatives=4000)
    classes = torch.arange(10) if labels is None else labels
    indices = torch.arange(10)
    drawn = module.draw(indices)
    assert drawn.shape == (10, 4000)
    for image in range(10):
        others = (classes != classes[image]).nonzero()[:, 0]
        counts = drawn[image].bincount(minlength=10)
        assert counts.sum() == counts[others].sum()
        assert (counts[others] - 4000 / len(others)).abs().max() < 6 * math.sqrt(4000 / len(others))
    assert not torch.equal(drawn, module.draw(indices))


def test_crd_agrees_with_other_processes_again_behind_a_roll_back():
    """They share memory and normalisers in the first step after any state was taken up."""
    module = crd()
    state = copy.deepcopy(module.state_dict())
    module(torch.randn(2, 3).double(), torch.randn(2, 6).double(), torch.arange(2))
    assert module._shared
    module.load_state_dict(state)
    assert not module._shared


def test_crd_tells_images_apart_after_training():
    torch.manual_seed(0)
    teacher = torch.randn(20, 6)
    module = CRD(torch.zeros(1, 6), torch.zeros(1, 6), 20, negatives=10, width=8)
    student = torch.randn(20, 6, requires_grad=True)
    optimizer = torch.optim.Adam([student, *module.parameters()], lr=0.02)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        losses.append(module(student, teacher, torch.arange(20)))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


# ReviewKD ------------------------------------------------------------------------------------------------------------


def reference_hcl(student, teacher):
    total = 0
    for own, other in zip(student, teacher, strict=True):
        loss, weights, used = mean_square(own, other), 1.0, 0
        for size in (4, 2, 1):
            if size < own.shape[2]:
                used += 1
                a, b = (np.array([[pooled(p, size, size) for p in image] for image in maps]) for maps in (own, other))
                loss += 0.5**used * mean_square(a, b)
                weights += 0.5**used
        total += loss / weights
    return total


def batch_norm(maps):
    return (maps - maps.mean((0, 2, 3), keepdims=True)) / np.sqrt(maps.var((0, 2, 3), keepdims=True) + 1e-5)


def convolution(maps, weight):
    """Cross-correlation with zeros around, offset by offset."""
    margin = weight.shape[2] // 2
    padded = np.pad(maps, [(0, 0), (0, 0), (margin, margin), (margin, margin)])
    result = np.zeros((len(maps), len(weight), *maps.shape[2:]))
    for i, j in itertools.product(range(weight.shape[2]), repeat=2):
        window = padded[:, :, i : i + maps.shape[2], j : j + maps.shape[3]]
        result += np.einsum("oc,nchw->nohw", weight[:, :, i, j], window)
    return result


def nearest(maps, size):
    rows = [i * maps.shape[2] // size[0] for i in range(size[0])]
    columns = [j * maps.shape[3] // size[1] for j in range(size[1])]
    return maps[:, :, rows][:, :, :, columns]


def reference_review(module, student, sizes):
    """Deep to shallow, as in the facts: reduce, gate with the residual, resize, project."""
    residual, outputs = None, []
    for level, maps, size in list(zip(module.levels, student, sizes, strict=True))[::-1]:
        maps = batch_norm(convolution(maps, level.reduce.weight.detach().numpy()))
        if residual is not None:
            residual = nearest(residual, maps.shape[2:])
            gates = convolution(np.concatenate([maps, residual], 1), level.attention.weight.detach().numpy())
            gates = 1 / (1 + np.exp(-gates - level.attention.bias.detach().numpy()[:, None, None]))
            maps = maps * gates[:, :1] + residual * gates[:, 1:]
        residual = nearest(maps, size)
        outputs.insert(0, batch_norm(convolution(residual, level.project.weight.detach().numpy())))
    return outputs


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_hcl_equals_its_formula(size):
    student, teacher = (
        [normal(0, 2, 3, size, size), normal(1, 2, 4, 1, 1)],
        [normal(2, 2, 3, size, size), normal(3, 2, 4, 1, 1)],
    )
    expected = reference_hcl([x.numpy() for x in student], [x.numpy() for x in teacher])
    np.testing.assert_allclose(hcl(student, teacher), expected, **CLOSE)
    assert hcl(student, student) == 0


def review_features():
    """Channels and sizes of two different networks: shallow to deep, the pooled vector last."""
    student = [normal(0, 3, 4, 8, 8), normal(1, 3, 6, 4, 4), normal(2, 3, 8, 3, 2), normal(3, 3, 8)]
    teacher = [normal(4, 3, 5, 8, 8), normal(5, 3, 7, 8, 8), normal(6, 3, 9, 2, 4), normal(7, 3, 10)]
    return student, teacher


def test_review_equals_its_formula():
    student, teacher = review_features()
    torch.manual_seed(0)
    module = ReviewKD(student, teacher).double()
    assert [level.attention is None for level in module.levels] == [False, False, False, True]
    assert {level.reduce.out_channels for level in module.levels} == {8}
    maps = [x.numpy().reshape(*x.shape, *[1] * (4 - x.ndim)) for x in student]
    targets = [x.numpy().reshape(*x.shape, *[1] * (4 - x.ndim)) for x in teacher]
    expected = reference_review(module, maps, [x.shape[2:] for x in targets])
    for found, wanted in zip(module.fuse(student, [x.shape[2:] for x in targets]), expected, strict=True):
        np.testing.assert_allclose(found.detach(), wanted, **CLOSE)
    total = 0
    for a, b in zip(expected, targets, strict=True):
        small = min(a.shape[2:])
        total += reference_hcl([a], [b]) if a.shape[2] == a.shape[3] else wide_hcl(a, b, small)
    np.testing.assert_allclose(module(student, teacher).detach(), total, **CLOSE)


def wide_hcl(a, b, small):
    """Height and width differ: the smaller one decides which sizes are pooled to."""
    assert (a.shape[2], small) == (2, 2)
    pools = [np.array([[pooled(p, 1, 1) for p in image] for image in maps]) for maps in (a, b)]
    return (mean_square(a, b) + 0.5 * mean_square(*pools)) / 1.5


def test_review_goes_by_the_sizes_of_the_batch():
    """Made from meta tensors of one size, used with images of another; the shallow output hears of the deepest map."""
    shapes = [(1, 4, 8, 8), (1, 6, 4, 4), (1, 6)]
    module = ReviewKD([torch.empty(s, device="meta") for s in shapes], [torch.empty(s, device="meta") for s in shapes])
    assert module.levels[0].reduce.weight.shape == (6, 4, 1, 1)
    features = [torch.randn(2, 4, 20, 12), torch.randn(2, 6, 10, 6), torch.randn(2, 6, requires_grad=True)]
    outputs = module.eval().fuse(features, [(10, 6), (5, 3), (1, 1)])
    assert [list(x.shape) for x in outputs] == [[2, 4, 10, 6], [2, 6, 5, 3], [2, 6, 1, 1]]
    assert torch.autograd.grad(outputs[0].sum(), features[2])[0].abs().max() > 0
    assert ReviewKD([torch.zeros(1, 2000)], [torch.zeros(1, 3)]).levels[0].reduce.out_channels == 512
    assert ReviewKD([torch.zeros(1, 20)], [torch.zeros(1, 3)], mid_channels=7).levels[0].reduce.out_channels == 7


def test_convolutions_of_a_fusion_start_kaiming_uniform():
    module = ABF(64, 128, 256, fuse=True)
    for layer, fan in ((module.reduce, 64), (module.project, 128 * 9)):
        bound = math.sqrt(3 / fan)  # gain 1 for a = 1
        assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert layer.bias is None


# All of them ---------------------------------------------------------------------------------------------------------


def cases():
    """Loss of (student, teacher) with fixed shapes; modules are in eval mode, so that they are functions."""
    torch.manual_seed(0)
    vectors, others = torch.randn(4, 6), torch.randn(4, 5)
    maps, targets = torch.randn(4, 3, 5, 5), torch.randn(4, 6, 4, 4)
    fitnet, review = FitNet(maps, targets).eval(), ReviewKD([maps, vectors], [targets, others]).eval()
    contrast = CRD(vectors, others, 10, negatives=5, width=4).eval()
    contrast.estimate.fill_(2.5)  # as after a first batch; the estimate itself is a constant of the gradient
    indices, negatives = torch.arange(4), torch.randint(4, 10, (4, 5))
    return {
        "rkd_distance": (rkd_distance, [vectors], [others], None),
        "rkd_angle": (rkd_angle, [vectors], [others], None),
        "attention": (lambda s, t: attention_transfer([s], [t]), [maps], [targets], None),
        "hint": (hint, [maps], [maps.flip(0)], None),
        "fitnet": (fitnet, [maps], [targets], fitnet),
        "crd": (lambda s, t: contrast(s, t, indices, negatives), [vectors], [others], contrast),
        "hcl": (lambda s, t: hcl([s], [t]), [maps], [maps.flip(0)], None),
        "review": (
            lambda a, b, c, d: review([a, b], [c, d]),
            [maps, vectors],
            [targets, others],
            review,
        ),
    }


NAMES = list(cases())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_student_only(name):
    loss, student, teacher, module = cases()[name]
    student = [x.clone().requires_grad_() for x in student]
    teacher = [x.clone().requires_grad_() for x in teacher]
    value = loss(*student, *teacher)
    assert value.shape == () and value.dtype == torch.float32
    value.backward()
    assert all(x.grad.abs().max() > 0 for x in student)
    assert all(x.grad is None for x in teacher)
    for key, parameter in module.named_parameters() if module else ():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    loss, student, teacher, module = cases()[name]
    student, teacher = [x.double().requires_grad_() for x in student], [x.double() for x in teacher]
    if module:
        module.double()
    assert torch.autograd.gradcheck(lambda *parts: loss(*parts, *teacher), student)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_computed_in_float32(name, dtype):
    loss, student, teacher, _ = cases()[name]
    student, teacher = [x.to(dtype) for x in student], [x.to(dtype) for x in teacher]
    found = loss(*student, *teacher)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss(*(x.float() for x in student), *(x.float() for x in teacher)))


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle", "attention", "hint", "hcl"])
def test_autocast_does_not_round_the_pure_functions(name):
    loss, student, teacher, _ = cases()[name]
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(*student, *teacher)
    assert torch.equal(found, loss(*student, *teacher))


@pytest.mark.parametrize("name", ["fitnet", "crd", "review"])
def test_modules_work_under_autocast(name):
    loss, student, teacher, _ = cases()[name]
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(*student, *teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(*student, *teacher), rtol=0.05, atol=0.05)


def test_autocast_does_not_round_what_contrast_compares():
    """Features and embeddings that bfloat16 holds exactly: what is left is the comparison with the memory."""
    module = CRD(torch.zeros(1, 4), torch.zeros(1, 4), 10, negatives=5, width=4).eval()
    for layer in (module.student_embedding, module.teacher_embedding):
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    features = torch.randint(-9, 9, (2, 3, 4)).float()
    batch = *features, torch.arange(3), torch.randint(10, (3, 5))
    with torch.autocast("cpu", torch.bfloat16):
        found = module(*batch)
    assert torch.equal(found, module(*batch))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [0.0, 1e-4, 1e4])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_extreme_features_stay_finite(name, size, dtype):
    loss, student, teacher, _ = cases()[name]
    student = [(x.sign() * size).to(dtype).requires_grad_() for x in student]
    value = loss(*student, *((-x.sign() * size).to(dtype) for x in teacher))
    gradients = torch.autograd.grad(value, student)
    assert value.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle, lambda s, t: attention_transfer([s], [t])])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_losses_without_a_scale_take_every_size(loss, size):
    student, teacher = normal(0, 4, 3, 2, 2).float(), normal(1, 4, 3, 2, 2).float()
    torch.testing.assert_close(loss(student * size, teacher / size), loss(student, teacher))


# Bad input -----------------------------------------------------------------------------------------------------------


def test_bad_embeddings():
    a = torch.zeros(4, 3)
    for loss in (rkd, rkd_distance, rkd_angle):
        with pytest.raises(InputError, match=r"must be \[N, ...\] with equal N; got \[4, 3\] and \[2, 3\]"):
            loss(a, a[:2])
        with pytest.raises(InputError, match=r"floating-point tensors, got torch.int64"):
            loss(a.long(), a)
        with pytest.raises(InputError, match=r"embeddings are empty"):
            loss(a[:, :0], a)
    with pytest.raises(InputError, match="distances need at least 2 samples, got 1"):
        rkd_distance(a[:1], a[:1])
    with pytest.raises(InputError, match="angles need at least 3 samples, got 2"):
        rkd(a[:2], a[:2])


def test_bad_levels():
    a = torch.zeros(2, 3, 4, 4)
    for loss in (attention_transfer, hcl, ReviewKD):
        with pytest.raises(InputError, match="equally many levels, at least one; got 1 and 2"):
            loss([a], [a, a])
        with pytest.raises(InputError, match="equally many levels, at least one; got 0 and 0"):
            loss([], [])
        with pytest.raises(InputError, match="lists of tensors, one per level; got a tensor"):
            loss(a, a)
        with pytest.raises(
            InputError, match=r"level 1 must be .* equally many images.* got \[2, 3, 4, 4\] and \[1, 3,"
        ):
            loss([a, a], [a, a[:1]])
        with pytest.raises(InputError, match=r"level 0 must be \[N, C, ...\] .* got \[2\] and \[2\]"):
            loss([a[:, 0, 0, 0]], [a[:, 0, 0, 0]])
    with pytest.raises(InputError, match=r"need features \[N, C, H, W\], got \[2, 3\]"):
        attention_transfer([a[:, :, 0, 0]], [a])
    with pytest.raises(InputError, match=r"power must be at least 1, got 0.5"):
        attention_map(a, 0.5)
    with pytest.raises(InputError, match=r"level 0 must have equal shapes, got \[2, 3, 4, 4\] and \[2, 2, 4, 4\]"):
        hcl([a], [a[:, :2]])
    with pytest.raises(InputError, match=r"maps \[N, C, H, W\] or vectors \[N, C\], got \[2, 3, 4\]"):
        hcl([a[..., 0]], [a[..., 0]])


def test_bad_hints_and_reviews():
    a = torch.randn(2, 3, 4, 4)
    with pytest.raises(InputError, match=r"equal shapes, not empty; .* use FitNet, which has a connector"):
        hint(a, a[:, :2])
    with pytest.raises(InputError, match=r"made for 5 teacher channels .* got \[2, 3, 4, 4\] and \[2, 3, 4, 4\]"):
        FitNet(a, torch.zeros(1, 5, 2, 2))(a, a)
    with pytest.raises(InputError, match=r"the connector takes 7 channels, got \[2, 3, 4, 4\]"):
        Connector(7, 3)(a, (4, 4))
    review = ReviewKD([a, a[:, :, 0, 0]], [a, a[:, :, 0, 0]])
    with pytest.raises(InputError, match=r"made for student channels \[3, 3\], got \[2, 3\]"):
        review([a[:, :2], a[:, :, 0, 0]], [a, a[:, :, 0, 0]])
    with pytest.raises(InputError, match=r"made for teacher channels \[3, 3\], got \[3, 2\]"):
        review([a, a[:, :, 0, 0]], [a, a[:, :2, 0, 0]])
    with pytest.raises(InputError, match="at least 2 samples in training mode, got 1"):
        review([a[:1], a[:1, :, 0, 0]], [a[:1], a[:1, :, 0, 0]])
    with pytest.raises(InputError, match="with fusion needs a residual, one without takes none"):
        ABF(3, 3, 3, fuse=False)(a, a, (4, 4))


def test_bad_contrast():
    a = torch.zeros(4)
    with pytest.raises(InputError, match=r"\[N, K\] for the negatives, not empty; got \[4\] and \[4\]"):
        noise_contrast(a, a, 10)
    with pytest.raises(InputError, match="temperature must be positive, got 0"):
        noise_contrast(a, a[:, None], 10, temperature=0)
    with pytest.raises(InputError, match="contrast needs at least 1 samples, got 0"):
        noise_contrast(a, a[:, None], 0)
    for options, message in (
        ({"negatives": 0}, "positive numbers of negatives and of channels, got 0 and 4"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"temperature": -1.0}, "temperature must be positive, got -1.0"),
        ({"labels": torch.zeros(9, dtype=torch.long)}, r"one class index per image, \[10\]; got torch.int64 \[9\]"),
        ({"labels": torch.zeros(10)}, r"one class index per image, \[10\]; got torch.float32 \[10\]"),
        ({"labels": torch.zeros(10, dtype=torch.long)}, "no other class to draw negatives from"),
    ):
        with pytest.raises(InputError, match=message):
            crd(**options)
    with pytest.raises(InputError, match=r"CRD needs features \[N, D\], got \[1, 3, 1, 1\]"):
        CRD(torch.zeros(1, 3, 1, 1), torch.zeros(1, 3), 10)
    with pytest.raises(InputError, match="a memory needs at least 2 samples, got 1"):
        CRD(torch.zeros(1, 3), torch.zeros(1, 3), 1)


def test_bad_batches_of_crd():
    module = crd()
    student, teacher, indices = torch.zeros(4, 3), torch.zeros(4, 6), torch.arange(4)
    for batch in ((teacher, teacher, indices), (student, teacher[:3], indices), (student, teacher, indices[:2])):
        with pytest.raises(
            InputError, match=r"CRD was made for features \[N, 3\] and \[N, 6\] with image numbers \[N\]"
        ):
            module(*batch)
    with pytest.raises(InputError, match=r"image numbers must lie in \[0, 9\], got 10"):
        module(student, teacher, indices + 7)
    with pytest.raises(InputError, match=r"negatives must lie in \[0, 9\], got -1"):
        module(student, teacher, indices, indices[:, None] - 1)
    with pytest.raises(InputError, match=r"negatives must be \[N, K\] with N = 4 and K >= 1, got \[4\]"):
        module(student, teacher, indices, indices)
