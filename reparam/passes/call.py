"""What a rule works with: one operator call in both worlds, and the edits it makes to the teacher's call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, fx

from reparam.ops.maps import Maps, ReplicaMap, clean, take_index
from reparam.ops.params import Noise
from reparam.ops.steps import DivideInt, Realign, Scale, Step
from reparam.passes.memory import shapes_of
from reparam.passes.meta import run_on_meta
from reparam.passes.modes import choose
from reparam.passes.values import Free, Int, Pair, Refuse, Value, is_wide, join, student, teacher, walk

if TYPE_CHECKING:
    from reparam.passes.planner import Planner

Path = tuple[Any, ...]
"""Where a value stands in a node: ``("args", 0)``, ``("kwargs", "dim")``, ``("args", 0, 2)``, ..."""


@dataclass
class NodeEdit:
    """How the teacher's node differs from the student's.

    Args:
        steps: operators inserted in front of an argument, by its path.
        constants: arguments replaced by constants, by path.
        out: operators inserted behind the node's result (a single tensor).
    """

    steps: dict[Path, list[Step]] = field(default_factory=dict)
    constants: dict[Path, Any] = field(default_factory=dict)
    out: list[Step] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.steps or self.constants or self.out)


Name = str | tuple[Any, ...]


class Call:
    """One operator call.

    Rules name arguments by parameter name (``"weight"``), or ``("tensors", 0)`` for an item of a list.
    """

    def __init__(
        self, planner: Planner, node: fx.Node, args: list[Value], kwargs: dict[str, Value], signature: inspect.Signature
    ) -> None:
        self.planner, self.node = planner, node
        self.args, self.kwargs = args, kwargs
        self.edit = NodeEdit()
        self.reason = ""
        self.weights: set[Path] = set()
        self.paths = _paths(signature, args, kwargs)

    # -- reading -------------------------------------------------------------------------------------------------

    @property
    def s(self) -> Any:
        """The student's result (meta)."""
        return self.node.meta["val"]

    @property
    def ends(self) -> bool:
        """Whether no mixing operator follows: the result is part of the network's output."""
        return self.node not in self.planner.reaches_mixing

    def path(self, name: Name) -> Path:
        """Return where an argument stands; an argument that was not given gets a keyword."""
        if isinstance(name, At):
            return tuple(name)
        head, rest = (name, ()) if isinstance(name, str) else (name[0], name[1:])
        return (*self.paths.get(head, ("kwargs", head)), *rest)

    def get(self, name: Name) -> Value:
        """Return the current value of an argument."""
        kind, key, *rest = self.path(name)
        value: Any = self.args[key] if kind == "args" else self.kwargs.get(key)
        for step in rest:
            value = getattr(value, step) if isinstance(value, slice) else value[step]
        return value

    def pair(self, name: Name) -> Pair:
        """Return a tensor argument; a free parameter is taken narrow."""
        value = self.get(name)
        if isinstance(value, Free):
            value = self.demand(name, {})
        if not isinstance(value, Pair):
            raise Refuse(f"argument {name} is not a tensor")
        return value

    # -- editing -------------------------------------------------------------------------------------------------

    def _store(self, name: Name, value: Value) -> None:
        kind, key, *rest = self.path(name)
        holder: Any = self.args if kind == "args" else self.kwargs
        if rest:
            value = _replaced(holder[key], rest, value)
        holder[key] = value

    def _step(self, name: Name, step: Step, value: Value) -> Any:
        self.edit.steps.setdefault(self.path(name), []).append(step)
        self._store(name, value)
        return value

    def insert(self, name: Name, step: Step, value: Value) -> None:
        """Insert a step in front of an argument, whose value is then ``value``."""
        self._step(name, step, value)

    def align(self, name: Name, dim: int, target: ReplicaMap | None) -> Pair:
        """Bring one dimension of an argument into the layout ``target`` (None: student width)."""
        value = self.pair(name)
        source = value.maps.get(dim) or ReplicaMap.identity(value.s.shape[dim])
        target = target or ReplicaMap.identity(source.size)
        if target == source:
            return value
        if target.size != source.size:
            raise Refuse(f"dimension {dim} of argument {name} cannot follow a map of {target.size} indices")
        maps = clean({**value.maps, dim: target})
        if dim in value.divided and not np.array_equal(source.counts, target.counts):
            self.planner.undivide(value.name)
        wide = value.t.new_empty(take_index(value.s.shape, maps))
        return self._step(name, Realign(dim, source, target), Pair(value.s, wide, maps, value.divided, value.name))

    def narrow(self, name: Name, dims: Iterable[int] | None = None, reason: str = "") -> Pair:
        """Contract the given dimensions of an argument, all mapped ones where ``dims`` is None.

        With a reason it stands in the plan; without one nothing is lost (the dimension ends here anyway).
        """
        value = self.pair(name)
        for dim in list(value.maps if dims is None else dims):
            if dim in value.maps:
                value = self.align(name, dim, None)
                self.reason = reason or self.reason
        return value

    def even(self, name: Name, dims: Iterable[int]) -> Pair:
        """Give the mapped ones of these dimensions the default layout with equally many replicas."""
        value = self.pair(name)
        for dim in dims:
            if dim in value.maps and value.maps[dim].uniform is None:
                source = value.maps[dim]
                value = self.align(name, dim, ReplicaMap.repeat(source.size, int(source.counts.max())))
        return value

    def source(self, name: Name) -> Any:
        """Return what stands in the graph: a node, or a constant."""
        kind, key, *rest = self.path(name)
        value: Any = self.node.args[key] if kind == "args" else self.node.kwargs.get(key)
        for step in rest:
            if isinstance(value, fx.Node):
                return value
            value = getattr(value, step) if isinstance(value, slice) else value[step]
        return value

    def match(self, name: Name, maps: Maps) -> Pair:
        """Give an argument exactly these maps: a free one is asked for them, another one is realigned."""
        if isinstance(self.get(name), Free):
            self.demand(name, maps)
        value = self.pair(name)
        for dim in sorted({*value.maps, *maps}):
            value = self.align(name, dim, maps.get(dim))
        return value

    def demand(self, name: Name, maps: Maps) -> Pair:
        """Ask a free argument for maps; it answers with the maps it got, which may be others."""
        value = self.planner.demand(self.get(name), maps)
        self._store(name, value)
        if not isinstance(value, Pair):
            raise Refuse(f"argument {name} is not a tensor")
        return value

    def weight(self, name: Name, maps: Maps, out_dim: int, in_dim: int, noise: bool = True) -> Pair:
        """Ask for the weight of a linear operator and see to its division by the replica counts of ``in_dim``."""
        value = self.get(name)
        divided = False
        if isinstance(value, Free):
            law = Noise(out_dim, in_dim) if noise else None
            value, divided = self.planner.demand_weight(value, maps, in_dim, law)
            self._store(name, value)
        elif isinstance(value, Pair) and value.divided:
            if value.divided != (in_dim,):
                self.planner.undivide(value.name)
            divided = True
        if divided:
            self.weights.add(self.path(name))
        pair = self.pair(name)
        if not divided and in_dim in pair.maps:
            counts = pair.maps[in_dim]
            self.scale(name, counts, in_dim, -1.0)
        return self.pair(name)

    def scale(self, name: Name, replica_map: ReplicaMap, dim: int, power: float) -> None:
        """Multiply an argument by the replica counts of ``replica_map`` to ``power``."""
        value = self.pair(name)
        self._step(name, counts_scale(replica_map, dim, power), value)

    def scale_out(self, step: Step) -> None:
        """Scale the operator's result."""
        self.edit.out.append(step)

    def set(self, name: Name, value: Any) -> None:
        """Replace an argument by a constant."""
        self.edit.constants[self.path(name)] = value
        kind, key, *rest = self.path(name)
        if kind == "args" and not rest and key >= len(self.args):
            raise Refuse(f"argument {name} cannot be set")
        if getattr(self.source(name), "target", None) is choose:
            raise Refuse(f"argument {name} would need another value, and has one per train mode already")
        self._store(name, value)

    def resize(self, name: Name, wanted: int) -> None:
        """Give a size its teacher value; one that the graph computes is multiplied, it may hold a resolution."""
        value = self.get(name)
        found = teacher(value)
        if found == wanted:
            return
        if not isinstance(self.source(name), fx.Node):
            self.set(name, wanted)
        elif isinstance(value, Int) and value.s == wanted:
            self.narrow_int(name)
        elif found > 0 and wanted % found == 0:
            self._step(name, DivideInt(1, wanted // found), wanted)
        elif wanted > 0 and found % wanted == 0:
            self._step(name, DivideInt(found // wanted), wanted)
        else:
            raise Refuse("a computed size would need another factor")
        # The student's world keeps its own number.
        self._store(name, Int(student(value), wanted))

    def narrow_int(self, name: Name) -> None:
        """Give a number that comes from a widened dimension its student value."""
        value = self.get(name)
        if not isinstance(value, Int):
            return
        if isinstance(value.s, int) and value.s > 0 and value.t % value.s == 0:
            self._step(name, DivideInt(value.t // value.s), value.s)
        elif isinstance(value.s, float) and value.t:
            self._step(name, Scale((value.s / value.t,)), value.s)
        else:
            self.set(name, value.s)

    # -- results -------------------------------------------------------------------------------------------------

    def run(self) -> Any:
        """Run the teacher's operator on its meta arguments."""
        args, kwargs = teacher(self.args), teacher(self.kwargs)
        runs, shapes = self.planner.capture.memory.runs, shapes_of((args, kwargs))
        key = (self.node.target, shapes)
        if shapes is not None and key in runs:
            return runs[key]
        try:
            value = run_on_meta(self.node.op, self.node.target, args, kwargs)
            if shapes is not None:
                runs[key] = value
            return value
        except Refuse:
            raise
        except Exception as error:
            raise Refuse(f"the operator refuses the wider arguments ({type(error).__name__}: {error})") from error

    def result(self, maps: Maps | Callable[[Tensor, Tensor], Maps] | None = None) -> Value:
        """Run the operator and pair its result with the student's; every tensor in it gets ``maps``.

        Raises:
            Refuse: the teacher's shape does not follow from the student's and the maps.
        """
        give = maps if callable(maps) else lambda _s, _t: maps or {}
        value = join(self.s, self.run(), give)
        for _path, leaf in walk(value):
            if isinstance(leaf, Pair) and tuple(leaf.t.shape) != take_index(leaf.s.shape, leaf.maps):
                raise Refuse(f"the result {leaf.describe()} does not follow the maps {leaf.maps}")
        return value

    def default_layout(self) -> bool:
        """Bring arguments whose replicas are in another order into the default layout; returns whether any was."""
        changed = False
        for place, holder in (("args", self.args), ("kwargs", self.kwargs)):
            for path, leaf in list(walk(holder)):
                if not isinstance(leaf, Pair):
                    continue
                for dim, replica_map in leaf.maps.items():
                    if replica_map.innermost is None and replica_map.uniform is not None:
                        self.align(At((place, *path)), dim, ReplicaMap.repeat(replica_map.size, replica_map.uniform))
                        changed = True
        return changed

    def contract_all(self) -> bool:
        """Bring every argument to student width; returns whether any was wide."""
        wide = False
        for place, holder in (("args", self.args), ("kwargs", self.kwargs)):
            for path, leaf in list(walk(holder)):
                name = At((place, *path))
                if isinstance(leaf, Free):
                    leaf = self.planner.demand(leaf, {})
                    self._store(name, leaf)
                if not is_wide(leaf):
                    continue
                wide = True
                if isinstance(leaf, Int):
                    self.narrow_int(name)
                else:
                    self.narrow(name)
        return wide


class At(tuple[Any, ...]):
    """A path in the node, ``At(("args", 1))``, used as the name of an argument."""


def counts_scale(replica_map: ReplicaMap, dim: int, power: float) -> Scale:
    """Return the step that multiplies by the replica counts along ``dim`` to ``power``."""
    if replica_map.uniform is not None:
        return Scale((float(replica_map.uniform) ** power,))
    return Scale(tuple((replica_map.counts[replica_map.index].astype(float) ** power).tolist()), dim)


def _paths(signature: inspect.Signature, args: list[Value], kwargs: dict[str, Value]) -> dict[str, Path]:
    """Bind arguments to parameter names.

    Raises:
        Refuse: the operator was called in a form that the rule does not know.
    """
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise Refuse(f"unknown form of the call: {error}") from error
    paths: dict[str, Path] = {}
    position = 0
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            paths[parameter.name] = ("args", position)
        elif parameter.kind is not parameter.KEYWORD_ONLY and position < len(args):
            paths[parameter.name] = ("args", position)
            position += 1
        else:
            paths[parameter.name] = ("kwargs", parameter.name)
    return paths


def _replaced(holder: Any, path: list[Any], value: Any) -> Any:
    if not path:
        return value
    if isinstance(holder, slice):
        parts = {n: getattr(holder, n) for n in ("start", "stop", "step")}
        parts[path[0]] = _replaced(parts[path[0]], path[1:], value)
        return slice(parts["start"], parts["stop"], parts["step"])
    if isinstance(holder, dict):
        return {**holder, path[0]: _replaced(holder[path[0]], path[1:], value)}
    items = list(holder)
    items[path[0]] = _replaced(items[path[0]], path[1:], value)
    return items if isinstance(holder, list) else tuple(items)
