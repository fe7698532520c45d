"""Splits: reshapes that cut a widened dimension into several, and which of those gets the replicas.

``[B, N, heads * width] -> [B, N, heads, width]`` may widen the heads or their width, ``[B, C * H * W] -> [B, C, H, W]``
had better widen the channels. In the default layout the last dimension gets them. Where that leaves later layers
narrow, ``reparam.passes.expand`` plans again with another choice for all splits on the same line of code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, fx

from reparam.ops.maps import ReplicaMap
from reparam.passes.records import weight_name
from reparam.passes.registry import find_rule
from reparam.passes.state import Restart

if TYPE_CHECKING:
    from reparam.passes.call import Call
    from reparam.passes.values import Pair

HEADS = ("auto", "count", "width")
"""What attention widens: the number of heads, their width, or what widens more of the network."""


@dataclass(frozen=True)
class Split:
    """A place in the code where a widened dimension is split.

    Args:
        line: file and line.
        parts: into how many dimensions (of more than one index) it is split there.
        heads: it makes the heads of an attention.
    """

    line: str
    parts: int
    heads: bool


def split_layout(call: Call, x: Pair, dim: int, sizes: list[int]) -> tuple[ReplicaMap, int] | None:
    """Return the layout that the widened dimension ``dim`` of ``x`` gets by choice, and which part has its replicas.

    None where there is no choice to be made, or none was.
    """
    parts = [k for k, size in enumerate(sizes) if size > 1]
    phi = x.maps[dim]
    if len(parts) < 2 or phi.uniform is None:
        return None
    planner = call.planner
    line = call.node.meta.get("source", "")
    split = Split(line, len(parts), call.node in planner.heads)
    planner.state.splits[line] = split
    choice = planner.choices.get(line)
    if choice is None or choice >= len(parts):
        return None
    part = parts[choice]
    index = np.arange(phi.size).reshape(sizes).repeat(phi.uniform, axis=part).reshape(-1)
    layout = ReplicaMap(index, phi.size)
    _ask_producer(call, dim, layout)
    return layout, part


def _ask_producer(call: Call, dim: int, layout: ReplicaMap) -> None:
    """Let the linear operator right in front choose this layout for its outputs: nothing is to be moved then."""
    source = call.source("input")
    entry = find_rule(source.op, source.target) if isinstance(source, fx.Node) else None
    if entry is None or entry.family != "linear" or not isinstance(source, fx.Node) or len(source.users) != 1:
        return
    weight = source.args[1] if len(source.args) > 1 else source.kwargs.get("weight")
    name = weight_name(call.planner, weight)
    layouts = call.planner.layouts
    if name is None or name in layouts or call.pair("input").ndim - 1 != dim or layout == call.pair("input").maps[dim]:
        return
    layouts[name] = layout
    raise Restart


def heads_of(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose values reach an attention (a product of two computed values) before any other mixing."""
    found: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        for user in node.users:
            if (user in found and not _mixes(user)) or _is_product(user):
                found.add(node)
    return found


def _mixes(node: fx.Node) -> bool:
    entry = find_rule(node.op, node.target)
    if entry is None:
        return node.op == "call_module"
    return bool(entry.mixing(node) if callable(entry.mixing) else entry.mixing)


def _is_product(node: fx.Node) -> bool:
    """Whether a node multiplies matrices none of which is a parameter."""
    entry = find_rule(node.op, node.target)
    if entry is None or entry.family not in ("attention", "matmul") or not _mixes(node):
        return False
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    return len(tensors) > 1 and not any(n.op == "get_attr" for n in tensors[:2])


def alternatives(splits: Mapping[str, Split], heads: str) -> list[dict[str, int]]:
    """Return choices to try, each for splits that belong together; the default is the last part everywhere."""
    found: list[dict[str, int]] = []
    if heads == "auto":
        found.append(head_counts(splits))
    for line, split in splits.items():
        if not split.heads:
            found += [{line: part} for part in range(split.parts - 1)]
    return [choice for choice in found if choice]


def head_counts(splits: Mapping[str, Split]) -> dict[str, int]:
    """Return the choice that widens the number of heads: the part in front of the last one."""
    return {line: split.parts - 2 for line, split in splits.items() if split.heads}
