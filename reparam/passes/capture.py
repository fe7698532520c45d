"""A recorded forward pass: one graph per train mode where that matters, and one per part of code that has no graph."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from reparam.errors import CaptureError
from reparam.passes.memory import Memory, shapes_of, signature
from reparam.passes.modes import told
from reparam.passes.skeleton import home_of
from reparam.passes.tracer import ModelTracer


@dataclass
class Capture:
    """A recorded forward pass.

    Args:
        graph: nodes with ``meta["val"]`` (meta value), ``meta["module"]`` (path) and ``meta["source"]`` (file:line).
        root: the meta skeleton that the graph's targets refer to.
        outputs: module path -> the values that calls of it returned (structures of nodes), in call order.
        leaves: paths of the modules that are leaves, with the reason.
        train: the forward pass in train mode, where recorded code branches on its training flag; this one is then
            the eval mode's.
        in_train_mode: whether this is the forward pass in train mode of such a network.
        eval_only: the network branches on its training flag and only its eval mode can be recorded.
        specialised: paths of the modules whose branches on sizes are those of the example, with guards.
        path: of the recorded module; empty but for parts.
        inputs: what a part is called with, on the meta device.
        parts: recorded modules inside leaves that have no graph, by path.
        memory: what recording found out.
        batches: other numbers of samples whose recordings were joined with this one (``reparam.passes.joins``).
    """

    graph: fx.Graph
    root: nn.Module
    outputs: dict[str, list[Any]] = field(default_factory=dict)
    leaves: dict[str, str] = field(default_factory=dict)
    train: Capture | None = None
    in_train_mode: bool = False
    eval_only: bool = False
    specialised: frozenset[str] = frozenset()
    path: str = ""
    inputs: Any = None
    parts: dict[str, Capture] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)
    batches: tuple[int, ...] = ()

    @property
    def modes(self) -> list[Capture]:
        """This one, and that in train mode where it is another."""
        return [self] if self.train is None else [self, self.train]

    @property
    def all(self) -> list[Capture]:
        """All modes of the network itself and of its parts."""
        return [*self.modes, *(mode for part in self.parts.values() for mode in part.modes)]

    @property
    def specialised_in_vain(self) -> frozenset[str]:
        """Modules that could not be recorded in one of their modes all the same."""
        return frozenset(path for path in self.specialised if any(path in mode.leaves for mode in self.modes))

    @property
    def graphs(self) -> list[fx.Graph]:
        """The graphs of all modes and parts."""
        return [capture.graph for capture in self.all]

    def nodes(self) -> Iterator[fx.Node]:
        """Yield the nodes of all graphs."""
        for graph in self.graphs:
            yield from graph.nodes


def trace(
    root: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    specialised: Collection[str] = (),
    memory: Memory | None = None,
) -> Capture:
    """Record ``root`` (a meta skeleton) called with these meta inputs.

    Args:
        root: the network.
        args: positional inputs.
        kwargs: keyword inputs.
        specialised: paths of submodules that branch on sizes or on their training flag and are recorded all the
            same: for the sizes of these inputs, with guards, and once per train mode where that decides. What has
            no graph otherwise is kept as a leaf.
        memory: what earlier recordings found out; added to.

    Raises:
        CaptureError: the forward pass of ``root`` itself cannot be recorded.
    """
    memory = memory or Memory(home_of(root))
    tracer = ModelTracer(args, kwargs, specialised=frozenset(specialised), memory=memory)
    try:
        graph = tracer.trace(root)
    except Exception as error:
        return _specialise(root, args, kwargs, frozenset({*specialised, ""}), tracer.memory, error)
    found = Capture(
        graph, root, tracer.outputs, tracer.leaves, memory=tracer.memory, specialised=frozenset(specialised)
    )
    if not tracer.read_mode:
        return found
    return _with_train_mode(found, args, kwargs, frozenset(specialised), tracer.memory)


def _specialise(
    root: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    paths: frozenset[str],
    memory: Memory,
    error: Exception,
) -> Capture:
    """Record a root that has control flow of its own: once per train mode where that decides, sizes guarded."""
    tracer = ModelTracer(args, kwargs, specialised=paths, memory=memory)
    try:
        graph = tracer.trace(root)
    except Exception as again:
        raise CaptureError(_untraceable(root, error)) from again
    found = Capture(graph, root, tracer.outputs, tracer.leaves, memory=tracer.memory, specialised=paths - {""})
    return _with_train_mode(found, args, kwargs, paths, memory) if tracer.read_mode else found


def _with_train_mode(
    capture: Capture, args: Sequence[Any], kwargs: Mapping[str, Any], paths: frozenset[str], memory: Memory
) -> Capture:
    """Record the train mode too, of code that does other things there."""
    tracer = ModelTracer(args, kwargs, specialised=paths, mode=True, memory=memory)
    try:
        graph = tracer.trace(capture.root)
    except Exception:
        capture.eval_only = True  # the teacher says so when it gets there
        return capture
    capture.train = Capture(
        graph, capture.root, tracer.outputs, tracer.leaves, in_train_mode=True, specialised=capture.specialised
    )
    mark_train(graph)
    return capture


def mark_train(graph: fx.Graph) -> None:
    """Let the nodes of a train mode have names of their own."""
    for node in graph.nodes:
        node.meta.update(key=f"train:{node.name}", train=True)


def key_of(node: fx.Node) -> str:
    """Return the name of a node in a plan: unique over the graphs of both train modes and of all parts."""
    key: str = node.meta.get("key", node.name)
    return key


def trace_inner(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], training: bool, memory: Memory
) -> fx.Graph:
    """Record a leaf module for analysis: one train mode, branches and sizes as for these inputs."""
    return _inner(module, args, kwargs, training, memory)[0]


def trace_branches(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], training: bool, memory: Memory
) -> list[fx.Graph]:
    """Record a leaf module as `trace_inner` does, and again for the other answer to each of its branches on sizes.

    A leaf goes on to accept every size, so every branch has to be looked at. A line that branches several times (a
    loop) is answered otherwise the first time only; answers with which the code fails are sizes that it refuses.
    """
    found: list[fx.Graph] = []
    turned: set[tuple[str, bool]] = set()
    waiting: list[tuple[bool, ...]] = [()]
    while waiting:
        forced = waiting.pop(0)
        try:
            graph, decisions = _inner(module, args, kwargs, training, memory, forced)
        except Exception:
            if not forced:
                raise
            continue
        found.append(graph)
        answers = tuple(answer for _line, answer in decisions)
        turned |= set(decisions)
        for place in range(len(forced), len(decisions)):
            line, answer = decisions[place]
            if (line, not answer) not in turned:
                turned.add((line, not answer))
                waiting.append((*answers[:place], not answer))
    return found


def _inner(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    training: bool,
    memory: Memory,
    forced: tuple[bool, ...] = (),
) -> tuple[fx.Graph, list[tuple[str, bool]]]:
    """The graph inside a leaf module, and its branches on sizes: their lines and what was answered."""
    key = (signature(module), training, shapes_of((args, kwargs)), forced)
    if key not in memory.graphs:
        tracer = ModelTracer(args, kwargs, training=training, memory=memory, forced=forced)
        found = tracer.trace(module), tracer.decisions
        # Equal modules may have other values in their buffers.
        if key[0] is None or key[2] is None or tracer.deciding:
            return found
        memory.graphs[key] = found
    kept, decisions = memory.graphs[key]
    copy = fx.Graph()
    copy.output(copy.graph_copy(kept, {}))
    for old, new in zip(kept.nodes, copy.nodes, strict=True):
        new.meta = dict(old.meta)
    return copy, decisions


def _untraceable(root: nn.Module, error: Exception) -> str:
    return (
        f"{type(root).__name__}: the forward pass cannot be recorded as a graph: {told(error)}. "
        "Its own forward branches on data or calls code that refuses symbolic values. Move that code into a "
        "submodule (submodules that cannot be recorded are kept as they are), or expand the submodules one by one"
    )
