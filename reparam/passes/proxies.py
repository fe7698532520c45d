"""Proxies that know the meta value they stand for."""

from __future__ import annotations

import builtins
import contextlib
import dis
import functools
import itertools
import operator
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, fx

from reparam.passes.functionalize import is_inplace

_CONCRETE = {
    "ndim",
    "is_sparse",
    "is_quantized",
    "is_nested",
    "is_mkldnn",
    "layout",
    "names",
    "dim",
    "ndimension",
    "is_floating_point",
    "is_complex",
    "is_contiguous",
}
"""Attributes and methods of a tensor whose values no input size changes."""


class HintProxy(fx.Proxy):
    """A proxy that knows the meta value of its node."""

    tracer: Any

    def stands_for(self) -> Any:
        """Return the meta value."""
        return object.__getattribute__(self, "node").meta.get("val")

    def __getattr__(self, name: str) -> Any:
        if name in ("_is_param", "_is_buffer"):
            return False
        value = self.stands_for()
        if name in ("is_cuda", "is_cpu", "is_mps", "is_meta") and _isinstance(value, Tensor):
            return self.tracer.memory.home.type == name.removeprefix("is_")
        if name in _CONCRETE and _isinstance(value, Tensor):
            return getattr(value, name)
        return HintAttribute(self, name)

    def __len__(self) -> int:
        length: int = self.tracer.length(self)
        return length

    def __int__(self) -> int:
        return int(self.tracer.concrete(self))

    def __index__(self) -> int:
        return operator.index(self.tracer.concrete(self))

    def __float__(self) -> float:
        return float(self.tracer.concrete(self))

    def __contains__(self, item: Any) -> bool:
        return item in self.tracer.concrete(self)

    def __bool__(self) -> bool:
        frame = sys._getframe(1)
        if _is_assert(frame):
            return True
        refused = _refused(frame.f_code, frame.f_lasti)
        if refused is not None and self.tracer.checked(self, refused):
            return not refused
        return bool(self.tracer.to_bool(self))

    def __setitem__(self, index: Any, new: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, new), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "data":
            super().__setattr__(name, value)
        elif not (_isinstance(value, HintProxy) and is_inplace(value.node)):  # x.data *= 2 has done its work
            raise fx.proxy.TraceError(f"{source_line()}: the data of a tensor are replaced")

    def __hash__(self) -> int:
        return id(self)


def _in_place(name: str) -> Any:
    """Return the method of ``x += y`` and its like: on tensors it changes x for all who hold it, unlike x + y."""

    def method(proxy: HintProxy, other: Any) -> Any:
        if not _isinstance(proxy.stands_for(), Tensor):
            return NotImplemented
        return proxy.tracer.create_proxy("call_function", getattr(operator, name), (proxy, other), {})

    return method


for _name in "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor imatmul".split():
    setattr(HintProxy, f"__{_name}__", _in_place(_name))


class HintAttribute(HintProxy, fx.proxy.Attribute):
    """An attribute of a proxy (``x.shape``), added to the graph when it is used other than as a method."""

    def __init__(self, root: fx.Proxy, attr: str) -> None:
        fx.proxy.Attribute.__init__(self, root, attr)

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        """The node; another one where the first was recorded in a module that was given up."""
        if self._node is not None and self._node._erased:
            self._node = None
        return super().node

    def stands_for(self) -> Any:
        """Return the meta value, without adding a node for it."""
        root = object.__getattribute__(self, "root")
        value = root.stands_for() if _isinstance(root, HintProxy) else None
        return getattr(value, object.__getattribute__(self, "attr"), None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Record a method call."""
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


_isinstance = builtins.isinstance


@contextlib.contextmanager
def proxies_have_types() -> Iterator[None]:
    """While active, Python code that asks ``isinstance(proxy, torch.Tensor)`` is told the type of the value.

    The builtin is replaced, not the class of the proxy: torch's C++ code asks for the class too, and would read a
    tensor's memory where there is none.
    """

    def told(value: Any, kinds: Any) -> bool:
        if _isinstance(value, kinds):
            return True
        return issubclass(type(value), HintProxy) and _isinstance(value.stands_for(), kinds)

    before = builtins.isinstance
    builtins.isinstance = told
    try:
        yield
    finally:
        builtins.isinstance = before


def _is_assert(frame: FrameType) -> bool:
    """Whether the truth value is asked for by an ``assert`` statement, which is then dropped."""
    return _asserts(frame.f_code, frame.f_lasti)


def _instructions(code: CodeType, last: int) -> tuple[list[dis.Instruction], int]:
    """Return the instructions that do something, and which of them was the last to run."""
    found = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "NOT_TAKEN", "TO_BOOL")]
    return found, max((k for k, i in enumerate(found) if i.offset <= last), default=0)


@functools.lru_cache(maxsize=1024)
def _asserts(code: CodeType, last: int) -> bool:
    instructions, current = _instructions(code, last)
    following = [i.opname for i in instructions[current : current + 3]]
    # The jump over ``raise AssertionError``, as CPython 3.10 to 3.14 write it.
    raises = ("LOAD_ASSERTION_ERROR", "LOAD_COMMON_CONSTANT")
    return any(
        name.startswith(("POP_JUMP", "JUMP_IF")) and "TRUE" in name and after in raises
        for name, after in itertools.pairwise(following)
    )


@functools.lru_cache(maxsize=1024)
def _refused(code: CodeType, last: int) -> bool | None:
    """The answer to an ``if`` under which the code does nothing but raise an error; None where neither does."""
    instructions, current = _instructions(code, last)
    for k in range(current, min(current + 2, len(instructions))):
        name = instructions[k].opname
        if name.startswith("POP_JUMP") and name.endswith(("IF_TRUE", "IF_FALSE")):
            jumps = name.endswith("IF_TRUE")
            target = next((n for n, i in enumerate(instructions) if i.offset == instructions[k].argval), None)
            if target is not None and _raises(instructions[target:]):
                return jumps
            return not jumps if _raises(instructions[k + 1 :]) else None
    return None


def _raises(instructions: list[dis.Instruction]) -> bool:
    """Whether code makes an error and raises it, with nothing else in between."""
    for instruction in instructions:
        if instruction.opname == "RAISE_VARARGS":
            return True
        if not instruction.opname.startswith(_MAKES_AN_ERROR):
            return False
    return False


_MAKES_AN_ERROR = (
    "LOAD_", "PUSH_NULL", "PRECALL", "CALL", "KW_NAMES", "FORMAT_", "CONVERT_", "BUILD_", "BINARY_", "SWAP", "COPY",
    "EXTENDED_ARG", "RESUME", "NOP",
)  # fmt: skip


def source_line() -> str:
    """Return file:line of the innermost frame that is model code; of torch's own layer where there is none."""
    frame: FrameType | None = sys._getframe(1)
    layer = ""
    while frame is not None:
        name = frame.f_code.co_filename
        if "/reparam/passes/expand.py" in name or "/reparam/passes/files.py" in name:
            break
        if "/torch/" not in name and "/reparam/passes/" not in name:
            return f"{name}:{frame.f_lineno}"
        if not layer and "/torch/nn/modules/" in name and not name.endswith(("/module.py", "/container.py")):
            layer = f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return layer


def nodes_of(value: Any) -> Any:
    """Replace proxies by their nodes inside tuples, lists and dicts."""
    if issubclass(type(value), fx.Proxy):
        return value.node
    if isinstance(value, dict):
        return {k: nodes_of(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(nodes_of(v) for v in value)
    return value


def iter_nodes(value: Any) -> Iterator[fx.Node]:
    """Yield the nodes of a structure."""
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from iter_nodes(item)
    elif isinstance(value, tuple):
        for item in value:
            yield from iter_nodes(item)
