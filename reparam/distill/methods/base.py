"""What a training method is: a way to build its networks, and a step that yields one loss after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

import reparam
from reparam.distill.config import TrainConfig
from reparam.errors import InputError, ModelError, near_matches


@dataclass(frozen=True)
class Networks:
    """The networks of a run.

    Attributes:
        student: images ``[N, C, H, W]`` to logits; a view on the teacher's parameters if there is a teacher.
        teacher: the network that owns the parameters, or None without a teacher.
        extract: returns the student as a plain model of its own.
    """

    student: nn.Module
    teacher: nn.Module | None
    extract: Callable[[], nn.Module]

    @property
    def owner(self) -> nn.Module:
        """The network whose parameters are trained and whose state_dict is the whole state of the run."""
        return self.student if self.teacher is None else self.teacher

    def train(self, mode: bool = True) -> None:
        """Put both networks into training (or evaluation) mode."""
        self.student.train(mode)
        if self.teacher is not None:
            self.teacher.train(mode)


@dataclass(frozen=True)
class Part:
    """One loss of a step, and the logits that it belongs to.

    Attributes:
        network: "student" or "teacher".
        loss: scalar with gradient.
        logits: ``[N, C]``.
    """

    network: str
    loss: Tensor
    logits: Tensor


Prepare = Callable[[nn.Module, Tensor, TrainConfig], Networks]
Step = Callable[[Networks, Tensor, Tensor, TrainConfig], Iterator[Part]]


@dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
        name: key in the registry.
        parts: names of the networks in the order in which ``step`` yields their losses.
        prepare: (student, example images, config) to networks; called after the student sits on its device.
        step: (networks, images ``[N, C, H, W]``, labels ``[N]``, config) to an iterator of ``Part``. The trainer runs
            the backward pass of each part before it asks for the next one, so only one graph is alive at a time.
            The step keeps no state, calls no backward and touches no optimizer.
    """

    name: str
    parts: tuple[str, ...]
    prepare: Prepare
    step: Step


_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add ``method`` to the registry under its name, which must be new."""
    if method.name in _METHODS:
        raise InputError(f"a method named {method.name!r} is registered already")
    _METHODS[method.name] = method
    return method


def get_method(name: str) -> Method:
    """Return the registered method of that name."""
    if name not in _METHODS:
        hint = near_matches(name, _METHODS)
        raise InputError(f"unknown method {name!r}{hint}; known methods: {', '.join(sorted(_METHODS))}")
    return _METHODS[name]


def expanded(student: nn.Module, ratio: int, example: Tensor, config: TrainConfig) -> nn.Module:
    """Return the student widened by ``ratio``, with the branches that the settings ask for."""
    return reparam.expand(
        student,
        ratio,
        branches=config.branches,
        init=config.branch_init or "student",
        example_input=example,
        noise=config.noise,
    )


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Run ``model`` and insist on one tensor of logits ``[N, C]``."""
    output = model(images)
    if not isinstance(output, Tensor) or output.ndim != 2:
        found = f"a tensor of shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(f"training needs a model that returns logits [N, classes], this one returns {found}")
    return output
