"""Recipes of branches: merged, run, widened and narrowed; against formulas and modules written from the papers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st
from test_kernels import error, values
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from reparam.errors import InputError, KernelError
from reparam.ops import algebra, factors, recipes
from reparam.ops.block import merge, new_tensors, run, wide_frame, wide_tensors, widening
from reparam.ops.expressions import Expression, Sum, has_norms
from reparam.ops.frames import Frame, Widening
from reparam.ops.maps import ReplicaMap
from reparam.ops.params import Noise, ParamMap, repeat_all
from reparam.ops.recipes import Recipe, Site, Unfit, recipe, registry

EXACT = 1e-12
SOME = settings(
    max_examples=250, deadline=None, derandomize=True, database=None, print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip

ALL = [
    "orepa", "orepa:pointwise=released", *(f"orepa:branches={n}" for n in range(1, 6)),
    "orepa_small", "orepa_small:bottleneck=2",
    "acb", "dbb", "repvgg", "mobileone", "mobileone:branches=1", "expandnet:rate=2", "expandnet:rate=2,variant=ck",
]  # fmt: skip
NORMED = ("acb", "dbb", "repvgg", "mobileone")


# Random operators ----------------------------------------------------------------------------------------------------


def site_of(
    inputs: int = 4,
    outputs: int = 6,
    size: tuple[int, ...] = (3, 3),
    padding: int = 1,
    init: str = "scratch",
    **more: Any,
) -> Site:
    def each(value: int) -> tuple[int, ...]:
        return (value,) * len(size)

    operator = f"conv{len(size)}d" if size else "linear"
    given = {name: each(more.pop(name, 1)) for name in ("stride", "dilation")}
    site = Site(
        "layer.weight", operator, inputs, outputs, size, given["stride"], each(padding), given["dilation"], 1, init
    )
    return replace(site, **more)


@st.composite
def sites(draw: st.DrawFn) -> Site:
    """Any operator that has a middle: linear, 1-D to 3-D, strided, dilated, padded or not, groups, depthwise."""
    dims = draw(st.sampled_from((0, 1, 2, 2, 2, 3)))

    def each(*choices: int) -> tuple[int, ...]:
        return tuple(draw(st.sampled_from(choices)) for _ in range(dims))

    size = (5,) * dims if draw(st.integers(0, 3)) == 0 and dims < 3 else each(1, 3, 3) if dims < 3 else (3, 1, 3)
    groups = draw(st.sampled_from((1, 1, 2, 4))) if dims else 1
    inputs, outputs = draw(st.sampled_from(((4, 4), (4, 8), (4, 4), (8, 4))))
    stride, padding, dilation = each(1, 1, 2), each(0, 1, 2, 3), each(1, 1, 2)
    init = draw(st.sampled_from(recipes.INITS))
    operator = f"conv{dims}d" if dims else "linear"
    return Site("layer.weight", operator, inputs, outputs, size, stride, padding, dilation, groups, init)


def host_shape(site: Site) -> tuple[int, ...]:
    return (site.outputs, site.inputs // site.groups, *site.size)


def drawn(expression: Expression, site: Site, seed: int = 0) -> dict[str, Tensor]:
    """All tensors with random values, the operator's own weight under an empty name."""
    tensors = new_tensors(expression, torch.empty(0, dtype=torch.float64))
    for k, (name, slot) in enumerate(expression.slots()):
        if slot.kind == "fixed" or not slot.shape:
            continue
        value = values(*slot.shape, seed=seed + k).detach()
        value = value / slot.shape[1] if len(slot.shape) > 1 else value.abs() + 0.5 if "var" in name else value
        tensors[name] = value.requires_grad_(slot.kind == "weight")
    tensors[""] = values(*host_shape(site), seed=seed + 99)
    return tensors


def expression_of(name: str, site: Site) -> Expression | None:
    """None where the recipe has nothing for this operator."""
    try:
        return recipes.get(name).expression(site)
    except Unfit as reason:
        event(f"refused: {reason}")
        return None


def field(site: Site, batch: int = 2) -> Tensor:
    if not site.dims:
        return values(batch + 3, site.inputs, seed=7)
    sizes = [d * (k - 1) + 4 for d, k in zip(site.dilation, site.size, strict=True)]
    return values(batch, site.inputs, *sizes, seed=7)


def plain_frame(site: Site) -> Frame:
    return Frame(site.inputs, site.groups)


def run_with(
    expression: Expression, site: Site, frame: Frame, tensors: dict[str, Tensor], x: Tensor, training: bool = False
) -> Tensor:
    return run(expression, site, frame, tensors.__getitem__, training, x, None)


# Merged and run ------------------------------------------------------------------------------------------------------


@SOME
@given(st.sampled_from(ALL), sites())
def test_merged_is_what_the_branches_compute(name: str, site: Site) -> None:
    """Values, and gradients with respect to the input and every tensor, in eval mode."""
    expression = expression_of(name, site)
    if expression is None:
        return
    note(f"{name} on {site}")
    tensors, x = drawn(expression, site), field(site)
    wrt = [x, *(t for t in tensors.values() if t.requires_grad)]
    branches = run_with(expression, site, plain_frame(site), tensors, x)
    kernel = merge(expression, site, plain_frame(site), tensors.__getitem__)
    assert kernel.weight.shape == tensors[""].shape and kernel.stride == site.stride
    merged = kernel(x)
    assert branches.std() > 0.01
    assert error(merged, branches) <= EXACT
    weights = values(*branches.shape, seed=5).detach()
    for mine, true in zip(*(torch.autograd.grad(y, wrt, weights) for y in (merged, branches)), strict=True):
        assert error(mine, true) <= EXACT
        assert mine.any()


@pytest.mark.parametrize("name", ALL)
def test_every_recipe_meets_operators_that_it_fits(name: str) -> None:
    """The random test above is not empty: a plain convolution has every recipe."""
    size = (5, 5) if "ck" in name else (3, 3)
    expression = recipes.get(name).expression(site_of(size=size))
    assert isinstance(expression, Sum)
    assert has_norms(expression) == name.startswith(NORMED)


@pytest.mark.parametrize("name", ALL)
def test_one_sample_without_a_batch(name: str) -> None:
    site = site_of(size=(5, 5), padding=2)
    expression = recipes.get(name).expression(site)
    tensors, x, bias = drawn(expression, site), field(site), values(6)
    batch, one = (
        run(expression, site, plain_frame(site), tensors.__getitem__, False, each, bias) for each in (x, x[1])
    )
    assert error(one, batch[1]) <= EXACT


@pytest.mark.parametrize("name", [n for n in ALL if not n.startswith("orepa:b")])
@pytest.mark.parametrize("size", [(5,), (5, 5), (5, 5, 5)], ids=str)
def test_the_function_stays_where_it_should(name: str, size: tuple[int, ...]) -> None:
    """New branches add nothing at first, bit for bit; from scratch they do."""
    found = {}
    for init in recipes.INITS:
        site = site_of(size=size, init=init)
        expression = recipes.get(name).expression(site)
        tensors = new_tensors(expression, torch.empty(0, dtype=torch.float64))
        tensors[""] = values(*host_shape(site))
        found[init] = merge(expression, site, plain_frame(site), tensors.__getitem__)
    assert torch.equal(found["student"].weight, tensors[""])
    assert found["student"].bias is None or not found["student"].bias.any()
    alone = name == "mobileone:branches=1" and not site.keeps_shape
    assert error(found["scratch"].weight, tensors[""]) > (1e-7 if alone else 0.1)


def own_expressions() -> dict[str, tuple[Site, Expression]]:
    """What no recipe does, and a recipe of your own may."""
    site = site_of(4, 4)
    point = site.point("a").normed("n").scaled("s", 1.0)
    wide = site_of(4, 4, (7,), 3, stride=2)
    strided, plain = (replace(wide.full(n), size=(3,), stride=(step,)) for n, step in (("first", 2), ("second", 1)))
    return {
        "scaled behind a norm": (site, site.origin() + (point >> site.full("b"))),
        "a sum inside a sequence": (site, site.origin() + ((point + site.identity("i")) >> site.full("b")).normed("m")),
        "a stride in front": (wide, wide.origin() + (strided >> plain)),
        "smaller behind a stride": (wide, wide.origin() + wide.sized("row", (3,)) + wide.point("p", strided=True)),
    }


@pytest.mark.parametrize("name", own_expressions())
def test_expressions_of_your_own(name: str) -> None:
    site, expression = own_expressions()[name]
    tensors, x = drawn(expression, site), field(site, batch=4)
    kernel = merge(expression, site, plain_frame(site), tensors.__getitem__)
    assert error(kernel(x), run_with(expression, site, plain_frame(site), tensors, x)) <= EXACT
    host = ParamMap(host_shape(site), {0: ReplicaMap.repeat(4, 3), 1: ReplicaMap.repeat(4, 3)}, (1,), Noise(0, 1))
    around, wide = widened(expression, site, host, tensors)
    found = merge(expression, site, wide_frame(site, around), wide.__getitem__)
    assert error(found(spread(x, around.inputs, 2)), spread(kernel(x), around.outputs, 2)) <= EXACT


# Widened -------------------------------------------------------------------------------------------------------------


def layout(draw: st.DrawFn, size: int, ratio: int) -> ReplicaMap:
    kind = draw(st.sampled_from(("innermost", "outermost", "mixed"))) if ratio > 1 else "innermost"
    event(f"layout {kind}")
    if kind == "innermost":
        return ReplicaMap.repeat(size, ratio)
    index = np.tile(np.arange(size), ratio)
    if kind == "mixed":
        index = np.array(draw(st.permutations(index.tolist())))
    return ReplicaMap(index, size)


@st.composite
def hosts(draw: st.DrawFn, site: Site) -> ParamMap:
    """How the planner widens the weight of an operator: either side, other ratios on each, any layout."""
    left, right = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((1, 2, 3)))
    event(f"ratios {left} and {right}")
    if site.depthwise:
        inputs = layout(draw, site.inputs, left)
        return ParamMap(host_shape(site), {0: inputs.outputs(site.outputs // site.inputs)})
    inner = layout(draw, site.inputs // site.groups, left)
    outer = ReplicaMap.joined([layout(draw, site.outputs // site.groups, right) for _ in range(site.groups)])
    return ParamMap(host_shape(site), {0: outer, 1: inner}, (1,), Noise(0, 1))


def widened(expression: Expression, site: Site, host: ParamMap, tensors: dict[str, Tensor]) -> tuple[Widening, Any]:
    around = widening(site, host, noise=host.noise is not None)
    torch.manual_seed(0)
    wide = wide_tensors(expression, around, tensors, 0.25)
    return around, {**wide, "": host.widen(tensors[""], 0.25)}


def spread(x: Tensor, replica_map: ReplicaMap, dims: int) -> Tensor:
    return repeat_all(x, {1 if dims else x.dim() - 1: replica_map})


@SOME
@given(st.sampled_from(ALL), sites(), st.data())
def test_widened_branches_compute_the_students_replicated(name: str, site: Site, data: st.DataObject) -> None:
    expression = expression_of(name, site)
    if expression is None:
        return
    host = data.draw(hosts(site))
    note(f"{name} on {site}, {host}")
    tensors, x = drawn(expression, site), field(site, batch=4)
    around, wide = widened(expression, site, host, tensors)
    frame = wide_frame(site, around)
    for training in (False, True):
        y = run_with(expression, site, plain_frame(site), tensors, x, training)
        found = run_with(expression, site, frame, wide, spread(x, around.inputs, site.dims), training)
        assert error(found, spread(y, around.outputs, site.dims)) <= 100 * EXACT if training else EXACT
    # The statistics of the norms have moved alike.
    maps = dict(expression.maps(around))
    for slot_name, slot in expression.slots():
        if slot.kind == "statistic":
            expected = maps[slot_name].widen(tensors[slot_name])
            assert error(wide[slot_name].double(), expected.double()) <= EXACT
    mine = merge(expression, site, plain_frame(site), tensors.__getitem__)
    kernel = merge(expression, site, frame, wide.__getitem__)
    assert error(kernel(spread(x, around.inputs, site.dims)), spread(mine(x), around.outputs, site.dims)) <= EXACT


@SOME
@given(st.sampled_from(ALL), sites(), st.sampled_from((2, 4)))
def test_narrowed_is_what_was_widened(name: str, site: Site, ratio: int) -> None:
    """Bit for bit, with noise."""
    expression = expression_of(name, site)
    if expression is None:
        return
    host = ParamMap(host_shape(site), {0: ReplicaMap.repeat(site.outputs, ratio)})
    if not site.depthwise:
        maps = {**host.maps, 1: ReplicaMap.repeat(site.inputs // site.groups, ratio)}
        host = ParamMap(host.shape, maps, (1,), Noise(0, 1))
    tensors = drawn(expression, site)
    around, wide = widened(expression, site, host, tensors)
    for slot_name, param_map in expression.maps(around):
        assert torch.equal(param_map.narrow(wide[slot_name]), tensors[slot_name]), slot_name
    assert torch.equal(host.narrow(wide[""]), tensors[""])


@pytest.mark.parametrize("ratio", [2, 3])
@pytest.mark.parametrize("name", ["orepa", "dbb", "expandnet"])
def test_layers_inside_branches_get_noise_of_their_own(name: str, ratio: int) -> None:
    site = site_of()
    expression = recipes.get(name).expression(site)
    host = ParamMap(
        host_shape(site), {0: ReplicaMap.repeat(6, ratio), 1: ReplicaMap.repeat(4, ratio)}, (1,), Noise(0, 1)
    )
    tensors = drawn(expression, site)
    around, wide = widened(expression, site, host, tensors)
    middle = {"orepa": "serial.weight", "dbb": "serial.weight", "expandnet": "row.middle"}[name]
    assert wide[middle].shape[1] == ratio * tensors[middle].shape[1]
    for slot_name, param_map in expression.maps(around):
        noisy = not torch.equal(wide[slot_name], param_map.widen(tensors[slot_name]))
        assert noisy == (len(param_map.maps) == 2 and dict(expression.slots())[slot_name].kind == "weight"), slot_name
        assert noisy == (wide[slot_name].dim() == 4 and "depthwise" not in slot_name and "window" not in slot_name
                         and "prior" not in slot_name and "identity" not in slot_name), slot_name  # fmt: skip


@pytest.mark.parametrize(("name", "serial"), [("orepa", True), ("dbb", True), ("expandnet", True), ("repvgg", False)])
def test_the_merged_kernel_must_not_be_sliced(name: str, serial: bool) -> None:
    """Each layer is narrowed, then merged: the other order is another function once the teacher was trained."""
    site = site_of(inputs=4, outputs=4)
    expression = recipes.get(name).expression(site)
    host = ParamMap(host_shape(site), {0: ReplicaMap.repeat(4, 2), 1: ReplicaMap.repeat(4, 2)}, (1,), Noise(0, 1))
    around = widening(site, host, noise=True)
    maps = {**dict(expression.maps(around)), "": host}
    start = drawn(expression, site)
    wide = {n: values(*m.wide_shape, seed=3) if m.wide_shape else start[n] for n, m in maps.items()}
    wide = {n: start[n] if "identity.w" in n or n == "identity.weight" else t for n, t in wide.items()}
    wide = {n: maps[n].widen(start[n]) if "identity" in n or "window" in n else t.abs() for n, t in wide.items()}
    narrow = {n: maps[n].narrow(t) for n, t in wide.items()}
    right = merge(expression, site, plain_frame(site), narrow.__getitem__).weight
    sliced = host.narrow(merge(expression, site, wide_frame(site, around), wide.__getitem__).weight)
    assert (error(sliced, right) > 0.1) if serial else (error(sliced, right) <= EXACT)


# OREPA's formulas ----------------------------------------------------------------------------------------------------


def orepa_kernels(t: dict[str, Tensor], groups: int, released: bool) -> list[Tensor]:
    """The six kernels [O, I / g, 3, 3], without their scales."""
    weight = t[""]
    outputs, inner, k, _k = weight.shape
    inputs = inner * groups
    i, taps = torch.arange(outputs, dtype=torch.float64), torch.arange(k, dtype=torch.float64)
    half = math.ceil(outputs / 2)
    rows = torch.cos(math.pi * (taps + 0.5) * (i[:half, None] + 1) / k)[:, :, None].expand(-1, -1, k)
    columns = torch.cos(math.pi * (taps + 0.5) * (i[half:, None] - half + 1) / k)[:, None, :].expand(-1, k, -1)
    prior = torch.cat([rows, columns])
    unit = torch.zeros(inputs, inner, dtype=torch.float64)
    unit[torch.arange(inputs), torch.arange(inputs) % inner] = 1
    first = (t["serial.residual"].flatten(1) + unit).view(groups, inner, inner)
    second = t["serial.weight"].view(groups, -1, inner, k, k)
    depthwise = t["separable.depthwise"].view(groups, inner, 8, k, k)
    points = t["separable.point"].view(groups, -1, inner, 8)
    point = t["point.weight"]
    return [
        weight,
        torch.einsum("oi,hw->oihw", t["average.point"].flatten(1), torch.full((k, k), 1 / k**2, dtype=torch.float64)),
        torch.einsum("oi,ohw->oihw", t["frequency.point"].flatten(1), prior),
        torch.einsum("gti,gothw->goihw", first, second).reshape(weight.shape),
        point if released else F.pad(point, (1, 1, 1, 1)),
        torch.einsum("cgthw,cogt->coghw", depthwise, points).reshape(weight.shape),
    ]


@pytest.mark.parametrize("channels", [(4, 6, 1), (4, 5, 1), (4, 6, 2), (6, 12, 3), (4, 4, 4), (4, 8, 4)], ids=str)
@pytest.mark.parametrize("word", ["published", "released"])
def test_orepa_is_the_sum_of_the_published_kernels(channels: tuple[int, int, int], word: str) -> None:
    inputs, outputs, groups = channels
    site = site_of(inputs, outputs, groups=groups)
    for count in range(1, 7):
        expression = recipes.get(f"orepa:branches={count},pointwise={word}").expression(site)
        tensors = drawn(recipes.get(f"orepa:pointwise={word}").expression(site), site)
        scales = [tensors[f"{n}.scale"] for n in "origin average frequency serial point separable".split()]
        parts = orepa_kernels(tensors, groups, word == "released")
        expected = sum(s.view(-1, 1, 1, 1) * p for s, p in list(zip(scales, parts, strict=True))[:count])
        assert error(merge(expression, site, plain_frame(site), tensors.__getitem__).weight, expected) <= EXACT


@pytest.mark.parametrize(("word", "last"), [("published", 1.0), ("released", 0.05)])
def test_how_orepa_starts(word: str, last: float) -> None:
    names = [f"{n}.scale" for n in "origin average frequency serial point separable".split()]
    for init, scales in (("scratch", [0.25, 0.25, 0, 0.5, last, 0.5]), ("student", [1.0, 0, 0, 0, 0, 0])):
        expression = recipes.get(f"orepa:pointwise={word}").expression(site_of(8, 8, init=init))
        tensors = new_tensors(expression, torch.empty(0, dtype=torch.float64))
        assert [float(tensors[n][0]) for n in names] == scales
        assert all(tensors[n].unique().numel() == 1 and tensors[n].shape == (8,) for n in names)
        assert not tensors["serial.residual"].any()
        # Kaiming, uniform: variance 2 / fan-in.
        bound = math.sqrt(6 / 8)
        assert bound / 2 < float(tensors["average.point"].abs().max()) <= bound


def added_apart(expression: Sum, read: Callable[[str], Tensor], frame: Frame) -> Tensor:
    """The kernel of a sum, every part written out."""
    parts = [Sum((part,)) for part in expression.parts]
    kernels = [part.kernel(read, frame) for part in parts]
    size = kernels[0].size
    return sum(algebra.resize(replace(kernel, padding=(0,) * kernel.dims), size).weight for kernel in kernels)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("name", ["orepa", "orepa:pointwise=released", "orepa_small", "orepa_small:bottleneck=1"])
def test_products_are_the_sum_of_the_parts_written_out(name: str, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    site = site_of(8, 16, groups=groups)
    expression = recipes.get(name).expression(site)
    assert isinstance(expression, Sum)
    counted: list[int] = []
    add = factors.add
    monkeypatch.setattr(factors, "add", lambda *given: counted.append(len(given[-1])) or add(*given))
    tensors = drawn(expression, site)
    trained = {n: t for n, t in tensors.items() if t.requires_grad}
    weights = [sum_.square() for sum_ in (
        expression.kernel(tensors.__getitem__, plain_frame(site)).weight,
        added_apart(expression, tensors.__getitem__, plain_frame(site)),
    )]  # fmt: skip
    assert error(*weights) <= EXACT
    gradients = [torch.autograd.grad(weight.sum(), list(trained.values())) for weight in weights]
    assert max(error(a, b) for a, b in zip(*gradients, strict=True)) <= EXACT
    # Not vacuous: three to five branches do go through products, with groups not all.
    small = "small" in name
    assert max(counted) == 5 - ("released" in name) - (groups > 1) - (groups == 2 and not small)


def test_a_scaled_norm_beside_a_product() -> None:
    """The bias of the norm is scaled as well."""
    site = site_of(4, 4)
    expression = site.origin().normed("n").scaled("s", 0.5) + site.point("p", strided=True)
    tensors = drawn(expression, site)
    x = field(site)
    merged = merge(expression, site, plain_frame(site), tensors.__getitem__)
    assert merged.bias is not None and bool(merged.bias.any())
    assert error(merged(x), run(expression, site, plain_frame(site), tensors.__getitem__, False, x, None)) <= EXACT


@pytest.mark.parametrize("name", ["orepa", "orepa_small"])
def test_multiply_adds_of_merging_are_all_counted(name: str) -> None:
    """C = 16: serial C x T x 9 C, three or four products of the outputs' taps, eight of the inputs' in orepa."""
    site = site_of(16, 16)
    expression = recipes.get(name).expression(site)
    tensors = drawn(expression, site)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        merge(expression, site, plain_frame(site), tensors.__getitem__)
    inner, products = (16, 3 + 8) if name == "orepa" else (2, 4)
    assert counter.get_total_flops() // 2 == 9 * 16**2 * (inner + products)


def test_second_derivatives_of_products() -> None:
    site = site_of(2, 2)
    expression = recipes.get("orepa").expression(site)
    tensors = {name: t / 3 for name, t in drawn(expression, site).items()}
    names = [n for n, t in tensors.items() if t.requires_grad]

    def weight(*given: Tensor) -> Tensor:
        read = {**tensors, **dict(zip(names, given, strict=True))}
        return expression.kernel(read.__getitem__, plain_frame(site)).weight

    given = tuple(tensors[n].detach().requires_grad_() for n in names)
    assert torch.autograd.gradcheck(weight, given) and torch.autograd.gradgradcheck(weight, given)


@pytest.mark.parametrize("size", [(3, 3), (5, 5), (3,)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_products_of_other_operators(size: tuple[int, ...], dilation: int) -> None:
    """A single tap in the middle, taps at other distances, and a part that joins nothing: all where they belong."""
    site = site_of(4, 4, size, padding=dilation * (size[0] // 2), dilation=dilation)
    small = site.point("small.weight", strided=True).scaled("small.scale", 1.0)
    far = site.sized("far.weight", (3,) * len(size))
    pooled = site.point("pool.point") >> site.average("pool.window")
    expression = site.origin() + small + far + pooled
    tensors = drawn(expression, site)
    x = field(site)
    merged = merge(expression, site, plain_frame(site), tensors.__getitem__)
    assert error(merged(x), run(expression, site, plain_frame(site), tensors.__getitem__, True, x, None)) <= EXACT


def test_parameters_of_orepa_small() -> None:
    """14.25 C^2 for C channels, the layer's own included, and C for each scale and depthwise filter."""
    slots = recipes.get("orepa_small").expression(site_of(64, 64)).slots()
    count = sum(math.prod(slot.shape) for _, slot in slots if slot.kind == "weight")
    assert count + 9 * 64**2 == 14.25 * 64**2 + 6 * 64 + 9 * 64


def test_parameters_of_orepa() -> None:
    """Per convolution C -> C with 3 taps: 38 C^2 values as released, in place of 9 C^2."""
    site = site_of(16, 16)
    for word, squares in (("released", 38 - 9), ("published", 38 - 8 - 9)):
        slots = recipes.get(f"orepa:pointwise={word}").expression(site).slots()
        sizes = [math.prod(slot.shape) for _name, slot in slots if slot.kind == "weight"]
        assert sum(sizes) == squares * 16**2 + 6 * 16 + 8 * 16 * 9


# Blocks of the papers, as modules ------------------------------------------------------------------------------------

CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOL: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class NormAndPad(nn.Module):
    """A norm that pads its output with what zeros would have become (DBB)."""

    def __init__(self, channels: int, site: Site) -> None:
        super().__init__()
        self.norm = NORM[site.dims](channels)
        self.padding = site.padding

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        n = self.norm
        value = n.bias - n.running_mean * n.weight / torch.sqrt(n.running_var + n.eps)
        shape = [*y.shape[:2], *(size + 2 * p for size, p in zip(y.shape[2:], self.padding, strict=True))]
        inside = (..., *(slice(p, p + size) for size, p in zip(y.shape[2:], self.padding, strict=True)))
        padded = value.view(-1, *(1,) * (y.dim() - 2)).expand(shape).clone()
        padded[inside] = y
        return padded


class Block(nn.Module):
    """A paper's block. Its tensors have the names that the recipe gives them."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.branches = nn.ModuleList()
        self.names: dict[str, tuple[nn.Module, str]] = {}

    def conv(self, name: str, size: tuple[int, ...] | int = 1, inputs: int = 0, outputs: int = 0, **more: Any) -> Any:
        size = size if isinstance(size, tuple) else (size,) * self.site.dims
        made = CONV[self.site.dims](
            inputs or self.site.inputs, outputs or self.site.outputs, size, bias=False, groups=self.site.groups, **more
        )
        self.names[name] = made, "weight"
        return made

    def normed(self, name: str, *layers: nn.Module, channels: int = 0, pad: bool = False) -> nn.Sequential:
        channels = channels or self.site.outputs
        norm = NormAndPad(channels, self.site) if pad else NORM[self.site.dims](channels)
        inner = norm.norm if pad else norm
        for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            self.names[f"{name}.{leaf}"] = inner, leaf
        return nn.Sequential(*layers, norm)

    def fill(self, tensors: dict[str, Tensor]) -> None:
        for name, (module, leaf) in self.names.items():
            getattr(module, leaf).data.copy_(tensors[name].detach())

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self.branches)  # type: ignore[return-value]


class Acb(Block):
    def __init__(self, site: Site) -> None:
        super().__init__(site)
        more = {"stride": site.stride}
        branches = [self.normed("origin.norm", self.conv("", site.size, padding=site.padding, **more))]
        for d, k in enumerate(site.size):
            size = tuple(k if d == other else 1 for other in range(site.dims))
            padding = tuple(p if d == other else 0 for other, p in enumerate(site.padding))
            branches.append(self.normed(f"row{d}.norm", self.conv(f"row{d}.weight", size, padding=padding, **more)))
        self.branches.extend(branches)


class RepVgg(Block):
    copies = 0

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        more = {"stride": site.stride}
        full = {"size": site.size, "padding": site.padding, **more}
        branches = [self.normed("origin.norm", self.conv("", **full))]
        for k in range(1, self.copies):
            branches.append(self.normed(f"copy{k}.norm", self.conv(f"copy{k}.weight", **full)))
        branches.append(self.normed("point.norm", self.conv("point.weight", **more)))
        if site.inputs == site.outputs and set(site.stride) == {1}:
            branches.append(self.normed("identity.norm"))
        self.branches.extend(branches)


class MobileOne(RepVgg):
    copies = 4


class Dbb(Block):
    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.branches.append(
            self.normed("origin.norm", self.conv("", site.size, padding=site.padding, stride=site.stride))
        )
        if site.groups < site.outputs:
            self.branches.append(self.normed("point.norm", self.conv("point.weight", stride=site.stride)))
            inside = self.normed("average.inner", self.conv("average.point"), pad=True)
            pool = POOL[site.dims](site.size, site.stride)
            self.branches.append(self.normed("average.norm", inside, pool))
        else:
            pool = POOL[site.dims](site.size, site.stride, site.padding)
            self.branches.append(self.normed("average.norm", pool))
        channels = site.inputs * (2 if site.groups == site.inputs else 1)
        entry = Entry(self.conv("serial.residual", outputs=channels))
        inner = self.normed("serial.inner", entry, channels=channels, pad=True)
        last = self.conv("serial.weight", site.size, inputs=channels, stride=site.stride)
        self.branches.append(self.normed("serial.norm", inner, last))


class Entry(nn.Module):
    """Identity plus residual, as a 1x1 convolution."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        repeat = self.conv.out_channels // self.conv.in_channels
        groups = self.conv.groups
        same = x.unflatten(1, (groups, -1)).repeat(1, 1, repeat, *(1,) * (x.dim() - 2)).flatten(1, 2)
        return self.conv(x) + same


BLOCKS: dict[str, Callable[[Site], Block]] = {"acb": Acb, "repvgg": RepVgg, "mobileone": MobileOne, "dbb": Dbb}
SITES = {
    "plain": site_of(4, 6),
    "same channels": site_of(6, 6),
    "stride": site_of(4, 6, stride=2),
    "groups": site_of(4, 6, groups=2),
    "depthwise": site_of(6, 6, groups=6),
    "depthwise with multiplier": site_of(4, 8, groups=4),
    "strided depthwise": site_of(6, 6, groups=6, stride=2),
    "1-D": site_of(4, 4, (3,)),
    "3-D": site_of(4, 4, (3, 3, 3)),
    "5 taps": site_of(4, 6, (5, 5), 2),
}


def fitting() -> Iterator[Any]:
    for name in BLOCKS:
        for where, site in SITES.items():
            if not recipes.get(name).unfit(site):
                yield pytest.param(name, site, id=f"{name}, {where}")


@pytest.mark.parametrize(("name", "site"), list(fitting()))
def test_against_the_papers_block(name: str, site: Site) -> None:
    """Outputs, gradients and running statistics, in train and eval mode, from scratch; then merged."""
    expression, block = recipes.get(name).expression(site), BLOCKS[name](site).double()
    tensors = drawn(expression, site)
    block.fill(tensors)
    trained = {n for n, slot in expression.slots() if slot.kind != "fixed"} | {""}
    assert set(block.names) == trained
    x = field(site, batch=8)
    for training in (True, True, False):
        block.train(training)
        mine, true = run_with(expression, site, plain_frame(site), tensors, x, training), block(x)
        assert error(mine, true) <= EXACT
        weights = values(*true.shape, seed=5).detach()
        names = [n for n in trained if tensors[n].requires_grad]
        found = torch.autograd.grad(mine, [x, *(tensors[n] for n in names)], weights)
        expected = torch.autograd.grad(true, [x, *(getattr(*block.names[n]) for n in names)], weights)
        largest = max(float(t.abs().max()) for t in expected[1:])
        assert all(float((a - b).abs().max()) <= EXACT * largest for a, b in zip(found, expected, strict=True))
        for n in trained - set(names):
            assert error(tensors[n].double(), getattr(*block.names[n]).double()) <= EXACT, n
    assert {int(tensors[n]) for n in trained if n.endswith("tracked")} == {2}
    kernel = merge(expression, site, plain_frame(site), tensors.__getitem__)
    assert error(kernel(x), block(x)) <= EXACT


@pytest.mark.parametrize("name", ["acb", "dbb", "repvgg", "mobileone"])
def test_statistics_are_counted_and_follow_the_batch(name: str) -> None:
    site = site_of(4, 4)
    expression = recipes.get(name).expression(site)
    tensors, x = drawn(expression, site), field(site)
    before = {n: t.clone() for n, t in tensors.items()}
    run_with(expression, site, plain_frame(site), tensors, x, False)
    assert all(torch.equal(t, before[n]) for n, t in tensors.items())
    run_with(expression, site, plain_frame(site), tensors, x, True)
    moved = {n for n, t in tensors.items() if not torch.equal(t, before[n])}
    assert moved == {n for n, slot in expression.slots() if slot.kind == "statistic"}
    assert {int(t) for n, t in tensors.items() if n.endswith("tracked")} == {1}
    # By hand, for the operator's own norm.
    y = F.conv2d(x, tensors[""], padding=1)
    expected = 0.9 * before["origin.norm.running_mean"] + 0.1 * y.mean((0, 2, 3))
    assert error(tensors["origin.norm.running_mean"], expected) <= EXACT
    expected = 0.9 * before["origin.norm.running_var"] + 0.1 * y.var((0, 2, 3))
    assert error(tensors["origin.norm.running_var"], expected) <= EXACT


@pytest.mark.parametrize("variant", ["cl", "ck"])
@pytest.mark.parametrize("padding", [0, 2])
def test_against_expandnets(variant: str, padding: int) -> None:
    site = site_of(3, 5, (5, 5), padding, stride=2)
    expression = recipes.get(f"expandnet:rate=2,variant={variant}").expression(site)
    tensors, x = drawn(expression, site), field(site)
    y = F.pad(x, (padding,) * 4)
    if variant == "cl":
        y = F.conv2d(y, tensors["row.first"])
        y = F.conv2d(F.conv2d(y, tensors["row.middle"], stride=2), tensors["row.last"])
        assert tensors["row.middle"].shape == (10, 6, 5, 5)
    else:
        y = F.conv2d(F.conv2d(y, tensors["row.layer0"]), tensors["row.layer1"], stride=2)
        assert tensors["row.layer0"].shape == (10, 3, 3, 3)
    shape = (1, -1, 1, 1)
    own = F.conv2d(x, tensors[""], padding=padding, stride=2)
    expected = y * tensors["row.scale"].view(shape) + own * tensors["origin.scale"].view(shape)
    kernel = merge(expression, site, plain_frame(site), tensors.__getitem__)
    assert error(kernel(x), expected) <= EXACT


def test_expandnet_of_a_linear_layer() -> None:
    site = site_of(3, 5, ())
    tensors = drawn(expression := recipes.get("expandnet:rate=3").expression(site), site)
    row = tensors["row.last"] @ tensors["row.middle"] @ tensors["row.first"]
    expected = tensors["row.scale"][:, None] * row + tensors["origin.scale"][:, None] * tensors[""]
    assert error(merge(expression, site, plain_frame(site), tensors.__getitem__).weight, expected) <= EXACT


# Conditions ----------------------------------------------------------------------------------------------------------

REFUSED = [
    ("orepa", site_of(size=(5, 5)), "not 3 wide"),
    ("orepa", site_of(stride=2), "stride"),
    ("orepa", site_of(size=(2, 2)), "one tap|even"),
    ("orepa", site_of(size=()), "linear"),
    ("orepa_small", site_of(stride=2), "stride"),
    ("acb", site_of(size=(4, 4)), "even"),
    ("acb", site_of(size=(3, 1)), "one dimension"),
    ("dbb", site_of(size=(1, 1)), "one tap"),
    ("repvgg", site_of(size=(3, 5)), "not 3 wide"),
    ("mobileone", site_of(size=(2, 3)), "even"),
    ("mobileone", replace(site_of(), operator="conv_transpose2d"), "transpose"),
    ("expandnet", site_of(groups=2), "groups"),
]


@pytest.mark.parametrize(("name", "site", "reason"), REFUSED)
def test_conditions(name: str, site: Site, reason: str) -> None:
    assert re.search(reason, recipes.get(name).unfit(site))
    assert recipes.get(name).unfit(site_of(4, 4)) == ""


@pytest.mark.parametrize("name", ["orepa", "acb", "repvgg", "mobileone", "dbb"])
@pytest.mark.parametrize("size", [(2, 2), (3, 4)], ids=str)
def test_even_kernels_have_no_middle(name: str, size: tuple[int, ...]) -> None:
    """Also where an entry overrides the condition."""
    with pytest.raises(Unfit, match="no middle"):
        recipes.get(name).expression(site_of(4, 4, size))


def test_rows_of_a_linear_layer() -> None:
    with pytest.raises(Unfit, match="one row per spatial dimension"):
        recipes.get("acb").expression(site_of(size=()))


def test_wrong_options() -> None:
    site = site_of()
    for text in ("orepa:branches=0", "orepa:branches=7", "orepa:pointwise=x", "orepa_small:bottleneck=0",
                 "mobileone:branches=0", "expandnet:rate=0",
                 "expandnet:variant=x"):  # fmt: skip
        with pytest.raises(InputError, match=r"branch|rate|pointwise|bottleneck"):
            recipes.get(text).expression(site)
    with pytest.raises(Unfit, match="from 5 on"):
        recipes.get("expandnet:variant=ck").expression(site)


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ALL)
def test_text_of_a_recipe(text: str) -> None:
    read = recipes.get(text)
    assert str(read) == text and recipes.get(str(read)) == read and hash(recipes.get(text)) == hash(read)
    assert recipes.get(read) is read
    assert recipes.get("orepa") != recipes.get("orepa:branches=3")


BAD: list[tuple[Any, str]] = [
    ("orpea", "did you mean.*orepa|orepa"),
    ("orepa:branch=4", "no option 'branch=4'.*branches=6"),
    ("orepa:branches", "no option 'branches'"),
    ("orepa:branches=four", "branches is of type int, not 'four'"),
    ("acb:x=1", "none"),
    (3, "not int"),
    (Recipe("nothing"), "unknown branch recipe 'nothing'"),
]


@pytest.mark.parametrize(("value", "message"), BAD)
def test_bad_names_and_options(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipes.get(value)


@pytest.fixture
def own_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes that are registered here are gone after the test."""
    monkeypatch.setattr(registry, "_RECIPES", dict(registry._RECIPES))


@pytest.mark.usefixtures("own_recipes")
def test_a_recipe_of_your_own() -> None:
    @recipe("twice-2", fits=lambda site: "" if site.outputs > 2 else "few outputs")
    def twice(site: Site, *, more: int = 1, fast: bool = True, rate: float = 0.5) -> Expression:
        expression = site.origin()
        for k in range(more):
            expression = expression + site.full(f"other{k}").scaled(f"scale{k}", site.start(rate))
        return expression

    assert "twice-2" in recipes.names()
    read = recipes.get("twice-2:more=3,fast=false,rate=0.25")
    assert dict(read.options) == {"more": 3, "fast": False, "rate": 0.25}
    assert recipes.get(str(read)) == read
    assert read.unfit(site_of(outputs=2)) == "few outputs"
    site = site_of()
    tensors = new_tensors(expression := read.expression(site), torch.empty(0, dtype=torch.float64))
    tensors[""] = values(*host_shape(site))
    assert set(tensors) == {"", *(f"{n}{k}" for n in ("other", "scale") for k in range(3))}
    assert float(tensors["scale2"][0]) == 0.25
    expected = tensors[""] + 0.25 * sum(tensors[f"other{k}"] for k in range(3))
    assert error(merge(expression, site, plain_frame(site), tensors.__getitem__).weight, expected) <= EXACT
    with pytest.raises(InputError, match="fast is of type bool, not 'maybe'"):
        recipes.get("twice-2:fast=maybe")


@pytest.mark.usefixtures("own_recipes")
def test_recipes_that_are_refused() -> None:
    def one(site: Site) -> Expression:
        return site.origin()

    def needs(site: Site, rate: float) -> Expression:
        return site.origin()

    with pytest.raises(InputError, match="there is a recipe 'orepa' already"):
        recipe("orepa", fits=lambda site: "")(one)
    for name in ("", "a b", "a:b", "a.b"):
        with pytest.raises(InputError, match="name has letters"):
            recipe(name, fits=lambda site: "")(one)
    with pytest.raises(InputError, match="option 'rate' needs a default"):
        recipe("needs", fits=lambda site: "")(needs)
    assert "needs" not in recipes.names()
    recipe("mine", fits=lambda site: "")(one)
    recipe("mine", fits=lambda site: "")(one)  # a notebook cell that is run again
    with pytest.raises(InputError, match="already"):
        recipe("mine", fits=lambda site: "")(needs)


def _others(site: Site) -> Expression:
    return site.origin() + site.full("a").scaled("b", site.start(1.0))


WRONG: dict[str, tuple[Any, str]] = {
    "nothing": (lambda s: None, "it returned NoneType, not operators of the site"),
    "tensor": (lambda s: Sum((s.origin(), torch.ones(3))), "Tensor stands where an operator"),
    "no origin": (lambda s: s.full("w"), r"uses site.origin\(\) 0 times"),
    "two origins": (lambda s: s.origin() + s.origin(), r"uses site.origin\(\) 2 times"),
    "same name": (lambda s: _others(s) + s.sized("a", (1, 3)).scaled("c", 0.0), "share the name 'a'"),
    "name of a scale": (lambda s: s.origin() + s.full("a").scaled("a", 0.0), "share the name 'a'"),
    "name above": (lambda s: _others(s) + s.full("a.b").scaled("c", 0.0), "share the name 'a'"),
    "same norm": (lambda s: s.origin().normed("n") + s.full("a").normed("n"), "share the name 'n.weight'"),
    "empty name": (lambda s: s.origin() + s.full("").scaled("c", 0.0), "'' is no name for a tensor"),
    "outputs": (lambda s: s.origin() + s.full("a", outputs=s.outputs + 1), "branches of 4 and 5 channels"),
    "inputs": (lambda s: _others(s) + (s.full("c", outputs=8) >> s.point("d")), "d takes 4 channels and gets 8"),
    "more outputs": (lambda s: s.origin() >> s.point("d", outputs=8), "returns 8 channels, the layer has 4"),
    "its own error": (lambda s: 1 / 0, "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.usefixtures("own_recipes")
def test_wrong_recipes(case: str) -> None:
    build, message = WRONG[case]
    recipe("wrong", fits=lambda site: "")(lambda site: build(site))
    with pytest.raises(InputError, match=f"recipe 'wrong', layer .*{message}"):
        recipes.get("wrong").expression(site_of(4, 4))


@pytest.mark.parametrize("value", [True, False, None])
@pytest.mark.usefixtures("own_recipes")
def test_conditions_return_text(value: Any) -> None:
    recipe("wrong", fits=lambda site: value)(_others)
    with pytest.raises(InputError, match=f"recipe 'wrong': fits returned {value} for .*an empty string where it is"):
        recipes.get("wrong").unfit(site_of(4, 4))


@pytest.mark.usefixtures("own_recipes")
def test_a_recipe_does_not_take_the_name_of_another() -> None:
    def dbb(site: Site) -> Expression:
        return site.origin()

    with pytest.raises(InputError, match="there is a recipe 'dbb' already"):
        recipe("dbb", fits=lambda site: "")(dbb)


def test_branches_of_another_size_are_refused() -> None:
    site = site_of(4, 4)
    larger = site.origin() + replace(site.full("larger"), size=(5, 5))
    for expression in (larger, site.full("only", outputs=8)):
        with pytest.raises(KernelError, match=r"starts with site.origin\(\)|the branches make"):
            tensors = drawn(expression, site)
            merge(expression, site, plain_frame(site), tensors.__getitem__)


@given(sites())
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_a_site_in_a_file(site: Site) -> None:
    assert Site.from_json(json.loads(json.dumps(site.to_json()))) == site
