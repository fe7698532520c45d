"""Small operators that a pass inserts into a graph to bring a value into another layout or scale.

Each step is data (frozen, JSON in and out) and builds the module that runs it. The modules own no parameters and
no state_dict keys; index tensors are non-persistent buffers, so they follow ``.to(device)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reparam.ops.maps import ReplicaMap, realign

STEPS = "reparam_steps"
"""Name of the module under which a rewritten network keeps the modules of its steps."""


@dataclass(frozen=True)
class Realign:
    """Bring dimension ``dim`` from layout ``source`` to layout ``target`` of the same student dimension.

    An identity target contracts: the mean over the replicas (the first replica for bool and int).
    """

    dim: int
    source: ReplicaMap
    target: ReplicaMap

    def build(self) -> nn.Module:
        """Return the module that runs this step."""
        if self.target.is_identity:
            return Contract(self.dim, self.source)
        return Reindex(self.dim, self.source, self.target)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        return {"step": "realign", "dim": self.dim, "source": self.source.to_json(), "target": self.target.to_json()}

    def __str__(self) -> str:
        word = "contract" if self.target.is_identity else "repeat" if self.source.is_identity else "reorder"
        return f"{word} dim {self.dim}: {len(self.source)} -> {len(self.target)}"


@dataclass(frozen=True)
class Scale:
    """Multiply by ``factors``: one number, or one per index of ``dim`` (the teacher's width)."""

    factors: tuple[float, ...]
    dim: int | None = None

    def build(self) -> nn.Module:
        """Return the module that runs this step."""
        return Multiply(self.factors, self.dim)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        return {"step": "scale", "dim": self.dim, "factors": list(self.factors)}

    def __str__(self) -> str:
        return f"scale by {self.factors[0]:g}" if self.dim is None else f"scale along dim {self.dim}"


@dataclass(frozen=True)
class DivideInt:
    """Bring an integer from one world's value to the other's: times ``factor``, divided by ``divisor``."""

    divisor: int
    factor: int = 1

    def build(self) -> nn.Module:
        """Return the module that runs this step."""
        return FloorDivide(self.divisor, self.factor)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        return {"step": "divide_int", "divisor": self.divisor, "factor": self.factor}

    def __str__(self) -> str:
        word = f"multiply the integer by {self.factor}" if self.factor != 1 else "divide the integer"
        return f"{word} by {self.divisor}" if self.factor == 1 else word


@dataclass(frozen=True)
class Positions:
    """Turn positions along a dimension, [n], into those of their ``ratio`` replicas side by side, [n * ratio]."""

    ratio: int

    def build(self) -> nn.Module:
        """Return the module that runs this step."""
        return Spread(self.ratio)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        return {"step": "positions", "ratio": self.ratio}

    def __str__(self) -> str:
        return f"positions of {self.ratio} replicas"


@dataclass(frozen=True)
class Shift:
    """Add one number: a logarithm of a sum over replicas is larger by the logarithm of their number."""

    amount: float

    def build(self) -> nn.Module:
        """Return the module that runs this step."""
        return Add(self.amount)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        return {"step": "shift", "amount": self.amount}

    def __str__(self) -> str:
        return f"add {self.amount:g}"


Step = Realign | Scale | DivideInt | Positions | Shift


def step_from_json(data: dict[str, Any]) -> Step:
    """Inverse of ``to_json`` of the step classes."""
    kind = data["step"]
    if kind == "realign":
        return Realign(int(data["dim"]), ReplicaMap.from_json(data["source"]), ReplicaMap.from_json(data["target"]))
    if kind == "scale":
        return Scale(tuple(data["factors"]), data["dim"])
    if kind == "divide_int":
        return DivideInt(int(data["divisor"]), int(data["factor"]))
    if kind == "positions":
        return Positions(int(data["ratio"]))
    if kind == "shift":
        return Shift(float(data["amount"]))
    raise ValueError(f"unknown step {kind!r}")


class Contract(nn.Module):
    """Mean over the replicas of each index of one dimension; the first replica for bool and int."""

    order: Tensor | None
    index: Tensor | None
    counts: Tensor | None
    first: Tensor | None

    def __init__(self, dim: int, source: ReplicaMap) -> None:
        super().__init__()
        self.dim, self.size, self.ratio = dim, source.size, source.uniform
        plain = source.innermost is not None
        # Without an end: the dimension may hold a batch or a resolution.
        self.pick = slice(None, None, source.innermost) if plain else source.slice
        order = None if plain or self.ratio is None else torch.tensor(source.index).argsort(stable=True)
        self.register_buffer("order", order, persistent=False)
        uneven = self.ratio is None
        self.register_buffer("index", torch.tensor(source.index) if uneven else None, persistent=False)
        self.register_buffer("counts", torch.tensor(source.counts) if uneven else None, persistent=False)
        first = None if self.pick is not None else torch.tensor(source.first)
        self.register_buffer("first", first, persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        """Return the value at student width."""
        if not (value.is_floating_point() or value.is_complex()):
            if self.first is None:
                return value[(slice(None),) * self.dim + (self.pick,)]
            return value.index_select(self.dim, self.first)
        if self.ratio is None:
            return self._uneven(value)
        if self.order is not None:
            value = value.index_select(self.dim, self.order)
        return value.unflatten(self.dim, (-1, self.ratio)).mean(self.dim + 1)

    def _uneven(self, value: Tensor) -> Tensor:
        assert self.index is not None and self.counts is not None
        shape = [*value.shape[: self.dim], self.size, *value.shape[self.dim + 1 :]]
        total = value.new_zeros(shape).index_add(self.dim, self.index, value)
        return total / self.counts.to(value.dtype).view([-1 if d == self.dim else 1 for d in range(value.dim())])

    def extra_repr(self) -> str:
        """Show dimension and widths."""
        return f"dim={self.dim}, size={self.size}, ratio={self.ratio}"


class Reindex(nn.Module):
    """Repeat or reorder the indices of one dimension."""

    index: Tensor | None

    def __init__(self, dim: int, source: ReplicaMap, target: ReplicaMap) -> None:
        super().__init__()
        self.dim = dim
        self.ratio = target.innermost if source.is_identity else None
        index = None if self.ratio is not None else torch.as_tensor(realign(source, target))
        self.register_buffer("index", index, persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        """Return the value in the target layout."""
        if self.index is None:
            return value.repeat_interleave(self.ratio or 1, self.dim)
        return value.index_select(self.dim, self.index)

    def extra_repr(self) -> str:
        """Show dimension and ratio."""
        return f"dim={self.dim}, ratio={self.ratio}"


class Multiply(nn.Module):
    """Multiply by a constant, or by one constant per index of a dimension."""

    factors: Tensor | None

    def __init__(self, factors: tuple[float, ...], dim: int | None) -> None:
        super().__init__()
        self.dim, self.factor = dim, factors[0]
        wide = None if dim is None else torch.tensor(factors, dtype=torch.float64)
        self.register_buffer("factors", wide, persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        """Return the scaled value in its own dtype."""
        if self.factors is None or self.dim is None:
            return value * self.factor
        return value * self.factors.to(value.dtype).view([-1 if d == self.dim else 1 for d in range(value.dim())])

    def extra_repr(self) -> str:
        """Show the factor."""
        return f"factor={self.factor}" if self.dim is None else f"dim={self.dim}"


class Add(nn.Module):
    """Add a constant."""

    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = amount

    def forward(self, value: Tensor) -> Tensor:
        """Return the shifted value in its own dtype."""
        return value + self.amount

    def extra_repr(self) -> str:
        """Show the amount."""
        return f"amount={self.amount}"


class FloorDivide(nn.Module):
    """Multiply and divide an integer."""

    def __init__(self, divisor: int, factor: int = 1) -> None:
        super().__init__()
        self.divisor, self.factor = divisor, factor

    def forward(self, value: int) -> int:
        """Return ``value * factor // divisor``."""
        return value * self.factor // self.divisor


class Spread(nn.Module):
    """Positions of all replicas in the default layout."""

    def __init__(self, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio

    def forward(self, index: Tensor) -> Tensor:
        """Return the positions of all replicas, [n] to [n * ratio]."""
        replicas = torch.arange(self.ratio, device=index.device, dtype=index.dtype)
        return (index[:, None] * self.ratio + replicas).flatten()


def contract(value: Tensor, dim: int, replica_map: ReplicaMap) -> Tensor:
    """Return ``value`` at student width along ``dim``."""
    contracted: Tensor = Contract(dim, replica_map).to(value.device)(value)
    return contracted
