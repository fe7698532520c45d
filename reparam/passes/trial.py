"""Random branches with which verification compares two worlds.

With those of the plan, whose scales may be 0, a wrong map would hide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reparam.errors import VerificationError
from reparam.ops.block import merge, new_tensors, wide_frame, wide_tensors
from reparam.ops.expressions import Expression
from reparam.ops.kernels import Kernel
from reparam.ops.params import repeat_all
from reparam.passes.blocks import around, host_map, student_frame
from reparam.passes.plan import Plan
from reparam.passes.rows import BranchPlan
from reparam.passes.seeds import seeded
from reparam.passes.world import Fetch

_TOLERANCE = 1e-9
_CPU = torch.device("cpu")  # where tensors of branches are drawn, for all devices


class Trial:
    """The tensors of both worlds, with merged weights where a layer has branches.

    Args:
        plan: with branches.
        canonical: tensor name -> first name of the same tensor.
        plain: returns the student's tensors in float64.
        wide: returns the teacher's.
    """

    def __init__(self, plan: Plan, canonical: Mapping[str, str], plain: Fetch, wide: Fetch) -> None:
        self.plan, self.canonical, self.plain, self.wide = plan, canonical, plain, wide
        self.branches = {branch.site.name: branch for branch in plan.branches}

    def student(self, name: str) -> Any:
        """Return a tensor of the student."""
        branch = self.branches.get(self.canonical.get(name, name))
        return self.plain(name) if branch is None else self._merged(branch).weight

    def teacher(self, name: str) -> Any:
        """Return a tensor of the teacher.

        Raises:
            VerificationError: what merged norms add is not the student's, repeated.
        """
        branch = self.branches.get(self.canonical.get(name, name))
        if branch is None:
            return self.wide(name)
        kernel = self._wide_merged(branch)
        if kernel.bias is not None:
            mine = self._merged(branch).bias
            assert mine is not None
            out = host_map(self.plan, branch).maps.get(0)
            expected = mine if out is None else repeat_all(mine, {0: out})
            error = float((kernel.bias - expected).abs().max() / expected.abs().max())
            if not error <= _TOLERANCE:
                raise VerificationError(
                    f"the bias of the merged branches of {branch.site.name} differs between student and teacher "
                    f"(relative error {error:.2e}): the recipe {str(branch.recipe)!r} is wrong; please report it"
                )
        return kernel.weight

    def _merged(self, branch: BranchPlan) -> Kernel:
        """Return the student's kernel."""
        weight = self.plain(branch.site.name)
        expression, tensors = _drawn(branch, weight)
        tensors[""] = weight
        return merge(expression, branch.site, student_frame(branch), tensors.__getitem__)

    def _wide_merged(self, branch: BranchPlan) -> Kernel:
        """Return the teacher's kernel."""
        expression, tensors = _drawn(branch, self.plain(branch.site.name))
        maps = around(self.plan, branch)
        with seeded(0, _CPU):
            found = wide_tensors(expression, maps, tensors, 0.25)
        found[""] = self.wide(branch.site.name)
        return merge(expression, branch.site, wide_frame(branch.site, maps), found.__getitem__)


def _drawn(branch: BranchPlan, like: Tensor) -> tuple[Expression, dict[str, Tensor]]:
    """Return the student's branches with random values, the same at every call."""
    expression = branch.recipe.expression(branch.site)
    with seeded(sum(branch.site.name.encode()), _CPU):
        tensors = new_tensors(expression, like.new_empty(0, device=_CPU))
        for name, slot in expression.slots():
            if slot.kind != "fixed" and slot.shape:
                tensors[name] = _drawn_like(tensors[name])
    return expression, {name: tensor.to(like.device) for name, tensor in tensors.items()}


def _drawn_like(tensor: Tensor) -> Tensor:
    # Vectors are scales and variances, which stay away from 0.
    return torch.rand_like(tensor) + 0.5 if tensor.dim() == 1 else torch.randn_like(tensor) / tensor[0].numel() ** 0.5
