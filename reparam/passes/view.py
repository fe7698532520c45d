"""The student's side of a teacher: run it on the teacher's own parameters, or take it out."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from reparam.errors import InputError
from reparam.passes.blocks import StudentBranches, running_branches
from reparam.passes.narrowing import Gathering, Narrowing
from reparam.passes.plan import STATISTICS
from reparam.passes.skeleton import named_tensors, rebuild, slots
from reparam.passes.teacher import Teacher, require_teacher


def student_view(teacher: nn.Module) -> StudentView:
    """Return the compact student as a module that computes with the teacher's own parameters.

    Gradients of ``view(x)`` reach the tensors of ``teacher``. A second call returns the same object. Only its norm
    statistics and other buffers that its forward changes in place are its own; they live in the teacher's state_dict
    under ``student_statistics.``.

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
    shared = {tensor.untyped_storage().data_ptr() for _, tensor in named_tensors(owner)}

    def own(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.untyped_storage().data_ptr() in shared else tensor

    with torch.no_grad():
        tensors = Narrowing(owner)()
        student = rebuild(owner.skeleton, lambda name, _meta: own(tensors[name]))
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
        self._gathering: list[Gathering] = []
        # A module under two names is given its tensors once: torch would put the narrowed ones back the second time.
        self._again = frozenset(name for name, first in slots(teacher.skeleton).items() if name != first)
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
        sources = self._narrow.sources.values()
        scales = {id(source.tensor): source.param_map.divisor for source in sources if source.param_map is not None}
        return {name: scales.get(id(value), 1.0) for name, value in self.teacher.named_parameters()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the student; inputs and outputs are those of the original model."""
        running = {b: self.network.get_submodule(b.module).training for b in self._narrow.branches if b.running}
        values, tensors = self.tensors(running)
        own = {name: tensors[name] for name in self.teacher.plan.statistics}
        if self._again:
            tensors = {name: tensor for name, tensor in tensors.items() if name not in self._again}
        with running_branches(running, tensors, values):
            result = functional_call(self.network, tensors, args, kwargs, tie_weights=False)  # all names are given
        for name, tensor in own.items():
            # A module that assigns a new statistic instead of updating the old one in place.
            if tensors[name] is not tensor:
                tensor.copy_(tensors[name])
        return result

    def tensors(self, running: Collection[StudentBranches] = ()) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the narrowed tensors of the branches, and the tensors that a forward pass of the student uses.

        Args:
            running: branches that run side by side instead of being merged.
        """
        if self._gathering:
            return self._gathering[-1].tensors(running)
        values = self._narrow.narrowed()
        return values, self._narrow.merged(values, running)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Narrow and merge once for all forward passes inside, and bring their gradients to the teacher at the end.

        The parameters' ``grad`` is what it would be without this context, but it is complete only behind it, and
        nothing of the teacher's size is written on the way. For ``loss.backward()`` inside, with parameters that do
        not change there; ``torch.autograd.grad`` with respect to them, their hooks and DistributedDataParallel see
        nothing of the student.
        """
        gathering = Gathering(self._narrow)
        self._gathering.append(gathering)
        try:
            yield
        finally:
            self._gathering.remove(gathering)
        gathering.pull_back()

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
        """Yield the teacher's parameters; they count as the view's own, as it has no modules (``recurse``)."""
        return self.teacher.named_parameters(prefix, True, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the teacher's buffers."""
        return self.teacher.named_buffers(prefix, True, remove_duplicate)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the student's state_dict, detached."""
        keys = set(self.network.state_dict())
        return {prefix + name: t.detach() for name, t in self._narrow().items() if name in keys}

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


__all__ = ["StudentView", "extract", "student_view"]
