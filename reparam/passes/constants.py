"""Values that are known while recording: what is computed from buffers that the forward pass does not write.

The recorded graph computes them all the same; recording needs them where they decide a size (the number of places
where a mask is true) or a branch.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from reparam.passes.functionalize import is_inplace, is_pure, storage
from reparam.passes.meta import Unknown
from reparam.passes.skeleton import MOST_VALUES
from reparam.passes.values import plain


def known_value(node: fx.Node, root: nn.Module, used: set[int]) -> Any:
    """Return the value of a node on the CPU.

    Args:
        node: of the graph that is being recorded.
        root: what is recorded, a meta skeleton whose buffers know their values.
        used: memory of the buffers that values were asked of; added to.

    Raises:
        LookupError: it depends on inputs or parameters, on chance, or on a buffer that is written.
    """
    found = _Known(root, [n for n in node.graph.nodes if is_inplace(n)])
    value = found.value(node)
    used |= {place for n in found.env if n.op == "get_attr" and (place := storage(n)) is not None}
    return value


class _Known:
    def __init__(self, root: nn.Module, writers: list[fx.Node]) -> None:
        self.root = root
        self.written = {storage(n.args[0]) for n in writers if n.args and isinstance(n.args[0], fx.Node)} - {None}
        self.env: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        if node not in self.env:
            self.env[node] = self._attribute(node) if node.op == "get_attr" else self._computed(node)
        return self.env[node]

    def _attribute(self, node: fx.Node) -> Any:
        found = operator.attrgetter(str(node.target))(self.root)
        found = getattr(found, "reparam_values", found)
        usable = isinstance(found, Tensor) and not found.is_meta and found.numel() <= MOST_VALUES
        if not usable or storage(node) in self.written:
            raise LookupError(f"the value of {node.target} is not known")
        return found.detach().cpu()

    def _computed(self, node: fx.Node) -> Any:
        if not is_pure(node):
            raise LookupError(f"{node.target} does not only compute a value")
        args, kwargs = plain(fx.node.map_arg((node.args, node.kwargs), self.value))
        before = torch.get_rng_state()
        try:
            target: Any = node.target
            method = getattr(args[0], target) if node.op == "call_method" else None
            value = target(*args, **kwargs) if method is None else method(*args[1:], **kwargs)
        except Exception as error:
            raise LookupError(str(error)) from error
        if not torch.equal(before, torch.get_rng_state()):
            torch.set_rng_state(before)
            raise LookupError(f"{node.target} is random")
        return value


class Recorder(Protocol):
    """What is needed of a tracer here."""

    def known(self, node: fx.Node) -> Any:
        """Return the value of a node on the CPU."""

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """Record an operator."""


def known_or_why(node: fx.Node, known: Callable[[fx.Node], Any]) -> Any:
    """Return the known value of a node that no sizes tell, on the meta device; else what says why it has none."""
    with contextlib.suppress(LookupError):
        return pytree.tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, known(node))
    behind = (n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), Unknown))
    why: Unknown = next(behind, node.meta["val"])
    why.source = why.source or f"{node.meta['source']}: {getattr(node.target, '__name__', node.target)}"
    return why


def places(index: Any, tracer: Recorder) -> Any:
    """Turn masks whose values are known into the places where they are true, which the graph then asks for."""
    items = []
    for item in index if type(index) is tuple else (index,):
        value = item.meta.get("val") if isinstance(item, fx.Node) else None
        if not (isinstance(value, Tensor) and value.dtype == torch.bool and value.dim() and _is_known(item, tracer)):
            items.append(item)
            continue
        found = tracer.create_node("call_method", "nonzero", (item,), {"as_tuple": True})
        items += [tracer.create_node("call_function", operator.getitem, (found, k), {}) for k in range(value.dim())]
    return tuple(items) if type(index) is tuple or len(items) != 1 else items[0]


def _is_known(node: fx.Node, tracer: Recorder) -> bool:
    with contextlib.suppress(LookupError):
        tracer.known(node)
        return True
    return False
