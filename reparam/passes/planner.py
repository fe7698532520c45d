"""The lock-step planner: read the captured graph in the student's and the teacher's world at once.

Requires: a :class:`~reparam.passes.tracer.Capture`. Ensures: for every tensor of every node the invariant of
:class:`~reparam.passes.values.Pair`. Changes nothing: the outcome is a set of parameter maps, node edits and module
attributes, from which ``reparam.passes.expand`` makes the plan.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from reparam.ops.maps import Maps, ReplicaMap, clean
from reparam.ops.params import Noise, ParamMap
from reparam.passes import rules as _rules  # noqa: F401  (registers all rules)
from reparam.passes.call import At, Call, NodeEdit
from reparam.passes.meta import Unknown
from reparam.passes.registry import find_rule
from reparam.passes.skeleton import canonical_names
from reparam.passes.tracer import Capture, key_of, trace_inner
from reparam.passes.values import (
    Free,
    Int,
    Pair,
    Refuse,
    Value,
    is_wide,
    narrow_value,
    student,
    transform,
    walk,
)


class Restart(Exception):
    """What was learned makes an earlier decision wrong; planning starts again with it."""


@dataclass
class Layer:
    """What became of one linear operator's weight."""

    name: str
    operator: str
    node: str
    source: str
    shape: tuple[int, ...]
    wide_shape: tuple[int, ...]
    inputs: bool
    outputs: bool
    reason: str
    multiply_adds: int
    wide_multiply_adds: int


@dataclass
class Contraction:
    """A place where values return to student width."""

    node: str
    operator: str
    module: str
    source: str
    reason: str


@dataclass
class State:
    """Everything that one planning pass decides."""

    params: dict[str, ParamMap] = field(default_factory=dict)
    linear: dict[str, bool] = field(default_factory=dict)
    env: dict[fx.Node, Value] = field(default_factory=dict)
    edits: dict[fx.Node, NodeEdit] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    statistics: set[str] = field(default_factory=set)
    layers: dict[str, Layer] = field(default_factory=dict)
    contractions: dict[fx.Node, Contraction] = field(default_factory=dict)

    def copy(self) -> State:
        """Return a copy that can be changed independently."""
        return State(
            dict(self.params), dict(self.linear), dict(self.env), dict(self.edits), dict(self.attributes),
            set(self.statistics), dict(self.layers), dict(self.contractions),
        )  # fmt: skip


class Planner:
    """Plans the expansion of one captured model.

    Args:
        capture: the recorded student.
        ratio: replicas per channel.
        ignored: parameter name -> reason, for parameters that must stay as they are.
    """

    def __init__(self, capture: Capture, ratio: int, ignored: dict[str, str] | None = None) -> None:
        self.capture, self.ratio = capture, ratio
        self.ignored = ignored or {}
        self.names = canonical_names(capture.root)
        self.preferred: dict[str, Maps] = {}
        self.computed: set[str] = set()
        self.inner_graphs: dict[tuple[fx.Node, bool], fx.Graph | Exception] = {}
        self.reaches_mixing: set[fx.Node] = set()
        self.from_input: set[fx.Node] = set()
        self.forcing: set[fx.Node] = set()
        self.state = State()
        for graph in capture.graphs:
            self._scan(graph)

    # -- the fixpoint --------------------------------------------------------------------------------------------

    def run(self) -> State:
        """Plan to a fixpoint and return the decisions."""
        for _attempt in range(8 + 2 * len(self.names)):
            self.state = State()
            try:
                for graph in self.capture.graphs:
                    for node in graph.nodes:
                        self.visit(node)
            except Restart:
                continue
            return self.state
        raise AssertionError("planning does not reach a fixpoint; please report this model")

    def _scan(self, graph: fx.Graph) -> None:
        """Find which nodes are followed by a mixing operator, and which come before all of them."""
        nodes = list(graph.nodes)
        mixes = {node: self._is_mixing(node) for node in nodes}
        for node in reversed(nodes):
            if any(mixes[user] or user in self.reaches_mixing for user in node.users):
                self.reaches_mixing.add(node)
        for node in nodes:
            if not mixes[node] and all(n in self.from_input for n in node.all_input_nodes):
                self.from_input.add(node)

    def _is_mixing(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.capture.root.get_submodule(str(node.target))
            return any(p.dim() >= 2 for p in module.parameters())
        entry = find_rule(node.op, node.target)
        if entry is None:
            return False
        return entry.mixing(node) if callable(entry.mixing) else entry.mixing

    # -- one node ------------------------------------------------------------------------------------------------

    def visit(self, node: fx.Node) -> None:
        """Compute the value of one node and store it."""
        self.state.env[node] = self._value(node)

    def _value(self, node: fx.Node) -> Value:
        val = node.meta.get("val")
        if node.op == "placeholder":
            return node.meta.get("pair", None) or narrow_value(val)
        if node.op == "get_attr":
            return self._attribute(node, val)
        args, kwargs = self.lookup(node.args), self.lookup(node.kwargs)
        if node.op == "output":
            return self._output(node, args)
        # A number that is read off a parameter (its size) is decided now.
        args, kwargs = (transform(v, self._decide_number) for v in (args, kwargs))
        leaves = [leaf for _path, leaf in walk([args, kwargs])]
        free = any(isinstance(leaf, Free) for leaf in leaves)
        tensors = any(isinstance(leaf, (Pair, Int)) for leaf in leaves)
        if free and not tensors and node not in self.forcing:
            return Free(node, val)
        if not free and not any(is_wide(leaf) for leaf in leaves) and not self._has_free_inside(node):
            return narrow_value(val)
        return self._apply(node, args, kwargs)

    def _decide_number(self, leaf: Any) -> Any:
        if isinstance(leaf, Free) and not isinstance(leaf.s, Tensor):
            return self.demand(leaf, {})
        return leaf

    def _has_free_inside(self, node: fx.Node) -> bool:
        if node.op != "call_module":
            return False
        module = self.capture.root.get_submodule(self._full(node, str(node.target)))
        return next(module.parameters(), None) is not None

    def _apply(self, node: fx.Node, args: Value, kwargs: Value) -> Value:
        before = self.state.copy() if node.op == "call_module" else None
        try:
            if isinstance(node.meta["val"], Unknown):
                raise Refuse(f"its result is not known before it runs ({node.meta['val'].reason})")
            if node.op == "call_module":
                return self._leaf(node, args, kwargs)
            return self._by_rule(node, args, kwargs)
        except Refuse as reason:
            if before is not None:
                self.state = before
            return self._contracted(node, args, kwargs, str(reason))

    def _by_rule(self, node: fx.Node, args: Value, kwargs: Value) -> Value:
        entry = find_rule(node.op, node.target)
        if entry is None:
            raise Refuse("no rule for this operator")
        call = Call(self, node, list(args), dict(kwargs), entry.signature)
        try:
            value = entry.function(call, *args, **kwargs)
        except Refuse:
            # Values that went through shuffles may have a layout that the default one serves better.
            call = Call(self, node, list(args), dict(kwargs), entry.signature)
            if not call.default_layout():
                raise
            value = entry.function(call, *call.args, **call.kwargs)
        if entry.family != "query":
            self._check_divided({"args": args, "kwargs": kwargs}, call.weights)
            self._check_divided({"args": call.args, "kwargs": call.kwargs}, call.weights)
        if call.edit:
            self.state.edits[node] = call.edit
        return value

    def _contracted(self, node: fx.Node, args: Value, kwargs: Value, reason: str) -> Value:
        self._check_divided([args, kwargs], set())
        call = Call(self, node, list(args), dict(kwargs), _ANY)
        if call.contract_all():
            self.state.contractions[node] = Contraction(
                key_of(node), operator_name(node), node.meta.get("module", ""), node.meta.get("source", ""), reason
            )
        if call.edit:
            self.state.edits[node] = call.edit
        return narrow_value(node.meta["val"])

    def _output(self, node: fx.Node, args: Value) -> Value:
        if node.graph not in self.capture.graphs:
            return args[0]
        self._check_divided(list(args), set())
        call = Call(self, node, list(args), {}, _ANY)
        call.contract_all()
        if call.edit:
            self.state.edits[node] = call.edit
        return call.args[0]

    def lookup(self, structure: Any) -> Value:
        """Replace nodes by their values in an argument structure."""
        plain = transform(_plain(structure), lambda leaf: leaf)
        return _substitute(plain, self.state.env)

    # -- parameters ----------------------------------------------------------------------------------------------

    def _full(self, node: fx.Node, target: str) -> str:
        prefix = node.meta.get("prefix", "")
        return f"{prefix}.{target}" if prefix and target else prefix or target

    def _attribute(self, node: fx.Node, val: Any) -> Value:
        if self.name_of(node) is None:
            return narrow_value(val)
        return Free(node, val)

    def name_of(self, node: fx.Node) -> str | None:
        """Return the canonical name of the parameter or buffer that a node reads, or None."""
        return self.names.get(self._full(node, str(node.target))) if node.op == "get_attr" else None

    def demand(self, value: Value, maps: Maps) -> Value:
        """Ask a free value for maps; the answer has the maps it got."""
        if not isinstance(value, Free):
            return value
        decided = self.state.env.get(value.node)
        if not isinstance(decided, Free):
            return decided
        if value.node.op == "get_attr":
            return self.assign(value.node, maps)
        return self._materialize(value, clean(maps))

    def demand_weight(self, value: Free, maps: Maps, in_dim: int, noise: Noise | None) -> tuple[Value, bool]:
        """Ask for the weight of a linear operator; returns it and whether it is divided already."""
        if value.node.op != "get_attr":
            return self.demand(value, maps), False
        name = self.name_of(value.node)
        assert name is not None
        linear = name not in self.computed
        pair = self.assign(value.node, maps, (in_dim,) if linear else (), noise if linear else None, linear)
        return pair, self.state.linear.get(name, False)

    def assign(
        self, node: fx.Node, maps: Maps, divide: tuple[int, ...] = (), noise: Noise | None = None, linear: bool = False
    ) -> Pair:
        """Decide the maps of a parameter, or return what was decided before."""
        name, value = self.name_of(node), node.meta["val"]
        assert name is not None
        if name in self.ignored:
            maps = {}
        known = self.state.params.get(name)
        if known is None:
            maps = self.preferred.get(name, clean(maps))
            known = ParamMap(tuple(value.shape), maps, divide, noise)
            self.state.params[name], self.state.linear[name] = known, linear
        elif self.state.linear[name] and known.maps and known.divide != tuple(d for d in divide if d in known.maps):
            self.undivide(name)
        elif clean(maps) != known.maps and name not in self.preferred and _is_wider(maps, known.maps):
            self.preferred[name] = clean(maps)
            raise Restart
        divided = known.divide if self.state.linear[name] else ()
        pair = Pair(value, value.new_empty(known.wide_shape), known.maps, divided, name)
        self.state.env[node] = pair
        return pair

    def undivide(self, name: str) -> None:
        """Note that a weight is used in several ways (as it is, transposed): it stays undivided, the graph divides."""
        self.computed.add(name)
        raise Restart

    def _check_divided(self, values: Value, weights: set[Any]) -> None:
        """A divided weight is read by linear operators only, as their weight."""
        for path, leaf in walk(values):
            if isinstance(leaf, Pair) and leaf.divided and path not in weights:
                self.undivide(leaf.name)

    def assign_vector(self, source: Any, replica_map: ReplicaMap) -> None:
        """Give a unit vector (of a power iteration) a map: its norm stays 1, so it is divided by sqrt(r)."""
        name = self.name_of(source) if isinstance(source, fx.Node) else None
        if name is None:
            raise Refuse("a vector of the power iteration is no buffer")
        param_map = ParamMap((replica_map.size,), {0: replica_map}, (0,), power=0.5)
        if self.state.params.setdefault(name, param_map) != param_map:
            raise Refuse("a vector of the power iteration is used in two layouts")
        self.state.linear[name] = True
        value = source.meta["val"]
        self.state.env[source] = Pair(value, value.new_empty(param_map.wide_shape), param_map.maps)

    def set_param(self, name: str, param_map: ParamMap) -> None:
        """Replace the map of a parameter (rules whose buffers scale in another way)."""
        self.state.params[name] = param_map

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """Return the parameters that a free value is computed from, largest first."""
        found: dict[fx.Node, None] = {}
        stack = [node]
        while stack:
            current = stack.pop()
            if isinstance(self.state.env.get(current), Free) and current.op == "get_attr":
                found[current] = None
            stack += [n for n in current.all_input_nodes if isinstance(self.state.env.get(n), Free)]
        return sorted(found, key=lambda n: -n.meta["val"].numel())

    def _materialize(self, value: Free, maps: Maps) -> Value:
        """Choose maps of the parameters behind a computed value so that it gets ``maps``."""
        trials: list[tuple[fx.Node, Maps]] = []
        if maps and isinstance(value.s, Tensor):
            for source in self.sources(value.node):
                trials += [(source, trial) for trial in _placements(maps, value.s, source.meta["val"])]
        for source, trial in trials:
            before = self.state.copy()
            try:
                self.assign(source, trial)
                result = self._force(value.node, source)
                if isinstance(result, Pair) and result.maps == maps:
                    return result
            except Refuse:
                pass
            self.state = before
        return self._force(value.node, None)

    def _force(self, node: fx.Node, source: fx.Node | None) -> Value:
        """Evaluate a free value: what depends on ``source``, or everything, at student width, where it is None."""
        if not isinstance(self.state.env[node], Free):
            return self.state.env[node]
        for current in _ancestors(node, self.state.env):
            if not isinstance(self.state.env[current], Free):
                continue
            if source is None and current.op == "get_attr":
                self.assign(current, {})
            elif current.op != "get_attr":
                self.visit(current)
        value = self.state.env[node]
        if isinstance(value, Free) and source is not None:
            raise Refuse("the value does not depend on the parameter")
        return value

    # -- records -------------------------------------------------------------------------------------------------

    def note_statistic(self, source: Any) -> None:
        """Mark the buffers of the module that owns a running statistic: the student keeps its own."""
        name = self.name_of(source) if isinstance(source, fx.Node) else None
        if name is None:
            return
        path = name.rpartition(".")[0]
        for buffer, _tensor in self.capture.root.get_submodule(path).named_buffers(recurse=False):
            self.state.statistics.add(f"{path}.{buffer}" if path else buffer)

    def note_attribute(self, source: Any, attribute: str, value: Any) -> None:
        """Note that the module which owns a parameter states another constant now (``groups``)."""
        name = self.name_of(source) if isinstance(source, fx.Node) else None
        if name is None:
            return
        path = name.rpartition(".")[0]
        if hasattr(self.capture.root.get_submodule(path), attribute):
            self.state.attributes[f"{path}.{attribute}" if path else attribute] = value

    def weight_name(self, source: Any) -> str | None:
        """Return the name of the (largest) parameter behind the weight of a linear operator."""
        if not isinstance(source, fx.Node):
            return None
        found: dict[str, int] = {}
        stack, seen = [source], set()
        while stack:
            node = stack.pop()
            seen.add(node)
            name = self.name_of(node)
            if name is not None and isinstance(node.meta["val"], nn.Parameter | Tensor):
                found[name] = node.meta["val"].numel()
            stack += [n for n in node.all_input_nodes if n not in seen and n.op != "placeholder"]
        return max(found, key=lambda n: found[n]) if found else None

    def record_layer(
        self,
        node: fx.Node,
        data: fx.Node,
        source: Any,
        weight: Pair,
        dims: tuple[int, int],
        multiply_adds: tuple[int, int],
    ) -> None:
        """Note what became of the weight of a linear operator (several calls of one weight count once).

        Args:
            node: the operator.
            data: its data input.
            source: the graph argument that is its weight.
            weight: the weight in both worlds.
            dims: output and input dimension of the weight.
            multiply_adds: of one sample, in the student and in the teacher.
        """
        name = self.weight_name(source)
        if name is None:
            return
        ends = node not in self.reaches_mixing
        outputs, inputs = (d in weight.maps for d in dims)
        outside = data in self.from_input
        reasons = [self.ignored[name]] if name in self.ignored else []
        reasons += [] if inputs else ["input of the network" if outside else "its input is at student width"]
        reasons += [] if outputs else ["output of the network" if ends else "its output is at student width"]
        earlier = self.state.layers.get(name)
        counted = (earlier.multiply_adds, earlier.wide_multiply_adds) if earlier else (0, 0)
        self.state.layers[name] = Layer(
            name, operator_name(node), node.name, node.meta.get("source", ""),
            tuple(weight.s.shape), tuple(weight.t.shape),
            (inputs or outside) and (earlier is None or earlier.inputs),
            (outputs or ends) and (earlier is None or earlier.outputs),
            "; ".join(reasons), counted[0] + multiply_adds[0], counted[1] + multiply_adds[1],
        )  # fmt: skip

    # -- leaf modules --------------------------------------------------------------------------------------------

    def _leaf(self, node: fx.Node, args: Value, kwargs: Value) -> Value:
        """Keep a leaf module as it is, with wider parameters, where the graph inside it needs no edits."""
        results = []
        for training in (False, True):
            graph = self._inner_graph(node, training, args, kwargs)
            results.append(self._run_inner(node, graph, args, kwargs))
        first, second = ([_summary(leaf) for _path, leaf in walk(result)] for result in results)
        if first != second:
            raise Refuse("its train and eval mode need different layouts")
        return results[0]

    def _inner_graph(self, node: fx.Node, training: bool, args: Value, kwargs: Value) -> fx.Graph:
        key = (node, training)
        if key not in self.inner_graphs:
            module = self.capture.root.get_submodule(self._full(node, str(node.target)))
            try:
                self.inner_graphs[key] = self._trace_inner(node, module, training, args, kwargs)
            except Exception as error:
                self.inner_graphs[key] = error
        graph = self.inner_graphs[key]
        if isinstance(graph, Exception):
            raise Refuse(f"its forward cannot be recorded ({type(graph).__name__}: {graph})")
        return graph

    def _trace_inner(self, node: fx.Node, module: nn.Module, training: bool, args: Value, kwargs: Value) -> fx.Graph:
        graph = trace_inner(module, student(args), student(kwargs), training)
        prefix = self._full(node, str(node.target))
        for inner in graph.nodes:
            inner.meta["prefix"] = prefix
            inner.meta["module"] = self._full(inner, inner.meta.get("module", ""))
            if inner.op == "call_module":
                raise Refuse(f"{inner.target} inside it cannot be recorded")
        nodes = list(graph.nodes)
        after = any(user for user in (node,) if user in self.reaches_mixing)
        for inner in reversed(nodes):
            if after or any(self._is_mixing(u) or u in self.reaches_mixing for u in inner.users):
                self.reaches_mixing.add(inner)
        return graph

    def _run_inner(self, node: fx.Node, graph: fx.Graph, args: Value, kwargs: Value) -> Value:
        flat = iter(
            [v for v in [*args, *kwargs.values()] if any(isinstance(leaf, (Pair, Free)) for _p, leaf in walk(v))]
        )
        result: Value = None
        for inner in graph.nodes:
            if inner.op == "placeholder":
                self.state.env[inner] = next(flat)
                continue
            self.visit(inner)
            edit = self.state.edits.pop(inner, None)
            if edit:
                self._edit_attributes(inner, edit)
            if inner.op == "output":
                result = self.state.env[inner]
        return result

    def _edit_attributes(self, node: fx.Node, edit: NodeEdit) -> None:
        """Turn edits of constants inside a leaf into edits of the module's attributes they were read from."""
        if edit.steps or edit.out:
            raise Refuse(f"{operator_name(node)} inside it would need its values rearranged")
        entry = find_rule(node.op, node.target)
        owners = [str(n.target).rpartition(".")[0] for n in node.all_input_nodes if n.op == "get_attr"]
        for path, value in edit.constants.items():
            name = _parameter_at(entry.signature, path) if entry else None
            for owner in owners:
                full = self._full(node, owner) if owner else node.meta["prefix"]
                module = self.capture.root.get_submodule(full)
                if name is not None and hasattr(module, name):
                    self.state.attributes[f"{full}.{name}" if full else name] = value
                    break
            else:
                raise Refuse(f"{operator_name(node)} inside it would need another constant")


def operator_name(node: fx.Node) -> str:
    """Return a readable operator name."""
    if node.op == "call_function":
        return getattr(node.target, "__name__", str(node.target))
    return str(node.target)


_ANY = inspect.signature(lambda *args, **kwargs: None)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if type(value) is tuple:
        return tuple(_plain(v) for v in value)
    return value


def _substitute(value: Any, env: dict[fx.Node, Value]) -> Any:
    if isinstance(value, fx.Node):
        return env[value]
    if isinstance(value, dict):
        return {k: _substitute(v, env) for k, v in value.items()}
    if isinstance(value, list):
        return [_substitute(v, env) for v in value]
    if type(value) is tuple:
        return tuple(_substitute(v, env) for v in value)
    if isinstance(value, slice):
        return slice(*(_substitute(getattr(value, n), env) for n in ("start", "stop", "step")))
    return value


def _is_wider(new: Maps, old: Maps) -> bool:
    """Whether ``new`` widens a dimension that ``old`` leaves narrow."""
    return any(dim not in old for dim in clean(new))


def _placements(maps: Maps, value: Tensor, source: Tensor) -> Iterator[Maps]:
    """Yield ways to give the dimensions of a source the maps of a value that is computed from it."""
    items = sorted(maps.items())

    def place(k: int, used: dict[int, ReplicaMap]) -> Iterator[Maps]:
        if k == len(items):
            if used:
                yield dict(used)
            return
        dim, replica_map = items[k]
        offset = source.dim() - value.dim()
        candidates = sorted(range(source.dim()), key=lambda d: (d != dim, d != dim + offset, d))
        for candidate in candidates:
            if candidate not in used and source.shape[candidate] == replica_map.size:
                yield from place(k + 1, {**used, candidate: replica_map})
        yield from place(k + 1, used)

    yield from place(0, {})


def _ancestors(node: fx.Node, env: dict[fx.Node, Value]) -> list[fx.Node]:
    """Return the free nodes that ``node`` is computed from, and itself, in topological order."""
    order: dict[fx.Node, None] = {}

    def add(current: fx.Node) -> None:
        if current in order or not isinstance(env.get(current), Free):
            return
        for parent in current.all_input_nodes:
            add(parent)
        order[current] = None

    add(node)
    return list(order)


def _summary(leaf: Any) -> Any:
    if isinstance(leaf, Pair):
        return ("tensor", tuple(leaf.s.shape), tuple(leaf.maps.items()))
    if isinstance(leaf, Free):
        return ("free", leaf.node.target)
    if isinstance(leaf, Int):
        return ("int", leaf.s, leaf.t)
    return ("plain", type(leaf))


def _parameter_at(signature: inspect.Signature, path: tuple[Any, ...]) -> str | None:
    if path[0] == "kwargs":
        return str(path[1])
    names = list(signature.parameters)
    return names[path[1]] if len(path) == 2 and path[1] < len(names) else None


__all__ = ["At", "Contraction", "Layer", "Planner", "Restart", "State", "operator_name"]
