"""What a recipe knows of the operator it is for, and the operators that it can write in its place."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reparam.errors import ReparamError
from reparam.ops import kernels
from reparam.ops.expressions import Expression, Origin, Weight
from reparam.ops.kernels import Sizes

INITS = ("student", "scratch")
"""``"student"``: the function stays the student's, new branches start at 0. ``"scratch"``: the recipe's own scales."""


class Unfit(ReparamError):
    """A recipe cannot replace an operator; the message is the reason."""


@dataclass(frozen=True)
class Site:
    """A linear operator that branches may be written for.

    Args:
        name: of its weight.
        operator: ``"conv2d"``, ``"linear"`` ...
        inputs: channels.
        outputs: channels.
        size: taps per spatial dimension; empty for a linear layer.
        stride: per spatial dimension.
        padding: per spatial dimension.
        dilation: per spatial dimension.
        groups: as in torch.
        init: one of :data:`INITS`.
    """

    name: str
    operator: str
    inputs: int
    outputs: int
    size: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes
    groups: int
    init: str = "student"

    @property
    def dims(self) -> int:
        """Number of spatial dimensions."""
        return len(self.size)

    @property
    def depthwise(self) -> bool:
        """Whether each output is computed from one input channel."""
        return self.groups == self.inputs > 1

    @property
    def scratch(self) -> bool:
        """Whether branches start with the recipe's own scales."""
        return self.init == "scratch"

    @property
    def keeps_shape(self) -> bool:
        """Whether output and input are of one shape, so that the input itself can be a branch."""
        same = all(2 * p == d * (k - 1) for p, d, k in zip(self.padding, self.dilation, self.size, strict=True))
        return self.inputs == self.outputs and not set(self.stride) - {1} and same

    def start(self, own: float) -> float:
        """Return what the scale of a new branch starts with: ``own`` from scratch, else 0."""
        return own if self.scratch else 0.0

    # -- operators -----------------------------------------------------------------------------------------------

    def origin(self, scale: float | None = None) -> Expression:
        """Return the operator itself, times a trained scale where one is given: ``scale`` from scratch, else 1."""
        own = Origin("", self.inputs, self.outputs, self.size, self.groups, self.stride, self.dilation)
        return own if scale is None else own.scaled("origin.scale", scale if self.scratch else 1.0)

    def normed_origin(self) -> Expression:
        """Return the operator itself: behind a norm from scratch, as it is where its function must stay."""
        own = self.origin()
        return own.normed("origin.norm") if self.scratch else own

    def full(self, name: str, inputs: int | None = None, outputs: int | None = None, **more: Any) -> Weight:
        """Return an operator of the same size, stride and dilation with a weight of its own."""
        return self._weight(name, inputs, outputs, self.size, self.stride, self.dilation, **more)

    def sized(self, name: str, size: Sizes, **more: Any) -> Weight:
        """Return an operator with fewer taps in the middle of the same field, of the same stride and dilation."""
        self.require_centre()
        return self._weight(name, None, None, size, self.stride, self.dilation, **more)

    def point(
        self, name: str, inputs: int | None = None, outputs: int | None = None, strided: bool = False, **more: Any
    ) -> Weight:
        """Return an operator of one tap; ``strided``: with the stride of the whole, where nothing else has it."""
        ones = (1,) * self.dims
        if strided:
            self.require_centre()
        return self._weight(name, inputs, outputs, ones, self.stride if strided else ones, ones, **more)

    def average(self, name: str) -> Weight:
        """Return average pooling over the field, on the outputs."""
        return self._fixed(name, lambda w: w.copy_(kernels.average(len(w), w.shape[2:], w).weight))

    def frequency(self, name: str) -> Weight:
        """Return OREPA's frequency prior over the field, on the outputs."""
        return self._fixed(name, lambda w: w.copy_(kernels.frequency(len(w), w.shape[2:], w).weight))

    def identity(self, name: str, outputs: int | None = None, strided: bool = False) -> Weight:
        """Return the input itself as an operator of one tap; more outputs than inputs repeat it, group by group."""
        return self.point(name, None, outputs or self.inputs, strided, fixed=identity_)

    def require_centre(self) -> None:
        """Refuse fields without a middle.

        Raises:
            Unfit: an even size.
        """
        if any(k % 2 == 0 for k in self.size):
            raise Unfit(f"its kernel of {'x'.join(map(str, self.size))} has no middle; branches need odd sizes")

    def _fixed(self, name: str, write: Callable[[Tensor], object]) -> Weight:
        return self.full(name, self.outputs, self.outputs, depthwise=True, fixed=write)

    def _weight(
        self,
        name: str,
        inputs: int | None,
        outputs: int | None,
        size: Sizes,
        stride: Sizes,
        dilation: Sizes,
        *,
        depthwise: bool = False,
        fixed: Callable[[Tensor], object] | None = None,
        start: Callable[[Tensor], object] | None = None,
    ) -> Weight:
        channels_in, channels_out = inputs or self.inputs, outputs or self.outputs
        groups = channels_in if depthwise else self.groups
        return Weight(name, channels_in, channels_out, size, groups, stride, dilation, depthwise, fixed, start)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Site:
        """Inverse of :meth:`to_json`."""
        values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in data.items()}
        return cls(**values)


def identity_(weight: Tensor) -> Tensor:
    """Write the identity into a weight [O, I / groups, 1, ...]: output t reads input ``t mod (I / groups)``."""
    width = weight.shape[1]
    rows = torch.eye(width, dtype=weight.dtype, device=weight.device).repeat(math.ceil(len(weight) / width), 1)
    return weight.copy_(rows[: len(weight)].reshape(weight.shape))


def linear_(weight: Tensor) -> Tensor:
    """Write random values that keep the variance: for operators with another linear one behind them."""
    return weight if weight.is_meta else nn.init.kaiming_uniform_(weight.flatten(1), nonlinearity="linear")


zeros_ = nn.init.zeros_
"""Writes zeros into a weight."""
