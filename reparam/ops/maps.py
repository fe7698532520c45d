"""Replica maps: which student index each teacher index repeats.

A widened dimension of ``n`` student indices and ``N >= n`` teacher indices is described by one array
``index`` of length ``N`` with values in ``[0, n)``: ``teacher[j] == student[index[j]]`` for every ``j``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


class Piece(NamedTuple):
    """Positions ``start + k * stride + j`` for k in [0, blocks) and j in [0, length), k outermost."""

    start: int
    blocks: int
    stride: int
    length: int


MOST_PIECES = 32
"""Of how many pieces first replicas are put together; of more, indexing is cheaper."""


@dataclass(frozen=True, eq=False)
class ReplicaMap:
    """Immutable map from teacher index to student index, onto ``range(size)``.

    Args:
        index: integers [N], the student index of each teacher index.
        size: number of student indices n; every one of them must occur in ``index``.
        marks: integers [n] that travel with the student indices and say where they come from (0: not known), or
            None. They take no part in comparisons and are not stored.

    >>> ReplicaMap.repeat(3, 2).index.tolist()
    [0, 0, 1, 1, 2, 2]
    """

    index: IntArray
    size: int
    marks: IntArray | None = None

    def __post_init__(self) -> None:
        index = np.ascontiguousarray(self.index, dtype=np.int64)
        index.setflags(write=False)
        object.__setattr__(self, "index", index)
        if index.ndim != 1:
            raise ValueError(f"a replica map is one-dimensional, not {index.ndim}-dimensional")
        if len(index) and (index.min() < 0 or index.max() >= self.size):
            raise ValueError(f"a replica map onto {self.size} indices has values outside [0, {self.size})")
        if len(index) < self.size or (self.counts == 0).any():
            raise ValueError(f"a replica map must reach each of its {self.size} student indices")

    @classmethod
    def identity(cls, size: int) -> ReplicaMap:
        """Return the map of a dimension that is not widened."""
        return cls(np.arange(size), size)

    @classmethod
    def repeat(cls, size: int, ratio: int) -> ReplicaMap:
        """Return the default layout: ``ratio`` replicas of each index, innermost."""
        return cls(np.repeat(np.arange(size), ratio), size)

    @classmethod
    def joined(cls, parts: Sequence[ReplicaMap]) -> ReplicaMap:
        """Return the map of a dimension that consists of these parts, one behind the other."""
        starts = np.cumsum([0, *(part.size for part in parts)])
        index = np.concatenate([part.index + start for part, start in zip(parts, starts, strict=False)])
        marks = None
        if any(part.marks is not None for part in parts):
            marks = np.concatenate([np.zeros(p.size, np.int64) if p.marks is None else p.marks for p in parts])
        return cls(index, int(starts[-1]), marks)

    def marked(self, marks: IntArray | int) -> ReplicaMap:
        """Return the same map with these marks, or with one mark for all indices."""
        return ReplicaMap(self.index, self.size, np.broadcast_to(np.asarray(marks, dtype=np.int64), (self.size,)))

    def part(self, start: int, stop: int, wide_start: int, wide_stop: int) -> ReplicaMap:
        """Return the map of student range [start, stop), which is teacher range [wide_start, wide_stop)."""
        marks = None if self.marks is None else self.marks[start:stop]
        return ReplicaMap(self.index[wide_start:wide_stop] - start, stop - start, marks)

    def __len__(self) -> int:
        return len(self.index)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ReplicaMap):
            return NotImplemented
        return self is other or (self.size == other.size and np.array_equal(self.index, other.index))

    def __hash__(self) -> int:
        return hash((self.size, self.index.tobytes()))

    def __repr__(self) -> str:
        if self.innermost is not None:
            return f"ReplicaMap.repeat({self.size}, {self.innermost})"
        shown = ", ".join(map(str, self.index[:12])) + (", ..." if len(self) > 12 else "")
        return f"ReplicaMap([{shown}], size={self.size})"

    @cached_property
    def counts(self) -> IntArray:
        """Number of replicas of each student index, [size]."""
        return np.bincount(self.index, minlength=self.size).astype(np.int64)

    @cached_property
    def uniform(self) -> int | None:
        """The number of replicas where all student indices have the same, else None."""
        if self.size == 0:
            return 1
        first = int(self.counts[0])
        return first if bool((self.counts == first).all()) else None

    @cached_property
    def is_identity(self) -> bool:
        """Whether teacher and student dimension are the same."""
        return len(self) == self.size and bool((self.index == np.arange(self.size)).all())

    @cached_property
    def innermost(self) -> int | None:
        """The ratio where this is ``ReplicaMap.repeat(size, ratio)``, else None."""
        ratio = self.uniform
        if ratio is None or not bool((self.index == np.repeat(np.arange(self.size), ratio)).all()):
            return None
        return ratio

    @cached_property
    def first(self) -> IntArray:
        """Teacher position of the first replica of each student index, [size]."""
        positions = np.full(self.size, len(self), dtype=np.int64)
        np.minimum.at(positions, self.index, np.arange(len(self)))
        return positions

    @cached_property
    def rank(self) -> IntArray:
        """Which replica (0 = first) of its student index each teacher index is, [N]."""
        order = np.argsort(self.index, kind="stable")
        starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]]) if self.size else np.zeros(0, dtype=np.int64)
        rank = np.empty(len(self), dtype=np.int64)
        rank[order] = np.arange(len(self)) - np.repeat(starts, self.counts)
        return rank

    @cached_property
    def slice(self) -> slice | None:
        """A slice that picks the first replicas, where one does (a view instead of a copy), else None."""
        if self.size == 0:
            return slice(0, 0)
        if self.size == 1:
            return slice(int(self.first[0]), int(self.first[0]) + 1)
        steps = np.diff(self.first)
        step = int(steps[0])
        if step <= 0 or not bool((steps == step).all()):
            return None
        return slice(int(self.first[0]), int(self.first[-1]) + 1, step)

    @cached_property
    def pieces(self) -> tuple[Piece, ...] | None:
        """The first replicas as pieces in the order of their student indices, or None where that takes too many.

        One piece is enough for the default layout and behind a depthwise operator with several outputs per channel;
        a concatenation has one or more for each of its parts.
        """
        if self.slice is not None:
            steps = self.slice.step or 1
            return (Piece(self.slice.start, self.size, steps, 1),) if self.size else ()
        ends = np.flatnonzero(np.diff(self.first) != 1) + 1
        starts = self.first[np.concatenate([[0], ends])].tolist()
        lengths = np.diff(np.concatenate([[0], ends, [self.size]])).tolist()
        found: list[Piece] = []
        for start, length in zip(starts, lengths, strict=True):
            if not (found and (joined := _with_run(found[-1], start, length, len(self)))):
                joined = Piece(start, 1, length, length)
            else:
                found.pop()
            found.append(joined)
            if len(found) > MOST_PIECES:
                return None
        return tuple(found)

    def outputs(self, multiplier: int) -> ReplicaMap:
        """Return the output map of a depthwise operator that gives each channel ``multiplier`` outputs."""
        index = (self.index[:, None] * multiplier + np.arange(multiplier)).reshape(-1)
        marks = None if self.marks is None else np.repeat(self.marks, multiplier)
        return ReplicaMap(index, self.size * multiplier, marks)

    def grouped(self, groups: int) -> list[ReplicaMap] | None:
        """Split into one map per group, or None where a teacher group would mix student groups.

        The teacher dimension is cut into ``groups`` equal blocks; block g must hold the replicas of student
        block g and nothing else.
        """
        if groups <= 0 or self.size % groups or len(self) % groups:
            return None
        width, wide = self.size // groups, len(self) // groups
        blocks = self.index.reshape(groups, wide) - np.arange(groups)[:, None] * width
        marks = [None] * groups if self.marks is None else list(self.marks.reshape(groups, width))
        if ((blocks < 0) | (blocks >= width)).any():
            return None
        try:
            return [ReplicaMap(block, width, mark) for block, mark in zip(blocks, marks, strict=True)]
        except ValueError:
            return None

    def same_blocks(self, groups: int) -> ReplicaMap | None:
        """Return the map inside a group where it is the same in every group, else None."""
        blocks = self.grouped(groups)
        if blocks is None or any(block != blocks[0] for block in blocks):
            return None
        return blocks[0]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value; the default layout is stored as its ratio."""
        if self.innermost is not None:
            return {"size": self.size, "repeat": self.innermost}
        return {"size": self.size, "index": self.index.tolist()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ReplicaMap:
        """Inverse of :meth:`to_json`."""
        if "repeat" in data:
            return cls.repeat(int(data["size"]), int(data["repeat"]))
        return cls(np.asarray(data["index"], dtype=np.int64), int(data["size"]))


def _with_run(piece: Piece, start: int, length: int, wide: int) -> Piece | None:
    """Return the piece with one more run of neighbouring positions, where it goes on as evenly as before.

    Blocks of several positions need the whole stride inside the dimension, to be one view of it.
    """
    last = piece.start + (piece.blocks - 1) * piece.stride
    stride = start - last
    even = length == piece.length and stride > 0 and (piece.blocks == 1 or stride == piece.stride)
    inside = length == 1 or start + stride <= wide
    return Piece(piece.start, piece.blocks + 1, stride, length) if even and inside else None


def realign(source: ReplicaMap, target: ReplicaMap) -> IntArray:
    """Return positions p with ``source.index[p] == target.index``, replica k going to replica k (modulo its count).

    Indexing a value that has the map ``source`` with p gives the same value under the map ``target``. First
    replicas go to first replicas.
    """
    if source.size != target.size:
        raise ValueError(f"maps onto {source.size} and {target.size} indices cannot be aligned")
    order = np.argsort(source.index, kind="stable")
    starts = np.concatenate([[0], np.cumsum(source.counts)[:-1]])
    replica = target.rank % source.counts[target.index]
    positions: IntArray = order[starts[target.index] + replica]
    return positions


Maps = dict[int, ReplicaMap]
"""The non-trivial maps of a tensor, by non-negative dimension."""


def clean(maps: Maps) -> Maps:
    """Drop identity maps."""
    return {dim: m for dim, m in sorted(maps.items()) if not m.is_identity}


def take_index(shape: Sequence[int], maps: Maps) -> tuple[int, ...]:
    """Return the teacher's shape of a student tensor of this shape."""
    return tuple(len(maps[d]) if d in maps else n for d, n in enumerate(shape))
