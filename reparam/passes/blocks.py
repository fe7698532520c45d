"""Branches in a teacher, in its graph, and in its student: a plan's branches applied."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from reparam.ops.block import BRANCHES, block_of, merge, module_at, new_tensors, run, wide_frame, wide_tensors, widening
from reparam.ops.expressions import Expression, has_norms
from reparam.ops.frames import Frame, Read, Widening
from reparam.ops.kernels import Kernel
from reparam.ops.params import ParamMap
from reparam.passes.contexts import NOTED
from reparam.passes.plan import STATISTICS, Plan
from reparam.passes.rows import BranchPlan
from reparam.passes.sites import LINEAR_FUNCTIONS, arguments, is_linear
from reparam.passes.teacher import Teacher, add_buffer


def path_of(branch: BranchPlan) -> str:
    """Return the path of a layer's branches in a teacher."""
    return f"{BRANCHES}.{branch.site.name}"


def host_map(plan: Plan, branch: BranchPlan) -> ParamMap:
    """Return how the operator's own weight is widened."""
    site = branch.site
    return plan.params.get(site.name) or ParamMap((site.outputs, site.inputs // site.groups, *site.size))


def around(plan: Plan, branch: BranchPlan) -> Widening:
    """Return the replica maps around a layer."""
    host = host_map(plan, branch)
    return widening(branch.site, host, noise=host.noise is not None)


def student_frame(branch: BranchPlan) -> Frame:
    """Return channels and groups of the student's operator."""
    return Frame(branch.site.inputs, branch.site.groups)


# -- in a teacher ----------------------------------------------------------------------------------------------------


def add_blocks(root: nn.Module, model: nn.Module, plan: Plan, noise: float) -> None:
    """Give the teacher's module tree the branches, and the student's own statistics of the norms inside.

    Args:
        root: the teacher's modules.
        model: the student.
        plan: with branches.
        noise: see ``expand``.
    """
    for branch in plan.branches:
        expression = branch.recipe.expression(branch.site)
        weight = model.get_parameter(branch.site.name)
        tensors = new_tensors(expression, weight.detach())
        maps = around(plan, branch)
        wide = wide_tensors(expression, maps, tensors, noise)
        block = block_of(expression, branch.site, wide_frame(branch.site, maps), wide)
        block.requires_grad_(weight.requires_grad)
        *path, leaf = path_of(branch).split(".")
        module_at(root, path).add_module(leaf, block.train(model.training))
        for name, slot in expression.slots():
            if slot.kind == "statistic" and plan.own_statistics:
                add_buffer(root, f"{STATISTICS}.{path_of(branch)}.{name}", tensors[name], persistent=True)


def insert_blocks(graph: fx.Graph, plan: Plan, canonical: Mapping[str, str], nodes: dict[fx.Node, fx.Node]) -> None:
    """Let the operators of a rewritten graph use their branches.

    Branches without norms make the weight of the operator, which stays; those with norms take its place.

    Args:
        graph: changed in place.
        plan: with branches.
        canonical: tensor name -> first name of the same tensor.
        nodes: old node -> new node; brought up to date.
    """
    branches = {branch.site.name: branch for branch in plan.branches}
    made: dict[str, fx.Node] = {}
    replaced: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        name = canonical.get(str(node.target), "") if node.op == "get_attr" else ""
        if name not in branches:
            continue
        branch = branches[name]
        running = has_norms(branch.recipe.expression(branch.site))
        for user in list(node.users):
            if not is_linear(user):
                continue
            if running:
                replaced[user] = _in_place_of(graph, user, path_of(branch))
                continue
            if name not in made:
                with graph.inserting_after(node):
                    made[name] = graph.call_module(path_of(branch), (node,))
            user.replace_input_with(node, made[name])
    for old, new in nodes.items():
        nodes[old] = replaced.get(new, new)


def _in_place_of(graph: fx.Graph, node: fx.Node, path: str) -> fx.Node:
    given = arguments(node)
    module = str(given["weight"].target).rpartition(".")[0]
    with graph.inserting_before(node):
        # Its module's own flag: a layer whose module is in eval mode is merged.
        flag = graph.create_node("get_attr", f"{module}.training" if module else "training")
        new = graph.call_module(path, (given["input"], given["weight"], given.get("bias"), flag))
    new.meta.update({k: v for k, v in node.meta.items() if k in NOTED})
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


# -- in its student --------------------------------------------------------------------------------------------------


class StudentBranches:
    """The branches of one layer at the student's width: every layer of every branch is narrowed first, then merged.

    Source: GPD (ICLR 2025), channel-branch reparameterization.
    """

    def __init__(self, teacher: Teacher, branch: BranchPlan) -> None:
        self.plan = branch
        self.name = branch.site.name
        self.module = self.name.rpartition(".")[0]
        self.path = path_of(branch)
        self.expression: Expression = branch.recipe.expression(branch.site)
        self.running = has_norms(self.expression)
        self._own = teacher.plan.own_statistics
        self._around = around(teacher.plan, branch)

    def places(self) -> Iterator[tuple[str, str, ParamMap | None]]:
        """Yield every tensor: its key in what is narrowed, its place in the teacher, and the map to narrow it by."""
        maps = dict(self.expression.maps(self._around))
        for name, slot in self.expression.slots():
            key = f"{self.path}.{name}"
            own = slot.kind == "statistic" and self._own
            yield (key, f"{STATISTICS}.{key}", None) if own else (key, key, maps[name])

    def merge_into(
        self, tensors: dict[str, Tensor], values: Mapping[str, Tensor], names: Mapping[str, Collection[str]]
    ) -> None:
        """Replace the layer's weight by the merged one; its bias goes to the layer's own, or into the norms behind it.

        Args:
            tensors: of the student, narrowed; changed in place.
            values: tensors of the branches, narrowed, by the keys of :meth:`places`.
            names: first name -> all names of the same tensor.
        """
        kernel = self._merged(tensors[self.name], values)
        tensors.update(dict.fromkeys(names[self.name], kernel.weight))
        if kernel.bias is None:
            return
        if self.plan.bias is not None:
            total = tensors[self.plan.bias] + kernel.bias
            tensors.update(dict.fromkeys(names[self.plan.bias], total))
        for mean in self.plan.norms if self.plan.bias is None else ():
            rest = tensors[mean] - kernel.bias.to(tensors[mean].dtype)
            tensors.update(dict.fromkeys(names[mean], rest))

    def run(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, values: Mapping[str, Tensor], training: bool
    ) -> Tensor:
        """Return what the layer returns: branches side by side in train mode, merged in eval mode."""
        if training:
            read = self._reader(weight, values)
            return run(self.expression, self.plan.site, student_frame(self.plan), read, True, x, bias)
        return self._merged(weight, values).with_bias(bias)(x)

    def _merged(self, weight: Tensor, values: Mapping[str, Tensor]) -> Kernel:
        return merge(self.expression, self.plan.site, student_frame(self.plan), self._reader(weight, values))

    def _reader(self, weight: Tensor, values: Mapping[str, Tensor]) -> Read:
        return lambda name: values[f"{self.path}.{name}"] if name else weight


@contextlib.contextmanager
def running_branches(
    running: Mapping[StudentBranches, bool], tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> Iterator[None]:
    """Let branches run wherever code applies their layer's weight, for the time of a call.

    Args:
        running: branches with norms, and whether they are in train mode.
        tensors: what the code finds as its parameters.
        values: tensors of the branches, narrowed.
    """
    table = {id(tensors[branch.name]): (branch, training) for branch, training in running.items()}
    with _Branches(table, values) if table else contextlib.nullcontext():
        yield


class _Branches(TorchFunctionMode):
    """Catches the convolutions and linear layers that apply one of some weights."""

    def __init__(self, table: Mapping[int, tuple[StudentBranches, bool]], values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.table, self.values = table, values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        kwargs = kwargs or {}
        if func in LINEAR_FUNCTIONS:
            given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
            branch, training = self.table.get(id(given["weight"]), (None, False))
            if branch is not None:
                return branch.run(given["input"], given["weight"], given.get("bias"), self.values, training)
        return func(*args, **kwargs)
