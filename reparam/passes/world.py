"""One network run node by node in float64, as it is verified."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from reparam.passes.modes import require, require_mode
from reparam.passes.parts import HOST, bound
from reparam.passes.skeleton import module_and_attribute, named_tensors
from reparam.passes.widen import stated_widths

Fetch = Callable[[str], Any]
"""Returns the parameter or buffer of a name in float64; None where there is none."""


class World:
    """One of the two networks: its graph, where its tensors come from, and the module attributes that are its own."""

    def __init__(
        self,
        graph: fx.Graph,
        root: nn.Module,
        tensors: Fetch,
        steps: dict[str, nn.Module] | None = None,
        attributes: Mapping[str, Any] | None = None,
        parts: Mapping[str, Any] | None = None,
    ) -> None:
        self.root, self.tensors, self.steps, self.parts = root, tensors, steps or {}, parts or {}
        self.attributes = attributes
        self.rounds = False  # whether the network's own code computes in a narrower type somewhere
        self.env: dict[fx.Node, Any] = {}
        order = {node: k for k, node in enumerate(graph.nodes)}
        self.last: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            end = max([node, *node.users], key=order.__getitem__)
            self.last.setdefault(end, []).append(node)

    def run(self, node: fx.Node, feeds: dict[str, Any]) -> None:
        """Compute one node."""
        if node.op == "placeholder":
            self.env[node] = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, feeds[node.name])
            return
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.env[n])
        args, kwargs = pytree.tree_map(self._wide_dtype, (args, kwargs))
        self.env[node] = self.call(node, args, kwargs)

    def _wide_dtype(self, value: Any) -> Any:
        if value in (torch.float32, torch.float16, torch.bfloat16) and isinstance(value, torch.dtype):
            self.rounds = True
            return torch.float64
        return value

    def free(self, node: fx.Node) -> None:
        """Drop the values that nothing needs after ``node``."""
        for done in self.last.get(node, ()):
            self.env.pop(done, None)

    def call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Run the operator of a node on these values."""
        target: Any = node.target
        if node.op == "output":
            return args[0]
        if target in (require, require_mode):
            return None  # about the modes and sizes of a user, and dtypes that are wider here
        if node.op == "get_attr":
            return self._attribute(target)
        if node.op == "call_method":
            rounds = target in ("half", "float", "bfloat16")
            self.rounds |= rounds
            name = "double" if rounds else target
            return getattr(args[0], name)(*args[1:], **kwargs)
        if node.op == "call_module":
            return self._module(target, args, kwargs)
        return target(*args, **kwargs)

    def _attribute(self, name: str) -> Any:
        if name.rpartition(".")[2] == "training":
            return False
        value = self.tensors(name)
        value = operator.attrgetter(name)(self.root) if value is None else value
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    def _widths(self, module: nn.Module, tensors: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
        if self.attributes is None:
            return contextlib.nullcontext()
        found: dict[str, Any] = {}
        for path, child in module.named_modules(prefix="x"):
            weight = tensors.get(f"{path}.weight".removeprefix("x."))
            found |= {f"{path}.{n}".removeprefix("x."): v for n, v in stated_widths(child, weight).items()}
        return _attributes(module, found)

    def _module(self, name: str, args: Any, kwargs: Any) -> Any:
        step = self.steps.get(name.rpartition(".")[2]) if name.startswith("reparam_steps.") else None
        if step is not None:
            return step(*args, **kwargs)
        name = "" if name == HOST else name
        module, prefix = self.root.get_submodule(name), f"{name}." if name else ""
        tensors = {n: self.tensors(prefix + n) for n, _t in named_tensors(module)}
        own = {n: v for n, v in (self.attributes or {}).items() if n.startswith(prefix)}
        inside = {path: part for path, part in self.parts.items() if path.startswith(prefix)}
        with eval_mode(module), _attributes(self.root, own), self._widths(module, tensors), bound(self.root, inside):
            return functional_call(module, tensors, args, kwargs)


@contextlib.contextmanager
def _attributes(root: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    """Set module attributes (``"a.b.groups"``) for the time of a call."""
    places = [(*module_and_attribute(root, path), value) for path, value in values.items()]
    before = [getattr(module, name) for module, name, _value in places]
    try:
        for module, name, value in places:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _value), value in zip(places, before, strict=True):
            setattr(module, name, value)


class eval_mode:
    """All modules in eval mode, for the time of a call."""

    def __init__(self, module: nn.Module) -> None:
        self.modes = [(m, m.training) for m in module.modules()]

    def __enter__(self) -> None:
        for module, _mode in self.modes:
            module.training = False

    def __exit__(self, *error: object) -> None:
        for module, mode in self.modes:
            module.training = mode
