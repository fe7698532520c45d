"""What the tracer answers to Python code that asks for numbers and truth values of what is symbolic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from reparam.passes.lengths import inputs_behind, is_fixed
from reparam.passes.memory import Memory
from reparam.passes.meta import Unknown
from reparam.passes.modes import BranchOnTraining, refuse, require
from reparam.passes.proxies import HintProxy, source_line


class Answers(fx.Tracer):
    """The part of a tracer that answers questions; ``ModelTracer`` says what its attributes mean."""

    fixed_training: bool | None
    specialised: frozenset[str]
    running: list[str]
    path: list[str]
    flags: dict[str, bool]
    memory: Memory
    mode: bool
    read_mode: bool
    forced: tuple[bool, ...]
    decisions: list[tuple[str, bool]]

    def length(self, proxy: fx.Proxy) -> int:
        """Answer ``len(value)``: of a tuple always, of a tensor where no input size changes it."""
        value = proxy.node.meta.get("val")
        if isinstance(value, (tuple, list, dict)):
            return len(value)
        if not isinstance(value, Tensor) or not value.dim():
            return len(self.concrete(proxy))
        length = value.shape[0]
        if inputs_behind(proxy.node):
            if not is_fixed(proxy.node, self.evaluate):
                name = name_of(proxy.node)
                raise fx.proxy.TraceError(f"{source_line()}: control flow depends on the length of {name}")
            self._check_length(proxy, length)
        return length

    def evaluate(self, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
        """Compute a node on the meta device, from these values of the nodes in front of it."""
        raise NotImplementedError

    def _check_length(self, proxy: fx.Proxy, length: int) -> None:
        """Let the teacher refuse a tensor of another length. A leaf runs its own code, which follows any length."""
        known = proxy.node.meta.get("length")
        if self.fixed_training is not None or (known is not None and not known._erased):
            return
        message = f"{source_line()}: the network iterates over a tensor here and was recorded for {length} items"
        shape: Any = proxy.shape
        equal = shape[0] == length
        proxy.node.meta["length"] = self.create_proxy("call_function", refuse, (equal, True, message), {}).node

    def concrete(self, proxy: fx.Proxy) -> Any:
        """Answer with the example's value where that is allowed; about a device with that of the network."""
        found = asked_of_device(proxy.node, self.memory.home)
        if found is not None:
            return found[0]
        name, value = name_of(proxy.node), proxy.node.meta.get("val")
        allowed = self.fixed_training is not None or self.running[-1] in self.specialised
        if allowed and isinstance(value, Tensor) and value.numel() == 1:
            proxy = self.create_proxy("call_method", "item", (proxy,), {})
            value = proxy.node.meta.get("val")  # known where it comes from buffers that nothing writes
        if not allowed or isinstance(value, (Tensor, Unknown)):
            raise fx.proxy.TraceError(f"{source_line()}: control flow depends on the value of {name}")
        if self.fixed_training is None:
            self._guard(proxy, value)
        return value

    def _guard(self, proxy: fx.Proxy, value: Any) -> None:
        kind, way_out = _asked_for(proxy.node)
        message = f"{source_line()}: the network branches on {kind} here and was recorded for {value!r}; {way_out}"
        guard = self.create_proxy("call_function", require, (proxy, value, message), {})
        guard.node.meta["specialised"] = self.running[-1]

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Answer ``if value:``."""
        target = str(obj.node.target)
        if self._is_flag(obj) and isinstance(obj, HintProxy):
            return self._flag(target)
        found = asked_of_device(obj.node, self.memory.home)
        if found is not None:
            return bool(found[0])
        answer = bool(self.concrete(obj))
        if self.fixed_training is not None:
            place = len(self.decisions)
            answer = self.forced[place] if place < len(self.forced) else answer
            self.decisions.append((source_line(), answer))
        return answer

    def checked(self, obj: fx.Proxy, refused: bool) -> bool:
        """Record that the code raises an error where ``obj`` is ``refused``; returns whether that could be done.

        The example is not refused, so the code goes on, for every other size that is not refused as well. A leaf runs
        its own code, which may catch the error: there it is a branch like others.
        """
        value = obj.node.meta.get("val")
        known = isinstance(value, (bool, int, float)) and bool(value) is not refused
        if not known or self._is_flag(obj) or self.fixed_training is not None:
            return False
        message = f"{source_line()}: the network refuses this input: its own code raises an error here"
        self.create_proxy("call_function", refuse, (obj, not refused, message), {})
        return True

    def _is_flag(self, obj: fx.Proxy) -> bool:
        return obj.node.op == "get_attr" and str(obj.node.target).rpartition(".")[2] == "training"

    def _flag(self, target: str) -> bool:
        """Answer a branch on a training flag."""
        if target in self.flags:
            return self.flags[target]
        if target in self.memory.indifferent and self.path:
            return False
        if not self.path and "" in self.specialised:
            self.read_mode = True
            return self.mode
        raise BranchOnTraining(target, f"{source_line()}: control flow depends on {target}")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Iterate over a tuple, or over the slices of a tensor, of known length."""
        length, items = self.length(obj), obj
        if isinstance(obj.node.meta.get("val"), Tensor):
            items = self.create_proxy("call_function", torch.unbind, (obj,), {})
        return iter([items[i] for i in range(length)])  # type: ignore[index]

    def keys(self, obj: fx.Proxy) -> Any:
        """Iterate over the keys of a dict."""
        value = obj.node.meta.get("val")
        return value.keys() if isinstance(value, dict) else super().keys(obj)


def asked_of_device(node: fx.Node, home: torch.device) -> tuple[Any] | None:
    """Return what a node that only asks for a tensor's device has as its value on ``home``; None for other nodes.

    Recordings run on the meta device, for which code may have a way of its own.
    """

    def value(current: fx.Node) -> Any:
        source = current.args[0] if current.args else None
        of_tensor = isinstance(source, fx.Node) and isinstance(source.meta.get("val"), Tensor)
        if of_tensor and current.target is getattr and current.args[1] == "device":
            return home
        if current.op not in ("call_function", "call_method") or isinstance(current.meta.get("val"), Tensor):
            raise LookupError
        args, kwargs = fx.node.map_arg((tuple(current.args), dict(current.kwargs)), value)
        if current.op == "call_method":
            return getattr(args[0], str(current.target))(*args[1:], **kwargs)
        return current.target(*args, **kwargs)  # type: ignore[operator]

    asks = isinstance(node.meta.get("val"), (bool, str, int, torch.device)) and node.all_input_nodes
    try:
        return (value(node),) if asks else None
    except Exception:  # it asks for something else, or the answer is an error there
        return None


def _asked_for(node: fx.Node) -> tuple[str, str]:
    """Return what a value that code branches on says about an input, and what to do where it is another one."""
    asked, waiting = set(), [node]
    while waiting:
        current = waiting.pop()
        asked.add(current.args[1] if current.target is getattr else current.target)
        waiting += [n for n in current.all_input_nodes if not isinstance(n.meta.get("val"), Tensor)]
    if asked & {"requires_grad", "is_leaf", "grad_fn", "grad"}:
        return "whether a tensor has gradients", (
            "give it inputs as they were then, or compute both ways and choose by an argument of forward"
        )
    if asked & {"dtype", "type", "layout", "get_device"}:
        return "a dtype or layout", (
            "expand it again with an example_input of the kind that is used now; under torch.autocast take another "
            "dtype (bfloat16 for float16)"
        )
    return "a size", "expand it again with an example_input of the size that is used now"


def name_of(node: fx.Node) -> str:
    """Return the name of what a node calls."""
    return str(getattr(node.target, "__name__", node.target))
