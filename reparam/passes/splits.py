"""Splits: reshapes that cut a widened dimension into several, and which of those gets the replicas.

``[B, N, heads * width] -> [B, N, heads, width]`` may widen the heads or their width, ``[B, C * H * W] -> [B, C, H, W]``
had better widen the channels. In the default layout the last dimension gets them. Where that leaves later layers
narrow, ``reparam.passes.expand`` plans again with another choice for all splits on the same line of code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import fx

from reparam.ops.maps import ReplicaMap
from reparam.passes.records import weight_name
from reparam.passes.registry import find_rule
from reparam.passes.state import Restart
from reparam.passes.values import Int

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
        count: the part that is their number; None where that is not known, or one head.
        width: the part that is their width; None where that is not known.
    """

    line: str
    parts: int
    heads: bool
    count: int | None = None
    width: int | None = None

    def part(self, choice: int | str | None) -> int | None:
        """Return the part that a choice means, None for the default: the last one."""
        if choice == "count":
            if self.count is None and self.width is not None:
                return self.part("width")  # a single head
            return self.parts - 2 if self.count is None and self.heads else self.count
        if choice == "width":
            part = self.parts - 2 if self.width is None and self.count == self.parts - 1 else self.width
            return None if part == self.parts - 1 else part
        return choice if isinstance(choice, int) and choice < self.parts else None


Choices = Mapping[str, int | str]
"""By line of code: a part, or what part of the heads (``"count"``, ``"width"``) gets the replicas."""


def chosen_part(call: Call, dims: Sequence[int]) -> int | None:
    """Note that these dimensions of the result could get replicas; returns which one was chosen, None for the last."""
    planner, line = call.planner, call.node.meta.get("source", "")
    split = Split(line, len(dims), call.node in planner.roles.heads, *planner.roles.parts(call.node, dims))
    known = planner.state.splits.get(line)
    if known is None or known.count is None:
        planner.state.splits[line] = split
    return split.part(planner.choices.get(line))


def split_layout(call: Call, x: Pair, dim: int, outs: Sequence[int]) -> tuple[ReplicaMap, int] | None:
    """Return the layout that the widened dimension ``dim`` of ``x`` gets by choice, and which part has its replicas.

    None where there is no choice to be made, or none was.

    Args:
        call: the call.
        x: its input.
        dim: the dimension that is split.
        outs: the dimensions of the result into which it is.
    """
    sizes = [int(call.s.shape[d]) for d in outs]
    parts = [k for k, size in enumerate(sizes) if size > 1]
    phi = x.maps[dim]
    if len(parts) < 2 or phi.uniform is None or _holds_batch(call, dim, outs[parts[0]]):
        return None
    choice = chosen_part(call, [outs[k] for k in parts])
    if choice is None and sizes[-1] == 2 and all(user.target is torch.view_as_complex for user in call.node.users):
        choice = len(parts) - 2  # the last part is that of real and imaginary numbers
    if choice is None:
        return None
    part = parts[choice]
    index = np.arange(phi.size).reshape(sizes).repeat(phi.uniform, axis=part).reshape(-1)
    layout = ReplicaMap(index, phi.size)
    _ask_producer(call, dim, layout)
    return layout, part


def _holds_batch(call: Call, dim: int, first: int) -> bool:
    """Whether a dimension may be heads and a batch in one: an order of its indices would be that of one batch size.

    So it is with the first dimension, and where the first part's size is asked of a value and is no width.
    """
    given = call.node.args[1:]
    sizes = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    size = sizes[first] if len(sizes) == call.s.dim() else None
    return dim == 0 or (isinstance(size, fx.Node) and not isinstance(call.planner.state.env.get(size), Int))


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


def alternatives(splits: Mapping[str, Split], heads: str) -> list[dict[str, int | str]]:
    """Return choices to try, each for splits that belong together; the default is the last part everywhere."""
    found: list[dict[str, int | str]] = []
    if heads == "auto":
        found.append(head_choices(splits, "count"))
    for line, split in splits.items():
        if not split.heads:
            found += [{line: part} for part in range(split.parts - 1)]
    return [choice for choice in found if choice]


def head_choices(splits: Mapping[str, Split], heads: str) -> dict[str, int | str]:
    """Return the choices that widen the number of heads, or their width, where those are not the default."""
    return {line: heads for line, split in splits.items() if split.heads and split.part(heads) is not None}
