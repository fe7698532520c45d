"""Run student and teacher side by side in float64 and compare every node.

Requires: a capture, the rewritten graph and its plan. Ensures: ``teacher == student[map]`` at every node to the
tolerance, or an error that names the first node where it does not hold. Parameters are converted and widened one at a
time, values are freed after their last use.
"""

from __future__ import annotations

import contextlib
import copy
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from reparam.errors import VerificationError
from reparam.ops.maps import Maps, take_index
from reparam.ops.params import repeat_all
from reparam.passes.example import Inputs
from reparam.passes.plan import Plan
from reparam.passes.skeleton import canonical_names, module_and_attribute, named_tensors
from reparam.passes.tracer import Capture, key_of
from reparam.passes.values import walk
from reparam.passes.widen import stated_widths

TOLERANCE = 1e-9
"""Relative error of a node above which verification fails. Exact expansion stays below 1e-12."""


@dataclass(frozen=True)
class NodeError:
    """The largest error that was met: max |difference| / max |student|, absolute where the node is 0."""

    error: float
    node: str
    operator: str
    module: str
    source: str


@dataclass
class Rewritten:
    """A teacher's graph before it has weights: what ``rewrite`` returns."""

    graph: fx.Graph
    steps: dict[str, nn.Module]
    nodes: dict[fx.Node, fx.Node]


def verify(model: nn.Module, capture: Capture, rewritten: Rewritten, plan: Plan, inputs: Inputs) -> NodeError:
    """Compare both worlds on these real inputs, in eval mode; returns the largest error.

    Parameters that are constant (fresh norms, zero-initialised branches) are varied, so that nothing hides behind
    a zero.

    Raises:
        VerificationError: a node differs; names node, operator, module and source line.
    """
    student = World(capture.graph, capture.root, _student_tensors(model))
    tensors = _teacher_tensors(model, plan, student.tensors)
    teacher = World(rewritten.graph, capture.root, tensors, rewritten.steps, plan.attributes)
    partner = {new: old for old, new in rewritten.nodes.items()}
    leaves = [v for v in pytree.tree_leaves(inputs) if isinstance(v, Tensor)]
    placeholders = [n for n in capture.graph.nodes if n.op == "placeholder"]
    values = iter([v for v in [*inputs[0], *inputs[1].values()] if _has_tensor(v)])
    feeds = {node.name: next(values) for node in placeholders}
    worst = NodeError(0.0, "", "", "", "")
    sizes: dict[fx.Node, float] = {}
    recorded: Any = None
    devices = [leaves[0].device] if leaves and leaves[0].device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        for node in rewritten.graph.nodes:
            torch.manual_seed(0)
            teacher.run(node, feeds)
            old = partner.get(node)
            if old is not None and old.op == "get_attr":
                student.run(old, feeds)  # a weight alone obeys its parameter map, not the invariant
            elif old is not None:
                torch.manual_seed(0)
                student.run(old, feeds)
                given = max((sizes.get(n, 0.0) for n in old.all_input_nodes), default=0.0)
                found = _compare(old, student.env[old], teacher.env[node], plan, given)
                sizes[old] = _size(student.env[old], given)
                worst = max(worst, found, key=lambda e: e.error)
                recorded = student.env[old]
            if old is not None:
                student.free(old)
            teacher.free(node)
        _compare_with_model(capture, student, recorded, inputs)
    return worst


def _compare_with_model(capture: Capture, world: World, recorded: Any, inputs: Inputs) -> None:
    """Compare the recorded graph with the model itself: what the capture missed, no comparison of two graphs shows."""
    model = copy.deepcopy(capture.root)
    tensors = {name: world.tensors(name) for name, first in canonical_names(model).items() if name == first}
    results = []
    for seed in (0, 1):
        args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs)
        torch.manual_seed(seed)
        with _eval_mode(model):
            model.training = capture.in_train_mode
            try:
                results.append(functional_call(model, {n: t.clone() for n, t in tensors.items()}, args, kwargs))
            except (RuntimeError, TypeError):
                return  # plain tensor attributes of another dtype: the model does not run in float64
    eager, again = ([v for v in pytree.tree_leaves(_open(r)) if isinstance(v, Tensor)] for r in results)
    ours = [v for v in pytree.tree_leaves(_open(recorded)) if isinstance(v, Tensor)]
    for a, b, c in zip(eager, again, ours, strict=True):
        if _difference(a, c, {}) > TOLERANCE and _difference(a, b, {}) <= TOLERANCE:
            raise VerificationError(
                f"{type(model).__name__}: the recorded graph does not compute what the model computes (relative error "
                f"{_difference(a, c, {}):.2e}); the capture misses a side effect of its code, for instance a change in "
                "place that is read under another name. Write that operator out of place, and please report it"
            )


def _open(value: Any) -> Any:
    """Open dataclass-like outputs."""
    fields = getattr(value, "__dataclass_fields__", None)
    return {name: getattr(value, name) for name in fields} if fields else value


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _compare(node: fx.Node, s: Any, t: Any, plan: Plan, given: float) -> NodeError:
    maps = plan.value_maps.get(key_of(node), ())
    pairs = zip(_tensors(s), _tensors(t), strict=False)
    worst = 0.0
    for k, (a, b) in enumerate(pairs):
        size = _largest(a) if a.is_floating_point() and a.numel() else 0.0
        floor = given if size < _NOTHING * given else given * _CANCELS
        worst = max(worst, _difference(a, b, dict(maps[k]) if k < len(maps) else {}, floor))
    operator_name = getattr(node.target, "__name__", str(node.target))
    found = NodeError(worst, node.name, operator_name, node.meta.get("module", ""), node.meta.get("source", ""))
    if not worst <= TOLERANCE:
        raise VerificationError(
            f"student and teacher differ at node {found.node} ({found.operator} in module "
            f"{found.module or 'the network itself'!r}, {found.source}): relative error {worst:.2e}. "
            "The rule of this operator is wrong for this use: please report it; meanwhile pass "
            f"ignore=[...] with the layers around it, or verify=False if you know better"
        )
    return found


_CANCELS = 1e-3
"""A value that is smaller than this share of what it was computed from is a difference of large numbers (the mean of
``x - x.mean()``): both networks round it, each in its own order, and its error is measured against that share."""

_NOTHING = 1e-12
"""A value below this share of what it was computed from is 0 but for rounding, and is measured against that itself."""


def _size(value: Any, given: float) -> float:
    """Return the size of a node for the errors behind it: where nothing but rounding is left, that of its inputs."""
    own = max((_largest(v) for v in _tensors(value) if v.is_floating_point() and v.numel()), default=0.0)
    own = own if math.isfinite(own) else 0.0
    return given if own < _NOTHING * given else own


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for _path, leaf in walk(value) if isinstance(leaf, Tensor)]


def _difference(student: Tensor, teacher: Tensor, maps: Maps, floor: float = 0.0) -> float:
    """Return max |teacher - repeated student| / max |student|; infinite where the shapes do not fit.

    A student smaller than ``floor`` is measured against that.
    """
    if tuple(teacher.shape) != take_index(student.shape, maps):
        return float("inf")
    if not (student.is_floating_point() and teacher.is_floating_point()) or not student.numel():
        return 0.0  # bool and int may flip on a rounding; what they lead to is compared
    plain = {d: m.innermost for d, m in maps.items() if m.innermost is not None}
    expected = repeat_all(student, {d: m for d, m in maps.items() if d not in plain})
    # Broadcast over the replicas instead of copying the student's value r times.
    split = [n for d, size in enumerate(expected.shape) for n in ((size, plain[d]) if d in plain else (size,))]
    ones = [n for d, size in enumerate(expected.shape) for n in ((size, 1) if d in plain else (size,))]
    expected = expected.reshape(ones)
    found = teacher.reshape(split)
    scale, difference = _largest(expected), _largest(found - expected)
    if not (math.isfinite(scale) and math.isfinite(difference)):
        if not torch.equal(found.isfinite(), expected.isfinite().expand_as(found)):
            return float("inf")
        expected, found = expected.nan_to_num(0, 0, 0), found.nan_to_num(0, 0, 0)
        scale, difference = _largest(expected), _largest(found - expected)
    scale = max(scale, floor)
    return difference / scale if scale > 0 else difference


def _largest(value: Tensor) -> float:
    low, high = torch.aminmax(value)
    return max(-float(low), float(high)) if low == low else float("nan")


Fetch = Callable[[str], Any]


def _student_tensors(model: nn.Module) -> Fetch:
    tensors = dict(named_tensors(model))

    def fetch(name: str) -> Any:
        tensor = tensors.get(name)
        return None if tensor is None else _varied(name, tensor.detach())

    return fetch


def _varied(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.clone()
    value = tensor.double()
    head = value.flatten()[:16]
    if value.numel() > 1 and bool((head == head[0]).all()) and bool((value == head[0]).all()):
        generator = torch.Generator().manual_seed(sum(name.encode()))
        value = value + 0.25 * torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value.device)
    return value


def _teacher_tensors(model: nn.Module, plan: Plan, student: Fetch) -> Fetch:
    canonical = canonical_names(model)

    def fetch(name: str) -> Any:
        value = student(canonical.get(name, name))
        param_map = plan.params.get(canonical.get(name, name))
        if value is None or param_map is None:
            return value
        generator = torch.Generator().manual_seed(sum(name.encode()))
        return param_map.widen(value, 0.25, generator)

    return fetch


class World:
    """One of the two networks: its graph, where its tensors come from, and the module attributes that are its own."""

    def __init__(
        self,
        graph: fx.Graph,
        root: nn.Module,
        tensors: Fetch,
        steps: dict[str, nn.Module] | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        self.root, self.tensors, self.steps = root, tensors, steps or {}
        self.attributes = attributes
        self.env: dict[fx.Node, Any] = {}
        order = {node: k for k, node in enumerate(graph.nodes)}
        self.last: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            end = max([node, *node.users], key=order.__getitem__)
            self.last.setdefault(end, []).append(node)

    def run(self, node: fx.Node, feeds: dict[str, Any]) -> None:
        """Compute one node."""
        if node.op == "placeholder":
            self.env[node] = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, feeds[node.name])
            return
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.env[n])
        args, kwargs = pytree.tree_map(_wide_dtype, (args, kwargs))
        self.env[node] = self._call(node, args, kwargs)

    def free(self, node: fx.Node) -> None:
        """Drop the values that nothing needs after ``node``."""
        for done in self.last.get(node, ()):
            self.env.pop(done, None)

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        target: Any = node.target
        if node.op == "output":
            return args[0]
        if node.op == "get_attr":
            return self._attribute(target)
        if node.op == "call_method":
            name = "double" if target in ("half", "float", "bfloat16") else target
            return getattr(args[0], name)(*args[1:], **kwargs)
        if node.op == "call_module":
            return self._module(target, args, kwargs)
        return target(*args, **kwargs)

    def _attribute(self, name: str) -> Any:
        if name.rpartition(".")[2] == "training":
            return False
        value = self.tensors(name)
        value = operator.attrgetter(name)(self.root) if value is None else value
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    def _widths(self, module: nn.Module, tensors: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
        if self.attributes is None:
            return contextlib.nullcontext()
        found: dict[str, Any] = {}
        for path, child in module.named_modules(prefix="x"):
            weight = tensors.get(f"{path}.weight".removeprefix("x."))
            found |= {f"{path}.{n}".removeprefix("x."): v for n, v in stated_widths(child, weight).items()}
        return _attributes(module, found)

    def _module(self, name: str, args: Any, kwargs: Any) -> Any:
        step = self.steps.get(name.rpartition(".")[2]) if name.startswith("reparam_steps.") else None
        if step is not None:
            return step(*args, **kwargs)
        module = self.root.get_submodule(name)
        tensors = {n: self.tensors(f"{name}.{n}") for n, _t in named_tensors(module)}
        own = {n: v for n, v in (self.attributes or {}).items() if n.startswith(f"{name}.")}
        with _eval_mode(module), _attributes(self.root, own), self._widths(module, tensors):
            return functional_call(module, tensors, args, kwargs)


def _wide_dtype(value: Any) -> Any:
    return (
        torch.float64
        if value in (torch.float32, torch.float16, torch.bfloat16) and isinstance(value, torch.dtype)
        else value
    )


@contextlib.contextmanager
def _attributes(root: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    """Set module attributes (``"a.b.groups"``) for the time of a call."""
    places = [(*module_and_attribute(root, path), value) for path, value in values.items()]
    before = [getattr(module, name) for module, name, _value in places]
    try:
        for module, name, value in places:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _value), value in zip(places, before, strict=True):
            setattr(module, name, value)


class _eval_mode:
    def __init__(self, module: nn.Module) -> None:
        self.modes = [(m, m.training) for m in module.modules()]

    def __enter__(self) -> None:
        for module, _mode in self.modes:
            module.training = False

    def __exit__(self, *error: object) -> None:
        for module, mode in self.modes:
            module.training = mode
