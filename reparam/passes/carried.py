"""What a forward carries from call to call outside of parameters and buffers: plain attributes, random numbers.

A graph has neither. A counter, a recurrent state kept in an attribute or a number drawn by Python would be that of the
recording for ever, so code that depends on one is not recorded. Caches are no state: what follows from sizes and
weights alone is computed anew by the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from reparam.passes.proxies import iter_nodes, nodes_of
from reparam.passes.restore import HOLDERS, depends_on, refilled
from reparam.passes.seeds import draws


class Left:
    """Stands for what an earlier call left in an attribute: whoever looks at it depends on that call."""

    def __getattr__(self, name: str) -> Any:
        raise fx.proxy.TraceError(f"it reads {name} of a value that an earlier call left behind")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse."""
        raise fx.proxy.TraceError(f"it gives a value that an earlier call left behind to {function}")


def prepare_next_call(module: nn.Module, before: dict[str, Any]) -> list[str]:
    """Leave in a module what tells state from caches in its next call, and return the attributes that a call changed.

    Numbers and tables stay as the call left them, values of its inputs become `Left`, and what was computed from sizes
    and weights is taken away. Dicts and lists stay the same objects, since a hook may hold them.

    Args:
        module: the module, behind the call.
        before: its `snapshot` in front of it.
    """
    changed = {
        name: value
        for name, value in vars(module).items()
        if name not in HOLDERS and not name.startswith("_tensor_constant") and not _same(before.get(name), value)
    }
    caches = {name for name, value in changed.items() if _is_cache(value)}
    for name, value in changed.items():
        if name in caches or (caches and isinstance(value, bool)):  # a flag that says that the cache is there
            vars(module)[name] = refilled(value, before.get(name))
        elif isinstance(value, dict):
            value.update({key: Left() for key, item in value.items() if _of_inputs(item)})
        elif isinstance(value, list):
            value[:] = [Left() if _of_inputs(item) else item for item in value]
        elif _of_inputs(value):
            vars(module)[name] = Left()
    return sorted(changed)


def _same(before: Any, value: Any) -> bool:
    if before is value and type(value) is not list:
        return True
    if type(before) is not type(value):
        return False
    if isinstance(value, (int, float, str)):
        return bool(before == value)
    if type(value) in (list, dict):
        items = (list(v.values()) if isinstance(v, dict) else v for v in (before, value))
        return len(before) == len(value) and all(a is b for a, b in zip(*items, strict=True))
    return False


def _is_cache(value: Any) -> bool:
    return any(iter_nodes(nodes_of(value))) and not _of_inputs(value)


def _of_inputs(value: Any) -> bool:
    return any(depends_on(node, ("placeholder",)) for node in iter_nodes(nodes_of(value)))


def refuse_draws(module: nn.Module, forward: Callable[[], Any]) -> Any:
    """Run ``forward`` and return what it returns.

    Raises:
        TraceError: it drew random numbers that are no operators of the graph.
    """
    before = draws()
    result = forward()
    if draws() != before:
        raise fx.proxy.TraceError(
            f"{type(module).__name__} draws random numbers in Python (random, numpy, or torch with constant sizes), "
            "which a graph would repeat for ever; draw them with the sizes of a tensor, as torch.rand_like does"
        )
    return result
