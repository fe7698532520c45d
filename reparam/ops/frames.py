"""What expressions of branches are read with: tensors by name, channels and groups, replica maps around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from reparam.ops.maps import ReplicaMap

Read = Callable[[str], Tensor]
"""Returns a weight, factor or statistic by its name inside the block."""


@dataclass(frozen=True)
class Slot:
    """A tensor of a block.

    Args:
        shape: of the student's tensor.
        kind: ``"weight"`` (trained), ``"fixed"`` (not trained, not stored) or ``"statistic"`` (updated in train mode).
        start: writes the first values into a tensor; None for the usual ones of a convolution (Kaiming, uniform).
    """

    shape: tuple[int, ...]
    kind: str
    start: Callable[[Tensor], object] | None = None


@dataclass(frozen=True)
class Frame:
    """Where an expression acts: channels and groups, of the student or the teacher."""

    inputs: int
    groups: int


@dataclass(frozen=True)
class Widening:
    """Replica maps around an expression.

    Args:
        inputs: of the channels that come in.
        outputs: of those that go out.
        groups: of the student's host operator.
        wide_groups: of the teacher's; more than ``groups`` where every replica has a group of its own.
        noise: whether weights that mix channels get symmetry-breaking noise.
    """

    inputs: ReplicaMap
    outputs: ReplicaMap
    groups: int
    wide_groups: int
    noise: bool

    def inner(self, channels: int) -> ReplicaMap:
        """Return the map of channels between two operators: as many replicas as the inputs have."""
        if self.wide_groups != self.groups:
            return self.inputs.outputs(channels // self.groups)
        return ReplicaMap.repeat(channels, int(self.inputs.counts.max(initial=1)))
