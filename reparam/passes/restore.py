"""What traced code did to the attributes of its modules: undone after tracing, refused where it cannot be recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn

from reparam.passes.functionalize import is_inplace

HOLDERS = ("_buffers", "_parameters", "_modules")


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module, for ``restore``."""
    # Code may also keep results in a dict (a cache of attention biases).
    return {name: value.copy() if type(value) in (dict, list) else value for name, value in vars(module).items()}


def restore(module: nn.Module, state: dict[str, Any]) -> None:
    """Undo what traced code did to the attributes of a module, but keep the constants that fx stored there."""
    constants = {k: v for k, v in vars(module).items() if k.startswith("_tensor_constant")}
    holders = {name: vars(module)[name] for name in HOLDERS}
    kept = {name: refilled(vars(module).get(name), value) for name, value in state.items() if name not in holders}
    vars(module).clear()
    vars(module).update({**kept, **holders, **constants})
    for name, holder in holders.items():
        if any(holder.get(key) is not value for key, value in state[name].items()):
            holder.update(state[name])


def refilled(current: Any, before: Any) -> Any:
    """Return the value before; a dict or list with its items before, since a hook may hold it too."""
    if type(before) not in (dict, list):
        return before
    items = before.copy()
    if type(current) is not type(before):
        return items
    current.clear()
    if isinstance(current, dict):
        current.update(items)
    else:
        current.extend(items)
    return current


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Undo at the end what code does to the attributes of a module and all inside it: a cache of the eval mode."""
    states = [(child, snapshot(child)) for child in module.modules()]
    try:
        yield
    finally:
        for child, state in states:
            restore(child, state)


@contextlib.contextmanager
def replaced(holder: Any, name: str, replacement: Any) -> Iterator[None]:
    """Set an attribute for the time of a block."""
    before = getattr(holder, name)
    setattr(holder, name, replacement)
    try:
        yield
    finally:
        setattr(holder, name, before)


def replaced_tensors(module: nn.Module, state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the plain tensor attributes that code replaced since ``snapshot``, also those in lists and dicts."""
    for name, old in state.items():
        new = vars(module).get(name)
        if (old is new and type(old) is not dict) or name in HOLDERS:
            continue
        for key, value in _items(old):
            if isinstance(value, Tensor) and dict(_items(new)).get(key) is not value:
                yield name, value


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if type(value) in (list, tuple):
        yield from enumerate(value)
    elif type(value) is dict:
        yield from value.items()
    else:
        yield None, value


def depends_on(node: fx.Node, kinds: tuple[str, ...]) -> bool:
    """Whether the values of nodes of these kinds (of inputs, parameters) go into a node, not only sizes and devices."""
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op in kinds:
            return True
        query = current.target is getattr or current.target in ("size", "dim", "numel")
        stack += [] if query else current.all_input_nodes
    return False


def refuse_assigned_buffers(module: nn.Module) -> None:
    """Refuse a forward that assigned a new tensor to a buffer: a graph only changes buffers in place.

    A cache of what follows from sizes alone is no state: the graph computes it each time.

    Raises:
        TraceError: it did.
    """
    for name, value in module._buffers.items():
        if not issubclass(type(value), fx.Proxy):
            continue
        node = value.node  # type: ignore[union-attr]
        cached = name in module._non_persistent_buffers_set and not depends_on(
            node, ("placeholder", "get_attr", "call_module")
        )
        if not cached and not is_inplace(node):
            raise fx.proxy.TraceError(f"{type(module).__name__} assigns a new tensor to its buffer {name}")
