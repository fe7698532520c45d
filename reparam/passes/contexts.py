"""Code inside ``with torch.no_grad()`` and ``with torch.autocast(...)``: a graph's generated code has these blocks too.

While recording, each node notes the blocks around it (``meta["around"]``, outermost first). Where a graph becomes code,
``surround`` adds nodes at their ends, which ``as_code`` turns into ``with`` statements.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from reparam.passes.proxies import HintProxy
from reparam.passes.restore import replaced

Context = tuple[Any, ...]
"""``("no_grad",)``, or ``("autocast", device type, dtype, enabled, cache_enabled)``; a device type of None stands for
that of the network's input."""

NOTED = ("module", "source", "around")
"""What a node's ``meta`` says about the code it comes from; a node that takes its place says the same."""


def block(kind: str, *options: Any) -> contextlib.AbstractContextManager[Any]:
    """Return the context manager of a block.

    Args:
        kind: ``"no_grad"`` or ``"autocast"``.
        options: of autocast: device type, or a value with a tensor on the device; dtype, enabled, cache_enabled.
    """
    if kind == "no_grad":
        return torch.no_grad()
    where, dtype, enabled, cache = options
    if not isinstance(where, str):
        where = next(v for v in pytree.tree_leaves(where) if isinstance(v, Tensor)).device.type
    return torch.autocast(where, dtype=dtype, enabled=enabled, cache_enabled=cache)


@fx.node.has_side_effect
def begin(manager: contextlib.AbstractContextManager[Any]) -> contextlib.AbstractContextManager[Any]:
    """Enter a block; in generated code ``with manager:``."""
    manager.__enter__()
    return manager


@fx.node.has_side_effect
def end(manager: contextlib.AbstractContextManager[Any]) -> None:
    """Leave a block; in generated code the end of the ``with`` statement."""
    manager.__exit__(None, None, None)


def surround(graph: fx.Graph) -> None:
    """Add the ends of the blocks to a graph, where its nodes are inside of others than those in front of them."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    opened: list[tuple[Context, fx.Node]] = []
    for node in list(graph.nodes):
        if node.op == "output":
            wanted: tuple[Context, ...] = ()
        elif node.op in ("placeholder", "get_attr") or "around" not in node.meta:
            continue  # it is the same inside and outside
        else:
            wanted = node.meta["around"]
        shared = 0
        while shared < min(len(opened), len(wanted)) and opened[shared][0] == wanted[shared]:
            shared += 1
        with graph.inserting_before(node):
            for _context, entered in reversed(opened[shared:]):
                graph.call_function(end, (entered,))
            del opened[shared:]
            for context in wanted[shared:]:
                options = [inputs[0] if value is None and k == 1 else value for k, value in enumerate(context)]
                manager = graph.call_function(block, tuple(options))
                opened.append((context, graph.call_function(begin, (manager,))))


@contextlib.contextmanager
def as_code(graph: fx.Graph) -> Iterator[None]:
    """While active, code that is generated from a graph has its blocks as ``with`` statements.

    An error inside leaves them as it should, and compilers know them.
    """
    entered = {node.name: str(node.args[0]) for node in graph.nodes if node.target is begin}
    if not entered:
        yield
        return
    left = {node.name for node in graph.nodes if node.target is end}
    with graph.on_generate_code(lambda _before: lambda body: [_with_blocks("".join(body), entered, left)]):
        yield


_ASSIGNED = re.compile(r"(\w+)( : [^=]+)? = ")


def _with_blocks(code: str, entered: dict[str, str], left: set[str]) -> str:
    lines, depth = [], 0
    for line in code.split("\n"):
        found = _ASSIGNED.match(line)
        name = found.group(1) if found else ""
        if name in left:
            depth -= 1
        elif name in entered:
            lines.append("    " * depth + f"with {entered[name]}:")
            depth += 1
        else:
            lines.append("    " * depth + line if line else line)
    return "\n".join(lines)


# -- while recording -------------------------------------------------------------------------------------------------


def around(autocasts: list[Context]) -> tuple[Context, ...]:
    """Return the blocks that code is in now, besides these: gradients are on where a recording starts."""
    return tuple(autocasts) if torch.is_grad_enabled() else (*autocasts, ("no_grad",))


@contextlib.contextmanager
def autocast_takes_meta() -> Iterator[None]:
    """Let code enter or leave autocast for ``x.device.type``, which torch does not know on the meta device."""
    plain = torch.autocast.__init__

    def init(
        self: Any, device_type: Any, dtype: Any = None, enabled: bool = True, cache_enabled: bool | None = None
    ) -> None:
        asked = device_type.stands_for() if isinstance(device_type, HintProxy) else device_type
        enabled = bool(enabled)  # where it is a train flag this is a branch on it
        plain(self, "cpu" if asked == "meta" else asked, dtype, enabled, cache_enabled)
        self.reparam_options = None if asked == "meta" else asked, dtype, enabled, cache_enabled

    with replaced(torch.autocast, "__init__", init):
        yield


@contextlib.contextmanager
def noting(autocasts: list[Context], is_recorded: Callable[[], bool]) -> Iterator[None]:
    """While active, a list holds the blocks of autocast that code is in, and gradients are on at first.

    Args:
        autocasts: the list.
        is_recorded: whether it is recorded code that runs.
    """
    plain_enter, plain_exit = torch.autocast.__enter__, torch.autocast.__exit__
    plain_set = torch.set_grad_enabled.__init__
    entered: list[bool] = []

    def enter(self: Any) -> Any:
        entered.append(is_recorded())
        if entered[-1]:
            made_before = self.device, self.fast_dtype, self._enabled, self._cache_enabled  # a decorator
            autocasts.append(("autocast", *vars(self).get("reparam_options", made_before)))
        return plain_enter(self)

    def leave(self: Any, *error: Any) -> Any:
        if entered.pop():
            autocasts.pop()
        return plain_exit(self, *error)

    def set_grad_enabled(self: Any, mode: bool) -> None:
        plain_set(self, bool(mode))  # torch would take a flag of the graph for an operator

    with (
        torch.enable_grad(),
        autocast_takes_meta(),
        replaced(torch.set_grad_enabled, "__init__", set_grad_enabled),
        replaced(torch.autocast, "__enter__", enter),
        replaced(torch.autocast, "__exit__", leave),
    ):
        yield
