"""Named intermediate values beside the output, for feature distillation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from reparam.errors import InputError, near_matches
from reparam.passes.flows import entering, meeting
from reparam.passes.functionalize import is_inplace
from reparam.passes.parts import HOST
from reparam.passes.program import Program
from reparam.passes.teacher import Teacher
from reparam.passes.view import StudentView

INPUT = ":input"
"""Behind a name: what enters it, instead of what it returns."""


def tap(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """Return a module that computes ``(output, {name: value})``, sharing all weights with ``module``.

    A value is what it was when it was computed, also where the network changes it in place later (by a ReLU).

    Args:
        module: a student, a student's view or a teacher.
        names: module paths of the student; the value is what the module returned (at its last call). A teacher's
            values are wide where the student's are replicated. Where the network's own code has no graph, the modules
            that this code calls can be tapped, at the student's width. ``path:input`` is the one tensor that entered
            the module, ``path.parameter:input`` the first tensor of the operator that took the parameter last (where a
            classifier is no module of its own).

    Raises:
        InputError: an unknown name (near matches are listed), or one whose module is not called.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    network = module.network if isinstance(module, StudentView) else module
    student = module.skeleton if isinstance(module, Teacher) else network
    known = [n for n, _m in student.named_modules() if n]
    parameters = {n for n, _p in student.named_parameters(remove_duplicate=False)}
    for name in wanted:
        base = name.removesuffix(INPUT)
        if base not in known and not (base != name and base in parameters):
            raise InputError(f"tap: no module {base!r}{near_matches(base, known)}")
    if isinstance(module, Teacher) and HOST in vars(module):
        return _HookTap(module, _called_by_host(module, wanted), wanted)
    return _GraphTap(module, wanted) if isinstance(module, Teacher) else _HookTap(module, network, wanted)


def _called_by_host(teacher: Teacher, names: list[str]) -> nn.Module:
    """Return the teacher, whose Python code calls modules; the modules inside its parts are not called any more."""
    for name in names:
        above = [name[:k] for k, letter in enumerate(name) if letter == "."]
        part = next((path for path in above if "forward" in vars(teacher.get_submodule(path))), None)
        if part is not None:
            raise InputError(f"tap: {name!r} lies inside {part!r}, which runs as one graph; tap {part!r} itself")
    return teacher


# Networks that run as they are --------------------------------------------------------------------------------------


class _HookTap(nn.Module):
    """Taps an eager network with forward hooks that exist only during the call."""

    def __init__(self, module: nn.Module, network: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.module = module
        self.names = names
        self._network = (network,)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Return output and values."""
        found = _Found()
        with contextlib.ExitStack() as stack:
            for name in self.names:
                stack.enter_context(_watched(self._network[0], name, found))
            output = self.module(*args, **kwargs)
        missing = [name for name in self.names if name not in found.values]
        if missing:
            raise InputError(f"tap: {missing[0]!r} is not called in this forward pass")
        return output, {name: found.values[name] for name in self.names}


class _Found:
    """The values of one call: copies, since code that follows may change them in place.

    Always copies, even where nothing follows: gradients add up in another order through a copy, and a run that is
    taken up again has to compute what it would have computed.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def keep(self, name: str, value: Any) -> None:
        """Keep a copy of a value."""
        self.values[name] = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


@contextlib.contextmanager
def _watched(network: nn.Module, name: str, found: _Found) -> Iterator[None]:
    """Keep a value by name while the network runs."""
    base = name.removesuffix(INPUT)
    if base == name:
        handle = network.get_submodule(name).register_forward_hook(lambda _m, _a, result: found.keep(name, result))
    elif _is_module(network, base):
        handle = network.get_submodule(base).register_forward_pre_hook(_entered(found, name), with_kwargs=True)
    else:
        path, _, parameter = base.rpartition(".")
        with _Meets(network.get_submodule(path), parameter, lambda value: found.keep(name, value)):
            yield
        return
    try:
        yield
    finally:
        handle.remove()


def _is_module(network: nn.Module, path: str) -> bool:
    try:
        network.get_submodule(path)
    except AttributeError:
        return False
    return True


def _entered(found: _Found, name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if len(tensors) != 1:
            raise InputError(f"tap: {name!r} asks for the tensor that enters a module, and {len(tensors)} do")
        found.keep(name, tensors[0])

    return hook


class _Meets(TorchFunctionMode):
    """Looks for operators that take a parameter; of a student's view the parameter changes from call to call."""

    def __init__(self, holder: nn.Module, parameter: str, keep: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.holder, self.parameter, self.keep = holder, parameter, keep

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look, and go on."""
        kwargs = kwargs or {}
        parameter = getattr(self.holder, self.parameter)
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        others = [tensor for tensor in tensors if tensor is not parameter]
        if others and len(others) < len(tensors):
            self.keep(others[0])
        return func(*args, **kwargs)


# Teachers -----------------------------------------------------------------------------------------------------------


class _GraphTap(nn.Module):
    """Taps a teacher by running its graph with more outputs."""

    def __init__(self, teacher: Teacher, names: list[str]) -> None:
        super().__init__()
        self.teacher = teacher
        # Programs over the teacher's own attributes, without registering them a second time.
        found = [{name: _value_in(program, name) for name in names} for program in teacher._programs]
        self._functions = tuple(_tapped(*pair) for pair in zip(teacher._programs, found, strict=True))
        lacking = [[name for name in names if values[name] is None] for values in found]
        if all(lacking):
            raise _missing(lacking[0])
        self._lacking = tuple(lacking)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Return output and values."""
        mode = -1 if self.teacher.training else 0
        if self._lacking[mode]:
            raise _missing(self._lacking[mode])
        function = self._functions[mode]
        result: tuple[Any, dict[str, Any]] = function(self.teacher, *args, **kwargs)
        return result


def _missing(names: list[str]) -> InputError:
    return InputError(f"tap: {names[0]!r} is not called in this forward pass, or lies inside a module kept whole")


def _value_in(program: Program, name: str) -> Any:
    """Return where a program has a value: a structure of node names, or None."""
    base = name.removesuffix(INPUT)
    calls = program.outputs.get(base)
    if base == name:
        return calls[-1] if calls else None
    nodes = {node.name: node for node in program.graph.nodes}
    if not calls:
        node = meeting(program.graph, base)
        return None if node is None else node.name
    if not isinstance(calls[-1], str):
        raise InputError(f"tap: {base!r} returns more than a tensor; tap what it returns, or a module inside it")
    given = entering(program.graph, base, nodes[calls[-1]])
    if len(given) != 1:
        raise InputError(f"tap: {name!r} asks for the tensor that enters a module, and {len(given)} do")
    return given[0].name


def _tapped(program: Program, values: dict[str, Any]) -> Callable[..., Any]:
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(program.graph, mapping)
    nodes = {old.name: new for old, new in mapping.items()}
    taken = {name: _nodes(value, nodes) for name, value in values.items() if value is not None}
    copies = {node: _copy(graph, node) for node in dict.fromkeys(pytree.tree_leaves(taken)) if _is_changed(node)}
    graph.output((output, fx.node.map_arg(taken, lambda node: copies.get(node, node))))
    return Program(graph).function()


def _copy(graph: fx.Graph, node: fx.Node) -> fx.Node:
    with graph.inserting_after(node):
        return graph.call_function(torch.clone, (node,))


def _is_changed(value: Any) -> bool:
    """Whether an operator changes a value in place, or what may share its memory."""
    stack, seen = [value] if isinstance(value, fx.Node) else [], set()
    while stack:
        node = stack.pop()
        for user in node.users if node not in seen else ():
            if user.args and user.args[0] is node:
                if is_inplace(user):
                    return True
                name = str(user.target if user.op == "call_method" else getattr(user.target, "__name__", ""))
                stack += [user] if name.strip("_") in _SHARING else []
        seen.add(node)
    return False


_SHARING = frozenset(
    "getitem view view_as reshape flatten unflatten transpose swapaxes swapdims permute movedim squeeze unsqueeze "
    "chunk split unbind narrow select expand contiguous t dropout getattr to detach".split()
)
"""Operators whose result may share the memory of their first argument."""


def _nodes(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, str):
        return nodes[value]
    if isinstance(value, dict):
        return {k: _nodes(v, nodes) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_nodes(v, nodes) for v in value)
    return value
