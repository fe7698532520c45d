"""What traced code did to the attributes of its modules: undone after tracing, refused where it cannot be recorded."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from reparam.passes.functionalize import is_inplace

_HOLDERS = ("_buffers", "_parameters", "_modules")


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module, for ``restore``."""
    return {name: dict(value) if name in _HOLDERS else value for name, value in vars(module).items()}


def restore(module: nn.Module, state: dict[str, Any]) -> None:
    """Undo what traced code did to the attributes of a module, but keep the constants that fx stored there."""
    constants = {k: v for k, v in vars(module).items() if k.startswith("_tensor_constant")}
    holders = {name: vars(module)[name] for name in _HOLDERS}
    vars(module).clear()
    vars(module).update({**state, **holders, **constants})
    for name, holder in holders.items():
        if any(holder.get(key) is not value for key, value in state[name].items()):
            holder.update(state[name])


def refuse_assigned_buffers(module: nn.Module) -> None:
    """Refuse a forward that assigned a new tensor to a buffer: a graph only changes buffers in place.

    Raises:
        TraceError: it did.
    """
    for name, value in module._buffers.items():
        if issubclass(type(value), fx.Proxy) and not is_inplace(value.node):  # type: ignore[union-attr]
            raise fx.proxy.TraceError(f"{type(module).__name__} assigns a new tensor to its buffer {name}")
