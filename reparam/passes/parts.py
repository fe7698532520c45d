"""Parts: modules with a graph inside code that has none.

Where the forward of a network (or of a module in it) cannot be recorded - a detection network loops over images and
keeps as many boxes as the data say - that code goes on to run as Python, at the student's width. The modules that it
calls are recorded one by one and widened inside: each keeps the width of its own inputs and outputs.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from reparam.errors import CaptureError
from reparam.ops.steps import STEPS
from reparam.passes.capture import Capture, trace
from reparam.passes.example import Inputs
from reparam.passes.functionalize import setitem
from reparam.passes.guards import broken_guards
from reparam.passes.joins import join_batches
from reparam.passes.memory import Memory
from reparam.passes.meta import describe, has_tensor
from reparam.passes.modes import require
from reparam.passes.program import Program
from reparam.passes.watch import watch

HOST = "reparam_host"
"""Attribute of a teacher that runs the Python code of a network without a graph."""


def record(
    root: nn.Module,
    inputs: Inputs,
    specialised: Collection[str] = (),
    opened: Collection[str] = (),
    memory: Memory | None = None,
) -> Capture:
    """Record a network (a meta skeleton), and the parts of what has no graph.

    Args:
        root: the network.
        inputs: its inputs on the meta device.
        specialised: see :func:`reparam.passes.capture.trace`.
        opened: leaf modules whose parts are recorded. The network itself is one of them where it has no graph.
        memory: see :func:`reparam.passes.capture.trace`.

    Raises:
        CaptureError: neither the network nor anything in it can be recorded.
    """
    try:
        capture = trace(root, *inputs, specialised=specialised, memory=memory)
        join_batches(capture, inputs)
    except CaptureError as error:
        capture = opaque_root(root, inputs, str(error))
        capture.memory = memory or Memory()
        capture.parts = find_parts(root, "", inputs, specialised)
        _drop_shared(capture)
        if not capture.parts:
            raise
        capture.specialised = frozenset(specialised)
        return capture
    for node in (n for mode in capture.modes for n in mode.graph.nodes):
        if node.op == "call_module" and node.target in opened:
            call = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            capture.parts |= find_parts(root, str(node.target), (tuple(call[0]), dict(call[1])), specialised)
    _drop_shared(capture)
    return capture


def _drop_shared(capture: Capture) -> None:
    """Leave modules alone that a graph calls as they are: a part's code is bound to the module itself."""
    called = {
        id(capture.root.get_submodule(str(node.target)))
        for node in capture.nodes()
        if node.op == "call_module" and node.target
    }
    for path in [path for path in capture.parts if id(capture.root.get_submodule(path)) in called]:
        del capture.parts[path]


def opaque_root(root: nn.Module, inputs: Inputs, reason: str) -> Capture:
    """Return the graph of a network that cannot be recorded: one call of the network itself."""
    graph = fx.Graph()
    args, kwargs = inputs

    def place(name: str, value: Any) -> Any:
        if not has_tensor(value):
            return value
        node = graph.placeholder(name)
        node.meta.update(val=value, module="", source="")
        return node

    given = tuple(place(f"input_{k}", value) for k, value in enumerate(args))
    named = {name: place(name, value) for name, value in kwargs.items()}
    call = graph.create_node("call_module", "", given, named)
    call.meta.update(val=None, module="", source="")
    graph.output(call).meta.update(val=None, module="", source="")
    return Capture(graph, root, leaves={"": reason})


def find_parts(root: nn.Module, path: str, inputs: Inputs, specialised: Collection[str]) -> dict[str, Capture]:
    """Record the modules inside ``path`` that can be recorded, outermost first.

    Args:
        root: the meta skeleton of the network.
        path: a module whose own forward has no graph; empty for the network itself.
        inputs: what it is called with, on the meta device.
        specialised: see :func:`reparam.passes.capture.trace`.

    Returns:
        Path in the network -> recorded forward pass.
    """
    module = root.get_submodule(path)
    seen = watch(module, inputs)
    found: dict[str, Capture] = {}

    def descend(parent: nn.Module, prefix: str) -> None:
        for name, child in parent.named_children():
            inside = f"{prefix}.{name}" if prefix else name
            if next(child.parameters(), None) is None:
                continue
            full = f"{path}.{inside}" if path else inside
            closed = seen.closed(child, inside)
            part = _record_part(root, full, seen.calls.get(inside, []), specialised) if closed else None
            if part is None:
                descend(child, inside)
            else:
                found[full] = part

    descend(module, "")
    return found


def _record_part(root: nn.Module, path: str, calls: list[Inputs], specialised: Collection[str]) -> Capture | None:
    if not calls or not all(_plain(call) and _shapes(call)[0] == _shapes(calls[0])[0] for call in calls):
        return None
    args, kwargs = pytree.tree_map(_not_empty, calls[0])
    inner = {name.removeprefix(path + ".") for name in specialised if name.startswith(path + ".") or ":" in name}
    try:
        part = trace(root.get_submodule(path), args, kwargs, specialised=inner)
        join_batches(part, (args, kwargs))
    except CaptureError:
        return None
    if part.eval_only or broken_guards(part, (args, kwargs)) or any(_writes_inputs(m.graph) for m in part.modes):
        return None
    if len({_shapes(call)[1] for call in calls}) > 1 and any(n.target is require for n in part.graph.nodes):
        return None  # its code branches on a size that differs between the calls
    for mode in part.modes:
        _adopt(mode, root, path, (args, kwargs))
    return part


def _writes_inputs(graph: fx.Graph) -> bool:
    """Whether items of an input are set: the graph does that to a copy, and the code around the part may look."""
    values = [n.meta.get("val") for n in graph.nodes if n.op == "placeholder"]
    given = {v.untyped_storage()._cdata for v in pytree.tree_leaves(values) if isinstance(v, Tensor)}
    changed = [n.args[0].meta.get("val") for n in graph.nodes if n.target is setitem and isinstance(n.args[0], fx.Node)]
    return any(isinstance(v, Tensor) and v.untyped_storage()._cdata in given for v in changed)


def _plain(call: Inputs) -> bool:
    """Whether a call has tensors, numbers and containers of these only: an object could hide tensors."""
    kinds = (Tensor, int, float, str, torch.dtype, torch.device, type(None))
    return all(isinstance(leaf, kinds) for leaf in pytree.tree_leaves(call))


def _shapes(call: Inputs) -> tuple[Any, Any]:
    """What a graph depends on, and the sizes that it may depend on."""
    leaves, structure = pytree.tree_flatten(call)
    kinds = [(v.dim(), v.dtype) if isinstance(v, Tensor) else v for v in leaves]
    return (str(structure), str(kinds)), str([tuple(v.shape) for v in leaves if isinstance(v, Tensor)])


def _not_empty(value: Any) -> Any:
    """Give dimensions without values (no box was found) two of them."""
    if not isinstance(value, Tensor) or value.numel():
        return value
    return value.new_empty([n or 2 for n in value.shape])


def _adopt(part: Capture, root: nn.Module, path: str, inputs: Inputs) -> None:
    """Let the names in a part's graph be those of the whole network."""
    for node in part.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            node.target = f"{path}.{node.target}"
        node.meta["module"] = f"{path}.{node.meta['module']}" if node.meta.get("module") else path
        node.meta["key"] = f"{path}:{node.meta.get('key', node.name)}"
        node.meta["part"] = path
    part.root, part.path, part.inputs = root, path, inputs
    part.outputs = {f"{path}.{name}": calls for name, calls in part.outputs.items()}
    part.leaves = {f"{path}.{name}": reason for name, reason in part.leaves.items()}


# -- in a teacher ----------------------------------------------------------------------------------------------------


def relative(graph: fx.Graph, path: str) -> fx.Graph:
    """Let a part's graph name its modules as the part itself does; inserted steps belong to it already."""
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module") and not str(node.target).startswith(STEPS + "."):
            node.target = str(node.target).removeprefix(path + ".")
    return graph


def bind(module: nn.Module, programs: list[Program], steps: Mapping[str, nn.Module], given: Given) -> None:
    """Let a module run its program instead of its class's forward; by its train mode where there are two."""
    if steps:
        module.add_module(STEPS, nn.ModuleDict(dict(steps)))
    functions = [program.function() for program in programs]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        taken, named = given.tensors(args, kwargs)
        return functions[-1 if self.training else 0](self, *taken, **named)

    vars(module)["forward"] = types.MethodType(forward, module)


@dataclass(frozen=True)
class Given:
    """What a part was recorded with: its graph holds for calls like that one.

    Args:
        path: of the part.
        inputs: on the meta device.
    """

    path: str
    inputs: Inputs

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments that the graph takes: those with tensors. The others are constants of it.

        Raises:
            RuntimeError: the call differs in more than sizes.
        """
        old_args, old_kwargs = self.inputs
        if len(args) != len(old_args) or kwargs.keys() != old_kwargs.keys():
            raise self._differs()
        for new, old in [*zip(args, old_args, strict=True), *((kwargs[name], v) for name, v in old_kwargs.items())]:
            if not _fits(new, old):
                raise self._differs()
        return (
            [new for new, old in zip(args, old_args, strict=True) if has_tensor(old)],
            {name: new for name, new in kwargs.items() if has_tensor(old_kwargs[name])},
        )

    def _differs(self) -> RuntimeError:
        return RuntimeError(
            f"{self.path} was recorded for the call ({describe_call(*self.inputs)}) and is called with other constants "
            f"or structures now; expand the network again with ignore=['{self.path}.*']"
        )


def describe_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return a call's arguments for messages."""
    return ", ".join([*map(describe, args), *(f"{name}={describe(value)}" for name, value in kwargs.items())])


def _fits(new: Any, old: Any) -> bool:
    """Whether an argument is like the recorded one: the same constant, or tensors of the same number of dimensions."""
    (first, one), (second, two) = pytree.tree_flatten(new), pytree.tree_flatten(old)
    if len(first) != len(second) or one != two:
        return False
    constant = not has_tensor(old)
    for a, b in zip(first, second, strict=True):
        if isinstance(a, Tensor) != isinstance(b, Tensor) or (isinstance(b, Tensor) and a.dim() != b.dim()):
            return False
        if constant and not (type(a) is type(b) and a == b):
            return False
    return True


BoundPart = tuple[list[Program], Mapping[str, nn.Module], Given]
"""Programs of a part, their steps, and the call they were recorded for."""


@contextlib.contextmanager
def bound(root: nn.Module, parts: Mapping[str, BoundPart]) -> Iterator[None]:
    """Bind parts (by path) for the time of a call."""
    try:
        for path, part in parts.items():
            bind(root.get_submodule(path), *part)
        yield
    finally:
        for path in parts:
            module = root.get_submodule(path)
            vars(module).pop("forward", None)
            module._modules.pop(STEPS, None)


def host_of(source: nn.Module, teacher: nn.Module) -> nn.Module:
    """Return a module of the student's class that runs its Python code on the teacher's own modules and tensors.

    Args:
        source: of the student's class, with its plain attributes.
        teacher: whose modules and tensors it gets.
    """
    host: nn.Module = object.__new__(type(source))
    vars(host).update(vars(source))
    for name in ("_modules", "_parameters", "_buffers"):
        vars(host)[name] = vars(teacher)[name]
    vars(host)["training"] = teacher.training
    return host
