"""The code of a module after folding, as a graph that calls the modules inside it."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from reparam.passes.folding.edits import Edit
from reparam.passes.folding.record import Call
from reparam.passes.functionalize import is_inplace
from reparam.passes.modes import require


class Missing(Exception):
    """A value that the code of a module needs does not exist there."""


@dataclass
class Code:
    """The new code of a module.

    Args:
        graph: the graph; targets are relative to the module.
        layers: names of new layers -> the edits that they come from.
        foreign: names of modules that are not inside the module -> their paths in the network.
        attributes: names in the graph -> paths of tensors in the network.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    layers: dict[str, Edit] = field(default_factory=dict)
    foreign: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)

    @property
    def steps(self) -> list[fx.Node]:
        """The nodes between inputs and output."""
        return [n for n in self.graph.nodes if n.op not in ("placeholder", "output")]

    @property
    def inputs(self) -> list[fx.Node]:
        """The inputs."""
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    @property
    def result(self) -> Any:
        """What it returns."""
        return next(iter(reversed(self.graph.nodes))).args[0]


class Emitter:
    """Writes the code of one call.

    Args:
        scope: the call.
        module: the recorded module.
        edits: all edits by node.
        inlined: calls whose code becomes part of the code that they are called from.
        aliases: value -> the nodes that are the same.
    """

    def __init__(
        self,
        scope: Call,
        module: nn.Module,
        edits: Mapping[fx.Node, Edit],
        inlined: set[Call],
        aliases: Mapping[fx.Node, list[fx.Node]],
    ) -> None:
        self.scope, self.module, self.edits, self.inlined, self.aliases = scope, module, edits, inlined, aliases
        self.code = Code()
        self.env: dict[fx.Node, fx.Node] = {}
        self.dropped: set[fx.Node] = set()
        self.kept: set[fx.Node] = set()
        inside = set(scope.nodes())
        self.starts = {n: e for e in edits.values() if e.node in inside for n in e.covered}

    def run(self) -> Code:
        """Write it.

        Raises:
            Missing: a value that is needed is not visible here.
        """
        self._inputs()
        self._body(self.scope)
        self.code.graph.output(self._map(self.scope.result))
        self._clean()
        return self.code

    # -- inputs --------------------------------------------------------------------------------------------------------

    def _inputs(self) -> None:
        for name, value, default in parameters_of(self.module, self.scope):
            if default is _NO or not _is_plain(default):
                new = self.code.graph.placeholder(name)
            else:
                new = self.code.graph.placeholder(name, default_value=default)
            if nodes_in(value):
                self._unpack(value, new)
            elif _is_plain(value):
                self._guard(name, value, new)

    def _guard(self, name: str, value: Any, new: fx.Node) -> None:
        """Stop where a constant argument is another one than the code was written for."""
        where = self.scope.path or "the network"
        message = f"{where} was folded for {name}={value!r}; fold the network again for another value"
        self.kept.add(self.code.graph.call_function(require, (new, value, message)))

    def _unpack(self, value: Any, new: fx.Node) -> None:
        """Let the nodes of a structure be the items of a new node."""
        if isinstance(value, fx.Node):
            self.env[value] = new
            return
        items = (
            value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, (list, tuple)) else ())
        )
        for key, item in items:
            if nodes_in(item):
                self._unpack(item, self.code.graph.call_function(operator.getitem, (new, key)))

    # -- body ----------------------------------------------------------------------------------------------------------

    def _body(self, call: Call) -> None:
        for item in call.items:
            if isinstance(item, fx.Node):
                self._node(item)
            elif item in self.inlined or not self._closed(item):
                self._body(item)
            else:
                self._call(item)

    def _closed(self, call: Call) -> bool:
        """Whether all that is used of a call is what it returns."""
        inside = set(call.nodes())
        hidden = inside - set(nodes_in(call.result))
        escapes = any(user not in inside for n in hidden if n.op != "get_attr" for user in n.users)
        return call.known and not escapes

    def _call(self, call: Call) -> None:
        inside = set(call.nodes())
        own = set(call.calls())
        for node in [n for n in call.nodes() if n in self.starts]:
            if self.starts[node].scope not in own:
                self._start(self.starts[node])
        results = set(nodes_in(call.result))
        if not inside & results or results <= self.dropped:
            return
        try:
            args, kwargs = self._map((tuple(call.args), call.kwargs))
        except Missing:
            return
        new = self.code.graph.call_module(self._module_name(call.path), args, kwargs)
        new.meta["around"] = call.around
        self._unpack(call.result, new)

    def _node(self, node: fx.Node) -> None:
        if node.op in ("get_attr", "placeholder", "output") or "needed" not in node.meta:
            return
        if node in self.starts:
            self._start(self.starts[node])
        if node in self.dropped:
            return
        edit = self.edits.get(node)
        if edit is None:
            args, kwargs = self._map((node.args, node.kwargs))
            target = self._module_name(str(node.target)) if node.op == "call_module" else node.target
            self.env[node] = self.code.graph.create_node(node.op, target, args, kwargs, node.name)
            self.env[node].meta["around"] = node.meta["around"]
            if node.target is require or (is_inplace(node) and not node.users):
                self.kept.add(self.env[node])
        elif edit.main is None:
            self.env[node] = self._source(edit)
        else:
            self.env[node] = self._layer(edit)

    def _start(self, edit: Edit) -> None:
        """Put a new operator where the first of those that it replaces was."""
        if edit.node in self.dropped:
            return
        new = self._layer(edit)
        for node in edit.covered:
            self.env[node] = new
        self.dropped |= edit.covered

    def _layer(self, edit: Edit) -> fx.Node:
        assert edit.main is not None and edit.kernel is not None
        path = str(edit.main.meta.get("module") or "")
        prefix = f"{self.scope.path}." if self.scope.path else ""
        name = path.removeprefix(prefix) if path.startswith(prefix) and path != self.scope.path else ""
        name = name or ("conv" if edit.kernel.dims else "linear")
        name = self._free(name, path)
        self.code.layers[name] = edit
        new = self.code.graph.call_module(name, (self._source(edit),))
        new.meta.update(layer=name, around=edit.main.meta["around"])
        return new

    def _free(self, base: str, path: str) -> str:
        """Return a name that is that of the operator's own module, or of nothing."""
        name, count = base, 0
        while name in self.code.layers or (self._absolute(name) != path and hasattr(self.module, name)):
            count += 1
            name = f"{base}_{count}"
        return name

    def _absolute(self, name: str) -> str:
        return f"{self.scope.path}.{name}" if self.scope.path else name

    def _source(self, edit: Edit) -> fx.Node:
        for node in (edit.source, *self.aliases.get(edit.source, ())):
            if node in self.env:
                return self.env[node]
        raise Missing(edit.source.name)

    # -- names ---------------------------------------------------------------------------------------------------------

    def _map(self, value: Any) -> Any:
        return fx.node.map_arg(value, self._value)

    def _value(self, node: fx.Node) -> fx.Node:
        if node in self.env:
            return self.env[node]
        if node.op != "get_attr":
            raise Missing(node.name)
        path = str(node.target)
        name = self._relative(path) or "tensor_" + path.replace(".", "_")
        self.code.attributes[name] = path
        return self.code.graph.get_attr(name)

    def _relative(self, path: str) -> str:
        prefix = f"{self.scope.path}." if self.scope.path else ""
        return path.removeprefix(prefix) if path.startswith(prefix) else ""

    def _module_name(self, path: str) -> str:
        name = self._relative(path)
        if not name:
            name = "shared_" + path.replace(".", "_")
            self.code.foreign[name] = path
        return name

    def _clean(self) -> None:
        for node in reversed(list(self.code.graph.nodes)):
            if not node.users and node.op not in ("placeholder", "output") and node not in self.kept:
                self.code.graph.erase_node(node)
        self._rename()
        used = {str(n.target) for n in self.code.steps}
        for table in (self.code.layers, self.code.foreign, self.code.attributes):
            for name in [n for n in table if n not in used]:
                del table[name]

    def _rename(self) -> None:
        """Give new layers another name where the module of that name is still needed as it was."""
        steps = self.code.steps
        called = [str(n.target) for n in steps if n.op == "call_module" and n.meta.get("layer") is None]
        called += [str(n.target) for n in steps if n.op == "get_attr"]
        for name in list(self.code.layers):
            if any(name == c or name.startswith(f"{c}.") or c.startswith(f"{name}.") for c in called):
                new = self._free(name.replace(".", "_") + "_folded", "")
                self.code.layers[new] = self.code.layers.pop(name)
                for node in steps:
                    if node.meta.get("layer") == name:
                        node.target = node.meta["layer"] = new


_NO = object()


def parameters_of(module: nn.Module, call: Call) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, value in this call and default of the inputs of a module."""
    signature = inspect.signature(module.forward)
    bound = signature.bind(*call.args, **call.kwargs).arguments
    for name, parameter in signature.parameters.items():
        default = _NO if parameter.default is parameter.empty else parameter.default
        value = bound.get(name, None if default is _NO else default)
        if parameter.kind is parameter.VAR_POSITIONAL:
            yield from ((f"{name}_{k}", item, _NO) for k, item in enumerate(bound.get(name, ())))
        elif parameter.kind is parameter.VAR_KEYWORD:
            yield from ((key, item, None) for key, item in bound.get(name, {}).items())
        else:
            yield name, value, default


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, a word, a type or None, or a structure of these."""
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return isinstance(value, (int, float, str, type(None), torch.dtype, torch.device))


def nodes_in(value: Any) -> list[fx.Node]:
    """Return the nodes of a structure."""
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return found
