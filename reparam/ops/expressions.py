"""Expressions of branches: what a recipe writes in place of one linear operator.

An expression says which weights there are and how they act: one after the other, side by side, scaled, normed. From
the same expression follow its one kernel (``kernel``), the operators themselves (``run``), the weights and how they
start (``slots``), and how each weight is widened (``maps``), so none of them can contradict another. It knows names and
shapes and holds no tensors: those are read by name, the student's or the teacher's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from reparam.errors import KernelError
from reparam.ops import algebra, factors
from reparam.ops.factors import Factors
from reparam.ops.flow import Flow, summed
from reparam.ops.frames import Frame, Read, Slot, Widening
from reparam.ops.kernels import Kernel, Sizes
from reparam.ops.maps import ReplicaMap
from reparam.ops.params import Noise, ParamMap


class Expression:
    """One linear operator, written as several. Subclasses are the operations."""

    def kernel(self, read: Read, frame: Frame) -> Kernel:
        """Return the one kernel, norms in eval mode; differentiable."""
        raise NotImplementedError

    def factors(self, read: Read, frame: Frame) -> Factors | None:
        """Return the kernel as a product of channels and taps; None where it is none."""
        return None

    def run(self, flow: Flow, read: Read, frame: Frame, training: bool) -> Flow:
        """Run the operators themselves; norms use and update statistics in train mode."""
        raise NotImplementedError

    def slots(self) -> Iterator[tuple[str, Slot]]:
        """Yield the tensors by name."""
        raise NotImplementedError

    def maps(self, widening: Widening) -> Iterator[tuple[str, ParamMap]]:
        """Yield how each tensor is widened."""
        raise NotImplementedError

    @property
    def outputs(self) -> int:
        """Number of output channels of the student's."""
        raise NotImplementedError

    @property
    def span(self) -> Sizes:
        """Distance between the first and the last place that one output reads, per dimension."""
        raise NotImplementedError

    def __rshift__(self, after: Expression) -> Expression:
        """Return this one, then ``after``."""
        return Sequence((*self.parts, after)) if isinstance(self, Sequence) else Sequence((self, after))

    def __add__(self, other: Expression) -> Expression:
        """Return the sum of both."""
        return Sum((*self.parts, other)) if isinstance(self, Sum) else Sum((self, other))

    def scaled(self, name: str, start: float) -> Expression:
        """Return this one times a trained factor per output channel, which starts as ``start``."""
        return Scaled(self, name, start)

    def normed(self, name: str, start: float = 1.0) -> Expression:
        """Return this one behind a batch norm, whose weight starts as ``start``."""
        return Normed(self, name, start)


@dataclass(frozen=True)
class Weight(Expression):
    """A convolution (or linear layer) with a weight of its own and no bias.

    Args:
        name: of the weight.
        inputs: channels.
        channels: output channels.
        size: taps per dimension.
        groups: of the student's operator.
        stride: per dimension.
        dilation: per dimension.
        depthwise: every input channel has outputs of its own. Otherwise it has the groups of the host operator.
        fixed: writes values that are not trained.
        start: see :class:`Slot`.
    """

    name: str
    inputs: int
    channels: int
    size: Sizes
    groups: int
    stride: Sizes
    dilation: Sizes
    depthwise: bool = False
    fixed: Callable[[Tensor], object] | None = None
    start: Callable[[Tensor], object] | None = None

    @property
    def outputs(self) -> int:
        """See the base class."""
        return self.channels

    @property
    def span(self) -> Sizes:
        """See the base class."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.size, strict=True))

    def kernel(self, read: Read, frame: Frame) -> Kernel:
        """See the base class."""
        none = (0,) * len(self.size)
        groups = frame.inputs if self.depthwise else frame.groups
        return Kernel(read(self.name), None, self.stride, none, self.dilation, none, groups)

    def factors(self, read: Read, frame: Frame) -> Factors | None:
        """See the base class."""
        return factors.point(self.kernel(read, frame)) if set(self.size) == {1} and not self.depthwise else None

    def run(self, flow: Flow, read: Read, frame: Frame, training: bool) -> Flow:
        """See the base class."""
        return flow.through(self.kernel(read, frame))

    def slots(self) -> Iterator[tuple[str, Slot]]:
        """See the base class."""
        shape = (self.channels, self.inputs // self.groups, *self.size)
        yield self.name, Slot(shape, "weight" if self.fixed is None else "fixed", self.fixed or self.start)

    def maps(self, widening: Widening) -> Iterator[tuple[str, ParamMap]]:
        """The linear law; where replicas have groups of their own, the weight is gathered."""
        shape = next(self.slots())[1].shape
        maps = {0: widening.outputs}
        if self.depthwise or widening.wide_groups != widening.groups:
            yield self.name, ParamMap(shape, maps)
            return
        inner = widening.inputs.same_blocks(widening.groups)
        if inner is None:
            raise KernelError(f"{self.name}: the replicas of its inputs are not the same in each group")
        noise = Noise(0, 1) if widening.noise and self.fixed is None else None
        yield self.name, ParamMap(shape, maps | {1: inner}, (1,), noise)


@dataclass(frozen=True)
class Origin(Weight):
    """The operator's own weight, which stays where it is: read under an empty name."""

    def slots(self) -> Iterator[tuple[str, Slot]]:
        """None: the weight belongs to the network."""
        return iter(())

    def maps(self, widening: Widening) -> Iterator[tuple[str, ParamMap]]:
        """None: the network's plan has it."""
        return iter(())


@dataclass(frozen=True)
class Sequence(Expression):
    """One after the other. Only what comes first may see padding; see :mod:`reparam.ops.algebra`."""

    parts: tuple[Expression, ...]

    @property
    def outputs(self) -> int:
        """See the base class."""
        return self.parts[-1].outputs

    @property
    def span(self) -> Sizes:
        """See the base class. A stride in front of another operator would widen its steps."""
        steps: Sizes | None = None
        total: Sizes = ()
        for part in self.parts:
            steps = steps or (1,) * len(part.span)
            total = tuple(t + s * n for t, s, n in zip(total or (0,) * len(steps), steps, part.span, strict=True))
            own = part.stride if isinstance(part, Weight) else (1,) * len(steps)
            steps = tuple(map(math.prod, zip(steps, own, strict=True)))
        return total

    def kernel(self, read: Read, frame: Frame, factors: Tensor | None = None) -> Kernel:
        """See the base class; ``factors`` [O] scale the last operator, which is smaller than the whole."""
        kernels: list[Kernel] = []
        for part in self.parts:
            kernels.append(part.kernel(read, frame))
            frame = replace(frame, inputs=kernels[-1].outputs)
        if factors is not None:
            kernels[-1] = algebra.scale(kernels[-1], factors)
        return algebra.then(*kernels)

    def factors(self, read: Read, frame: Frame) -> Factors | None:
        """See the base class."""
        if (
            len(self.parts) != 2
            or not isinstance(self.parts[0], (Weight, Sum))
            or not isinstance(self.parts[1], Weight)
        ):
            return None
        first = self.parts[0].kernel(read, frame)
        return factors.sequence(first, self.parts[1].kernel(read, replace(frame, inputs=first.outputs)))

    def run(self, flow: Flow, read: Read, frame: Frame, training: bool) -> Flow:
        """See the base class."""
        for part in self.parts:
            flow = part.run(flow, read, frame, training)
            frame = replace(frame, inputs=flow.channels)
        return flow

    def slots(self) -> Iterator[tuple[str, Slot]]:
        """See the base class."""
        for part in self.parts:
            yield from part.slots()

    def maps(self, widening: Widening) -> Iterator[tuple[str, ParamMap]]:
        """See the base class."""
        here = widening.inputs
        for k, part in enumerate(self.parts):
            after = self._map_behind(k, here, widening)
            yield from part.maps(replace(widening, inputs=here, outputs=after))
            here = after

    def _map_behind(self, k: int, here: ReplicaMap, widening: Widening) -> ReplicaMap:
        """Return the map of what part ``k`` returns."""
        part, rest = self.parts[k], self.parts[k + 1 :]
        if all(_keeps_channels(later) for later in rest):
            return widening.outputs
        if _is_depthwise(part):
            return here.outputs(part.outputs // here.size)
        return widening.inner(part.outputs)


def _is_depthwise(part: Expression) -> bool:
    inner = _unwrapped(part)
    return isinstance(inner, Weight) and inner.depthwise


def _keeps_channels(part: Expression) -> bool:
    """Whether output c is computed from input c alone."""
    inner = _unwrapped(part)
    return isinstance(inner, Weight) and inner.depthwise and inner.channels == inner.inputs


def _unwrapped(part: Expression) -> Expression:
    while isinstance(part, Wrapped):
        part = part.part
    return part


@dataclass(frozen=True)
class Sum(Expression):
    """Side by side, added."""

    parts: tuple[Expression, ...]

    @property
    def outputs(self) -> int:
        """See the base class."""
        return self.parts[0].outputs

    @property
    def span(self) -> Sizes:
        """See the base class."""
        return tuple(map(max, *(part.span for part in self.parts))) if len(self.parts) > 1 else self.parts[0].span

    def kernel(self, read: Read, frame: Frame) -> Kernel:
        """See the base class; smaller kernels lie in the middle."""
        first, *others = self.parts
        products = [(part, part.factors(read, frame)) for part in others]
        dense = [part for part, product in products if product is None]
        head, scale = (first.part, read(first.name)) if isinstance(first, Scaled) and not dense else (first, None)
        whole = algebra.add(*(_inside(part.kernel(read, frame), self.span) for part in (head, *dense)))
        joined = [product for _, product in products if product is not None and product.joins(whole)]
        apart = [part for part, product in products if product is not None and not product.joins(whole)]
        whole = factors.add(whole, scale, joined)
        return algebra.add(whole, *(_inside(part.kernel(read, frame), self.span) for part in apart))

    def run(self, flow: Flow, read: Read, frame: Frame, training: bool) -> Flow:
        """See the base class."""
        return summed([part.run(flow.cropped(self.span, part.span), read, frame, training) for part in self.parts])

    def slots(self) -> Iterator[tuple[str, Slot]]:
        """See the base class."""
        for part in self.parts:
            yield from part.slots()

    def maps(self, widening: Widening) -> Iterator[tuple[str, ParamMap]]:
        """See the base class."""
        for part in self.parts:
            yield from part.maps(widening)


def _inside(kernel: Kernel, span: Sizes) -> Kernel:
    """Let a smaller kernel read the middle of what one of this span reads: its padding is negative."""
    sides = tuple((own - all_) // 2 for own, all_ in zip(kernel.span, span, strict=True))
    return replace(kernel, padding=tuple(map(sum, zip(kernel.padding, sides, strict=True))))


@dataclass(frozen=True)
class Wrapped(Expression):
    """Something done to each channel of what another expression returns.

    Args:
        part: the other expression.
        name: of its tensor, or of the module that holds them.
        start: what it multiplies each channel by at first.
    """

    part: Expression
    name: str
    start: float = 1.0

    @property
    def outputs(self) -> int:
        """See the base class."""
        return self.part.outputs

    @property
    def span(self) -> Sizes:
        """See the base class."""
        return self.part.span


class Scaled(Wrapped):
    """Times a trained factor per output channel."""

    def factors(self, read: Read, frame: Frame) -> Factors | None:
        """See the base class."""
        product = self.part.factors(read, frame)
        return None if product is None else product.scaled(read(self.name))

    def kernel(self, read: Read, frame: Frame) -> Kernel:
        """See the base class."""
        if isinstance(self.part, Sequence):
            return self.part.kernel(read, frame, read(self.name))
        return algebra.scale(self.part.kernel(read, frame), read(self.name))

    def run(self, flow: Flow, read: Read, frame: Frame, training: bool) -> Flow:
        """See the base class."""
        return self.part.run(flow, read, frame, training).scaled(read(self.name))

    def slots(self) -> Iterator[tuple[str, Slot]]:
        """See the base class."""
        yield from self.part.slots()
        yield self.name, Slot((self.outputs,), "weight", functools.partial(nn.init.constant_, val=self.start))

    def maps(self, widening: Widening) -> Iterator[tuple[str, ParamMap]]:
        """See the base class."""
        yield from self.part.maps(widening)
        yield self.name, ParamMap((self.outputs,), {0: widening.outputs})


NORM_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
"""Names of a norm's tensors, as ``torch.nn.BatchNorm2d`` has them."""


@dataclass(frozen=True)
class Normed(Wrapped):
    """Behind a batch norm of its own."""

    eps: float = 1e-5
    momentum: float = field(default=0.1)

    def kernel(self, read: Read, frame: Frame) -> Kernel:
        """See the base class."""
        weight, bias, mean, var = (read(f"{self.name}.{leaf}") for leaf in NORM_TENSORS[:4])
        return algebra.normalise(self.part.kernel(read, frame), mean, var, weight, bias, self.eps)

    def run(self, flow: Flow, read: Read, frame: Frame, training: bool) -> Flow:
        """See the base class."""
        flow = self.part.run(flow, read, frame, training)
        weight, bias, mean, var, seen = (read(f"{self.name}.{leaf}") for leaf in NORM_TENSORS)
        if training:
            seen.add_(1)
        return flow.normed(mean, var, weight, bias, training, self.momentum, self.eps)

    def slots(self) -> Iterator[tuple[str, Slot]]:
        """See the base class."""
        yield from self.part.slots()
        shapes: list[tuple[int, ...]] = [(self.outputs,)] * 4 + [()]
        for leaf, shape, first in zip(NORM_TENSORS, shapes, (self.start, 0.0, 0.0, 1.0, 0.0), strict=True):
            kind = "weight" if leaf in ("weight", "bias") else "statistic"
            yield f"{self.name}.{leaf}", Slot(shape, kind, functools.partial(nn.init.constant_, val=first))

    def maps(self, widening: Widening) -> Iterator[tuple[str, ParamMap]]:
        """See the base class."""
        yield from self.part.maps(widening)
        for leaf in NORM_TENSORS[:4]:
            yield f"{self.name}.{leaf}", ParamMap((self.outputs,), {0: widening.outputs})
        yield f"{self.name}.{NORM_TENSORS[4]}", ParamMap(())


def has_norms(expression: Expression) -> bool:
    """Whether it has norms inside: then it is linear in eval mode only."""
    return any(slot.kind == "statistic" for _name, slot in expression.slots())
