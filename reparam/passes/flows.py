"""How values flow through a recorded graph from the inputs to the output: the main path, what enters a module."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx, nn

from reparam.passes import rules  # noqa: F401  (registers what operators do)
from reparam.passes.registry import find_rule
from reparam.passes.values import holds_tensor

_SIZES = ("size", "dim", "numel", "__len__")
"""Methods that return sizes of a value, through which it does not flow."""


_NEAR = 40
"""Values that are looked at around one, to tell where its channels are."""

_MOVES = ("permute", "transpose", "movedim", "swapaxes", "swapdims")
"""Operators behind which the last dimension may be another although it has the same size."""

_LAST = ("linear", "layer_norm", "rms_norm")
_FIRST = ("batch_norm", "group_norm", "instance_norm", "max_pool2d", "avg_pool2d")
"""Operators, beside convolutions, that take the last or the second dimension for the channels."""


class Flow:
    """The values of a recorded graph that are computed from its inputs and from which its output is computed.

    Args:
        graph: as recorded, with meta values.
        root: what the graph's targets refer to.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self._root = root
        found = {node for node in computed(graph) if node.op == "placeholder" or holds_tensor(node.meta.get("val"))}
        end = next(node for node in reversed(graph.nodes) if node.op == "output")
        outputs = [node for node in end.all_input_nodes if node in found]
        self.output: fx.Node | None = outputs[0] if outputs else None
        reaching = set(outputs[:1])
        for node in reversed(graph.nodes):
            if node in reaching:
                reaching.update(given for given in node.all_input_nodes if given in found)
        self.nodes = [node for node in graph.nodes if node in reaching]
        self._members = reaching

    def given(self, node: fx.Node) -> list[fx.Node]:
        """The values that an operator takes and that are computed from the inputs."""
        return [given for given in node.all_input_nodes if given in self._members]

    def mixes(self, node: fx.Node) -> bool:
        """Whether an operator sums over channels."""
        if node.op == "call_module":
            return any(p.dim() >= 2 for p in self._root.get_submodule(str(node.target)).parameters())
        entry = find_rule(node.op, node.target)
        return entry is not None and entry.mixes(node)

    def has_kernel(self, node: fx.Node) -> bool:
        """Whether an operator sums over channels, or takes a kernel (a depthwise convolution)."""
        weights = [given.meta.get("val") for given in node.all_input_nodes if given.op == "get_attr"]
        return self.mixes(node) or any(isinstance(value, Tensor) and value.dim() > 2 for value in weights)

    def channels_first(self, node: fx.Node) -> bool:
        """Whether a linear operator sums over the second dimension of its input, not over the last one."""
        if node.op == "call_module":
            return any(p.dim() > 2 for p in self._root.get_submodule(str(node.target)).parameters())
        return str(getattr(node.target, "__name__", "")).startswith("conv")

    def channels_last(self, node: fx.Node) -> bool:
        """Whether the operators around a value, those behind it first, take its last dimension for its channels."""
        size = node.meta["val"].shape[-1]
        for behind in (True, False):
            queue, seen = list(node.users) if behind else [node], {node}
            while queue and len(seen) < _NEAR:
                current = queue.pop(0)
                name = _operator(current)
                if name in _LAST or name in _FIRST or name.startswith("conv"):
                    return name in _LAST
                shape: tuple[int, ...] = tuple(getattr(current.meta.get("val"), "shape", ()))
                # A pooled value tells nothing about the dimensions of the map.
                if name in _MOVES or len(shape) not in (3, 4) or shape[-1] != size:
                    continue
                more = [n for n in (current.users if behind else self.given(current)) if n not in seen]
                seen.update(more)
                queue += more
        return False

    def main_path(self) -> list[fx.Node]:
        """The values that everything goes through on its way to the output (its dominators), in order."""
        above: dict[fx.Node, fx.Node | None] = {}
        depth: dict[fx.Node | None, int] = {None: 0}
        for node in self.nodes:
            given = self.given(node)
            common: fx.Node | None = given[0] if given else None
            for other in given[1:]:
                left: fx.Node | None = common
                right: fx.Node | None = other
                while left is not right:
                    if left is not None and depth[left] >= depth[right]:
                        left = above[left]
                    elif right is not None:
                        right = above[right]
                common = left
            above[node], depth[node] = common, depth[common] + 1
        path: list[fx.Node] = []
        current = self.output
        while current is not None:
            path.append(current)
            current = above[current]
        return path[::-1]

    def classifier(self) -> fx.Node | None:
        """The first of those operators that sum over channels from which the output is computed without another one."""
        if self.output is None:
            return None
        last, seen, stack = set(), {self.output}, [self.output]
        while stack:
            node = stack.pop()
            if self.mixes(node):
                last.add(node)
                continue
            for given in self.given(node):
                if given not in seen:
                    seen.add(given)
                    stack.append(given)
        # Beside a shortcut around the classifier there are earlier operators: those come before another one.
        before = self._before(last)
        return next((node for node in self.nodes if node in last and node not in before), None)

    def _before(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        found: set[fx.Node] = set()
        stack = [given for node in nodes for given in self.given(node)]
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack += self.given(node)
        return found


def _operator(node: fx.Node) -> str:
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))


def computed(graph: fx.Graph) -> set[fx.Node]:
    """The nodes through which values of the inputs flow; reading a size is no such node."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" or (
            any(given in found for given in node.all_input_nodes)
            and not _reads_size(node)
            and (value is None or isinstance(value, Tensor) or holds_tensor(value))
        ):
            found.add(node)
    return found


def _reads_size(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _SIZES
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    return node.op == "call_function" and node.target is len


def entering(graph: fx.Graph, path: str, returned: fx.Node) -> list[fx.Node]:
    """Return the values that entered a module when it returned this one, in the order of the graph.

    Args:
        graph: as recorded, or of a teacher.
        path: of the module.
        returned: what the call returned.
    """
    flowing = computed(graph)

    def inside(node: fx.Node) -> bool:
        module = str(node.meta.get("module", ""))
        return module == path or module.startswith(path + ".")

    def inserted(node: fx.Node) -> bool:
        return "module" not in node.meta  # a teacher's steps and branches belong to nobody

    if not inserted(returned) and not inside(returned):
        return [returned]
    found: set[fx.Node] = set()
    seen, stack = {returned}, [returned]
    while stack:
        node = stack.pop()
        for given in node.all_input_nodes:
            if given not in flowing or given in seen:
                continue
            seen.add(given)
            if inside(given) or (inserted(given) and any(inside(n) for n in _behind(given, flowing))):
                stack.append(given)
            else:
                found.add(given)
    return [node for node in graph.nodes if node in found]


def _behind(node: fx.Node, flowing: set[fx.Node]) -> set[fx.Node]:
    """The values that an inserted node was computed from, through others like it."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        for given in stack.pop().all_input_nodes:
            if given in flowing and given not in found:
                found.add(given)
                if "module" not in given.meta:
                    stack.append(given)
    return found


def meeting(graph: fx.Graph, parameter: str) -> fx.Node | None:
    """Return the value that meets a parameter at its last use, or None: the first of what the operator takes besides.

    Args:
        graph: as recorded, or of a teacher.
        parameter: its name; what is computed from it alone (a weight merged with its branches) stands for it.
    """
    flowing = computed(graph)
    known = {node for node in graph.nodes if node.op == "get_attr" and node.target == parameter}
    found: fx.Node | None = None
    for node in graph.nodes:
        if not any(given in known for given in node.all_input_nodes):
            continue
        others = [given for given in node.all_input_nodes if given in flowing]
        if others:
            found = others[0]
        else:
            known.add(node)
    return found
