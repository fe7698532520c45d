"""Find the last linear operator of a stage on the recorded graph, the norm behind it, and who could take in a bias."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from reparam.errors import InputError
from reparam.ops.kernels import Kernel
from reparam.passes.flows import Flow
from reparam.passes.folding.affine import describe
from reparam.passes.folding.constants import Constants, constants_of
from reparam.passes.folding.linear import read_operators
from reparam.passes.folding.ops import Op, value_of
from reparam.passes.folding.record import Call, Recording, call_of
from reparam.passes.folding.values import asks_size, follow, users_of
from reparam.passes.head_modules import Place, Taker
from reparam.passes.skeleton import named_tensors
from reparam.passes.state import operator_name

_OTHER = "choose another operator by its module's name (stages=['path.of.a.conv'])"
_NORM_TENSORS = ("running_mean", "running_var", "weight", "bias")


class Search:
    """Reads one recorded forward pass.

    Args:
        recording: of the network in eval mode.
        model: the network itself, for tensors that modules share.
    """

    def __init__(self, recording: Recording, model: nn.Module) -> None:
        self.recording, self.skeleton = recording, recording.skeleton
        self.constant = constants_of(recording.graph)
        self.ops = read_operators(recording.graph, self.constant)
        self.shapes = Constants(None, recording.skeleton)
        self.flow = Flow(recording.graph, recording.skeleton)
        self.calls: dict[str, list[Call]] = {}
        for call in recording.root.calls():
            self.calls.setdefault(call.path, []).append(call)
        uses = Counter(id(tensor) for _, tensor in named_tensors(model))
        self.shared = {name for name, tensor in named_tensors(model) if uses[id(tensor)] > 1}
        self.depth: dict[fx.Node, int] = {}
        for node in recording.graph.nodes:
            before = max((self.depth[given] for given in node.all_input_nodes), default=0)
            self.depth[node] = before + (self._is_operator(node) or self.flow.mixes(node))

    # -- the operator ------------------------------------------------------------------------------------------------

    def place(self, stage: str, earlier: Sequence[str], inside: bool) -> Place:
        """Find where the heads of a stage belong.

        From what the stage returned the graph is followed backwards to the first convolution or linear layer. Where
        several values meet (a residual sum, a concatenation, a gate), it goes on with those of full size, of these
        with the one that most linear operators lie behind, of these with the first: the branch, not its shortcut.

        Args:
            stage: path of a module.
            earlier: stages that must not be left backwards.
            inside: whether the operator has to be inside the module.

        Raises:
            InputError: there is none, or it cannot be replaced.
        """
        result = self.result(stage)
        barriers = {self.result(name) for name in earlier} - {result}
        node = result
        while node in barriers or not self._is_operator(node):
            given = [n for n in node.all_input_nodes if n not in self.constant and isinstance(value_of(n), Tensor)]
            if self.flow.mixes(node) and not self._is_operator(node):
                reason = f"it ends with {describe(node)}, which is no convolution and no linear layer"
                raise InputError(f"{stage!r} has no linear operator at its end: {reason}; {_OTHER}")
            if not given or node in barriers:
                end = describe(node)
                raise InputError(f"{stage!r} has no linear operator at its end: there is none behind {end}; {_OTHER}")
            node = self._branch(node, given)
        if inside and node not in set(self.calls[stage][-1].nodes()):
            raise InputError(
                f"{stage!r} has no linear operator at its end: the last one before it is {describe(node)}, outside of "
                f"that module; {_OTHER}"
            )
        return self._replaceable(stage, node)

    def result(self, path: str) -> fx.Node:
        """The value that a module returned.

        Raises:
            InputError: it is not called in the graph, or returns no tensor.
        """
        calls = self.calls.get(path, [])
        found = calls[-1].result if calls else None
        if not isinstance(found, fx.Node) or not isinstance(value_of(found), Tensor):
            why = "returns no single tensor" if calls else "is not called in the recorded forward pass"
            raise InputError(f"heads cannot be put at {path!r}: it {why}; {_OTHER}")
        return found

    def _is_operator(self, node: fx.Node) -> bool:
        return node in self.ops and self.ops[node].kind == "kernel"

    def _branch(self, node: fx.Node, given: list[fx.Node]) -> fx.Node:
        """The value through which the path goes on; `max` returns the first of equals."""
        whole = [n for n in given if value_of(n).numel() == value_of(node).numel()]
        return max(whole or given, key=lambda n: self.depth[n])

    def _replaceable(self, stage: str, node: fx.Node) -> Place:
        path = call_of(node).path
        module = self.skeleton.get_submodule(path)
        where = f"{stage!r} ends with {describe(node)} ({node.meta.get('source', '')})"
        if not path or not self._reads_own(node, path):
            raise InputError(
                f"{where}, a functional operator, or one whose weight is computed: there is no module to replace. "
                f"Write it as torch's layer (nn.Conv2d, nn.Linear, ...), or {_OTHER}"
            )
        if any(True for _ in module.children()) or self._last_call(path).result is not node:
            raise InputError(f"{where}: its module {path!r} does more than this operator; {_OTHER}")
        self._check_sole(where, path)
        geometry = geometry_of(self._kernel(node))
        norm = self._norm(node)
        if norm is not None or self._bias_of(node):
            return Place(stage, path, geometry, norm)
        return Place(stage, path, geometry, None, self._takers(path, node))

    def _last_call(self, path: str) -> Call:
        return self.calls[path][-1]

    def _kernel(self, node: fx.Node) -> Kernel:
        build = self.ops[node].kernel
        assert build is not None
        return build(self.shapes)

    def _reads_own(self, node: fx.Node, path: str) -> bool:
        """Whether an operator takes weight and bias of its module, and these are all of the module's tensors."""
        given = [n for n in node.all_input_nodes if n in self.constant]
        own = {f"{path}.{name}" for name, _ in named_tensors(self.skeleton.get_submodule(path))}
        read = {str(n.target) for n in given if n.op == "get_attr"}
        return len(read) == len(given) and read == own and f"{path}.weight" in own

    def _bias_of(self, node: fx.Node) -> bool:
        return any(str(n.target).endswith(".bias") for n in node.all_input_nodes if n.op == "get_attr")

    def _check_sole(self, where: str, path: str) -> None:
        """Insist on a module that is called once and whose tensors are its own."""
        tensors = {f"{path}.{name}" for name, _ in named_tensors(self.skeleton.get_submodule(path))}
        if len(self.calls[path]) > 1:
            raise InputError(f"{where}: its module {path!r} is called {len(self.calls[path])} times; {_OTHER}")
        if tensors & self.shared:
            raise InputError(f"{where}: {min(tensors & self.shared)} is shared with other modules; {_OTHER}")

    # -- the norm ----------------------------------------------------------------------------------------------------

    def _norm(self, node: fx.Node) -> str | None:
        """The path of the batch norm that is alone behind an operator and acts on its channels."""
        users = users_of(node)
        value = value_of(node)
        follower = next(iter(users)) if len(users) == 1 else None
        channels_second = self._kernel(node).dims > 0 or value.dim() == 2
        return self._norm_path(follower) if follower is not None and channels_second else None

    def _norm_path(self, node: fx.Node) -> str | None:
        """The path of the module whose tensors a batch norm in eval mode takes; None if it is not so simple."""
        op = self.ops.get(node)
        path = call_of(node).path
        if op is None or not op.norm or operator_name(node) != "batch_norm" or not path:
            return None
        read = {str(n.target) for n in node.all_input_nodes if n in self.constant}
        module: Any = self.skeleton.get_submodule(path)
        own = {f"{path}.{name}" for name in _NORM_TENSORS if getattr(module, name, None) is not None}
        alone = len(self.calls[path]) == 1 and not own & self.shared
        return path if read == own and alone and isinstance(getattr(module, "eps", None), float) else None

    # -- who takes in a bias -----------------------------------------------------------------------------------------

    def _takers(self, path: str, start: fx.Node) -> tuple[Taker, ...]:
        """Follow a constant per channel through the graph to norms and biases.

        Raises:
            InputError: something else is behind the operator.
        """
        kernel = self._kernel(start)
        dim = 1 if kernel.dims else value_of(start).dim() - 1
        known: dict[fx.Node, tuple[int, Tensor, int]] = {start: (dim, torch.arange(kernel.outputs), 1)}
        takers: list[Taker] = []
        for node in self.recording.graph.nodes:
            given = [n for n in node.all_input_nodes if n in known and not asks_size(node, n)]
            if not given or ("needed" not in node.meta and node.op != "output"):
                continue
            taker = self._taker(node, known[given[0]])
            if taker is not None:
                takers.append(taker)
                continue
            passed = self._passed(node, given, known)
            if passed is None:
                raise InputError(
                    f"{path!r} has no bias and no batch norm behind it, so the merged heads' bias has to go elsewhere, "
                    f"and {describe(node)} cannot take it in; give the operator a bias (bias=True), or {_OTHER}"
                )
            if passed[2]:
                known[node] = passed
        return tuple(takers)

    def _taker(self, node: fx.Node, shift: tuple[int, Tensor, int]) -> Taker | None:
        dim, index, factor = shift
        op = self.ops.get(node)
        path = call_of(node).path
        if op is None or not path:
            return None
        if op.norm and op.affine is not None and op.affine.dim == dim and self._norm_path(node) is not None:
            return Taker(path, True, tuple(index.tolist()), factor)
        if op.kind != "kernel" or not self._reads_own(node, path) or not self._bias_of(node):
            return None
        kernel = self._kernel(node)
        channel = 1 if kernel.dims else value_of(op.inputs[0]).dim() - 1
        tensors = {f"{path}.weight", f"{path}.bias"}
        simple = channel == dim and not any(kernel.padding) and not kernel.transposed
        if not simple or len(self.calls[path]) > 1 or tensors & self.shared:
            return None
        return Taker(path, False, tuple(index.tolist()), factor)

    def _passed(
        self, node: fx.Node, given: list[fx.Node], known: dict[fx.Node, tuple[int, Tensor, int]]
    ) -> tuple[int, Tensor, int] | None:
        """What the constant is behind an operator that lets it through; None if it does not."""
        op = self.ops.get(node)
        dim, index, factor = known[given[0]]
        if op is None:
            return None
        if op.kind == "same":
            return dim, index, factor
        if op.kind == "cat":
            return self._joined(op, dim, known)
        if op.kind == "add":
            if any(known[n][0] != dim or not torch.equal(known[n][1], index) for n in given):
                return None
            signs = zip(op.inputs, op.signs, strict=True)
            return dim, index, sum(sign * known[n][2] for n, sign in signs if n in known)
        if op.kind == "move":
            found = follow(node, given[0], dim)
            return None if found is None else (found[0], index[found[1]], factor)
        return (dim, index, factor) if _is_average(op, self.shapes) and dim == 1 else None

    def _joined(
        self, op: Op, dim: int, known: dict[fx.Node, tuple[int, Tensor, int]]
    ) -> tuple[int, Tensor, int] | None:
        """The constant behind a concatenation along its channels."""
        given = [known[n] for n in op.inputs if n in known]
        if op.dim != dim or any(shift[0] != dim or shift[2] != given[0][2] for shift in given):
            return None
        parts = [known[n][1] if n in known else torch.full((value_of(n).shape[dim],), -1) for n in op.inputs]
        return dim, torch.cat(parts), given[0][2]


def _is_average(op: Op, shapes: Constants) -> bool:
    """Whether an operator averages places without any zeros among them."""
    return op.kind == "pool" and op.kernel is not None and not any(op.kernel(shapes).padding)


def geometry_of(kernel: Kernel) -> dict[str, Any]:
    """Return what a kernel is besides its tensors."""
    names = ("stride", "padding", "dilation", "output_padding", "groups", "transposed")
    return {name: getattr(kernel, name) for name in names}


def check_different(places: Collection[Place]) -> None:
    """Insist on another operator for every stage.

    Raises:
        InputError: two stages end with one.
    """
    seen: dict[str, str] = {}
    for place in places:
        if place.path in seen:
            raise InputError(f"stages {seen[place.path]!r} and {place.stage!r} both end with {place.path!r}; name one")
        seen[place.path] = place.stage
