"""Modules that folding makes: plain layers, and modules whose code is a graph."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn

from reparam.ops.kernels import Kernel
from reparam.passes.contexts import as_code
from reparam.passes.gradients import takes_gradients, with_gradients

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_HOLDERS = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")


def layer(kernel: Kernel, trainable: bool) -> nn.Module:
    """Return the torch layer of a kernel.

    Args:
        kernel: what it computes.
        trainable: ``requires_grad`` of its parameters.
    """
    inputs, outputs, bias = kernel.inputs, kernel.outputs, kernel.bias is not None
    made: nn.Module
    with torch.device("meta"):
        if not kernel.dims:
            made = nn.Linear(inputs, outputs, bias)
        elif kernel.transposed:
            rest = (kernel.stride, kernel.padding, kernel.output_padding, kernel.groups, bias, kernel.dilation)
            made = _TRANSPOSED[kernel.dims](inputs, outputs, kernel.size, *rest)  # type: ignore[arg-type]
        else:
            geometry = (kernel.stride, kernel.padding, kernel.dilation, kernel.groups, bias)
            made = _CONV[kernel.dims](inputs, outputs, kernel.size, *geometry)  # type: ignore[arg-type]
    return with_weights(made, kernel, trainable)


def with_weights(module: nn.Module, kernel: Kernel, trainable: bool) -> nn.Module:
    """Give a layer the weight and bias of a kernel."""
    for name, value in (("weight", kernel.weight), ("bias", kernel.bias)):
        parameter = None if value is None else nn.Parameter(value, requires_grad=trainable)
        module.register_parameter(name, parameter)
    return module.eval()


class FoldedModule(fx.GraphModule):
    """A module whose code changed by folding: its own modules under their own names, called by a graph.

    Args:
        root: holds modules, parameters, buffers and plain attributes; adopted as they are.
        graph: the code.
        class_name: of the module it stands for.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str) -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name=class_name)
        # fx would copy only what the graph refers to.
        for name, value in vars(root).items():
            if name in _HOLDERS:
                vars(self)[name].update(value)
            elif not name.startswith("_") and name != "forward":
                vars(self).setdefault(name, value)
        self.training = root.training
        self.graph = graph

    def recompile(self) -> Any:
        """Generate the forward again."""
        with as_code(self.graph):
            code = super().recompile()
        if takes_gradients(self.graph):
            type(self).forward = with_gradients(type(self).forward)
        return code

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldedModule:
        return _rebuild(*copy.deepcopy(self.__reduce__()[1], memo))

    def __copy__(self) -> FoldedModule:
        return _rebuild(*self.__reduce__()[1])

    def __reduce__(self) -> Any:
        state = {name: value for name, value in vars(self).items() if name != "meta" and name[:1] != "_"}
        holders = {name: vars(self)[name] for name in _HOLDERS}
        return _rebuild, (type(self).__name__, _written(self.graph), {**state, **holders})


class Reference(str):
    """The name of a node in a written graph."""

    __slots__ = ()


Row = tuple[str, str, Any, Any, Any]


def _written(graph: fx.Graph) -> list[Row]:
    """Return a graph as rows of plain values; fx itself would record its code again when it is loaded."""

    def write(value: Any) -> Any:
        return fx.node.map_arg(value, lambda node: Reference(node.name))

    return [(n.op, n.name, n.target, _plain(write(n.args)), _plain(write(n.kwargs))) for n in graph.nodes]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, slice):
        return slice(_plain(value.start), _plain(value.stop), _plain(value.step))
    return tuple(map(_plain, value)) if type(value) is tuple else value


def _rebuild(name: str, rows: list[Row], state: dict[str, Any]) -> FoldedModule:
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}

    def read(value: Any) -> Any:
        if isinstance(value, Reference):
            return known[value]
        if isinstance(value, dict):
            return {k: read(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            return type(value)(map(read, value))
        return slice(*map(read, (value.start, value.stop, value.step))) if isinstance(value, slice) else value

    for kind, label, target, args, kwargs in rows:
        if kind == "output":
            graph.output(read(args)[0])
        else:
            known[label] = graph.create_node(kind, target, read(args), read(kwargs), label)
    root = nn.Module()
    vars(root).update(state)
    return FoldedModule(root, graph, name)
