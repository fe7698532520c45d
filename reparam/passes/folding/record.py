"""Record a network for folding: one flat graph of its eval mode that knows which call each node is in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from reparam.passes.answers import asked_of_device
from reparam.passes.contexts import Context
from reparam.passes.functionalize import is_inplace
from reparam.passes.guards import with_inputs
from reparam.passes.memory import Memory
from reparam.passes.meta import has_tensor
from reparam.passes.modes import require
from reparam.passes.proxies import source_line
from reparam.passes.skeleton import home_of
from reparam.passes.tracer import ModelTracer


@dataclass(eq=False)
class Call:
    """One call of a module while recording.

    Args:
        path: of the module.
        parent: the call from whose code it was called; None for the network itself.
        args: positional arguments, structures of nodes.
        kwargs: keyword arguments.
        result: what it returned.
        known: whether arguments and result are structures that a graph can hold.
        around: the blocks of gradient and autocast modes that it was called in.
        items: its nodes, and the calls of other modules, in order.
    """

    path: str
    parent: Call | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    result: Any = None
    known: bool = True
    around: tuple[Context, ...] = ()
    items: list[fx.Node | Call] = field(default_factory=list)

    def outward(self) -> Iterator[Call]:
        """Yield this call, the one it was made from, and so on."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.parent

    def nodes(self) -> Iterator[fx.Node]:
        """Yield all nodes inside, also in calls inside."""
        for item in self.items:
            yield from item.nodes() if isinstance(item, Call) else (item,)

    def calls(self) -> Iterator[Call]:
        """Yield this call and all calls inside."""
        yield self
        for item in self.items:
            if isinstance(item, Call):
                yield from item.calls()


def call_of(node: fx.Node) -> Call:
    """Return the innermost call that a node is in."""
    call: Call = node.meta["call"]
    return call


def common_call(nodes: Sequence[fx.Node]) -> Call:
    """Return the innermost call that holds all nodes."""
    shared = list(call_of(nodes[0]).outward())
    for node in nodes[1:]:
        own = set(call_of(node).outward())
        shared = [call for call in shared if call in own]
    return shared[0]


@dataclass
class Recording:
    """A flat graph and its calls.

    Args:
        graph: nodes with ``meta["val"]``, ``meta["source"]`` and ``meta["call"]``.
        skeleton: the meta copy that its targets refer to.
        root: the call of the network itself.
        leaves: paths of the modules without a graph, with the reason.
    """

    graph: fx.Graph
    skeleton: nn.Module
    root: Call
    leaves: dict[str, str]


def record_calls(skeleton: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Recording:
    """Record the eval mode of ``skeleton`` (on the meta device) for these meta inputs.

    Branches on sizes are those of the example, with guards in the graph.

    Raises:
        Exception: whatever stops the recording of the network's own forward.
    """
    tracer = _Tracer(args, kwargs, training=False, memory=Memory(home_of(skeleton)))
    graph = tracer.trace(skeleton)
    root = _structure(graph)
    inputs = iter([node for node in graph.nodes if node.op == "placeholder"])
    root.args = tuple(next(inputs) if has_tensor(value) else value for value in args)
    root.kwargs = {name: next(inputs) if has_tensor(value) else value for name, value in kwargs.items()}
    return Recording(graph, skeleton, root, tracer.leaves)


def _enter(*_: Any) -> None:
    """Mark the begin of a call."""


def _leave(*_: Any) -> None:
    """Mark the end of a call."""


class _Tracer(ModelTracer):
    """Marks the calls of modules, and guards what branches were decided on."""

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace into ``m`` between two marks."""
        if self._evaluating or self.submodule_paths is None or m not in self.submodule_paths:
            return super().call_module(m, forward, args, kwargs)
        self._mark(_enter, (self.submodule_paths[m],), (args, kwargs))
        result = super().call_module(m, forward, args, kwargs)
        self._mark(_leave, (), (result,))
        return result

    def _mark(self, kind: Callable[..., None], fixed: tuple[Any, ...], values: tuple[Any, ...]) -> None:
        try:
            self.create_proxy("call_function", kind, (*fixed, *values), {})
        except Exception:  # an object that no graph can hold
            self.create_proxy("call_function", kind, fixed, {})

    def checked(self, obj: fx.Proxy, refused: bool) -> bool:
        """Errors of the network's own code are branches like others here: they stay in its code."""
        return False

    def concrete(self, proxy: fx.Proxy) -> Any:
        """Answer with the example's value, guarded."""
        value = super().concrete(proxy)
        if isinstance(value, (int, float, str)) and asked_of_device(proxy.node, self.memory.home) is None:
            message = (
                f"{source_line()}: the network branches on a size here and was folded for {value!r}; fold it again "
                "with an example_input of the size that is used now"
            )
            self.create_proxy("call_function", require, (proxy, value, message), {})
        return value


def _structure(graph: fx.Graph) -> Call:
    """Read the marks into calls and take them out."""
    stack = [Call("")]
    marks = []
    for node in graph.nodes:
        if node.target is _enter:
            path, *rest = node.args
            args, kwargs = rest if rest else ((), {})
            call = Call(path, stack[-1], tuple(args), dict(kwargs), known=bool(rest), around=node.meta["around"])
            stack[-1].items.append(call)
            stack.append(call)
        elif node.target is _leave:
            call = stack.pop()
            call.known = call.known and bool(node.args)
            call.result = node.args[0] if node.args else None
        else:
            node.meta["call"] = stack[-1]
            stack[-1].items.append(node)
            continue
        marks.append(node)
    for node in marks:
        graph.erase_node(node)
    root = stack[0]
    root.result = next(iter(reversed(graph.nodes))).args[0]
    for node in needed(graph):
        node.meta["needed"] = True
    return root


def needed(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that the output depends on, or that stop the network or change a value in place."""
    return with_inputs(
        n for n in graph.nodes if n.op == "output" or n.target is require or (is_inplace(n) and not n.users)
    )
