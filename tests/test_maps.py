"""First replicas: how the student's tensors are read from the teacher's, and how gradients go back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reparam.ops.maps import MOST_PIECES, ReplicaMap
from reparam.ops.params import ParamMap, first_replicas


@st.composite
def parts(draw: st.DrawFn) -> ReplicaMap:
    """One part of a dimension: the default layout, the outputs of a depthwise operator, unwidened, or anything."""
    size, ratio = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    kind = draw(st.sampled_from(("innermost", "outermost", "outputs", "identity", "any")))
    if kind == "innermost":
        return ReplicaMap.repeat(size, ratio)
    if kind == "outermost":
        return ReplicaMap(np.arange(size * ratio) % size, size)
    if kind == "outputs":
        return ReplicaMap.repeat(size, ratio).outputs(draw(st.integers(1, 4)))
    if kind == "identity":
        return ReplicaMap.identity(size)
    more = draw(st.lists(st.integers(0, size - 1), max_size=4))
    return ReplicaMap(np.array(draw(st.permutations([*range(size), *more]))), size)


def dimensions() -> st.SearchStrategy[ReplicaMap]:
    return st.lists(parts(), min_size=1, max_size=4).map(ReplicaMap.joined)


@settings(deadline=None)
@given(dimensions())
def test_first_replicas(replica_map):
    wide = torch.arange(3 * len(replica_map)).reshape(3, -1)
    assert torch.equal(first_replicas(wide, 1, replica_map), wide[:, torch.tensor(replica_map.first)])
    pieces = replica_map.pieces
    assert pieces is not None and sum(piece.blocks * piece.length for piece in pieces) == replica_map.size


@settings(deadline=None)
@given(dimensions(), dimensions(), st.booleans(), st.sampled_from((1.0, 0.5)), st.integers(0, 99))
def test_pulling_back_is_the_adjoint_of_narrowing(rows, columns, both, power, seed):
    law = ParamMap((rows.size, 2, columns.size), {0: rows, 2: columns}, (0, 2) if both else (2,), power=power)
    generator = torch.Generator().manual_seed(seed)
    value, wide, gradient, into = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in (law.shape, law.wide_shape, law.shape, law.wide_shape)
    )
    torch.testing.assert_close(law.narrow(law.widen(value)), value, rtol=0, atol=1e-14)
    wide.requires_grad_()
    counts = [torch.tensor(m.counts).double() ** power for m in (rows, columns)]
    expected = wide[torch.tensor(rows.first)][:, :, torch.tensor(columns.first)] * counts[1]
    expected = expected * counts[0][:, None, None] if both else expected
    torch.testing.assert_close(law.narrow(wide), expected, rtol=1e-14, atol=0)
    (wanted,) = torch.autograd.grad(expected, wide, gradient)
    (found,) = torch.autograd.grad(law.narrow(wide), wide, gradient)
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0)
    start = into.clone()
    law.pull_back(gradient, into)
    torch.testing.assert_close(into, start + wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("size, multiplier, ratio", [(3, 4, 2), (1, 2, 3), (4, 1, 2), (2, 3, 3)])
def test_one_piece_behind_a_depthwise_operator(size, multiplier, ratio):
    assert len(ReplicaMap.repeat(size, ratio).outputs(multiplier).pieces) == 1


def test_a_view_where_the_layout_allows():
    wide = torch.arange(12)
    for replica_map in (ReplicaMap.repeat(4, 3), ReplicaMap(np.arange(12) % 4, 4)):
        assert first_replicas(wide, 0, replica_map)._is_view()


def test_many_pieces_are_indexed():
    size = 4 * MOST_PIECES
    index = np.random.default_rng(0).permutation(np.arange(2 * size) % size)
    replica_map = ReplicaMap(index, size)
    assert replica_map.pieces is None
    law = ParamMap((size,), {0: replica_map}, (0,))
    wide = torch.randn(law.wide_shape, dtype=torch.float64, requires_grad=True)
    assert torch.equal(law.narrow(wide), 2 * wide[torch.tensor(replica_map.first)])
    (expected,) = torch.autograd.grad(law.narrow(wide).sum(), wide)
    into = torch.zeros_like(wide)
    law.pull_back(torch.ones(size, dtype=torch.float64), into)
    assert torch.equal(into, expected)


def test_counts_that_change_often():
    index = np.repeat(np.arange(3 * MOST_PIECES), np.tile([1, 2, 3], MOST_PIECES))
    replica_map = ReplicaMap(index, 3 * MOST_PIECES)
    law = ParamMap((replica_map.size,), {0: replica_map}, (0,))
    value = torch.randn(law.shape, dtype=torch.float64)
    torch.testing.assert_close(law.narrow(law.widen(value)), value, rtol=1e-15, atol=0)
