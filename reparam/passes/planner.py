"""The lock-step planner: read the captured graph in the student's and the teacher's world at once.

Requires: a :class:`~reparam.passes.capture.Capture`. Ensures: for every tensor of every node the invariant of
:class:`~reparam.passes.values.Pair`. Changes nothing: the outcome is a set of parameter maps, node edits and module
attributes, from which ``reparam.passes.expand`` makes the plan.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, fx

from reparam.ops.maps import Maps, ReplicaMap, clean
from reparam.ops.params import Noise, ParamMap
from reparam.passes import rules as _rules  # noqa: F401  (registers all rules)
from reparam.passes.call import Call
from reparam.passes.capture import Capture, key_of
from reparam.passes.dependence import ancestors, is_wider, placements, substitute
from reparam.passes.leaves import is_opaque_function, keep_leaf
from reparam.passes.meta import Unknown
from reparam.passes.ratios import Ratios
from reparam.passes.records import note_statistics
from reparam.passes.registry import find_rule
from reparam.passes.roles import Roles
from reparam.passes.rows import ContractionPlan
from reparam.passes.skeleton import canonical_names, named_tensors
from reparam.passes.splits import Choices
from reparam.passes.state import Restart, State, function_key, operator_name
from reparam.passes.streams import Streams, carry
from reparam.passes.values import (
    Free,
    Int,
    Pair,
    Refuse,
    Value,
    is_wide,
    narrow_value,
    plain,
    transform,
    walk,
)
from reparam.passes.writes import keep_writes


class Planner:
    """Plans the expansion of one captured model.

    Args:
        capture: the recorded student.
        ratios: replicas of the outputs of each layer.
        ignored: parameter name -> reason, for parameters that must stay as they are.
        streams: where to note which layers meet, or None.
        choices: which part of a split gets the replicas, by line of code (``reparam.passes.splits``).
    """

    def __init__(
        self,
        capture: Capture,
        ratios: Ratios,
        ignored: dict[str, str] | None = None,
        streams: Streams | None = None,
        choices: Choices | None = None,
    ) -> None:
        self.capture, self.ratios, self.streams, self.choices = capture, ratios, streams, choices or {}
        self.ignored = ignored or {}
        self.names = canonical_names(capture.root)
        self.preferred: dict[str, Maps] = {}
        self.computed: set[str] = set()
        self.linear_laws: dict[str, tuple[tuple[int, ...], Noise | None]] = {}
        self.inner_graphs: dict[tuple[fx.Node, bool], list[fx.Graph] | Exception] = {}
        self.reaches_mixing: set[fx.Node] = set()
        self.from_input: set[fx.Node] = set()
        self.roles = Roles(capture.graphs)
        self.layouts: dict[str, ReplicaMap] = {}
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
            note_statistics(self)
            return self.state
        raise AssertionError("planning does not reach a fixpoint; please report this model")

    def _scan(self, graph: fx.Graph) -> None:
        """Find which nodes are followed by a mixing operator, and which come before all of them."""
        nodes = list(graph.nodes)
        mixes = {node: self.is_mixing(node) for node in nodes}
        for node in reversed(nodes):
            if any(mixes[user] or user in self.reaches_mixing for user in node.users):
                self.reaches_mixing.add(node)
        if "part" not in nodes[-1].meta:
            self.mark_inputs(nodes)

    def mark_inputs(self, nodes: list[fx.Node]) -> None:
        """Note which nodes come before all mixing operators: their channels are the network's own inputs."""
        for node in nodes:
            if not self.is_mixing(node) and all(n in self.from_input for n in node.all_input_nodes):
                self.from_input.add(node)

    def is_mixing(self, node: fx.Node) -> bool:
        """Whether an operator sums over channels."""
        if node.op == "call_module":
            module = self.capture.root.get_submodule(str(node.target))
            return any(p.dim() >= 2 for p in module.parameters())
        entry = find_rule(node.op, node.target)
        return entry is not None and entry.mixes(node)

    # -- one node ------------------------------------------------------------------------------------------------

    def visit(self, node: fx.Node) -> None:
        """Compute the value of one node and store it."""
        self.state.env[node] = self._value(node)

    def _value(self, node: fx.Node) -> Value:
        val = node.meta.get("val")
        if node.op == "placeholder":
            return narrow_value(val)
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
        if free and not tensors:
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
        module = self.capture.root.get_submodule(self.full_name(node, str(node.target)))
        return next(named_tensors(module), None) is not None

    def _apply(self, node: fx.Node, args: Value, kwargs: Value) -> Value:
        opaque = node.op == "call_module" or (find_rule(node.op, node.target) is None and is_opaque_function(node))
        before = self.state.copy() if opaque else None
        try:
            if isinstance(node.meta["val"], Unknown):
                raise Refuse(f"its result is not known before it runs ({node.meta['val'].reason})")
            if opaque:
                return keep_leaf(self, node, args, kwargs)
            return self._by_rule(node, args, kwargs)
        except Refuse as reason:
            if before is not None:
                self.state = before
            return self._contracted(node, args, kwargs, str(reason))

    def _by_rule(self, node: fx.Node, args: Value, kwargs: Value) -> Value:
        entry = find_rule(node.op, node.target)
        if entry is None:
            once = hasattr(node.target, "reparam_conditional")
            raise Refuse("it runs on one way of a branch on sizes only" if once else "no rule for this operator")
        call = Call(self, node, list(args), dict(kwargs), entry.signature)
        try:
            value = entry.function(call, *args, **kwargs)
        except Refuse:
            # Values that went through shuffles may have a layout that the default one serves better.
            call = Call(self, node, list(args), dict(kwargs), entry.signature)
            if not call.default_layout():
                raise
            value = entry.function(call, *call.args, **call.kwargs)
        keep_writes(self, node, call)
        value = value if self.streams is None else carry(call, value)
        if entry.family != "query":
            self._check_divided({"args": args, "kwargs": kwargs}, call.weights)
            self._check_divided({"args": call.args, "kwargs": call.kwargs}, call.weights)
        if call.reason:
            self._note_contraction(node, call.reason)
        if call.edit:
            self.state.edits[node] = call.edit
        return value

    def _note_contraction(self, node: fx.Node, reason: str) -> None:
        self.state.contractions[node] = ContractionPlan(
            key_of(node), operator_name(node), node.meta.get("module", ""), node.meta.get("source", ""), reason
        )

    def _contracted(self, node: fx.Node, args: Value, kwargs: Value, reason: str) -> Value:
        self._check_divided([args, kwargs], set())
        if node.op == "call_module":
            self._keep_narrow(node)
            self.state.refused[self.full_name(node, str(node.target))] = reason
        elif is_opaque_function(node):
            self.state.refused[function_key(node.target)] = reason
        call = Call(self, node, list(args), dict(kwargs), _ANY)
        if call.contract_all():
            self._note_contraction(node, reason)
        keep_writes(self, node, call)
        if call.edit:
            self.state.edits[node] = call.edit
        return narrow_value(node.meta["val"])

    def _keep_narrow(self, node: fx.Node) -> None:
        """A leaf module at student width keeps its parameters, also where another call could widen them."""
        path = self.full_name(node, str(node.target))
        inside = f"{path}." if path else ""
        for name, tensor in named_tensors(self.capture.root.get_submodule(path)):
            full = f"{path}.{name}" if path else name
            if any(part.startswith(inside) and full.startswith(part + ".") for part in self.capture.parts):
                continue
            name = self.names[full]
            known = self.state.params.setdefault(name, ParamMap(tuple(tensor.shape)))
            self.state.linear.setdefault(name, False)
            self.preferred[name] = {}
            if known.maps:
                raise Restart

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
        return substitute(plain(structure), self.state.env)

    # -- parameters ----------------------------------------------------------------------------------------------

    def full_name(self, node: fx.Node, target: str) -> str:
        """Return the path in the whole model of a target inside a leaf's graph."""
        prefix = node.meta.get("prefix", "")
        return f"{prefix}.{target}" if prefix and target else prefix or target

    def _attribute(self, node: fx.Node, val: Any) -> Value:
        if self.name_of(node) is None:
            return narrow_value(val)
        return Free(node, val)

    def name_of(self, node: fx.Node) -> str | None:
        """Return the canonical name of the parameter or buffer that a node reads, or None."""
        return self.names.get(self.full_name(node, str(node.target))) if node.op == "get_attr" else None

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
            if name in self.linear_laws and name not in self.computed:
                (divide, noise), linear = self.linear_laws[name], True
            known = ParamMap(tuple(value.shape), maps, divide, noise)
            self.state.params[name], self.state.linear[name] = known, linear
        elif linear and not self.state.linear[name] and name not in self.linear_laws:
            # Its size was asked for before its linear operator came.
            self.linear_laws[name] = divide, noise
            self.preferred.setdefault(name, clean(maps))
            raise Restart
        elif (
            linear
            and self.state.linear[name]
            and known.maps
            and known.divide != tuple(d for d in divide if d in known.maps)
        ):
            self.undivide(name)
        elif clean(maps) != known.maps and name not in self.preferred and is_wider(maps, known.maps):
            self.preferred[name] = clean(maps)
            raise Restart
        divided = known.divide if self.state.linear[name] else ()
        # The node itself stays free: another use may want other maps, which is settled here again.
        return Pair(value, value.new_empty(known.wide_shape), known.maps, divided, name)

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
                trials += [(source, trial) for trial in placements(maps, value.s, source.meta["val"])]
        for source, trial in trials:
            before = self.state.copy()
            try:
                self.state.env[source] = self.assign(source, trial)
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
        loaned: dict[fx.Node, Value] = {}
        # A size that is read off a computed weight does not decide that weight: its operator comes later.
        is_number = source is None and not isinstance(node.meta["val"], Tensor)
        for current in ancestors(node, self.state.env):
            if not isinstance(self.state.env[current], Free):
                continue
            if source is None and current.op == "get_attr":
                loaned[current] = self.state.env[current]
                self.state.env[current] = self.assign(current, {})
            elif current.op != "get_attr":
                if is_number:
                    loaned[current] = self.state.env[current]
                self.visit(current)
        value = self.state.env[node]
        self.state.env.update({n: v for n, v in loaned.items() if n is not node})
        if isinstance(value, Free) and source is not None:
            raise Refuse("the value does not depend on the parameter")
        return value


_ANY = inspect.signature(lambda *args, **kwargs: None)
