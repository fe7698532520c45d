"""Every operator rule, through the table of ``rule_table``: exact, as wide as stated, extracted bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rule_nets import Row, leaves, randomise
from rule_table import ROWS
from torch import Tensor, nn

import reparam
from reparam.passes.expand import verify_plan
from reparam.passes.plan import Plan
from reparam.passes.search import prepare
from reparam.passes.widen import build_teacher

EXACT = 1e-12
PARAMS = [pytest.param(row, id=row.name, marks=row.marks) for row in ROWS]


def inputs_of(row: Row, which: int, batch: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(which)
    shapes = [(batch, *shape) for shape in row.inputs[which]]
    if row.kind == "int":
        return tuple(torch.randint(0, 5, shape, generator=generator) for shape in shapes)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def grow(model: nn.Module, ratio: int, example: Any) -> tuple[nn.Module, Plan, float]:
    """What ``expand`` does, with the largest error of a node."""
    capture, inputs, made = prepare(model, ratio, example)
    torch.manual_seed(0)
    error = verify_plan(model, capture, made, inputs, None)
    return build_teacher(model, capture, made, 0.25), made, error


def difference(a: Any, b: Any) -> float:
    first, second = leaves(a), leaves(b)
    assert len(first) == len(second) > 0
    worst = 0.0
    for x, y in zip(first, second, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        x, y = (v.double() if not v.is_complex() else torch.view_as_real(v) for v in (x, y))
        scale = float(x.abs().max())
        worst = max(worst, float((x - y).abs().max()) / (scale or 1.0))
    return worst


@pytest.mark.parametrize("ratio", [2, 3])
@pytest.mark.parametrize("row", PARAMS)
def test_operator(row: Row, ratio: int) -> None:
    torch.manual_seed(0)
    model = randomise(row.make())
    teacher, made, error = grow(model, ratio, inputs_of(row, 0, 2))
    assert error <= EXACT
    for which, batch in ((0, 1), (1, 3)):
        xs = inputs_of(row, which, batch)
        torch.manual_seed(1)
        with torch.no_grad():
            expected = model(*[x.clone() for x in xs])
            torch.manual_seed(1)
            found = teacher(*[x.clone() for x in xs])
        assert difference(expected, found) <= EXACT
        assert type(expected) is type(found)
    check_widths(row, made)
    check_weights(model, teacher, made)
    check_round_trip(model, teacher, ratio)


def check_widths(row: Row, made: Plan) -> None:
    reasons = [f"{c.operator}: {c.reason}" for c in made.contractions]
    if row.expect in ("wide", "reduced"):
        assert not reasons
    else:
        assert any(row.expect in reason for reason in reasons), reasons
    if row.expect == "wide":
        tail = next(layer for layer in made.layers if layer.name == "tail.weight")
        assert tail.inputs and tail.wide_shape != tail.shape


def check_weights(model: nn.Module, teacher: nn.Module, made: Plan) -> None:
    """Not vacuous: some weights have another shape, and those that the plan says."""
    wide, own = teacher.state_dict(), model.state_dict()
    changed = {name for name, tensor in own.items() if wide[name].shape != tensor.shape}
    assert changed
    assert {layer.name for layer in made.layers if layer.widened} <= changed


def check_round_trip(model: nn.Module, teacher: nn.Module, ratio: int) -> None:
    back = reparam.extract(teacher)
    assert type(back) is type(model)
    own = model.state_dict()
    for name, tensor in back.state_dict().items():
        if ratio == 2:
            assert torch.equal(tensor, own[name]), name
        else:
            assert torch.allclose(tensor, own[name], rtol=1e-15, atol=0), name


def test_the_table_has_no_row_twice() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
