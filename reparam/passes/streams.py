"""Streams: layers whose outputs meet element by element, and so must have the same number of replicas.

Which layers those are does not depend on how often their channels are repeated. A planning pass in which every layer
has the same ratio finds them: each layer marks the map of its output, the marks travel with the maps, and where maps
meet, their marks do. ``reparam.passes.layers`` works with what was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import fx

from reparam.errors import InputError
from reparam.ops.maps import IntArray, ReplicaMap
from reparam.passes.records import weight_name
from reparam.passes.state import Meeting, operator_name
from reparam.passes.values import Pair, Value, transform, walk

if TYPE_CHECKING:
    from reparam.passes.call import Call, Name


class Streams:
    """What the pass that looks for streams keeps: a number for each layer that it met."""

    def __init__(self) -> None:
        self.layers: dict[str, int] = {}

    def number(self, name: str) -> int:
        """Return the mark of a layer, > 0."""
        return self.layers.setdefault(name, len(self.layers) + 1)


def ratio_of(call: Call, weight: Name) -> int:
    """Return the ratio of the layer whose weight is this argument."""
    name = weight_name(call.planner, call.source(weight))
    if call.planner.streams is not None and name is not None:
        call.planner.streams.number(name)
    return call.planner.ratios.of(name)


def produced(call: Call, weight: Name, replica_map: ReplicaMap) -> ReplicaMap:
    """Mark the map of a layer's output as that of this layer.

    A map that has marks came from elsewhere: the layer's weight is also used transposed, as the tied decoder of an
    encoder, and its outputs are the inputs of the other.
    """
    streams = call.planner.streams
    name = weight_name(call.planner, call.source(weight)) if streams is not None else None
    if streams is None or name is None or replica_map.marks is not None:
        return replica_map
    return replica_map.marked(streams.number(name))


def follows(call: Call, weight: Name, replica_map: ReplicaMap | None) -> None:
    """Note that a depthwise layer has the map of its input, so that it is in one stream with what is there.

    Raises:
        InputError: an entry asks for another ratio than the input has, although no stream says so: behind a shuffle of
            several layers nothing tells which channel is whose.
    """
    name, streams = weight_name(call.planner, call.source(weight)), call.planner.streams
    if name is None:
        return
    if streams is not None:
        number = streams.number(name)
        _meet(call, [] if replica_map is None else [replica_map.marked(number), replica_map])
    choice = call.planner.ratios.layers.get(name)
    if choice is None or choice.entry is None or replica_map is None:
        return
    other = sorted({*replica_map.counts.tolist()} - {1, choice.ratio})
    if other:
        raise InputError(
            f"the ratios contradict each other: {name} (entry {choice.entry!r}: {choice.ratio}) repeats each channel "
            f"as often as its input does, and what comes to it at {described(call.node)} is repeated "
            f"{' or '.join(map(str, other))} times. Give it the ratio of the layers in front of it"
        )


def described(node: fx.Node) -> str:
    """Return an operator with its node, module and source line."""
    module, source = node.meta.get("module") or "the network itself", node.meta.get("source", "")
    return f"{operator_name(node)} ({node.name} in module {module!r}, {source})"


def meet(call: Call, places: Sequence[Name], axis: int, chosen: ReplicaMap) -> ReplicaMap:
    """Note that tensors meet along a dimension of the result (negative ``axis``); returns its map with all marks."""
    if call.planner.streams is None:
        return chosen
    values = [value for place in places if isinstance(value := call.get(place), Pair) and value.ndim >= -axis]
    found = [m for value in values if (m := value.maps.get(value.ndim + axis)) is not None and m.size == chosen.size]
    marks = _meet(call, found)
    return chosen if marks is None else chosen.marked(marks)


def _meet(call: Call, maps: list[ReplicaMap]) -> IntArray | None:
    """Pair up the marks index by index; returns those that are known in any of the maps."""
    names = list(call.planner.streams.layers) if call.planner.streams is not None else []
    known = [m.marks for m in maps if m.marks is not None]
    marks = known[0] if known else None
    for other in known[1:]:
        assert marks is not None
        for a, b in np.unique(np.stack([marks, other], axis=1), axis=0).tolist():
            if a and b and a != b:
                call.planner.state.meetings.append(Meeting(call.node, names[a - 1], names[b - 1]))
        marks = np.where(marks == 0, other, marks)
    return marks


def carry(call: Call, value: Value) -> Value:
    """Mark maps that a rule made anew, where everything wide among its arguments comes from one layer."""
    given = [leaf for _path, leaf in walk([call.args, call.kwargs]) if isinstance(leaf, Pair)]
    found = {mark for leaf in given for m in leaf.maps.values() for mark in ([0] if m.marks is None else m.marks)}
    if len(found) != 1 or 0 in found:
        return value
    only = int(found.pop())

    def mark(leaf: Any) -> Any:
        if not isinstance(leaf, Pair):
            return leaf
        return replace(leaf, maps={d: m if m.marks is not None else m.marked(only) for d, m in leaf.maps.items()})

    return transform(value, mark)
