"""The branches of one linear operator as a module: their tensors, merged to one kernel or run side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from reparam.errors import InputError, KernelError
from reparam.ops.expressions import Expression, has_norms
from reparam.ops.flow import Flow
from reparam.ops.frames import Frame, Read, Widening
from reparam.ops.kernels import Kernel
from reparam.ops.maps import ReplicaMap
from reparam.ops.params import ParamMap
from reparam.ops.recipes import Site

BRANCHES = "reparam_branches"
"""Name of the module under which a network keeps its branches, each under the path of the weight it belongs to."""


def merge(expression: Expression, site: Site, frame: Frame, read: Read) -> Kernel:
    """Return the one kernel of an operator with branches, norms in eval mode; differentiable.

    Args:
        expression: of the branches.
        site: the student's operator.
        frame: channels and groups of the network that ``read`` reads.
        read: returns tensors by name; the operator's own weight under an empty name.

    Raises:
        KernelError: the expression is an operator of another size.
    """
    weight = read("")
    # A kernel in half precision would round every weight of the sum.
    kind = weight.device.type
    known = torch.amp.is_autocast_available(kind)
    with torch.autocast(kind, enabled=False) if known else contextlib.nullcontext():
        kernel = expression.kernel(read, frame)
    if kernel.weight.shape != weight.shape or any(kernel.padding):
        raise KernelError(
            f"the branches make {kernel}, the operator's weight is {list(weight.shape)}; a recipe returns "
            "a sum that starts with site.origin(), and no part of it is larger"
        )
    return replace(kernel, padding=site.padding)


def run(
    expression: Expression, site: Site, frame: Frame, read: Read, training: bool, x: Tensor, bias: Tensor | None
) -> Tensor:
    """Run the branches side by side on ``x`` [N, I, ...]; see :func:`merge`."""
    single = x.dim() == site.dims + 1 and site.dims > 0  # one sample without a batch dimension
    flow = expression.run(Flow(x[None] if single else x, site.padding), read, frame, training).padded()
    result = flow.x
    if bias is not None:
        result = result + bias.reshape(-1, *(1,) * site.dims)
    return result[0] if single else result


def widening(site: Site, weight: ParamMap, noise: bool) -> Widening:
    """Return the replica maps around an operator from the map of its weight [O, I / groups, ...]."""
    outputs = weight.maps.get(0) or ReplicaMap.identity(site.outputs)
    if site.groups == site.inputs > 1:
        times = site.outputs // site.inputs
        inputs = ReplicaMap(outputs.index[::times] // times, site.inputs)
        return Widening(inputs, outputs, site.groups, len(inputs), False)
    inner = weight.maps.get(1) or ReplicaMap.identity(site.inputs // site.groups)
    inputs = ReplicaMap.joined([inner] * site.groups)
    return Widening(inputs, outputs, site.groups, site.groups, noise)


class Block(nn.Module):
    """The tensors of the branches of one operator, and what it computes with them.

    Args:
        expression: of the branches.
        site: the student's operator.
        frame: channels and groups of this network's operator.
        tensors: by name, of this network's shapes.
    """

    def __init__(self, expression: Expression, site: Site, frame: Frame, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.expression, self.site, self.frame = expression, site, frame
        self.normed = has_norms(expression)
        self.places: dict[str, tuple[nn.Module, str]] = {}
        for name, slot in expression.slots():
            *path, leaf = name.split(".")
            holder = module_at(self, path)
            self.places[name] = holder, leaf
            if slot.kind == "weight":
                holder.register_parameter(leaf, nn.Parameter(tensors[name]))
            else:
                holder.register_buffer(leaf, tensors[name], persistent=slot.kind == "statistic")

    def forward(self, weight: Tensor) -> Tensor:
        """Return the merged weight; for branches without norms, which are linear in train mode too."""
        return self.merged(weight).weight

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None, training: bool) -> Tensor:
        """Return what the operator returns: branches side by side in train mode, merged in eval mode."""
        if training:
            return run(self.expression, self.site, self.frame, self._reader(weight), training, x, bias)
        return self.merged(weight).with_bias(bias)(x)

    def merged(self, weight: Tensor) -> Kernel:
        """Return the one kernel, without the operator's own bias."""
        return merge(self.expression, self.site, self.frame, self._reader(weight))

    def _reader(self, weight: Tensor) -> Read:
        def read(name: str) -> Tensor:
            if not name:
                return weight
            holder, leaf = self.places[name]
            tensor: Tensor = getattr(holder, leaf)
            return tensor

        return read

    def extra_repr(self) -> str:
        """Show which operator it belongs to."""
        return f"{self.site.operator} {self.site.inputs} -> {self.site.outputs}"


class RunningBlock(Block):
    """Branches with norms inside: a block that takes the place of the operator."""

    def forward(  # type: ignore[override]
        self, x: Tensor, weight: Tensor, bias: Tensor | None, training: bool
    ) -> Tensor:
        """Return what the operator returns; see :meth:`Block.run`."""
        return self.run(x, weight, bias, training)


def block_of(expression: Expression, site: Site, frame: Frame, tensors: Mapping[str, Tensor]) -> Block:
    """Return the block of an expression: one that merges, or one that runs in train mode if there are norms inside."""
    return (RunningBlock if has_norms(expression) else Block)(expression, site, frame, tensors)


def new_tensors(expression: Expression, like: Tensor) -> dict[str, Tensor]:
    """Return the first values of the student's tensors, in the dtype and on the device of the operator's weight.

    Random ones are drawn from torch's default generator.
    """

    def make(shape: tuple[int, ...], kind: str) -> Tensor:
        counter = kind == "statistic" and not shape
        return torch.empty(shape, dtype=torch.long if counter else like.dtype, device=like.device)

    result = {}
    with torch.no_grad():
        for name, slot in expression.slots():
            tensor = result[name] = make(slot.shape, slot.kind)
            if slot.start is not None:
                slot.start(tensor)
            elif tensor.device.type != "meta":
                nn.init.kaiming_uniform_(tensor.flatten(1))
    return result


def check_start(expression: Expression, site: Site, weight: Tensor, recipe: str) -> None:
    """Compare what new branches make with the operator that they are for.

    Raises:
        InputError: from a student, another operator; or values that are not finite.
    """
    tensors = {**new_tensors(expression, weight), "": weight}
    kernel = merge(expression, site, Frame(site.inputs, site.groups), tensors.__getitem__)
    apart = (kernel.weight - weight).abs().max() if weight.numel() else weight.new_zeros(())
    shift = weight.new_zeros(()) if kernel.bias is None else kernel.bias.abs().max()
    if not bool(torch.isfinite(apart + shift)):
        raise InputError(f"recipe {recipe!r}, layer {site.name}: its branches start with NaN or Inf")
    if not site.scratch and float(apart + shift) > 1e-6 * float(weight.abs().max()):
        raise InputError(
            f"recipe {recipe!r}, layer {site.name}: with init='student' its branches do not start as the layer itself "
            f"(weights differ by {float(apart):.1e}, bias by {float(shift):.1e}); the scale of a new branch, or the "
            "weight of its last norm, starts with site.start(...), and site.origin() has no norm behind it"
        )


def wide_tensors(
    expression: Expression, around: Widening, tensors: Mapping[str, Tensor], noise: float
) -> dict[str, Tensor]:
    """Return the teacher's tensors."""
    return {name: param_map.widen(tensors[name], noise) for name, param_map in expression.maps(around)}


def wide_frame(site: Site, around: Widening) -> Frame:
    """Return channels and groups of the teacher's operator."""
    return Frame(len(around.inputs), around.wide_groups)


def module_at(root: nn.Module, path: Iterable[str]) -> nn.Module:
    """Return the module at a path; plain modules are added on the way where there are none."""
    for name in path:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    return root
