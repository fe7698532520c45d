"""The student's tensors computed from the teacher's, and their gradients brought back to it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reparam.ops.params import ParamMap
from reparam.passes.blocks import StudentBranches
from reparam.passes.plan import STATISTICS
from reparam.passes.skeleton import canonical_names
from reparam.passes.teacher import Teacher


@dataclass(frozen=True)
class Source:
    """Where a tensor of the student comes from: a slot of a module of the teacher, and the map to narrow it by.

    A recurrent module may move its weights into a block of memory of its own (for cuDNN): they must be no views. An
    embedding may return sparse gradients, which no map can bring back: they become dense.
    """

    slots: dict[str, Any]
    slot: str
    param_map: ParamMap | None
    moves: bool = False
    sparse: bool = False

    @property
    def tensor(self) -> Tensor:
        """The teacher's tensor, as it is now."""
        tensor: Tensor = self.slots[self.slot]
        return tensor

    def narrowed(self) -> Tensor:
        """Return the student's tensor; differentiable."""
        if self.param_map is None:
            return self.tensor
        value = self.param_map.narrow(self.tensor)
        if self.sparse:
            value = _Dense.apply(value)
        return value.clone() if self.moves and value._is_view() else value

    def leaf(self) -> Tensor:
        """Return the student's tensor with gradients of its own; the teacher's tensor where both are the same."""
        wide = self.tensor
        with torch.no_grad():
            value = self.narrowed()
        if value is wide:
            return wide
        return (value.detach() if value._is_view() else value).requires_grad_(wide.requires_grad)

    def pull_back(self, leaf: Tensor) -> None:
        """Add the gradient of what :meth:`leaf` returned to that of the teacher's tensor."""
        wide = self.tensor
        if leaf is wide or leaf.grad is None or self.param_map is None:
            return
        if wide.grad is None:
            wide.grad = torch.zeros_like(wide)
        elif wide.grad.is_sparse:  # the teacher's own
            wide.grad = wide.grad.to_dense()
        self.param_map.pull_back(leaf.grad.to_dense() if leaf.grad.is_sparse else leaf.grad, wide.grad)


class Narrowing:
    """Computes every parameter and buffer of the student from the teacher's; differentiable.

    The places are looked up once; the tensors are read at each call, so ``to()`` and optimizers work.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.names: dict[str, list[str]] = {}
        for name, first in canonical_names(teacher.skeleton).items():
            self.names.setdefault(first, []).append(name)
        self.branches = [StudentBranches(teacher, branch) for branch in teacher.plan.branches]
        self.sources = dict(self._sources(teacher))

    def __call__(self) -> dict[str, Tensor]:
        """Return the tensors by name; tied names get the same tensor. Branches are merged into their layers."""
        return self.merged(self.narrowed())

    def narrowed(self) -> dict[str, Tensor]:
        """Return the student's tensors by their first name, and those of its branches by the teacher's."""
        return {name: source.narrowed() for name, source in self.sources.items()}

    def merged(self, values: dict[str, Tensor], running: Collection[StudentBranches] = ()) -> dict[str, Tensor]:
        """Return the tensors by name, branches merged into the weights of their layers, but for those in ``running``.

        Args:
            values: see :meth:`narrowed`.
            running: branches that are not merged.
        """
        result = {name: values[first] for first, same in self.names.items() for name in same}
        for branch in self.branches:
            if branch not in running:
                branch.merge_into(result, values, self.names)
        return result

    def _sources(self, teacher: Teacher) -> Iterator[tuple[str, Source]]:
        own = set(teacher.plan.statistics) if teacher.plan.own_statistics else set()
        for name in self.names:
            module = teacher.skeleton.get_submodule(name.rpartition(".")[0])
            sparse = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse
            kinds = isinstance(module, nn.RNNBase), sparse
            if name in own:
                yield name, _source(teacher, f"{STATISTICS}.{name}", None)
            else:
                yield name, _source(teacher, name, teacher.plan.params.get(name), *kinds)
        for branch in self.branches:
            for key, place, param_map in branch.places():
                yield key, _source(teacher, place, param_map)


def _source(
    teacher: Teacher, place: str, param_map: ParamMap | None, moves: bool = False, sparse: bool = False
) -> Source:
    path, _, leaf = place.rpartition(".")
    holder = teacher.get_submodule(path)
    slots: dict[str, Any] = holder._parameters if leaf in holder._parameters else holder._buffers
    return Source(slots, leaf, param_map, moves, sparse)


class _Dense(torch.autograd.Function):
    """The tensor itself; a sparse gradient becomes dense."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].to_dense() if gradients[0].is_sparse else gradients[0]


class Gathering:
    """The student's tensors for one optimizer step, apart from the teacher's until their gradients are known.

    Networks are differentiated down to the weights that they use; from there it is weight space: through the merging
    of branches, then, in place, into the gradients of the teacher's parameters.
    """

    def __init__(self, narrowing: Narrowing) -> None:
        self._narrowing = narrowing
        self._leaves: dict[str, Tensor] = {}
        self._merged: dict[frozenset[str], tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def tensors(self, running: Collection[StudentBranches]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the tensors of the branches, and those of the student; see :meth:`Narrowing.merged`."""
        if not self._leaves:
            self._leaves = {name: source.leaf() for name, source in self._narrowing.sources.items()}
        key = frozenset(branch.name for branch in running)
        if key not in self._merged:
            with torch.enable_grad():  # the first pass may be one without gradients
                merged = self._narrowing.merged(self._leaves, running)
            apart = {id(t): t.detach().requires_grad_() for t in merged.values() if t.grad_fn is not None}
            self._merged[key] = merged, {name: apart.get(id(t), t) for name, t in merged.items()}
        return self._leaves, dict(self._merged[key][1])  # a copy: functional_call writes into what it is given

    def pull_back(self) -> None:
        """Add the gradients of all backward passes so far to those of the teacher's parameters."""
        for merged, apart in self._merged.values():
            pairs = {id(t): (t, apart[name].grad) for name, t in merged.items() if t is not apart[name]}
            known = [(t, gradient) for t, gradient in pairs.values() if gradient is not None]
            if known:
                torch.autograd.backward([t for t, _ in known], [gradient for _, gradient in known])
        for name, leaf in self._leaves.items():
            self._narrowing.sources[name].pull_back(leaf)
