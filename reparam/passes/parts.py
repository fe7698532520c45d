"""Parts: modules with a graph inside code that has none.

Where the forward of a network (or of a module in it) cannot be recorded - a detection network loops over images and
keeps as many boxes as the data say - that code goes on to run as Python, at the student's width. The modules that it
calls are recorded one by one and widened inside: each keeps the width of its own inputs and outputs.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from reparam.errors import CaptureError
from reparam.ops.steps import STEPS
from reparam.passes.capture import Capture, trace
from reparam.passes.example import Inputs
from reparam.passes.memory import Memory
from reparam.passes.meta import run_module_on_meta
from reparam.passes.modes import require
from reparam.passes.program import Program
from reparam.passes.skeleton import rebuild

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
    except CaptureError as error:
        capture = opaque_root(root, inputs, str(error))
        capture.memory = memory or Memory()
        capture.parts = find_parts(root, "", inputs, specialised)
        if not capture.parts:
            raise
        capture.specialised = frozenset(specialised)
        return capture
    for node in (n for mode in capture.modes for n in mode.graph.nodes):
        if node.op == "call_module" and node.target in opened:
            call = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            capture.parts |= find_parts(root, str(node.target), (tuple(call[0]), dict(call[1])), specialised)
    return capture


def opaque_root(root: nn.Module, inputs: Inputs, reason: str) -> Capture:
    """Return the graph of a network that cannot be recorded: one call of the network itself."""
    graph = fx.Graph()
    args, kwargs = inputs
    taken: list[fx.Node] = []

    def place(name: str, value: Any) -> Any:
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            return value
        node = graph.placeholder(name)
        node.meta.update(val=value, module="", source="")
        taken.append(node)
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
    calls = _calls_inside(module, inputs)
    found: dict[str, Capture] = {}

    def descend(parent: nn.Module, prefix: str) -> None:
        for name, child in parent.named_children():
            inside = f"{prefix}.{name}" if prefix else name
            if next(child.parameters(), None) is None:
                continue
            full = f"{path}.{inside}" if path else inside
            part = _record_part(root, full, calls.get(inside, []), specialised)
            if part is None:
                descend(child, inside)
            else:
                found[full] = part

    descend(module, "")
    return found


def _calls_inside(module: nn.Module, inputs: Inputs) -> dict[str, list[Inputs]]:
    """Run a module and note what its submodules are called with; on zeros where the meta device does not get on."""
    calls: dict[str, list[Inputs]] = {}

    def note(name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        call = pytree.tree_map(lambda v: v.detach().to("meta") if isinstance(v, Tensor) else v, (args, kwargs))
        calls.setdefault(name, []).append(call)

    def run(copy: nn.Module, call: Callable[[], Any]) -> bool:
        calls.clear()
        for name, child in copy.named_modules():
            if name:
                child.register_forward_pre_hook(partial(note, name), with_kwargs=True)
        try:
            call()
        except Exception:
            return False
        return True

    copy = rebuild(module, lambda _name, tensor: tensor)
    if not run(copy, lambda: run_module_on_meta(copy, *inputs)):
        real = rebuild(module, lambda _name, tensor: torch.zeros_like(tensor, device="cpu"))
        zeros = pytree.tree_map(lambda v: torch.zeros_like(v, device="cpu") if isinstance(v, Tensor) else v, inputs)
        seen = dict(calls)
        with torch.no_grad():
            run(real.eval(), lambda: real(*zeros[0], **zeros[1]))
        calls = {**seen, **calls}
    return calls


def _record_part(root: nn.Module, path: str, calls: list[Inputs], specialised: Collection[str]) -> Capture | None:
    if not calls or not all(_plain(call) and _shapes(call)[0] == _shapes(calls[0])[0] for call in calls):
        return None
    args, kwargs = pytree.tree_map(_not_empty, calls[0])
    inner = {name.removeprefix(path + ".") for name in specialised if name.startswith(path + ".") or ":" in name}
    try:
        part = trace(root.get_submodule(path), args, kwargs, specialised=inner)
    except CaptureError:
        return None
    if len({_shapes(call)[1] for call in calls}) > 1 and any(n.target is require for n in part.graph.nodes):
        return None  # its code branches on a size that differs between the calls
    for mode in part.modes:
        _adopt(mode, root, path, (args, kwargs))
    return part


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


def bind(module: nn.Module, programs: list[Program], steps: Mapping[str, nn.Module]) -> None:
    """Let a module run its program instead of its class's forward; by its train mode where there are two."""
    if steps:
        module.add_module(STEPS, nn.ModuleDict(dict(steps)))
    functions = [program.function() for program in programs]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return functions[-1 if self.training else 0](self, *args, **kwargs)

    vars(module)["forward"] = types.MethodType(forward, module)


@contextlib.contextmanager
def bound(root: nn.Module, parts: Mapping[str, tuple[list[Program], Mapping[str, nn.Module]]]) -> Iterator[None]:
    """Bind parts (by path) for the time of a call."""
    try:
        for path, (programs, steps) in parts.items():
            bind(root.get_submodule(path), programs, steps)
        yield
    finally:
        for path in parts:
            module = root.get_submodule(path)
            vars(module).pop("forward", None)
            module._modules.pop(STEPS, None)


def host_of(skeleton: nn.Module, teacher: nn.Module) -> nn.Module:
    """Return a module of the student's class that runs its Python code on the teacher's own modules and tensors."""
    host: nn.Module = object.__new__(type(skeleton))
    vars(host).update(vars(skeleton))
    for name in ("_modules", "_parameters", "_buffers"):
        vars(host)[name] = vars(teacher)[name]
    host.training = teacher.training
    return host
