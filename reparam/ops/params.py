"""Parameter maps: how one student tensor becomes one teacher tensor, and back.

The law for a linear operator with output map phi_o and input map phi_i, n_i replicas of input i:
``W~[o, i] = W[phi_o(o), phi_i(i)] / n_{phi_i(i)}`` (GPD, ICLR 2025, inverse reparameterization, with the
division on the input side so that activations keep their scale).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reparam.ops.maps import MOST_PIECES, IntArray, Maps, Piece, ReplicaMap, clean, take_index


@dataclass(frozen=True)
class Noise:
    """Where symmetry-breaking noise may go.

    Args:
        out_dim: dimension of the weight that runs over outputs.
        in_dim: dimension that runs over inputs; the noise of the replicas of one input sums to zero.
    """

    out_dim: int
    in_dim: int


@dataclass(frozen=True)
class ParamMap:
    """How a parameter or buffer is widened and narrowed.

    Args:
        shape: student shape.
        maps: non-trivial replica map per dimension.
        divide: dimensions whose replica counts divide the value (the inputs of a linear operator).
        noise: where symmetry-breaking noise may go, or None.
        power: exponent of the divisor; 1 for linear weights, 0.5 for the vectors of a power iteration.

    ``narrow(widen(w)) == w``, bit for bit where the counts are powers of two and ``power`` is 1.
    """

    shape: tuple[int, ...]
    maps: Maps = field(default_factory=dict)
    divide: tuple[int, ...] = ()
    noise: Noise | None = None
    power: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "maps", clean(self.maps))
        object.__setattr__(self, "divide", tuple(d for d in self.divide if d in self.maps))
        for dim, replica_map in self.maps.items():
            if not 0 <= dim < len(self.shape) or replica_map.size != self.shape[dim]:
                raise ValueError(f"map of dimension {dim} has size {replica_map.size}, tensor has shape {self.shape}")

    def __hash__(self) -> int:
        return hash((self.shape, tuple(self.maps.items()), self.divide, self.noise, self.power))

    @property
    def wide_shape(self) -> tuple[int, ...]:
        """Shape of the teacher's tensor."""
        return take_index(self.shape, self.maps)

    @property
    def is_identity(self) -> bool:
        """Whether teacher and student tensor are the same."""
        return not self.maps

    def widen(self, value: Tensor, amplitude: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """Return the teacher's tensor of :attr:`wide_shape`, a new tensor without autograd history.

        Args:
            value: student tensor of :attr:`shape`.
            amplitude: standard deviation of the noise relative to the root mean square of ``value``; 0 for none.
            generator: source of the noise; None for torch's default generator.
        """
        wide = value.detach()
        for dim in self.divide:
            wide = wide / self._divisor(dim, self.maps[dim].counts, wide)
        real = value.numel() > 0 and value.is_floating_point() and value.device.type != "meta"
        noisy = bool(amplitude) and self.noise is not None and real
        scale = amplitude * _root_mean_square(value.detach()) if noisy else 0.0
        if noisy and self._in_default_layout():
            return self._with_noise(wide, scale, generator)
        # Repeating a dimension of size 1 gives a view whose replicas share their memory.
        wide = repeat_all(wide, self.maps).contiguous()
        wide = wide.clone(memory_format=torch.contiguous_format) if wide.data_ptr() == value.data_ptr() else wide
        if noisy:
            self._add_noise(wide, scale, generator)
        return wide

    def narrow(self, wide: Tensor) -> Tensor:
        """Return the student's tensor of :attr:`shape` from the teacher's; differentiable.

        The first replica of each index, times the divisor: the paper's channel-level part of CBR.
        """
        value = wide
        for dim, replica_map in self.maps.items():
            value = first_replicas(value, dim, replica_map)
        for dim in self.divide:
            value = value * self._divisor(dim, self.maps[dim].counts, value)
        # torch's CPU batch_norm gives wrong gradients for a weight with a stride (2.15, input [N, C]).
        return value.contiguous() if value.dim() == 1 else value

    def pull_back(self, gradient: Tensor, into: Tensor) -> None:
        """Add a gradient of the student's tensor to one of the teacher's: the adjoint of :meth:`narrow`, in place.

        Automatic differentiation would write the whole wide tensor, mostly zeros, and add that.

        Args:
            gradient: of the student's tensor, :attr:`shape`.
            into: gradient of the teacher's tensor, :attr:`wide_shape`; changed.
        """
        factor = 1.0
        for dim in self.divide:
            divisor = self._divisor(dim, self.maps[dim].counts, gradient)
            if isinstance(divisor, float):
                factor *= divisor
            else:
                gradient = gradient * divisor
        _add_to_first(into, gradient, sorted(self.maps.items()), factor)

    @property
    def divisor(self) -> float:
        """By how much the student's tensor is larger than the block of the teacher's that it is read from.

        Where an index has more replicas than another: the mean.
        """
        return math.prod(float(self.maps[dim].counts.mean()) ** self.power for dim in self.divide)

    def _divisor(self, dim: int, counts: IntArray, like: Tensor) -> Tensor | float:
        uniform = self.maps[dim].uniform
        if uniform is not None:
            return float(uniform) ** self.power
        shape = [1] * like.dim()
        shape[dim] = -1
        return _numbers(counts, self.power, like).view(shape)

    def _add_noise(self, wide: Tensor, scale: float, generator: torch.Generator | None) -> None:
        """Add noise that sums to zero over the replicas of each input and leaves the first replicas alone.

        Rows of replicas 2..r carry noise on all columns; rows of first replicas on columns 2..r only, which needs
        r >= 3 because the sum must vanish there too.
        """
        assert self.noise is not None
        in_map = self.maps.get(self.noise.in_dim)
        if in_map is None or in_map.uniform is None or in_map.uniform < 2:
            return
        out_map = self.maps.get(self.noise.out_dim) or ReplicaMap.identity(self.shape[self.noise.out_dim])
        columns = _replica_positions(in_map)
        view = wide.movedim((self.noise.out_dim, self.noise.in_dim), (0, 1))
        for rank, rows in enumerate(_replica_positions(out_map)):
            _noise_block(view, rows, columns if rank else columns[1:], scale / len(columns), generator)

    def _in_default_layout(self) -> bool:
        """Whether only the dimensions with noise are mapped, each with the same number of replicas, innermost."""
        assert self.noise is not None
        dims = {self.noise.out_dim, self.noise.in_dim}
        return self.noise.in_dim in self.maps and all(
            dim in dims and replica_map.innermost is not None for dim, replica_map in self.maps.items()
        )

    def _with_noise(self, value: Tensor, scale: float, generator: torch.Generator | None) -> Tensor:
        """Return the replicas of ``value`` with the noise of :meth:`_add_noise`: each number is written once."""
        assert self.noise is not None
        dims = (self.noise.out_dim, self.noise.in_dim)
        counts = [self.wide_shape[dim] // self.shape[dim] for dim in dims]
        wide = value.new_empty(self.wide_shape)
        value, view = value.movedim(dims, (0, 1)), wide.movedim(dims, (0, 1))
        for row in range(counts[0]):
            slots = [view[row :: counts[0], column :: counts[1]] for column in range(counts[1])]
            quiet = 0 if row and len(slots) > 1 else 1 if len(slots) > 2 else len(slots)
            for slot in slots[:quiet]:
                slot.copy_(value)
            noisy = slots[quiet:]
            for slot, eps in zip(
                noisy, _cancelling(len(noisy), value.shape, scale / len(slots), generator, value), strict=True
            ):
                torch.add(value, eps, out=slot)
        return wide

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        return {
            "shape": list(self.shape),
            "maps": {str(dim): m.to_json() for dim, m in self.maps.items()},
            "divide": list(self.divide),
            "noise": None if self.noise is None else [self.noise.out_dim, self.noise.in_dim],
            "power": self.power,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ParamMap:
        """Inverse of :meth:`to_json`."""
        return cls(
            tuple(data["shape"]),
            {int(dim): ReplicaMap.from_json(m) for dim, m in data["maps"].items()},
            tuple(data["divide"]),
            None if data["noise"] is None else Noise(*data["noise"]),
            float(data["power"]),
        )


def repeat(value: Tensor, dim: int, replica_map: ReplicaMap) -> Tensor:
    """Repeat the indices of ``dim`` as the map says: the student's value in the teacher's layout."""
    if replica_map.innermost is not None:
        return value.repeat_interleave(replica_map.innermost, dim)
    return value.index_select(dim, torch.tensor(replica_map.index, device=value.device))


def repeat_all(value: Tensor, maps: Maps) -> Tensor:
    """Repeat the indices of several dimensions; one copy for all that have the default layout."""
    plain = {dim: m.innermost for dim, m in maps.items() if m.innermost is not None}
    shape = [n for d, size in enumerate(value.shape) for n in ((size, plain[d]) if d in plain else (size,))]
    ones = [n for d, size in enumerate(value.shape) for n in ((size, 1) if d in plain else (size,))]
    if plain:
        value = value.reshape(ones).expand(shape).reshape([n * (plain.get(d) or 1) for d, n in enumerate(value.shape)])
    for dim, replica_map in maps.items():
        if dim not in plain:
            value = repeat(value, dim, replica_map)
    return value


def first_replicas(value: Tensor, dim: int, replica_map: ReplicaMap) -> Tensor:
    """Take the first replica of each student index along ``dim``; a view where the layout allows.

    Without a tensor of indices where it allows that: a GPU would wait for it, and no CUDA graph can hold it.
    """
    if replica_map.pieces is None:
        return value.index_select(dim, torch.tensor(replica_map.first, device=value.device))
    parts = [_piece(value, dim, piece) for piece in replica_map.pieces] or [value.narrow(dim, 0, 0)]
    parts = [part if part.dim() == value.dim() else part.flatten(dim, dim + 1) for part in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _piece(value: Tensor, dim: int, piece: Piece) -> Tensor:
    """Return a view of these positions of ``dim``; blocks of several positions have a dimension of their own."""
    start, blocks, stride, length = piece
    if length == 1:
        return value[(slice(None),) * dim + (slice(start, start + (blocks - 1) * stride + 1, stride),)]
    if blocks == 1:
        return value.narrow(dim, start, length)
    return value.narrow(dim, start, blocks * stride).unflatten(dim, (blocks, stride)).narrow(dim + 1, 0, length)


def _add_to_first(into: Tensor, gradient: Tensor, maps: list[tuple[int, ReplicaMap]], factor: float) -> None:
    """Add ``factor`` times the gradient to the first replicas along these dimensions, the last one first.

    Blocks move the dimensions behind them.
    """
    if not maps:
        into.add_(gradient, alpha=factor)
        return
    (*before, (dim, replica_map)) = maps
    if replica_map.pieces is None:
        first = torch.tensor(replica_map.first, device=gradient.device)
        shape = [*gradient.shape[:dim], len(replica_map), *gradient.shape[dim + 1 :]]
        _add_to_first(into, gradient.new_zeros(shape).index_copy(dim, first, gradient), before, factor)
        return
    done = 0
    for piece in replica_map.pieces:
        size = piece.blocks * piece.length
        place, part = _piece(into, dim, piece), gradient.narrow(dim, done, size)
        if place.dim() > into.dim():
            part = part.unflatten(dim, (piece.blocks, piece.length))
        _add_to_first(place, part, before, factor)
        done += size


def _numbers(counts: IntArray, power: float, like: Tensor) -> Tensor:
    """Return ``counts ** power`` in the dtype and on the device of ``like``.

    Filled in there, where it takes few runs of equal numbers: a copy from the CPU would have to be waited for.
    """
    ends = [0, *(np.flatnonzero(np.diff(counts)) + 1).tolist(), len(counts)]
    if len(ends) > MOST_PIECES:
        return torch.tensor(counts, dtype=like.dtype, device=like.device).pow(power)
    runs = [like.new_full((stop - start,), float(counts[start]) ** power) for start, stop in pairwise(ends)]
    return torch.cat(runs)


Positions = slice | Tensor


def _root_mean_square(value: Tensor) -> float:
    if value.dtype == torch.float64:
        return float(torch.linalg.vector_norm(value)) / math.sqrt(value.numel())
    return float(value.float().square().mean().sqrt())


def _replica_positions(replica_map: ReplicaMap) -> list[Positions]:
    """Teacher positions of the k-th replica of the student indices, in their order, for each k."""
    ratio = replica_map.innermost
    if ratio is not None:
        return [slice(k, None, ratio) for k in range(ratio)]
    positions: list[Positions] = []
    for k in range(int(replica_map.counts.max())):
        at = (replica_map.rank == k).nonzero()[0]
        positions.append(torch.as_tensor(at[replica_map.index[at].argsort(kind="stable")]))
    return positions


def _cancelling(
    count: int, shape: torch.Size, scale: float, generator: torch.Generator | None, like: Tensor
) -> Iterator[Tensor]:
    """Draw ``count`` tensors of noise that sum to zero, one after the other; each is to be used before the next."""
    total: Tensor | None = None
    for _ in range(count - 1):
        eps = _draw(shape, scale, generator, like)
        total = eps if total is None else total + eps
        yield eps
    if total is not None:  # the last one takes what is missing to zero
        yield total.neg_()


def _draw(shape: torch.Size, scale: float, generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Draw noise; on the CPU, since a seed has to mean the same on every device."""
    return torch.randn(shape, generator=generator).mul_(scale).to(like.device, like.dtype)


def _noise_block(
    view: Tensor, rows: Positions, columns: list[Positions], scale: float, generator: torch.Generator | None
) -> None:
    """Add noise to ``view[rows, c]`` for each c of ``columns`` so that it sums to zero over them."""
    if len(columns) < 2:
        return
    shape = view[rows][:, columns[0]].shape
    for column, eps in zip(columns, _cancelling(len(columns), shape, scale, generator, view), strict=True):
        if isinstance(rows, slice) and isinstance(column, slice):
            view[rows, column] += eps
        else:
            index = torch.arange(view.shape[0])[rows][:, None].to(view.device)
            view[index, torch.arange(view.shape[1])[column].to(view.device)] += eps
