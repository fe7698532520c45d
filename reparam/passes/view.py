"""The student's side of a teacher: run it on the teacher's own parameters, or take it out."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from reparam.errors import InputError
from reparam.ops.params import ParamMap
from reparam.passes.blocks import StudentBranches, running_branches
from reparam.passes.plan import STATISTICS
from reparam.passes.skeleton import canonical_names, named_tensors, rebuild
from reparam.passes.teacher import Teacher, require_teacher


def student_view(teacher: nn.Module) -> StudentView:
    """Return the compact student as a module that computes with the teacher's own parameters.

    Gradients of ``view(x)`` reach the tensors of ``teacher``. A second call returns the same object. Only its norm
    statistics are its own; they live in the teacher's state_dict under ``student_statistics.``.

    Source: GPD (ICLR 2025), channel-branch reparameterization: ``W_s = r W[:C_out, :C_in]``.

    Raises:
        InputError: ``teacher`` was not made by reparam.
    """
    owner = require_teacher(teacher)
    if not owner._views:
        owner._views = (StudentView(owner),)
    view: StudentView = owner._views[0]
    return view


def extract(teacher: nn.Module) -> nn.Module:
    """Return the student as a plain model: original class, state_dict keys and shapes; a fresh copy.

    ``extract(expand(m))`` has the state_dict of ``m`` bit for bit where the ratio is a power of two, within 2 ulp
    otherwise; float16 rounds what becomes too small, too. The result is in the train or eval mode of the student's
    view.

    Warns where the teacher was trained and the view never ran: the student's own norm statistics are then not its own.

    Raises:
        InputError: ``teacher`` was not made by reparam.
    """
    owner = require_teacher(teacher)
    _warn_of_old_statistics(owner)
    tensors = narrow_tensors(owner)
    with torch.no_grad():
        student = rebuild(owner.skeleton, lambda name, _meta: tensors[name].detach().clone())
    modes = owner._views[0].modes() if owner._views else None
    for name, module in student.named_modules():
        module.training = modes[name] if modes is not None else _mode(owner, name)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(owner.get_parameter(name).requires_grad)
    return student


def _warn_of_old_statistics(teacher: Teacher) -> None:
    """Say so where only the teacher's norms have seen data: the student's own statistics are those of a new network."""
    state, prefix = teacher.state_dict(), f"{STATISTICS}."
    counters = [name for name in state if name.startswith(prefix) and name.endswith(_COUNTER)]
    if any(state[name].is_meta for name in counters):
        return
    never = not any(map(bool, (state[name] for name in counters)))
    if never and any(state[name.removeprefix(prefix)] for name in counters):
        warnings.warn(
            "the student's own norm statistics were never updated, although the teacher's were: the extracted student "
            "will not be good in eval mode. Run student_view(teacher) in train mode as well, if only for a few batches",
            stacklevel=3,
        )


_COUNTER = "num_batches_tracked"


def _mode(teacher: Teacher, path: str) -> bool:
    try:
        return teacher.get_submodule(path).training
    except AttributeError:
        return teacher.training


@dataclass(frozen=True)
class _Source:
    """Where a tensor of the student comes from: a slot of a module of the teacher, and the map to narrow it by.

    A recurrent module may move its weights into a block of memory of its own (for cuDNN): they must be no views.
    """

    names: tuple[str, ...]
    slots: dict[str, Any]
    slot: str
    param_map: ParamMap | None
    moves: bool = False


class Narrowing:
    """Computes every parameter and buffer of the student from the teacher's; differentiable.

    The places are looked up once; the tensors are read at each call, so ``to()`` and optimizers work.
    """

    def __init__(self, teacher: Teacher) -> None:
        names: dict[str, list[str]] = {}
        for name, first in canonical_names(teacher.skeleton).items():
            names.setdefault(first, []).append(name)
        own = set(teacher.plan.statistics) if teacher.plan.own_statistics else set()
        self.names = names
        self.sources = [_source(teacher, first, tuple(same), own) for first, same in names.items()]
        self.branches = [StudentBranches(teacher, branch) for branch in teacher.plan.branches]

    def __call__(self, running: Collection[StudentBranches] = ()) -> dict[str, Tensor]:
        """Return the tensors by name; tied names get the same tensor.

        Branches are merged into the weights of their layers, but for those in ``running``.
        """
        result: dict[str, Tensor] = {}
        for source in self.sources:
            value = source.slots[source.slot]
            if source.param_map is not None:
                value = source.param_map.narrow(value)
                # torch's CPU batch norm ignores the stride of its weight in the backward of an [N, C] input.
                value = value.contiguous() if value.dim() == 1 else value
                value = value.clone() if source.moves and value._is_view() else value
            for name in source.names:
                result[name] = value
        for branch in self.branches:
            if branch not in running:
                branch.merge_into(result, self.names)
        return result


def narrow_tensors(teacher: Teacher) -> dict[str, Tensor]:
    """Return every parameter and buffer of the student, computed from the teacher's; differentiable."""
    return Narrowing(teacher)()


def _source(teacher: Teacher, name: str, names: tuple[str, ...], own: set[str]) -> _Source:
    path, _, leaf = name.rpartition(".")
    if name in own:
        holder = teacher.get_submodule(f"{STATISTICS}.{path}" if path else STATISTICS)
        return _Source(names, holder._buffers, leaf, None)
    holder = teacher.get_submodule(path)
    slots: dict[str, Any] = holder._parameters if leaf in holder._parameters else holder._buffers
    moves = isinstance(teacher.skeleton.get_submodule(path), nn.RNNBase)
    return _Source(names, slots, leaf, teacher.plan.params.get(name), moves)


class StudentView(nn.Module):
    """See :func:`student_view`.

    ``parameters()`` are the teacher's tensors, each once; ``to()`` moves the teacher; ``train()`` and ``eval()``
    switch this view only; ``state_dict()`` is the student's.
    """

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        # In a tuple: the teacher and the meta skeleton are no submodules of the view.
        self._owner = (teacher,)
        self._network = (teacher.skeleton,)
        self._narrow = Narrowing(teacher)
        for name, module in teacher.skeleton.named_modules():
            module.training = _mode(teacher, name)
        self.training = teacher.training

    @property
    def teacher(self) -> Teacher:
        """The teacher whose parameters this view uses."""
        return self._owner[0]

    @property
    def network(self) -> nn.Module:
        """The student's own modules, without weights (meta device)."""
        return self._network[0]

    def divisors(self) -> dict[str, float]:
        """Return how many times larger the student's tensor is than its block of the teacher's parameter, by name.

        One step of gradient descent on the teacher's parameter moves the student's tensor by the divisor squared times
        the step of plain training (Adam: by the divisor). Parameters of branches are among them.
        """
        scales = {id(s.slots[s.slot]): s.param_map.divisor for s in self._narrow.sources if s.param_map is not None}
        for branch in self._narrow.branches:
            slots = branch.slots.values()
            scales |= {id(places[leaf]): one.divisor for places, leaf, one in slots if one is not None}
        return {name: scales.get(id(value), 1.0) for name, value in self.teacher.named_parameters()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the student; inputs and outputs are those of the original model."""
        running = {b: self.network.get_submodule(b.module).training for b in self._narrow.branches if b.running}
        tensors = self._narrow(running)
        own = {name: tensors[name] for name in self.teacher.plan.statistics}
        with running_branches(running, tensors):
            result = functional_call(self.network, tensors, args, kwargs)
        for name, tensor in own.items():
            # A module that assigns a new statistic instead of updating the old one in place.
            if tensors[name] is not tensor:
                tensor.copy_(tensors[name])
        return result

    def train(self, mode: bool = True) -> StudentView:
        """Switch the student; the teacher keeps its mode."""
        self.training = mode
        self.network.train(mode)
        return self

    def modes(self) -> dict[str, bool]:
        """Return the train flag of every module of the student."""
        return {name: module.training for name, module in self.network.named_modules()}

    def train_modes(self, modes: dict[str, bool]) -> None:
        """Set the train flag of every module of the student."""
        for name, module in self.network.named_modules():
            module.training = modes[name]
        self.training = modes[""]

    def for_copy(self, teacher: Teacher) -> StudentView:
        """Return the view of a copied teacher, in the same modes as this one."""
        view = student_view(teacher)
        view.train_modes(self.modes())
        return view

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the teacher's parameters."""
        return self.teacher.named_parameters(prefix, recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the teacher's buffers."""
        return self.teacher.named_buffers(prefix, recurse, remove_duplicate)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the student's state_dict, detached."""
        keys = set(self.network.state_dict())
        return {prefix + name: t.detach() for name, t in narrow_tensors(self.teacher).items() if name in keys}

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the weights belong to the teacher."""
        raise InputError(
            "a student view owns no weights; load them into the teacher, or expand a student that has them"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> StudentView:
        self.teacher._apply(fn, recurse)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of the teacher's parameters."""
        self.teacher.zero_grad(set_to_none)

    def __deepcopy__(self, memo: dict[int, Any]) -> StudentView:
        import copy

        teacher = copy.deepcopy(self.teacher, memo)
        view = student_view(teacher)
        memo[id(self)] = view
        return view

    def __reduce__(self) -> Any:
        raise InputError(
            "a student view is not pickled; write the teacher with reparam.save, or reparam.extract(teacher)"
        )

    def extra_repr(self) -> str:
        """Show the student's class."""
        return f"student={type(self.network).__name__}"


__all__ = ["StudentView", "extract", "named_tensors", "narrow_tensors", "student_view"]
