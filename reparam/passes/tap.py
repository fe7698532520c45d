"""Named intermediate values beside the output, for feature distillation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from reparam.errors import InputError, near_matches
from reparam.passes.parts import HOST
from reparam.passes.program import Program
from reparam.passes.teacher import Teacher
from reparam.passes.view import StudentView


def tap(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """Return a module that computes ``(output, {name: value})``, sharing all weights with ``module``.

    Args:
        module: a student, a student's view or a teacher.
        names: module paths of the student; the value is what the module returned (at its last call). A teacher's
            values are wide where the student's are replicated. Where the network's own code has no graph, the modules
            that this code calls can be tapped, at the student's width.

    Raises:
        InputError: an unknown name (near matches are listed), or one whose module is not called.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    network = module.network if isinstance(module, StudentView) else module
    known = [n for n, _m in (module.skeleton if isinstance(module, Teacher) else network).named_modules() if n]
    for name in wanted:
        if name not in known:
            raise InputError(f"tap: no module {name!r}{near_matches(name, known)}")
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


class _HookTap(nn.Module):
    """Taps an eager network with forward hooks that exist only during the call."""

    def __init__(self, module: nn.Module, network: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.module = module
        self.names = names
        self._network = (network,)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Return output and values."""
        values: dict[str, Any] = {}
        handles = []
        for name in self.names:
            hook = _store(values, name)
            handles.append(self._network[0].get_submodule(name).register_forward_hook(hook))
        try:
            output = self.module(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        missing = [name for name in self.names if name not in values]
        if missing:
            raise InputError(f"tap: {missing[0]!r} is not called in this forward pass")
        return output, {name: values[name] for name in self.names}


def _store(values: dict[str, Any], name: str) -> Any:
    def hook(_module: nn.Module, _args: Any, result: Any) -> None:
        values[name] = result

    return hook


class _GraphTap(nn.Module):
    """Taps a teacher by running its graph with more outputs."""

    def __init__(self, teacher: Teacher, names: list[str]) -> None:
        super().__init__()
        self.teacher = teacher
        # Programs over the teacher's own attributes, without registering them a second time.
        self._functions = tuple(_tapped(program, names) for program in teacher._programs)
        lacking = [_not_called(program, names) for program in teacher._programs]
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


def _not_called(program: Program, names: list[str]) -> list[str]:
    return [name for name in names if not program.outputs.get(name)]


def _missing(names: list[str]) -> InputError:
    return InputError(f"tap: {names[0]!r} is not called in this forward pass, or lies inside a module kept whole")


def _tapped(program: Program, names: list[str]) -> Callable[..., Any]:
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(program.graph, mapping)
    nodes = {old.name: new for old, new in mapping.items()}
    taps = {}
    for name in names:
        calls = program.outputs.get(name)
        if calls:
            taps[name] = _nodes(calls[-1], nodes)
    graph.output((output, taps))
    return Program(graph).function()


def _nodes(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, str):
        return nodes[value]
    if isinstance(value, dict):
        return {k: _nodes(v, nodes) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_nodes(v, nodes) for v in value)
    return value
