"""Where a network's feature maps and the input of its classifier are, read off its recorded graph.

Nothing here knows a network's name or class. The *main path* are the values that everything goes through on its way
from the image to the output (the dominators of the output): the sums of residual blocks, the concatenations of dense
ones, but nothing inside a branch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from reparam.errors import CaptureError
from reparam.passes.capture import Capture, trace
from reparam.passes.example import example_for
from reparam.passes.flows import Flow, entering
from reparam.passes.grids import MAP, Layout, layout_of
from reparam.passes.skeleton import skeleton_of
from reparam.passes.teacher import Teacher
from reparam.passes.view import StudentView

_SHRINKS = 0.67
"""A resolution ends where sides fall below this share: an unpadded convolution does not end it, a stride of 2 does."""

_FEW = 3
"""With fewer resolutions than this, the blocks at one of them are looked at."""


@dataclass(frozen=True)
class Stages:
    """Where the features of a network are; all names can be given to :func:`reparam.tap`.

    Attributes:
        model: class name of the network, for messages.
        features: modules whose last output is a feature map, shallow to deep; empty where there are fewer than two.
        layouts: how the values of ``features`` become ``[N, C, H, W]``.
        widths: their channels (a dynamic teacher's are wider).
        sizes: their height and width for the example input.
        embedding: what enters the classifier; None where there is none. ``fc:input`` is the value that enters the
            module ``fc``, ``head.weight:input`` the value that meets the parameter ``head.weight``.
        embedding_layout: how it becomes ``[N, C]``, after it has become ``[N, C, H, W]`` where it is no vector.
        reason: why ``features`` is empty or ``embedding`` None; else empty.
    """

    model: str
    features: tuple[str, ...] = ()
    layouts: tuple[Layout, ...] = ()
    widths: tuple[int, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    embedding: str | None = None
    embedding_layout: Layout = MAP
    reason: str = ""


Kinds = dict[fx.Node, tuple[Layout, tuple[int, int], int]]
"""Node -> layout, height and width, channels."""


@dataclass(frozen=True)
class _Level:
    """A candidate: a value on the way, the module that returned it, and what kind of map it is."""

    node: fx.Node
    path: str
    layout: Layout
    size: tuple[int, int]
    width: int

    @property
    def side(self) -> float:
        return math.sqrt(self.size[0] * self.size[1])


def stages(model: nn.Module, example_input: Any = None) -> Stages:
    """Find the feature maps of a network and the input of its classifier. No weight is read: a meta model will do.

    **Features.** Values are maps ``[N, C, H, W]`` or ``[N, H, W, C]``, or tokens ``[N, L, C]`` of a grid with class and
    register tokens in front. Of each resolution the last value on the main path that a module returned, in front of
    the block that leaves the resolution. A resolution ends where sides fall below two thirds. One at which no layer
    with weights works (its input and its output have that resolution) is left out, such as that behind the strided
    stem of a ResNet, or only the first layer of a strided block; but not the last one, where a layer made it. Maps
    of 1 x 1 are left out. Where the main path skips resolutions (cells that read the two before them), those are
    filled in from the other values.

    Networks with fewer than three resolutions that have at least four equal blocks (sibling modules of one type) at
    one of them yield outputs of these instead: of ``depth`` blocks those with the numbers
    ``depth//4 - 1``, ``2 (depth//4) - 1``, ``3 (depth//4) - 1``, ``depth - 2``, ``depth - 1``, as GPD taps transformers
    for ReviewKD.

    **Embedding.** The input of the last linear operator: that from which the output is computed without another one. Of
    several (the two heads of a distilled transformer) the first.

    Args:
        model: a network; of a dynamic teacher or a student's view the student is looked at, whose names they share.
        example_input: see :func:`reparam.plan`.

    Raises:
        InputError: the model does not accept the example input, or none can be found.
    """
    source = (
        model.skeleton if isinstance(model, Teacher) else model.network if isinstance(model, StudentView) else model
    )
    name = type(source).__name__
    skeleton = skeleton_of(source)
    inputs = example_for(model if source is model else skeleton, skeleton, _on_meta(example_input, source is model))
    try:
        capture = trace(skeleton, *inputs)
    except CaptureError as error:
        return Stages(name, reason=f"its forward pass cannot be recorded ({error})")
    return _Finder(capture).found(name)


def _on_meta(example: Any, keep: bool) -> Any:
    """Take the values out of an example for a network that has none."""
    return example if keep else pytree.tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, example)


class _Finder:
    """Reads one recorded forward pass, that of the eval mode."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.flow = Flow(capture.graph, capture.root)
        self.order = {node: number for number, node in enumerate(self.flow.nodes)}
        images = [n.meta["val"] for n in capture.graph.nodes if n.op == "placeholder"]
        maps = [v for v in images if isinstance(v, Tensor) and v.dim() == 4 and v.is_floating_point()]
        self.image = maps[0] if len(maps) == 1 else None
        # A value may be returned by a module and by those around it: the outermost counts.
        self.paths: dict[fx.Node, str] = {}
        self.returned = {path: calls[-1] for path, calls in capture.outputs.items() if _is_value(calls)}
        for path, value in sorted(self.returned.items(), key=lambda item: (item[0].count("."), len(item[0]))):
            self.paths.setdefault(value, path)

    def found(self, name: str) -> Stages:
        """Return what was found."""
        levels = self._levels()
        embedding, layout = self._embedding()
        reasons = [] if len(levels) > 1 else ["it has fewer than two feature maps of different depth"]
        reasons += [] if embedding else ["it has no linear operator in front of its output whose input has a name"]
        levels = levels if len(levels) > 1 else []
        return Stages(
            name,
            tuple(level.path for level in levels),
            tuple(level.layout for level in levels),
            tuple(level.width for level in levels),
            tuple(level.size for level in levels),
            embedding,
            layout,
            "; ".join(reasons),
        )

    # -- features ----------------------------------------------------------------------------------------------------

    def _levels(self) -> list[_Level]:
        if self.image is None or self.flow.output is None:
            return []
        kinds = self._layouts(self.image)
        path = [level for node in self.flow.main_path() if (level := self._level(node, kinds)) is not None]
        runs = _by_resolution(path)
        levels = self._last_of(runs, kinds)
        if runs and (not levels or levels[-1].side > runs[-1][0].side):
            levels += self._made_by_a_layer(runs[-1], kinds)
        levels = self._with_gaps_filled(levels, kinds)
        if len(levels) < _FEW:
            blocks = max((self._blocks(run) for run in runs), key=len, default=[])
            if len(blocks) >= 4:
                return _spaced(blocks)
            levels = blocks if len(levels) < 2 else levels
        return levels

    def _layouts(self, image: Tensor) -> Kinds:
        """What kind of map each value is, in the order of the graph: tokens have the grid of the map before them."""
        result: Kinds = {}
        grids: list[tuple[int, int]] = []
        for node in self.flow.nodes:
            value = node.meta.get("val")
            if not isinstance(value, Tensor) or value.dim() not in (3, 4) or value.shape[0] != image.shape[0]:
                continue
            last = value.dim() == 4 and value.shape[1] == value.shape[3] and self.flow.channels_last(node)
            kind = layout_of(tuple(value.shape), (image.shape[2], image.shape[3]), grids, last)
            if kind is not None:
                result[node] = kind
                if kind[1] not in grids[:1]:
                    grids.insert(0, kind[1])
        return result

    def _level(self, node: fx.Node, kinds: Kinds) -> _Level | None:
        kind = kinds.get(node)
        if kind is None or node.op == "placeholder" or max(kind[1]) < 2:
            return None
        return _Level(node, self.paths.get(node, ""), *kind)

    def _last_of(self, runs: list[list[_Level]], kinds: Kinds) -> list[_Level]:
        """The last value of each resolution that a module returned, where layers work at that resolution."""
        result = []
        for run in runs:
            if self._works(run, run[-1].node, kinds):
                cut = [level for level in self._before_shrinking(run, kinds) if level.path]
                result += [level for level in cut[-1:] if not self._is_squeeze(level, run, kinds)]
        return result

    def _is_squeeze(self, level: _Level, run: list[_Level], kinds: Kinds) -> bool:
        """Whether the only layer of a resolution is the first one of a strided block: it belongs to the next one."""
        if len(self._works(run, level.node, kinds)) != 1:
            return False
        for module in _around(level.path):
            returned = self.returned.get(module)
            if returned in kinds and _SHRINKS * _SHRINKS * 0.9 < _side(kinds[returned]) / run[0].side < _SHRINKS:
                given = entering(self.capture.graph, module, returned)
                if given and given[0] in kinds and _side(kinds[given[0]]) < run[0].side + 0.5:
                    return any(self._strides(node, module, run, kinds) for node in self.flow.nodes)
        return False

    def _strides(self, node: fx.Node, module: str, run: list[_Level], kinds: Kinds) -> bool:
        """Whether a layer inside a module leaves a resolution."""
        inside = str(node.meta.get("module", "")).startswith(module + ".") and self.flow.has_kernel(node)
        if not inside or node not in kinds:
            return False
        sides = [_side(kinds[given]) for given in self.flow.given(node) if given in kinds]
        return bool(sides) and max(sides) > run[-1].side - 0.5 and _side(kinds[node]) < _SHRINKS * run[0].side

    def _before_shrinking(self, run: list[_Level], kinds: Kinds) -> list[_Level]:
        """Cut off what lies inside the module that leaves the resolution: the wide inside of a strided block.

        A module that does so but holds all layers of the resolution is the whole network or a container of stages.
        """
        members = {level.node: number for number, level in enumerate(run)}
        path = run[-1].path or str(run[-1].node.meta.get("module", ""))
        for module in _around(path):
            returned = self.returned.get(module)
            if returned is None or returned in members:
                continue
            given = entering(self.capture.graph, module, returned)
            if given and given[0] in members and self._works(run, given[0], kinds):
                return self._before_shrinking(run[: members[given[0]] + 1], kinds)
        return run

    def _works(self, run: list[_Level], last: fx.Node, kinds: Kinds) -> list[fx.Node]:
        """The operators with weights that take and return maps of this resolution, up to a node."""
        low, high = run[-1].side - 0.5, run[0].side + 0.5

        def inside(node: fx.Node) -> bool:
            return node in kinds and low <= _side(kinds[node]) <= high

        return [
            node
            for node in self.flow.nodes[: self.order[last] + 1]
            if self.flow.mixes(node) and inside(node) and any(inside(given) for given in self.flow.given(node))
        ]

    def _made_by_a_layer(self, run: list[_Level], kinds: Kinds) -> list[_Level]:
        """The last resolution counts also where a single strided layer makes it, but not where a pooling does."""
        low, high = run[-1].side - 0.5, run[0].side + 0.5
        made = any(self.flow.mixes(n) and n in kinds and low <= _side(kinds[n]) <= high for n in self.flow.nodes)
        return [level for level in run if level.path][-1:] if made else []

    def _with_gaps_filled(self, levels: list[_Level], kinds: Kinds) -> list[_Level]:
        """Add resolutions that only values beside the main path have, each where it lies between its neighbours."""
        order = self.order
        beside = [level for node in self.flow.nodes if self.paths.get(node) and (level := self._level(node, kinds))]
        ends = [(order[level.node], level.side) for level in levels]
        top = math.sqrt(self.image.shape[2] * self.image.shape[3]) if self.image is not None else 0.0
        result: list[_Level] = []
        for (first, large), (second, small), level in zip(
            [(-1, top), *ends], [*ends, (len(order), 1.0)], [*levels, None], strict=True
        ):
            between = [
                other
                for other in beside
                if first < order[other.node] < second
                and small / _SHRINKS <= other.side <= large * _SHRINKS
                and other.layout.kind == (level or other).layout.kind
            ]
            ends_here = level is None and bool(levels)  # behind the last one there is the pooling
            if large * _SHRINKS * _SHRINKS > small and not ends_here:  # the step is larger than the usual ones
                result += self._last_of(_by_resolution(_decreasing(between)), kinds)
            result += [level] if level is not None else []
        return result

    def _blocks(self, run: list[_Level]) -> list[_Level]:
        """The largest set of sibling modules of one type, with parameters, that return values of the run."""
        groups: dict[Any, dict[fx.Node, _Level]] = {}
        members = {level.node: level for level in run}
        for path, value in self.returned.items():
            level, module = members.get(value), self.capture.root.get_submodule(path)
            if level is None or next(module.parameters(), None) is None:
                continue
            named = _Level(level.node, path, level.layout, level.size, level.width)
            key = path.rpartition(".")[0], level.width, type(module)
            groups.setdefault(key, {}).setdefault(level.node, named)
        largest = max(groups.values(), key=len, default={})
        return [largest[level.node] for level in run if level.node in largest]

    # -- embedding ---------------------------------------------------------------------------------------------------

    def _embedding(self) -> tuple[str | None, Layout]:
        last = self.flow.classifier()
        given = self.flow.given(last) if last is not None else []
        if last is None or not given:
            return None, MAP
        value = given[0]
        layout = MAP if self.flow.channels_first(last) else Layout("last")
        return self._name_of(last, value), layout

    def _name_of(self, operator: fx.Node, value: fx.Node) -> str | None:
        """Name the input of an operator: what enters its module, else what a module returned or meets a parameter."""
        module = str(operator.meta.get("module", ""))
        returned = self.returned.get(module)
        if returned is not None and entering(self.capture.graph, module, returned) == [value]:
            return f"{module}:input"
        if value in self.paths:
            return self.paths[value]
        for node in operator.all_input_nodes:
            if node.op == "get_attr" and len(node.users) == 1:
                return f"{node.target}:input"
        return None


def _side(kind: tuple[Layout, tuple[int, int], int]) -> float:
    return math.sqrt(math.prod(kind[1]))


def _around(path: str) -> list[str]:
    """The modules that a module lies in, from the outside."""
    return [path[:k] for k, letter in enumerate(path) if letter == "."]


def _is_value(calls: Sequence[Any]) -> bool:
    return bool(calls) and isinstance(calls[-1], fx.Node)


def _by_resolution(levels: Sequence[_Level]) -> list[list[_Level]]:
    """Split a path where its sides shrink; what follows larger than the resolution before it is no part of it."""
    runs: list[list[_Level]] = []
    for level in levels:
        if not runs or level.side < _SHRINKS * runs[-1][0].side:
            runs.append([level])
        elif level.side <= runs[-1][0].side:
            runs[-1].append(level)
    return runs


def _decreasing(levels: Sequence[_Level]) -> list[_Level]:
    """Values beside the main path come in any order: drop those that are larger than a later one of their run."""
    result: list[_Level] = []
    for level in levels:
        while result and result[-1].side < level.side:
            result.pop()
        result.append(level)
    return result


def _spaced(blocks: list[_Level]) -> list[_Level]:
    depth = len(blocks)
    quarter = depth // 4
    chosen = {quarter - 1, 2 * quarter - 1, 3 * quarter - 1, depth - 2, depth - 1}
    return [blocks[number] for number in sorted(chosen)]


__all__ = ["Layout", "Stages", "stages"]
