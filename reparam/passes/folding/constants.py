"""Values that depend on parameters and buffers only, in float64."""

from __future__ import annotations

import operator
import zlib
from typing import Any

import torch
from torch import Tensor, fx, nn

from reparam.passes.functionalize import is_inplace
from reparam.passes.state import operator_name
from reparam.passes.values import plain
from reparam.passes.world import in_double

_FACTORIES = {"zeros", "ones", "full", "arange", "tensor", "eye", "linspace"}


def constants_of(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that are computed from parameters, buffers and numbers alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            found.add(node)
        elif node.op in ("call_function", "call_method") and not is_inplace(node):
            inputs = node.all_input_nodes
            made = not inputs and getattr(node.target, "__name__", "") in _FACTORIES
            if made or (inputs and all(n in found for n in inputs)):
                found.add(node)
    return found


class Constants:
    """Evaluates constants, once each; on the meta device where there is no model.

    Args:
        model: whose tensors to read, or None to know shapes only.
        skeleton: the recorded copy, for tensors that recording made.
    """

    def __init__(self, model: nn.Module | None, skeleton: nn.Module) -> None:
        self.model, self.skeleton = model, skeleton
        self.device = torch.device("meta") if model is None else device_of(model)
        if self.device.type == "mps":
            self.device = torch.device("cpu")  # which has float64
        self._known: dict[fx.Node, Any] = {}

    def __call__(self, value: Any) -> Any:
        """Return the value of a node, or what is no node as it is; floating point numbers in float64."""
        if not isinstance(value, fx.Node):
            return value
        if value not in self._known:
            with torch.no_grad(), in_double():
                self._known[value] = self._compute(value)
        return self._known[value]

    def vector(self, value: Any) -> Tensor:
        """Return a constant or a number as a vector."""
        return torch.as_tensor(self(value), dtype=torch.float64, device=self.device).reshape(-1)

    def _compute(self, node: fx.Node) -> Any:
        if self.model is None:
            return _double(node.meta["val"])
        if node.op == "get_attr":
            return _double(self._attribute(str(node.target)).to(self.device))
        args, kwargs = plain(fx.node.map_arg((node.args, node.kwargs), self))
        if node.op == "call_method":
            return _double(getattr(args[0], str(node.target))(*args[1:], **kwargs))
        target: Any = node.target
        return _double(target(*args, **kwargs))

    def _attribute(self, name: str) -> Any:
        try:
            return operator.attrgetter(name)(self.model).detach()
        except AttributeError:
            return operator.attrgetter(name)(self.skeleton).detach()


class Probes(Constants):
    """Evaluates constants for random parameters and buffers.

    Kernels that are equal for these are computed in the same way from the same tensors. Equal values of a network as
    it was made say nothing about the trained one.
    """

    def _attribute(self, name: str) -> Any:
        value = super()._attribute(name)
        if not value.is_floating_point():
            return value
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return 0.5 + torch.rand(value.shape, dtype=torch.float64, generator=generator)


_PLACED = set(
    "getattr getitem size dim view reshape flatten t transpose permute squeeze unsqueeze expand expand_as contiguous "
    "to float double half type type_as chunk split unbind narrow select detach clone movedim".split()
)
"""Operators that give the values of a weight another place or type, and compute nothing."""


def is_computed(weight: fx.Node) -> bool:
    """Whether a constant weight is computed in each run, from no fewer values than it has itself."""
    todo, seen, values, computed = [weight], {weight}, 0, False
    while todo:
        node = todo.pop()
        if node.op == "get_attr":
            values += node.meta["val"].numel()
            continue
        computed |= operator_name(node) not in _PLACED
        todo += [n for n in node.all_input_nodes if n not in seen]
        seen.update(node.all_input_nodes)
    return computed and weight.meta["val"].numel() <= values


def device_of(model: nn.Module, weight: Any = None) -> torch.device:
    """Return the device of a weight, given as the node that reads it, else of the model's first tensor."""
    if isinstance(weight, fx.Node) and weight.op == "get_attr":
        return operator.attrgetter(str(weight.target))(model).device
    first = next(iter([*model.parameters(), *model.buffers()]), None)
    return torch.device("cpu") if first is None else first.device


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
