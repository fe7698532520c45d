"""Networks that nobody wrote: every law must hold for all of them.

The default run draws 80 networks, the same ones every time, so that a red run means a change in the code. The
thorough run draws 10,000 others: ``pytest -m thorough tests/test_random_networks.py``. To look at one network of
benchmarks/random_networks.py: ``python benchmarks/random_networks.py --only 1234``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, note, settings, target
from hypothesis import strategies as st
from random_checks import Mismatch, check, failure, kinds
from random_networks import OPS, Program, Step, program_of, programs, shrink

RATIOS = st.sampled_from((2, 3, 4))
COMMON = {
    "deadline": None, "print_blob": True, "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
}  # fmt: skip
CI = settings(max_examples=int(os.environ.get("RANDOM_NETWORKS", "80")), derandomize=True, **COMMON)
THOROUGH = settings(max_examples=10_000, derandomize=False, phases=(Phase.generate, Phase.shrink), **COMMON)


def laws(program: Program, ratio: int) -> float:
    note(f"ratio {ratio}\n{program}")
    outcome = check(program, ratio)
    target(outcome.coverage, label="coverage")
    event(f"coverage {'0' if not outcome.coverage else 'up to ' + format(-(-outcome.coverage // 0.25) / 4, '.0%')}")
    event(f"compared in train mode: {outcome.train is not None}")
    event(f"compared at another resolution: {outcome.resolution}")
    event(f"any parameter widened: {outcome.widened}")
    return outcome.coverage


@pytest.fixture(scope="module")
def coverages() -> Iterator[list[float]]:
    """Collect the coverage of every network; at the end, most of them must have a widened weight."""
    found: list[float] = []
    yield found
    widened = sum(coverage > 0 for coverage in found)
    assert widened >= 0.5 * len(found), f"only {widened} of {len(found)} networks have a widened weight"


@CI
@given(programs(), RATIOS)
def test_random_networks_obey_every_law(coverages: list[float], program: Program, ratio: int) -> None:
    coverages.append(laws(program, ratio))


@pytest.mark.thorough
@THOROUGH
@given(programs(), RATIOS)
def test_ten_thousand_random_networks(program: Program, ratio: int) -> None:
    laws(program, ratio)


# -- networks that were wrong once ---------------------------------------------------------------------------------


def step(name: str, *inputs: int, again: int | None = None, **options: Any) -> Step:
    return Step(name, inputs, tuple(options.items()), again)


def conv(x: int, out: int, kernel: int = 1, **options: Any) -> Step:
    """A convolution without bias, padding or groups where nothing else is said."""
    plain = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "bias": False, "mode": "zeros", "form": "module"}
    return step("conv", x, **{"out": out, "kernel": kernel, **plain, **options})


def linear(x: int, out: int, form: str = "module") -> Step:
    return step("linear", x, out=out, bias=False, form=form)


IMAGE, VECTOR, TOKENS = ("image", (4, 6, 6)), ("vector", (5,)), ("tokens", (9, 6))
BATCH = {"kind": "batch", "affine": True, "keep": True}
FOUND = {
    "a batch size computed from sizes became a constant":
        (IMAGE, conv(0, 2), step("shuffle", 1, kind="to_batch", groups=2), step("gate", 2, kind="eca", width=3)),
    "a shared weight was divided twice": (VECTOR, linear(0, 8), linear(1, 8), step("linear", 2, again=1), linear(3, 2)),
    "a divided weight was scaled in the graph as if it were not":
        (IMAGE, conv(0, 3), step("tied", 1, out=5, use="scaled"), conv(2, 2)),
    "a module with control flow on data was refused": (TOKENS, linear(0, 4), step("opaque", 1, kind="data")),
    "torch's batch_norm gave wrong gradients for strided weights":
        (VECTOR, linear(0, 6), step("norm", 1, **BATCH), linear(2, 3)),
    "a norm at student width shared its statistics with the student":
        (IMAGE, conv(0, 3), step("norm", 1, kind="batch", affine=False, keep=True)),
    "a power iteration at student width shared its vectors":
        (IMAGE, conv(0, 4, form="spectral_norm"), step("norm", 1, **BATCH)),
    "a channel number times a value was the teacher's":
        (IMAGE, conv(0, 5), step("reduce", 1, f="count"), conv(2, 3)),
    "a field of a named tuple could not be contracted":
        (IMAGE, conv(0, 5), step("reduce", 1, f="min_values"), conv(2, 3)),
    "replicas of a single channel shared their memory": (IMAGE, conv(0, 1), conv(1, 3, kernel=3)),
    "steps of a failed attempt at a reshape stayed":
        (("image", (5, 6, 6)), linear(0, 4), step("depth", 1, kind="reshape_up"), conv(2, 3)),
    "a leaf at student width had a norm that another call had widened":
        (("image", (4, 6)), conv(0, 12), step("shuffle", 1, kind="half_constant", groups=4),
         step("norm", 2, kind="batch", affine=False, keep=True), linear(3, 8), step("norm", 1, again=2), linear(5, 3)),
    "a roll over channels was proven with the teacher's shift":
        (VECTOR, linear(0, 7), step("pieces", 1, kind="roll", at=5), linear(2, 7)),
    "replicas of a single channel went into the resolution":
        (IMAGE, conv(0, 1), step("shuffle", 1, kind="half_constant", groups=1), conv(2, 3)),
    "a mean of values that were centred was compared relative to its rounding":
        (IMAGE, conv(0, 4), step("reduce", 1, f="mean"), step("reduce", 2, again=1), conv(3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("ratio", [2, 3])
@pytest.mark.parametrize("name", FOUND)
def test_networks_that_were_wrong_once(name: str, ratio: int) -> None:
    (form, shape), *steps = FOUND[name]
    check(Program(form, shape, 1, tuple(steps), (len(steps),)), ratio)


# -- the strategy itself -------------------------------------------------------------------------------------------


def test_every_operator_is_drawn() -> None:
    seen = {step.name for seed in range(400) for step in program_of(seed).steps}
    assert seen == set(OPS)


def test_a_seed_means_one_network() -> None:
    one, two = program_of(12), program_of(12)
    assert one == two and str(one) == str(two)
    assert all(torch.equal(a, b) for a, b in zip(one.build().parameters(), two.build().parameters(), strict=True))
    assert program_of(13) != one


def test_programs_print_as_programs() -> None:
    program = Program("image", (3, 6, 6), 1, (Step("pointwise", (0,), (("f", "relu"),)), Step("pair", (0, 1))), (2,))
    assert str(program).splitlines()[1:] == ["x1 = pointwise(x0, f='relu')", "x2 = pair(x0, x1)", "return one of x2"]
    assert list(kinds(program)) == ["pointwise relu", "pair"]


def test_shrinking_keeps_what_fails() -> None:
    program = next(p for p in map(program_of, range(200)) if "norm" in [s.name for s in p.steps] and len(p.steps) > 5)
    small = shrink(program, lambda p: any(step.name == "norm" for step in p.steps))
    assert [step.name for step in small.steps] == ["norm"]


def test_a_wrong_teacher_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not vacuous: a weight that is not divided by its replicas is a mismatch."""
    from reparam.ops.params import ParamMap

    monkeypatch.setattr(ParamMap, "_divisor", lambda *_: 1.0)
    found = [failure(program_of(seed), 2) for seed in range(6)]
    assert any(message and "differ at node" in message for message in found)


def test_an_error_above_the_tolerance_is_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random_checks.TOLERANCE", -1.0)
    with pytest.raises(Mismatch, match="allowed"):
        check(program_of(0), 2)
