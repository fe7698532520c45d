"""The linear operators of a recorded network that branches could be written for, and what stands behind them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from reparam.errors import KernelError
from reparam.ops import kernels
from reparam.ops.kernels import Kernel
from reparam.ops.recipes import Site
from reparam.passes.capture import Capture, trace_inner
from reparam.passes.skeleton import canonical_names
from reparam.passes.state import operator_name

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")

_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d), _CONV),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _TRANSPOSED),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _TRANSPOSED),
    **dict.fromkeys((F.linear, torch._C._nn.linear), _CONV[:3]),
    F.batch_norm: _NORM,
}


LINEAR_FUNCTIONS = frozenset(_ARGUMENTS) - {F.batch_norm}
"""Convolutions, transposed ones and linear layers."""


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a convolution, linear layer or batch norm by name."""
    names = _ARGUMENTS[node.target]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def is_linear(node: fx.Node) -> bool:
    """Whether a node is a convolution, a transposed one, or a linear layer."""
    return node.op == "call_function" and node.target in LINEAR_FUNCTIONS


def geometry(node: fx.Node) -> Kernel:
    """Return the kernel of a convolution or linear layer, with its meta weight and no bias.

    Raises:
        KernelError: it has no fixed geometry.
    """
    given = arguments(node)
    weight = given["weight"].meta["val"] if isinstance(given["weight"], fx.Node) else given["weight"]
    if any(isinstance(value, fx.Node) for name, value in given.items() if name not in ("input", "weight", "bias")):
        raise KernelError("its stride, padding or groups are computed")
    settings = {name: value for name, value in given.items() if name not in ("input", "weight", "bias")}
    if "transpose" in operator_name(node):
        return kernels.conv_transpose(weight, None, **settings)
    return kernels.conv(weight, None, **settings) if weight.dim() > 2 else kernels.linear(weight)


@dataclass
class Operator:
    """A weight and the nodes that apply it.

    Args:
        name: first path of the weight.
        site: what a recipe sees, where all nodes apply it alike; None with a reason.
        nodes: convolutions or linear layers of all recorded modes.
        bias: first path of the bias; None where there is none, empty where it is not this operator's alone.
        norms: running means of the batch norms that alone read what the nodes return, else empty.
        reason: why it can have no branches.
    """

    name: str
    site: Site | None = None
    nodes: list[fx.Node] = field(default_factory=list)
    bias: str | None = None
    norms: tuple[str, ...] = ()
    reason: str = ""


def find_operators(capture: Capture, init: str) -> dict[str, Operator]:
    """Return the convolutions and linear layers of a network by the first path of their weight, in graph order."""
    canonical = canonical_names(capture.root)
    found: dict[str, Operator] = {}
    others: set[str] = set()
    readers: dict[str, set[fx.Node]] = {}
    for mode in capture.modes:
        for node in mode.graph.nodes:
            if node.op == "call_module":
                inside = {first for name, first in canonical.items() if name.startswith(f"{node.target}.")}
                others |= inside
                for name in inside:
                    readers.setdefault(name, set()).add(node)
            if node.op != "get_attr" or node.target not in canonical:
                continue
            name = canonical[node.target]
            readers.setdefault(name, set()).update(node.users)
            for user in node.users:
                if is_linear(user) and arguments(user)["weight"] is node and user.all_input_nodes.count(node) == 1:
                    found.setdefault(name, Operator(name)).nodes.append(user)
                elif not (is_linear(user) and arguments(user).get("bias") is node):
                    others.add(name)
    norms = _Norms(capture, canonical)
    for name, operator in found.items():
        if name in others:
            operator.reason = "its weight is read in another way too"
        else:
            _describe(operator, canonical, norms, init)
        if operator.bias and readers[operator.bias] != set(operator.nodes):
            operator.bias = ""
    return found


def _describe(operator: Operator, canonical: Mapping[str, str], norms: _Norms, init: str) -> None:
    """Fill in what all nodes of an operator agree on."""
    sites, biases = set(), set()
    for node in operator.nodes:
        try:
            sites.add(_site(operator.name, node, init))
        except KernelError as error:
            operator.reason = str(error)
            return
        bias = arguments(node).get("bias")
        plain = isinstance(bias, fx.Node) and bias.op == "get_attr"
        biases.add(None if bias is None else canonical.get(str(bias.target), "") if plain else "")
    if len(sites) > 1 or len(biases) > 1:
        operator.reason = "it is called in several ways"
        return
    operator.site, operator.bias = sites.pop(), biases.pop()
    operator.norms = norms.behind(operator.nodes)


def _site(name: str, node: fx.Node, init: str) -> Site:
    kernel = geometry(node)
    if kernel.dims == 0 and kernel.weight.dim() != 2:
        raise KernelError("a linear layer with a vector as its weight")
    return Site(
        name,
        operator_name(node),
        kernel.inputs,
        kernel.outputs,
        kernel.size,
        kernel.stride,
        kernel.padding,
        kernel.dilation,
        kernel.groups,
        init,
    )


class _Norms:
    """Which running mean each batch norm of a recording uses."""

    def __init__(self, capture: Capture, canonical: Mapping[str, str]) -> None:
        self.capture, self.canonical = capture, canonical
        self.leaves: dict[str, str | None] = {}
        self.users: dict[str, set[fx.Node]] = {}
        for mode in capture.modes:
            for node in mode.graph.nodes:
                for mean in self._means(node):
                    self.users.setdefault(mean, set()).add(node)

    def behind(self, nodes: list[fx.Node]) -> tuple[str, ...]:
        """Return the running means of the norms behind ``nodes``; empty where one of them is read by anything else."""
        found: dict[str, set[fx.Node]] = {}
        for node in nodes:
            means = [self._mean_of(user, node) for user in node.users]
            if not means or None in means:
                return ()
            for user, mean in zip(node.users, means, strict=True):
                found.setdefault(str(mean), set()).add(user)
        alone = all(self.users.get(mean) == users for mean, users in found.items())
        return tuple(found) if alone else ()

    def _means(self, node: fx.Node) -> Iterator[str]:
        """Yield the running means that a node could use."""
        if node.op == "call_module":
            prefix = f"{node.target}."
            yield from (
                first
                for name, first in self.canonical.items()
                if name.startswith(prefix) and name.endswith("running_mean")
            )
        elif node.op == "get_attr" and str(node.target).endswith("running_mean"):
            for user in node.users:
                self.users.setdefault(self.canonical[str(node.target)], set()).add(user)

    def _mean_of(self, user: fx.Node, value: fx.Node) -> str | None:
        """Return the running mean of a batch norm that ``user`` applies to ``value``."""
        if user.op == "call_module" and user.args == (value,) and not user.kwargs:
            key = str(user.target)
            if key not in self.leaves:
                self.leaves[key] = self._mean_inside(key, value.meta["val"])
            return self.leaves[key]
        if user.target is not F.batch_norm or arguments(user)["input"] is not value:
            return None
        mean = arguments(user).get("running_mean")
        return self.canonical.get(str(mean.target)) if isinstance(mean, fx.Node) else None

    def _mean_inside(self, path: str, value: Any) -> str | None:
        """Return the running mean of the batch norm that a leaf module begins with."""
        module = self.capture.root.get_submodule(path)
        if not isinstance(value, Tensor):
            return None
        try:
            graph = trace_inner(module, (value,), {}, False, self.capture.memory)
        except Exception:
            return None  # code that cannot be recorded is no plain norm
        first = next(node for node in graph.nodes if node.op == "placeholder")
        readers = [node for node in first.users if node.target is F.batch_norm]
        # Other readers ask for its shape only; one that reads values would see the bias.
        values = [n for n in first.users if n not in readers and isinstance(n.meta.get("val"), Tensor)]
        if len(readers) != 1 or values:
            return None
        mean = arguments(readers[0]).get("running_mean")
        name = f"{path}.{mean.target}" if isinstance(mean, fx.Node) and mean.op == "get_attr" else ""
        return self.canonical.get(name)
