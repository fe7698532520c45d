"""The algebra of kernels against really running the operators: values and gradients, in float64."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st
from torch import Tensor

from reparam.errors import KernelError
from reparam.ops import algebra
from reparam.ops.algebra import add, affine_of, behind, concatenate, normalise, regroup, resize, scale, then
from reparam.ops.kernels import Kernel, affine, average, conv, conv_transpose, frequency, identity, linear

EXACT = 1e-12
COMMON = settings(
    deadline=None, derandomize=True, database=None, print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
NUMBER = int(os.environ.get("RANDOM_KERNELS", "150"))
FEW, MANY = settings(COMMON, max_examples=NUMBER // 3), settings(COMMON, max_examples=NUMBER)


# Random operators ----------------------------------------------------------------------------------------------------


def values(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers, other ones for every shape."""
    generator = torch.Generator().manual_seed(1000 * seed + hash(shape) % 997)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def kernels(
    draw: st.DrawFn,
    dims: int,
    inputs: int,
    outputs: int | None = None,
    kind: bool | None = None,
    padded: bool = True,
    bias: bool | None = None,
) -> Kernel:
    """Any operator: even and non-square sizes, one tap, groups, depthwise with multiplier, transposed."""

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    groups = draw(st.sampled_from(divisors(inputs if outputs is None else math.gcd(inputs, outputs))))
    own = draw(st.integers(1, 3)) if outputs is None else outputs // groups
    transposed = dims > 0 and (draw(st.booleans()) if kind is None else kind)
    size = (1,) * dims if draw(st.integers(0, 3)) == 0 else each(1, 3 if dims == 3 else 4)
    stride = each(1, 3) if draw(st.booleans()) else (1,) * dims
    dilation = each(1, 3) if draw(st.booleans()) else (1,) * dims
    padding = each(0, 3) if padded else (0,) * dims
    more = (0,) * dims
    if transposed:
        # What a transposed convolution cuts off may not be all that it makes.
        padding = tuple(min(p, (d * (k - 1) + 1) // 2) for p, d, k in zip(padding, dilation, size, strict=True))
        if draw(st.integers(0, 2)) == 0:
            more = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    seed = draw(st.integers(0, 99))
    channels = (inputs, own) if transposed else (groups * own, inputs // groups)
    weight = values(*channels, *size, seed=seed)
    shift = values(groups * own, seed=seed + 100) if (draw(st.booleans()) if bias is None else bias) else None
    return Kernel(weight, shift, stride, padding, dilation, more, groups, transposed)


def with_room(kernel: Kernel) -> Kernel:
    """The operator with an output padding that torch takes whatever the dilation becomes."""
    more = tuple(min(o, s - 1) for o, s in zip(kernel.output_padding, kernel.stride, strict=True))
    return replace(kernel, output_padding=more)


DIMS = st.sampled_from((0, 1, 1, 2, 2, 2, 3))
CHANNELS = st.sampled_from((1, 2, 4, 6))


def parameters(*kernels_: Kernel) -> list[Tensor]:
    return [t for k in kernels_ for t in (k.weight, k.bias) if t is not None]


def sample(dims: int, channels: int, size: int) -> Tensor:
    return values(2, channels, *(size + d % 2 for d in range(dims)), seed=7)


def enough(*sequence: Kernel) -> int:
    """A size of the input for which every operator of a sequence has an output."""
    size = 1
    for k in reversed(sequence):
        if not k.transposed:
            size = size * max(k.stride, default=1) + max(k.span, default=0)
        else:
            size += 1 + 2 * max(k.padding, default=0)
    return size


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert bool(torch.isfinite(expected).all())
    largest = float(expected.detach().abs().max())
    return float((found - expected).detach().abs().max()) / (largest or 1.0)


def same(merged: Kernel, run: Callable[[Tensor], Tensor], x: Tensor, wrt: list[Tensor]) -> None:
    """Equal values, and equal gradients of a random sum of them."""
    expected, found = run(x), merged(x)
    assert expected.numel()
    assert error(found, expected) <= EXACT
    weights = values(*expected.shape, seed=5).detach()
    grads = [torch.autograd.grad(y, [x, *wrt], weights, allow_unused=True) for y in (found, expected)]
    for mine, true in zip(*grads, strict=True):
        zero = torch.zeros(())
        assert error(zero if mine is None else mine, zero if true is None else true) <= EXACT


def sequence_of(*kernels_: Kernel) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        for k in kernels_:
            x = k(x)
        return x

    return run


# Sequences -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes() -> Iterator[list[str]]:
    """Collect what became of every sequence; at the end there must be enough of everything."""
    found: list[str] = []
    yield found
    for outcome, share in {"accepted": 0.4, "accepted, padded": 0.05, "border": 0.05}.items():
        assert found.count(outcome) >= share * len(found), {o: found.count(o) for o in set(found)}


def _passes(*_: object) -> None:
    """A check that finds nothing."""


def wrong_without_the_law(a: Kernel, b: Kernel) -> bool:
    """Whether there is no kernel without the law of padding, or one that differs for any size of the input."""
    lawless = {"_check_padding": _passes, "_check_crop": _passes}  # mock's own objects cost more than the rest
    with mock.patch.multiple(algebra, **lawless):
        try:
            merged = then(a, b)
        except KernelError:
            return True
    first = enough(a, b)
    for size in range(first, first + 2 + math.prod(a.stride) * math.prod(b.stride)):
        x = sample(a.dims, a.inputs, size).detach()
        if error(merged(x), sequence_of(a, b)(x)) > 1e-6:
            return True
    return False


def every_place(k: Kernel) -> bool:
    """Whether every place behind a transposed convolution gets something."""
    return all(d == 1 and n >= s for d, n, s in zip(k.dilation, k.size, k.stride, strict=True))


@MANY
@given(st.data(), DIMS, CHANNELS, st.booleans())
def test_sequences(outcomes: list[str], data: st.DataObject, dims: int, channels: int, padded: bool) -> None:
    kind = data.draw(st.sampled_from((False, False, False, True, True, None)))
    first_bias = data.draw(st.sampled_from((False, None)))
    a = data.draw(kernels(dims, channels, kind=kind, bias=first_bias, padded=not kind or padded))
    b = data.draw(kernels(dims, a.outputs, kind=kind, padded=bool(kind) or padded))
    note(f"{a}\n{b}")
    try:
        merged = then(a, b)
    except KernelError as caught:
        assert repr(a) in str(caught) and repr(b) in str(caught)
        outcome = "border" if "border" in str(caught) or "alike" in str(caught) else "refused"
        if outcome == "border" and (every_place(a) or not a.transposed):
            assert wrong_without_the_law(a, b)
    else:
        outcome = "accepted, padded" if not b.transposed and any(b.padding) else "accepted"
        size = enough(a, b)
        same(merged, sequence_of(a, b), sample(dims, channels, size), parameters(a, b))
        if dims:
            for more in range(1, 6):
                x = sample(dims, channels, size + more).detach()
                assert error(merged(x), b(a(x))) <= EXACT
    event(outcome)
    outcomes.append(outcome)


def plain_and_transposed(transposed: bool) -> Iterator[Kernel]:
    """Small operators of one dimension with every stride, padding and output padding."""
    for size, stride, padding, more, bias in itertools.product((1, 2, 3), (1, 2), (0, 1, 2), (0, 1), (False, True)):
        if more < stride and (transposed or not more):
            yield Kernel(
                values(1, 1, size), values(1) if bias else None, (stride,), (padding,), (1,), (more,), 1, transposed
            )


@pytest.mark.parametrize("transposed", [False, True])
def test_the_law_of_padding_is_exact(transposed: bool) -> None:
    """All pairs of small operators: refused if and only if the composed kernel is wrong."""
    accepted = refused = 0
    for a, b in itertools.product(plain_and_transposed(transposed), plain_and_transposed(transposed)):
        if not every_place(a):
            continue
        try:
            then(a, b)
        except KernelError:
            refused += 1
            assert wrong_without_the_law(a, b), (a, b)
        else:
            accepted += 1
            assert not wrong_without_the_law(a, b), (a, b)
    assert min(accepted, refused) > 100


@FEW
@given(st.data(), DIMS, CHANNELS, st.booleans())
def test_sequences_of_three(data: st.DataObject, dims: int, channels: int, transposed: bool) -> None:
    """Padding at the outer end, no bias inside of transposed ones: all are accepted, in any order of merging."""
    bias = False if transposed else None
    a = data.draw(kernels(dims, channels, kind=transposed, bias=bias, padded=not transposed))
    b = data.draw(kernels(dims, a.outputs, kind=transposed, bias=bias, padded=False))
    c = data.draw(kernels(dims, b.outputs, kind=transposed, padded=transposed))
    a, b, c = map(with_room, (a, b, c))
    x = sample(dims, channels, enough(a, b, c))
    for merged in (then(a, b, c), then(a, then(b, c))):
        same(merged, sequence_of(a, b, c), x, parameters(a, b, c))


@FEW
@given(st.data(), st.sampled_from((1, 2, 3)), CHANNELS)
def test_pointwise_operators_before_and_behind_transposed_ones(data: st.DataObject, dims: int, channels: int) -> None:
    kernel = data.draw(kernels(dims, channels, kind=True))
    seed = data.draw(st.integers(0, 9))
    tail = conv(values(5, kernel.outputs, *(1,) * dims, seed=seed), values(5, seed=seed))
    head = conv(values(channels, 3, *(1,) * dims, seed=seed))
    flipped = conv_transpose(values(3, channels, *(1,) * dims, seed=seed))
    kernel = with_room(kernel)
    x = sample(dims, 3, enough(kernel))
    for first in (head, flipped):
        same(then(first, kernel, tail), sequence_of(first, kernel, tail), x, parameters(first, kernel, tail))
    with pytest.raises(KernelError, match="to every place alike"):
        then(replace(head, bias=values(channels)), replace(kernel, weight=F.pad(kernel.weight, (0, 1))))


w = values

SEQUENCES = {
    "1x1 then padded 3x3": (conv(w(5, 4, 1, 1)), conv(w(6, 5, 3, 3), w(6), padding=1)),
    "padded 3x3 then 1x1": (conv(w(5, 4, 3, 3), w(5), padding=1), conv(w(6, 5, 1, 1), w(6))),
    "strided 3x3 then 1x1": (conv(w(5, 4, 3, 3), w(5), stride=2, padding=1), conv(w(6, 5, 1, 1), w(6))),
    "1x1 then average": (conv(w(6, 4, 1, 1), w(6)), average(6, (3, 3), w(1))),
    "1x1 then padded average": (conv(w(6, 4, 1, 1)), replace(average(6, (3, 3), w(1)), padding=(1, 1))),
    "strided 1x1 then padded 3x3": (conv(w(5, 4, 1, 1), stride=2), conv(w(6, 5, 3, 3), stride=2, padding=1)),
    "padded 1x1 then padded 3x3": (conv(w(5, 4, 1, 1), padding=2), conv(w(6, 5, 3, 3), padding=1)),
    "3x3 with all of its span then padded 3x3": (conv(w(5, 4, 3, 3), padding=2), conv(w(6, 5, 3, 3), padding=1)),
    "3x1 then 1x3, each padded": (conv(w(5, 4, 3, 1), padding=(1, 0)), conv(w(6, 5, 1, 3), padding=(0, 1))),
    "depthwise then pointwise": (conv(w(32, 1, 3, 3), padding=1, groups=4), conv(w(6, 32, 1, 1), w(6))),
    "groups 4, then 6": (conv(w(12, 2, 2, 3), w(12), groups=4), conv(w(6, 2, 3, 2), w(6), groups=6)),
    "upsampling twice, the first cut": (
        conv_transpose(w(4, 5, 4, 4), stride=2, padding=1),
        conv_transpose(w(5, 3, 2, 2), stride=2),
    ),
    "upsampling twice, the first with output padding": (
        conv_transpose(w(4, 5, 3, 3), stride=2, output_padding=1),
        conv_transpose(w(5, 3, 3, 3), w(3), stride=2, padding=1, output_padding=1),
    ),
    "transposed with bias, then one that cuts off its ramps": (
        conv_transpose(w(4, 5, 2, 2), w(5), stride=2),
        conv_transpose(w(5, 3, 3, 3), w(3), padding=2),
    ),
    "linear layers": (linear(w(5, 4), w(5)), linear(w(6, 5), w(6))),
    "scale then linear": (affine(w(4), w(4), 0), linear(w(6, 4))),
    "linear then scale": (linear(w(6, 4)), affine(w(6), w(6), 0)),
    "scales without dimensions": (affine(w(6), w(6), 0), identity(6, 0, w(1), groups=2)),
}  # fmt: skip


@pytest.mark.parametrize("name", SEQUENCES)
def test_named_sequences(name: str) -> None:
    a, b = SEQUENCES[name]
    wrt = [t for t in parameters(a, b) if t.requires_grad]
    for size in (7, 8, 9):
        same(then(a, b), sequence_of(a, b), sample(a.dims, a.inputs, size), wrt)


REFUSED = {
    "1x1 with bias then padded 3x3": (
        conv(w(5, 4, 1, 1), w(5)), conv(w(6, 5, 3, 3), padding=1), "second pads with zeros.*its bias.*border"),
    "padded 3x3 twice": (
        conv(w(5, 4, 3, 3), padding=1), conv(w(6, 5, 3, 3), padding=1), "second pads with zeros.*one tap.*border"),
    "3x1 then 3x1, both padded": (
        conv(w(5, 4, 3, 1), padding=(1, 0)), conv(w(6, 5, 3, 1), padding=(1, 0)), "pads with zeros"),
    "channels": (conv(w(5, 4, 1, 1)), conv(w(5, 4, 1, 1)), "does not take"),
    "dimensions": (linear(w(5, 4)), conv(w(6, 5, 1, 1)), "does not take"),
    "transposed then plain": (conv_transpose(w(4, 5, 2, 2)), conv(w(6, 5, 3, 3)), "no single kernel"),
    "plain then transposed": (conv(w(5, 4, 3, 3)), conv_transpose(w(5, 6, 2, 2)), "no single kernel"),
    "transposed, cut, then overlapping": (
        conv_transpose(w(4, 5, 4, 4), stride=2, padding=1), conv_transpose(w(5, 3, 4, 4), None, 2), "cuts off"),
    "transposed with bias, twice": (
        conv_transpose(w(4, 5, 2, 2), w(5), stride=2), conv_transpose(w(5, 3, 2, 2), None, 2), "the bias of the first"),
    "transposed with bias, then output padding": (
        conv_transpose(w(4, 5, 2), w(5)), conv_transpose(w(5, 3, 2), None, 1, 2, 1, dilation=2), "bias of the first"),
    "no room for output padding": (
        conv_transpose(w(4, 5, 2), dilation=3, output_padding=2), conv_transpose(w(5, 3, 2)), "output padding of"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_sequences(name: str) -> None:
    a, b, message = REFUSED[name]
    with pytest.raises(KernelError, match=message) as caught:
        then(a, b)
    assert repr(a) in str(caught.value) and repr(b) in str(caught.value)


def test_what_a_bias_would_do_behind_padding() -> None:
    """DBB pads the output of the first with the value of its bias: the same as padding the first."""
    a, b = conv(w(5, 4, 1, 1), w(5)), conv(w(6, 5, 3, 3), w(6))
    x = sample(2, 4, 6)

    def run(x: Tensor) -> Tensor:
        y = a(x)
        framed = a.bias[None, :, None, None].expand(2, 5, y.shape[2] + 2, y.shape[3] + 2).clone()
        framed[:, :, 1:-1, 1:-1] = y
        return b(framed)

    same(then(replace(a, padding=(1, 1)), b), run, x, parameters(a, b))


# Scale, norm, zero-pad, groups ---------------------------------------------------------------------------------------


@FEW
@given(st.data(), DIMS, CHANNELS)
def test_scale_and_norm(data: st.DataObject, dims: int, channels: int) -> None:
    kernel = data.draw(kernels(dims, channels))
    x = sample(dims, channels, enough(kernel))
    mean, gamma, beta = (values(kernel.outputs, seed=seed) for seed in (1, 2, 3))
    var = (values(kernel.outputs, seed=4).detach().square() + 0.1).requires_grad_()
    column = (-1, *(1,) * dims)
    for shift in (None, beta):
        used = [gamma, *([] if shift is None else [shift])]

        def scaled(x: Tensor, shift: Tensor | None = shift) -> Tensor:
            y = kernel(x) * gamma.reshape(column)
            return y if shift is None else y + shift.reshape(column)

        same(scale(kernel, gamma, shift), scaled, x, [*parameters(kernel), *used])
    for factor, shift in ((gamma, beta), (None, None), (gamma, None), (None, beta)):
        merged = normalise(kernel, mean, var, factor, shift, 1e-2)

        def normed(x: Tensor, factor: Tensor | None = factor, shift: Tensor | None = shift) -> Tensor:
            y = (kernel(x) - mean.reshape(column)) / torch.sqrt(var.reshape(column) + 1e-2)
            y = y if factor is None else y * factor.reshape(column)
            return y if shift is None else y + shift.reshape(column)

        wrt = [*parameters(kernel), mean, var, *(t for t in (factor, shift) if t is not None)]
        same(merged, normed, x, wrt)
        with torch.no_grad():
            true = F.batch_norm(kernel(x), mean, var, factor, shift, eps=1e-2)
            assert error(merged(x), true) <= EXACT


@FEW
@given(st.data(), DIMS, CHANNELS)
def test_resize(data: st.DataObject, dims: int, channels: int) -> None:
    kernel = data.draw(kernels(dims, channels))
    extra = [data.draw(st.sampled_from((0, 2, 4))) for _ in range(dims)]
    larger = resize(kernel, [n + m for n, m in zip(kernel.size, extra, strict=True)])
    assert larger.size == tuple(n + m for n, m in zip(kernel.size, extra, strict=True))
    same(larger, kernel, sample(dims, channels, enough(kernel)), parameters(kernel))


@pytest.mark.parametrize("size", [(4, 4), (3, 4), (1, 1), (5, 2), (5,), (3, 3, 3)])
def test_what_resize_refuses(size: tuple[int, ...]) -> None:
    kernel = conv(w(4, 4, 3, 3))
    with pytest.raises(KernelError, match="has no place in the middle of") as caught:
        resize(kernel, size)
    assert repr(kernel) in str(caught.value) and "x".join(map(str, size)) in str(caught.value)


def test_even_kernels_in_even_ones() -> None:
    kernel = conv(w(4, 4, 2, 1))
    same(resize(kernel, (4, 3)), kernel, sample(2, 4, 6), parameters(kernel))
    with pytest.raises(KernelError, match="even"):
        resize(kernel, (3, 3))


@FEW
@given(st.data(), DIMS, st.sampled_from((4, 6, 12)))
def test_regroup(data: st.DataObject, dims: int, channels: int) -> None:
    kernel = data.draw(kernels(dims, channels))
    fewer = data.draw(st.sampled_from(divisors(kernel.groups)))
    merged = regroup(kernel, fewer)
    assert merged.groups == fewer
    same(merged, kernel, sample(dims, channels, enough(kernel)), parameters(kernel))
    with pytest.raises(KernelError, match=f"cannot be written with {kernel.groups * 2} groups"):
        regroup(kernel, kernel.groups * 2)


# Sums and concatenations ---------------------------------------------------------------------------------------------


@st.composite
def companions(draw: st.DrawFn, kernel: Kernel, outputs: int) -> Kernel:
    """An operator whose outputs are at the places of those of ``kernel``, with other taps and groups."""
    other = draw(kernels(kernel.dims, kernel.inputs, outputs, kind=kernel.transposed))
    sizes, padding = list(other.size), []
    for dim in range(kernel.dims):
        reach = kernel.span[dim] - 2 * kernel.padding[dim]
        span = other.dilation[dim] * (sizes[dim] - 1)
        if (span - reach) % 2 or span < reach:
            sizes[dim], span = kernel.size[dim], kernel.span[dim]
            other = replace(other, dilation=(*other.dilation[:dim], kernel.dilation[dim], *other.dilation[dim + 1 :]))
        padding.append((span - reach) // 2)
    weight = values(*other.weight.shape[:2], *sizes, seed=11)
    return replace(
        other, weight=weight, padding=tuple(padding), stride=kernel.stride, output_padding=kernel.output_padding
    )


@MANY
@given(st.data(), DIMS, CHANNELS)
def test_sums(data: st.DataObject, dims: int, channels: int) -> None:
    a = data.draw(kernels(dims, channels))
    a = with_room(a)
    parts = [a, *(data.draw(companions(a, a.outputs)) for _ in range(data.draw(st.integers(1, 2))))]
    note(str(parts))
    x = sample(dims, channels, max(map(enough, parts)))
    same(add(*parts), lambda x: sum(k(x) for k in parts[1:]) + parts[0](x), x, parameters(*parts))


@FEW
@given(st.data(), DIMS, CHANNELS)
def test_concatenations(data: st.DataObject, dims: int, channels: int) -> None:
    a = data.draw(kernels(dims, channels))
    a = with_room(a)
    others = [data.draw(companions(a, n)) for n in data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=2))]
    parts = [a, *others]
    x = sample(dims, channels, max(map(enough, parts)))
    same(concatenate(*parts), lambda x: torch.cat([k(x) for k in parts], 1), x, parameters(*parts))


@MANY
@given(st.data(), st.sampled_from((1, 2)), st.sampled_from((1, 2)), CHANNELS, CHANNELS)
def test_sums_of_what_differs(data: st.DataObject, dims: int, more: int, channels: int, inputs: int) -> None:
    """Refused with both operators named; and not without reason."""
    a = data.draw(kernels(dims, channels))
    b = data.draw(kernels(max(dims, more), data.draw(st.sampled_from((channels, inputs)))))
    for function in (add, concatenate):
        try:
            merged = function(a, b)
        except KernelError as caught:
            assert repr(a) in str(caught) and repr(b) in str(caught)
            assert function.__name__[:3] in str(caught)
            if "in size" in str(caught):
                sizes = range(max(enough(a), enough(b)), max(enough(a), enough(b)) + 4 * max(a.stride))
                xs = [sample(dims, channels, size).detach() for size in sizes]
                assert any(a(x).shape[2:] != b(x).shape[2:] for x in xs)
        else:
            x = sample(dims, channels, max(enough(a), enough(b))).detach()
            found = a(x) + b(x) if function is add else torch.cat([a(x), b(x)], 1)
            assert error(merged(x), found) <= EXACT


SUMS = {
    "dilation 2 and 1": (conv(w(4, 4, 3, 3), padding=2, dilation=2), conv(w(4, 4, 3, 3), w(4), padding=1)),
    "3x3, 1x1, 1x3, 5x5": (
        conv(w(4, 4, 3, 3), padding=1), conv(w(4, 4, 1, 1), w(4)), conv(w(4, 4, 1, 3), padding=(0, 1)),
        conv(w(4, 4, 5, 5), w(4), padding=2),
    ),
    "with identity": (conv(w(4, 4, 3, 3), padding=1), identity(4, 2, w(1))),
    "stride 2": (conv(w(4, 4, 3, 3), stride=2, padding=1), conv(w(4, 4, 1, 1), stride=2)),
    "groups 4, 2": (conv(w(4, 1, 3, 3), padding=1, groups=4), conv(w(4, 2, 3, 3), padding=1, groups=2)),
    "groups 4, 6": (conv(w(12, 3, 3), padding=1, groups=4), conv(w(12, 2, 1), w(12), groups=6)),
    "even, of one parity": (conv(w(4, 4, 2)), conv(w(4, 4, 4), padding=1)),
    "transposed": (conv_transpose(w(4, 4, 4), stride=2, padding=1), conv_transpose(w(4, 4, 2), w(4), stride=2)),
    "linear": (linear(w(4, 4), w(4)), identity(4, 0, w(1), groups=4)),
}  # fmt: skip


@pytest.mark.parametrize("name", SUMS)
def test_named_sums(name: str) -> None:
    parts = SUMS[name]
    wrt = [t for t in parameters(*parts) if t.requires_grad]
    for size in (9, 10):
        x = sample(parts[0].dims, parts[0].inputs, size)
        same(add(*parts), lambda x: sum(k(x) for k in parts[1:]) + parts[0](x), x, wrt)
        same(concatenate(*parts), lambda x: torch.cat([k(x) for k in parts], 1), x, wrt)


def test_aligned_sums_are_no_larger_than_needed() -> None:
    wide, narrow = SUMS["dilation 2 and 1"]
    assert add(wide, narrow).size == (5, 5)
    assert add(wide, conv(w(4, 4, 1, 1))).size == (3, 3)
    assert add(wide, wide).dilation == (2, 2)
    assert add(*SUMS["groups 4, 2"]).groups == 2


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (conv(w(4, 4, 3, 3)), "differ in size"),
        (conv(w(4, 4, 2, 2), padding=1), "differ in size"),
        (conv(w(4, 4, 3, 3), padding=1, stride=2), "differ in stride"),
        (conv(w(5, 4, 3, 3), padding=1), "the number of outputs"),
        (conv(w(4, 5, 3, 3), padding=1), "the number of inputs"),
        (conv(w(4, 4, 3), padding=1), "spatial dimensions"),
        (conv_transpose(w(4, 4, 3, 3), padding=1), "one is transposed"),
    ],
)
def test_sums_of_unequal_outputs_are_refused(other: Kernel, message: str) -> None:
    kernel = conv(w(4, 4, 3, 3), padding=1)
    for parts in ((kernel, other), (kernel, identity(4, 2, w(1)), other)):
        with pytest.raises(KernelError, match=message) as caught:
            add(*parts)
        assert repr(kernel) in str(caught.value) and repr(other) in str(caught.value)
        assert "cannot be added" in str(caught.value)


def test_sums_of_transposed_kernels_without_room() -> None:
    """Also where only all of them together have none."""
    a = conv_transpose(w(4, 4, 4), dilation=3, padding=2, output_padding=2)
    b = conv_transpose(w(4, 4, 2), dilation=5, output_padding=2)
    assert a(sample(1, 4, 6)).shape == b(sample(1, 4, 6)).shape
    with pytest.raises(KernelError, match="output padding of") as caught:
        add(a, b)
    assert repr(a) in str(caught.value) and repr(b) in str(caught.value)
    three = [conv_transpose(w(4, 4, n), None, 1, p, 3, 1, d) for n, p, d in ((3, 0, 12), (3, 6, 18), (3, 8, 20))]
    assert all(k.span[0] - 2 * k.padding[0] == 24 for k in three)
    with pytest.raises(KernelError, match="output padding of"):
        add(*three)


# Behind an affine map ------------------------------------------------------------------------------------------------


@FEW
@given(st.data(), DIMS, CHANNELS, st.booleans())
def test_behind(data: st.DataObject, dims: int, channels: int, shifted: bool) -> None:
    kernel = data.draw(kernels(dims, channels))
    factors, shift = values(channels, seed=1), values(channels, seed=2) if shifted else None
    column = (-1, *(1,) * dims)

    def run(x: Tensor) -> Tensor:
        y = x * factors.reshape(column)
        return kernel(y if shift is None else y + shift.reshape(column))

    x = sample(dims, channels, enough(kernel))
    wrt = [*parameters(kernel), factors, *([] if shift is None else [shift])]
    try:
        merged = behind(kernel, factors, shift)
    except KernelError as caught:
        assert repr(kernel) in str(caught)
        no_room = any(o >= max(s, 1) for o, s in zip(kernel.output_padding, kernel.stride, strict=True))
        assert no_room or (shifted and (kernel.transposed or any(kernel.padding)))
    else:
        same(merged, run, x, wrt)


# Fixed kernels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", range(4))
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_identity_and_affine(dims: int, groups: int) -> None:
    x = sample(dims, 6, 4)
    kernel = identity(6, dims, x, groups)
    assert kernel.groups == groups and torch.equal(kernel(x), x)
    factors, shift = values(6, seed=1), values(6, seed=2)
    c = (-1, *(1,) * dims)
    same(affine(factors, shift, dims), lambda x: x * factors.reshape(c) + shift.reshape(c), x, [factors, shift])
    same(affine(factors, None, dims), lambda x: x * factors.reshape(c), x, [factors])


@pytest.mark.parametrize("size", [(3,), (3, 3), (2, 5), (2, 3, 1)])
def test_average(size: tuple[int, ...]) -> None:
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(size)]
    x = sample(len(size), 4, 6)
    same(average(4, size, x), lambda x: pool(x, size, 1), x, [])


def test_average_is_transform_v() -> None:
    dense = regroup(average(4, (3, 3), w(1)), 1).weight
    for d in range(4):
        for c in range(4):
            assert torch.equal(dense[d, c], torch.full((3, 3), 1 / 9 if d == c else 0.0, dtype=torch.float64))


@pytest.mark.parametrize("channels", [1, 2, 5, 6, 7, 16])
def test_frequency_prior(channels: int) -> None:
    """OREPA's loops; where the halves are not equal, the second one counts from 0 as well."""
    kernel = frequency(channels, (3, 3), w(1))
    assert kernel.weight.shape == (channels, 1, 3, 3) and kernel.groups == channels
    first = [i for i in range(channels) if i < channels / 2]
    for i in range(channels):
        for h in range(3):
            for t in range(3):
                if i in first:
                    expected = math.cos(math.pi * (h + 0.5) * (i + 1) / 3)
                else:
                    expected = math.cos(math.pi * (t + 0.5) * (i + 1 - len(first)) / 3)
                assert abs(float(kernel.weight[i, 0, h, t]) - expected) <= 1e-14


@pytest.mark.parametrize("size", [(4,), (2, 5), (3, 1, 2)])
def test_frequency_prior_of_other_sizes(size: tuple[int, ...]) -> None:
    weight = frequency(7, size, w(1)).weight
    assert torch.isfinite(weight).all()
    part, start = 0, 0
    for dim, k in enumerate(size):
        part = math.ceil((7 - start) / (len(size) - dim))
        for i in range(part):
            taps = [math.cos(math.pi * (t + 0.5) * (i + 1) / k) for t in range(k)]
            line = weight[start + i, 0].movedim(dim, -1)
            assert torch.allclose(line, torch.tensor(taps, dtype=line.dtype).expand_as(line), rtol=0, atol=1e-14)
        start += part
    assert start == 7


# Published formulas --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_branches_of_orepa(groups: int) -> None:
    """The squeezing formulas of OREPA (CVPR 2022), with the groups written out."""
    i, o, g = 4, 8, groups
    point, free = w(o, i // g, 1, 1, seed=1), w(o, i // g, 3, 3, seed=2)
    d, wide, mix = w(i, i // g, 1, 1, seed=3), w(8 * i, 1, 3, 3, seed=4), w(o, 8 * i // g, 1, 1, seed=5)
    p = torch.empty(o, 3, 3, dtype=torch.float64)
    for n in range(o // 2):
        wave = torch.tensor([math.cos(math.pi * (t + 0.5) * (n + 1) / 3) for t in range(3)], dtype=torch.float64)
        p[n], p[n + o // 2] = wave[:, None], wave[None, :]
    branches = [
        then(conv(point, groups=g), replace(average(o, (3, 3), point), padding=(1, 1))),
        then(conv(point, groups=g), replace(frequency(o, (3, 3), point), padding=(1, 1))),
        then(add(conv(d, groups=g), identity(i, 2, d, g)), conv(free, padding=1, groups=g)),
        resize(conv(point, groups=g), (3, 3)),
        then(conv(wide, padding=1, groups=i), conv(mix, groups=g)),
    ]
    flat, eye = point[:, :, 0, 0], torch.zeros(i, i // g, dtype=torch.float64)
    for t in range(i):
        eye[t, t % (i // g)] = 1
    first = (d[:, :, 0, 0] + eye).reshape(g, i // g, i // g)
    small = torch.zeros(o, i // g, 3, 3, dtype=torch.float64)
    small[:, :, 1, 1] = flat
    # The rows of the pointwise factor are those of the outputs, one group after the other.
    rows = mix.reshape(g, o // g, i // g, 8)
    formulas = [
        torch.einsum("oi,hw->oihw", flat, torch.full((3, 3), 1 / 9, dtype=torch.float64)),
        torch.einsum("oi,ohw->oihw", flat, p),
        torch.einsum("gti,gothw->goihw", first, free.reshape(g, o // g, i // g, 3, 3)).reshape(o, i // g, 3, 3),
        small,
        torch.einsum("cgthw,cogt->coghw", wide.reshape(g, i // g, 8, 3, 3), rows).reshape(o, i // g, 3, 3),
    ]
    scales = w(5, o, seed=6)
    for kernel, formula in zip(branches, formulas, strict=True):
        assert kernel.padding == (1, 1) and kernel.groups == g and kernel.bias is None
        assert error(kernel.weight, formula) <= EXACT
    block = add(*(scale(k, s) for k, s in zip(branches, scales, strict=True)))
    expected = sum(torch.einsum("o,oihw->oihw", s, f) for s, f in zip(scales, formulas, strict=True))
    assert error(block.weight, expected) <= EXACT
    wrt = [point, free, d, wide, mix, scales]
    grads = [torch.autograd.grad(weight.square().sum(), wrt) for weight in (block.weight, expected)]
    for mine, true in zip(*grads, strict=True):
        assert error(mine, true) <= EXACT


def test_stem_of_orepa() -> None:
    """A large kernel as a stack of 3x3 kernels, all padding in front."""
    parts = [conv(w(5, 3, 3, 3), stride=1, padding=3), conv(w(6, 5, 3, 3)), conv(w(4, 6, 3, 3), stride=2)]
    merged = then(*parts)
    assert (merged.size, merged.stride, merged.padding) == ((7, 7), (2, 2), (3, 3))
    for size in (9, 10):
        same(then(*parts), sequence_of(*parts), sample(2, 3, size), parameters(*parts))


def test_transform_i() -> None:
    weight, bias, mean, gamma, beta = w(4, 3, 3, 3), w(4), w(4, seed=1), w(4, seed=2), w(4, seed=3)
    var = w(4, seed=4).detach().square()
    merged = normalise(conv(weight, bias), mean, var, gamma, beta, 1e-5)
    for o in range(4):
        factor = gamma[o] / math.sqrt(float(var[o]) + 1e-5)
        assert error(merged.weight[o], weight[o] * factor) <= EXACT
        assert error(merged.bias[o], beta[o] + (bias[o] - mean[o]) * factor) <= EXACT
    factors, shift = affine_of(mean, var, None, None, 1e-5)
    assert error(factors, 1 / torch.sqrt(var + 1e-5)) <= EXACT and error(shift, -mean * factors) <= EXACT


def test_transform_ii() -> None:
    a, b = conv(w(4, 3, 3, 3), w(4)), conv(w(4, 3, 3, 3, seed=1), w(4, seed=1))
    assert torch.equal(add(a, b).weight, a.weight + b.weight) and torch.equal(add(a, b).bias, a.bias + b.bias)
    assert torch.equal(add(a, conv(b.weight)).bias, a.bias)


@pytest.mark.parametrize("groups", [1, 2])
def test_transform_iii(groups: int) -> None:
    first, b1, second, b2 = w(6, 4 // groups, 1, 1), w(6), w(8, 6 // groups, 3, 3), w(8)
    merged = then(conv(first, b1, groups=groups), conv(second, b2, groups=groups))
    i, m, o = 4 // groups, 6 // groups, 8 // groups
    for n in range(groups):
        f1, f2 = first[n * m : (n + 1) * m, :, 0, 0], second[n * o : (n + 1) * o]
        expected = sum(f2[:, d, None] * f1[d][None, :, None, None] for d in range(m))
        assert expected.shape == (o, i, 3, 3)
        assert error(merged.weight[n * o : (n + 1) * o], expected) <= EXACT
        shift = b2[n * o : (n + 1) * o] + sum(f2[:, d].sum((1, 2)) * b1[n * m + d] for d in range(m))
        assert error(merged.bias[n * o : (n + 1) * o], shift) <= EXACT


def test_transform_iv() -> None:
    a, b = conv(w(4, 3, 3, 3), w(4)), conv(w(2, 3, 3, 3))
    merged = concatenate(a, b)
    assert torch.equal(merged.weight, torch.cat([a.weight, b.weight]))
    assert torch.equal(merged.bias, torch.cat([a.bias, torch.zeros(2, dtype=torch.float64)]))


def test_concatenation_of_groups() -> None:
    a, b = conv(w(4, 2, 3), w(4), groups=2), conv(w(4, 1, 3), w(4), groups=4)
    same(concatenate(a, b), lambda x: torch.cat([a(x), b(x)], 1), sample(1, 4, 6), parameters(a, b))
    with pytest.raises(KernelError, match="cannot be concatenated") as caught:
        concatenate(a, replace(b, padding=(1,)))
    assert repr(a) in str(caught.value)


def test_transform_vi() -> None:
    kernel = resize(conv(w(4, 3, 1, 3), padding=(0, 1)), (5, 3))
    expected = torch.zeros(4, 3, 5, 3, dtype=torch.float64)
    expected[:, :, 2] = w(4, 3, 1, 3)[:, :, 0]
    assert torch.equal(kernel.weight, expected) and kernel.padding == (2, 1)


# Making kernels ------------------------------------------------------------------------------------------------------


def test_words_for_padding() -> None:
    weight = w(4, 3, 3, 2)
    x = sample(2, 3, 8)
    for dilation in ((1, 2), (2, 2), (3, 4)):
        same(conv(weight, padding="same", dilation=dilation),
             lambda x, d=dilation: F.conv2d(x, weight, padding="same", dilation=d), x, [weight])  # fmt: skip
    same(conv(weight, padding="valid", stride=2), lambda x: F.conv2d(x, weight, stride=2), x, [weight])
    with pytest.raises(KernelError, match="even kernel"):
        conv(weight, padding="same")
    with pytest.raises(KernelError, match="stride"):
        conv(weight, padding="same", dilation=2, stride=2)
    with pytest.raises(KernelError, match="neither a number"):
        conv(weight, padding="full")


def test_arguments_of_torch() -> None:
    weight, bias, x = w(4, 3, 3, 2), w(4), sample(2, 3, 8)
    for stride, padding, dilation in ((1, 0, 1), ((2, 1), (0, 1), (1, 2)), ([2], [1], [1])):
        kernel = conv(weight, bias, stride, padding, dilation)
        same(kernel, lambda x, a=(stride, padding, dilation): F.conv2d(x, weight, bias, *a), x, [weight, bias])
    weight, bias, x = w(4, 3, 3, 2), w(6), sample(2, 4, 5)
    args = ((2, 3), (1, 0), (1, 2), 2, (1, 2))
    same(conv_transpose(weight, bias, *args), lambda x: F.conv_transpose2d(x, weight, bias, *args), x, [weight, bias])


def test_words_for_kernels() -> None:
    assert repr(linear(w(5, 4))) == "<linear layer 4 -> 5>"
    assert repr(conv(w(6, 2, 3, 1), w(6), 2, (1, 0), groups=2)) == (
        "<convolution 4 -> 6, 3x1, stride (2, 2), padding (1, 0), groups 2, with bias>"
    )
    assert repr(conv_transpose(w(4, 3, 2), None, 2, 0, 1)) == (
        "<transposed convolution 4 -> 3, 2, stride (2,), output padding (1,)>"
    )


# Types, devices, gradients -------------------------------------------------------------------------------------------


def everything(like: Tensor) -> list[Kernel]:
    """One result of every operation."""
    one = like.new_ones
    wide, point = conv(one(4, 4, 3, 3), one(4), padding=1), conv(one(4, 4, 1, 1))
    deep, up = conv(one(4, 1, 3, 3), groups=4, padding=1), conv_transpose(one(4, 4, 2, 2), one(4), 2)
    spread, threes = conv(one(4, 4, 3, 3), None, 1, 2, 2), conv(one(6, 2, 2, 2), one(6), groups=3)
    return [
        scale(wide, one(4), one(4)), scale(up, one(4)), normalise(point, one(4), one(4), None, None, 1e-5),
        resize(point, (3, 3)), regroup(deep, 2), add(wide, point, deep), add(wide, spread),
        then(point, deep), then(wide, point, point), then(conv(one(6, 2, 2, 2), None, 1, 0, 2, 3), threes),
        then(conv(one(6, 3, 2, 2), None, groups=2), threes), then(conv_transpose(one(4, 4, 2, 2)), up),
        concatenate(wide, deep), behind(deep, one(4)), behind(threes, one(6), one(6)),
        identity(4, 2, like, 2), affine(one(4), None, 2), average(4, (3, 3), like), frequency(5, (3, 3), like),
    ]  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_types_and_devices_are_kept(device: str, dtype: torch.dtype) -> None:
    like = torch.empty(1, dtype=dtype, device=device)
    for kernel in everything(like):
        for tensor in (kernel.weight, kernel.bias):
            assert tensor is None or (tensor.dtype is dtype and tensor.device.type == device)


def test_gradients_by_differences() -> None:
    """Also through products of parameters: the operations are differentiable as they are, twice."""
    a, b, c = w(2, 1, 2, 2, seed=1), w(2, 2, 2, 1, seed=2), w(2, 2, 1, 1, seed=3)
    bias, gamma = w(2, seed=4), w(2, seed=5)
    up, more = w(2, 1, 2, seed=6), w(2, 2, 2, seed=7)

    def merged(a: Tensor, b: Tensor, c: Tensor, bias: Tensor, gamma: Tensor) -> tuple[Tensor, ...]:
        chain = then(conv(a, bias, padding=1, groups=2), conv(b, bias, stride=2, dilation=2))
        total = add(resize(conv(c, bias), (3, 3)), conv(regroup(conv(c), 1).weight), scale(conv(c), gamma))
        both = concatenate(behind(conv(c), gamma, bias), conv(c))
        return tuple(t for k in (chain, total, both) for t in (k.weight, k.bias))

    def raised(up: Tensor, more: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        kernel = then(conv_transpose(up, stride=2, groups=2), conv_transpose(more, bias, stride=3, padding=1))
        return kernel.weight, kernel.bias

    assert torch.autograd.gradcheck(merged, (a, b, c, bias, gamma))
    assert torch.autograd.gradgradcheck(merged, (a, b, c, bias, gamma))
    assert torch.autograd.gradcheck(raised, (up, more, bias))


# Messages ------------------------------------------------------------------------------------------------------------


@MANY
@given(st.data(), st.sampled_from(((1, 1), (2, 2), (2, 2), (0, 2), (3, 3))), st.tuples(CHANNELS, CHANNELS))
def test_messages_name_both_operators(data: st.DataObject, dims: tuple[int, ...], channels: tuple[int, ...]) -> None:
    a, b = (data.draw(kernels(d, c)) for d, c in zip(dims, channels, strict=True))
    for function in (then, add, concatenate, lambda a, b: add(a, a, b), lambda a, b: concatenate(b, b, a)):
        try:
            function(a, b)
        except KernelError as caught:
            message = str(caught)
            assert repr(a) in message and repr(b) in message
            assert "layer" in message or "convolution" in message
            assert "None" not in message and "_" not in message
