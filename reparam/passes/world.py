"""One network run node by node in float64, as it is verified."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from reparam.passes.modes import refuse, require, require_mode
from reparam.passes.parts import HOST, bound
from reparam.passes.restore import unchanged
from reparam.passes.skeleton import canonical_names, first_floating_dtype, module_and_attribute
from reparam.passes.values import plain
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
        self.single = False  # whether the last node did not run in float64
        self.env: dict[fx.Node, Any] = {}
        order = {node: k for k, node in enumerate(graph.nodes)}
        self.last: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            end = max([node, *node.users], key=order.__getitem__)
            self.last.setdefault(end, []).append(node)

    def run(self, node: fx.Node, feeds: dict[str, Any]) -> None:
        """Compute one node."""
        self.single = False
        if node.op == "placeholder":
            self.env[node] = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, feeds[node.name])
            return
        args, kwargs = plain(fx.node.map_arg((node.args, node.kwargs), lambda n: self.env[n]))
        self.env[node] = self.call(node, args, kwargs)

    def free(self, node: fx.Node) -> None:
        """Drop the values that nothing needs after ``node``."""
        for done in self.last.get(node, ()):
            self.env.pop(done, None)

    def call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Run the operator of a node on these values."""
        target: Any = node.target
        if node.op == "output":
            return args[0]
        if target in (refuse, require, require_mode):
            return None  # about the modes and sizes of a user, and dtypes that are wider here
        if node.op == "get_attr":
            return self._attribute(target)
        if node.op == "call_module":
            return self._module(target, args, kwargs)
        function = getattr(type(args[0]), target) if node.op == "call_method" else target
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if not _is_about_dtypes(error):
                raise
        self.single = True  # it has no kernel for float64, as those of quantization
        with in_single():
            return _cast(function(*_cast(args, torch.float32), **_cast(kwargs, torch.float32)), torch.float64)

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
        canonical = canonical_names(module)
        first = {n: self.tensors(prefix + n) for n in dict.fromkeys(canonical.values())}
        tensors = {n: first[same] for n, same in canonical.items()}
        own = {n: v for n, v in (self.attributes or {}).items() if n.startswith(prefix)}
        inside = {path: part for path, part in self.parts.items() if path.startswith(prefix)}
        with (
            unchanged(module),  # the other world, and the student's view, run the same module
            eval_mode(module),
            _attributes(self.root, own),
            self._widths(module, tensors),
            bound(self.root, inside),
        ):
            try:
                with in_double():
                    return functional_call(module, first, args, kwargs)
            except (RuntimeError, TypeError) as error:
                if not _is_about_dtypes(error):
                    raise
            # Its code makes single precision numbers in a way of its own: it runs as it does for a user.
            self.single = True
            dtype = first_floating_dtype(self.root)
            with _in(dtype or torch.float32), torch._C.DisableTorchFunction():  # and with it, _Doubles
                first, args, kwargs = _cast((first, args, kwargs), dtype)
                return _cast(functional_call(module, first, args, kwargs), torch.float64)


class _Doubles(TorchFunctionMode):
    """Python code that asks for single precision gets float64: ``x.float()``, ``torch.zeros(n, dtype=...)``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        if func in _LIKE:  # random values come in the order of the memory, and the teacher's may be another
            kwargs = {"memory_format": torch.contiguous_format, **(kwargs or {})}
        # Types stand on their own; a search through all arguments would copy the memo of each deepcopy.
        return func(*map(_wider, args), **{name: _wider(value) for name, value in (kwargs or {}).items()})


_LIKE = (torch.rand_like, torch.randn_like, torch.randint_like)


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """Let Python code compute in float64 all through, also what it computes from sizes alone (grids, anchors)."""
    with _in(torch.float64), _Doubles():
        yield


@contextlib.contextmanager
def in_single() -> Iterator[None]:
    """Let code draw random numbers in single precision, eight times as fast, also inside `in_double`."""
    with _in(torch.float32), torch._C.DisableTorchFunction():  # and with it, _Doubles
        yield


@contextlib.contextmanager
def _in(dtype: torch.dtype) -> Iterator[None]:
    """Set the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _wider(value: Any) -> Any:
    narrow = isinstance(value, torch.dtype) and value in (torch.float32, torch.float16, torch.bfloat16)
    return torch.float64 if narrow else value


def _cast(values: Any, dtype: torch.dtype | None) -> Any:
    return pytree.tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, values)


def _is_about_dtypes(error: Exception) -> bool:
    return any(word in str(error) for word in ("dtype", "scalar type", "data type", "same type", "'Double'"))


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
