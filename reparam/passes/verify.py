"""Run student and teacher side by side in float64 and compare every node.

Requires: a capture, the rewritten graph and its plan. Ensures: ``teacher == student[map]`` at every node to the
tolerance, or an error that names the first node where it does not hold. Parameters are converted and widened one at a
time, values are freed after their last use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from reparam.errors import VerificationError
from reparam.ops.maps import Maps, take_index
from reparam.ops.params import repeat_all
from reparam.passes.capture import Capture, key_of
from reparam.passes.example import Inputs
from reparam.passes.gradients import TAKE, is_cut_off, needs_gradients, without_gradients
from reparam.passes.meta import has_tensor
from reparam.passes.plan import Plan
from reparam.passes.seeds import generators_kept, seed
from reparam.passes.skeleton import canonical_names, copied, named_tensors
from reparam.passes.tf32 import tf32
from reparam.passes.torch_modules import without_fast_paths
from reparam.passes.trial import Trial
from reparam.passes.values import walk
from reparam.passes.world import Fetch, World, eval_mode, in_double, in_single

TOLERANCE = 1e-9
"""Relative error of a node above which verification fails. Exact expansion stays below 1e-12."""


SINGLE = 1e-3
"""The same where a network's own code had to run in single precision."""


class OtherBatch(Exception):
    """A map that is not the default layout runs over a dimension that holds the batch: it is that of the plan."""


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
    parts: Mapping[str, Any] = field(default_factory=dict)


def verify(model: nn.Module, capture: Capture, rewritten: Rewritten, plan: Plan, inputs: Inputs) -> NodeError:
    """Compare both worlds on these real inputs, in eval mode; returns the largest error.

    Parameters that are constant (fresh norms, zero-initialised branches) are varied, so that nothing hides behind
    a zero. Code without a graph that asks for single precision gets float64; where it makes such numbers in a way of
    its own (through numpy) and does not run, it runs in the student's dtype, and so does an operator without a kernel
    for float64 (quantization's); these and what follows are compared to the tolerance of that.

    Raises:
        VerificationError: a node differs; names node, operator, module and source line.
    """
    return without_gradients(lambda: _verified(model, capture, rewritten, plan, inputs))


def _verified(model: nn.Module, capture: Capture, rewritten: Rewritten, plan: Plan, inputs: Inputs) -> NodeError:
    plain = _student_tensors(model)
    tensors = _teacher_tensors(model, plan, plain)
    student = World(capture.graph, capture.root, plain)
    if plan.branches:
        trial = Trial(plan, canonical_names(model), plain, tensors)
        student.tensors, tensors = trial.student, trial.teacher
    teacher = World(rewritten.graph, capture.root, tensors, rewritten.steps, plan.attributes, rewritten.parts)
    partner = {new: old for old, new in rewritten.nodes.items()}
    placeholders = [n for n in capture.graph.nodes if n.op == "placeholder"]
    values = iter([v for v in [*inputs[0], *inputs[1].values()] if has_tensor(v)])
    feeds = {node.name: next(values) for node in placeholders}
    worst = NodeError(0.0, "", "", "", "")
    sizes: dict[fx.Node, float] = {}
    unsteady: set[fx.Node] = set()
    single: set[fx.Node] = set()
    recorded: Any = None
    device = _device(inputs)
    with generators_kept(device), in_double(), tf32(False):  # what runs in single precision
        for node in rewritten.graph.nodes:
            seed(0, device)
            _run_wide(teacher, node, feeds)
            old = partner.get(node)
            if old is not None and old.op == "get_attr":
                student.run(old, feeds)  # a weight alone obeys its parameter map, not the invariant
            elif old is not None:
                seed(0, device)
                student.run(old, feeds)
                if teacher.single or student.single or single & set(old.all_input_nodes):
                    single.add(old)
                given = max((sizes.get(n, 0.0) for n in old.all_input_nodes), default=0.0)
                try:
                    limit = SINGLE if old in single else TOLERANCE
                    found = _compare(old, student.env[old], teacher.env[node], plan, given, limit)
                except VerificationError:
                    if not (_unsteady(student, old, device) or unsteady & set(old.all_input_nodes)):
                        raise
                    unsteady.add(old)
                    found = worst
                sizes[old] = _size(student.env[old], given)
                worst = worst if old in single else max(worst, found, key=lambda e: e.error)
                recorded = student.env[old]
            if old is not None:
                student.free(old)
            teacher.free(node)
        _compare_with_model(capture, student, recorded, inputs)
    return worst


def _run_wide(teacher: World, node: fx.Node, feeds: dict[str, Any]) -> None:
    try:
        teacher.run(node, feeds)
    except RuntimeError as error:
        if node.target not in TAKE or not is_cut_off(error):
            raise
        raise VerificationError(
            f"node {node.name} ({node.meta.get('source', '')}) takes a gradient with respect to a value that is wider "
            "in the teacher, and there is no rule for that. Pass ignore=[...] with the layers in front of that value, "
            "or move the code that takes the gradient into a submodule, which is kept as it is"
        ) from error


def _device(inputs: Inputs) -> torch.device:
    """Where both worlds run."""
    return next((v.device for v in pytree.tree_leaves(inputs) if isinstance(v, Tensor)), torch.device("cpu"))


def _unsteady(student: World, node: fx.Node, device: torch.device) -> bool:
    """Whether code without a graph makes decisions that rounding turns over: which boxes a detector keeps.

    Its parts have been compared at every node. It is asked again with weights and inputs that differ by rounding.
    """
    if node.op != "call_module" or node.meta.get("val") is not None:
        return False
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: student.env[n])
    before, tensors = student.env[node], student.tensors
    for number in range(1, 4):
        seed(number, device)

        def nudged(v: Any) -> Any:
            return v * (1 + 1e-15 * torch.randn_like(v)) if isinstance(v, Tensor) and v.is_floating_point() else v

        student.tensors = lambda name: nudged(tensors(name))
        after = student.call(node, *pytree.tree_map(nudged, (args, kwargs)))
        student.tensors = tensors
        pairs = list(zip(_tensors(before), _tensors(after), strict=False))
        if any(a.shape != b.shape or _difference(a, b, {}) > TOLERANCE for a, b in pairs):
            return True
    return False


def _compare_with_model(capture: Capture, world: World, recorded: Any, inputs: Inputs) -> None:
    """Compare the recorded graph with the model itself: what the capture missed, no comparison of two graphs shows."""
    if "" in capture.leaves:
        return  # the recorded graph is a call of the model
    model = copied(capture.root.get_submodule(capture.path))
    eager = _run_model(model, capture, world, inputs, 0)
    if eager is None:
        return
    ours = _in_outputs(recorded)
    errors = [_difference(a, b, {}) for a, b in zip(eager, ours, strict=True)]
    if max(errors, default=0.0) <= TOLERANCE:
        return
    again = _run_model(model, capture, world, inputs, 1) or []
    for error, a, b in zip(errors, eager, again, strict=True):
        if error > TOLERANCE and _difference(a, b, {}) <= TOLERANCE:  # else it is random
            raise VerificationError(
                f"{type(model).__name__}: the recorded graph does not compute what the model computes (relative error "
                f"{error:.2e}); the capture misses a side effect of its code, for instance a change in "
                "place that is read under another name. Write that operator out of place, and please report it"
            )


def _run_model(model: nn.Module, capture: Capture, world: World, inputs: Inputs, number: int) -> list[Tensor] | None:
    """Run the model's own code with a world's tensors; None where it does not run in float64."""
    if capture.path:
        _drop_hooks(model)  # a part's own hooks stay with its module
    prefix = f"{capture.path}." if capture.path else ""
    tensors = {name: world.tensors(prefix + name) for name, first in canonical_names(model).items() if name == first}
    args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs)
    seed(number, _device(inputs))
    with eval_mode(model), without_fast_paths(), in_double():
        for name in {"", *capture.specialised}:
            if ":" not in name:
                model.get_submodule(name).training = capture.in_train_mode
        try:
            result = functional_call(model, tensors, args, kwargs)
        except (RuntimeError, TypeError) as error:
            if needs_gradients(error) and not torch.is_grad_enabled():
                raise
            return None  # plain tensor attributes of another dtype
    return _in_outputs(result)


def _drop_hooks(module: nn.Module) -> None:
    for name, value in vars(module).items():
        if name in ("_forward_hooks", "_forward_pre_hooks"):
            vars(module)[name] = type(value)()


def _in_outputs(value: Any) -> list[Tensor]:
    return [v.detach() for v in pytree.tree_leaves(_open(value)) if isinstance(v, Tensor)]


def _open(value: Any) -> Any:
    """Open dataclass-like outputs."""
    fields = getattr(value, "__dataclass_fields__", None)
    return {name: getattr(value, name) for name in fields} if fields else value


def _compare(node: fx.Node, s: Any, t: Any, plan: Plan, given: float, limit: float = TOLERANCE) -> NodeError:
    maps = plan.value_maps.get(key_of(node), ())
    mine, wide = _tensors(s), _tensors(t)
    pairs = zip(mine, wide, strict=False)
    worst = 0.0 if len(mine) == len(wide) else math.inf
    for k, (a, b) in enumerate(pairs):
        size = _largest(a) if a.is_floating_point() and a.numel() else 0.0
        floor = given if size < _NOTHING * given else given * _CANCELS
        worst = max(worst, _difference(a, b, dict(maps[k]) if k < len(maps) else {}, floor))
    operator_name = getattr(node.target, "__name__", str(node.target))
    found = NodeError(worst, node.name, operator_name, node.meta.get("module", ""), node.meta.get("source", ""))
    if not worst <= limit:
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
    return [leaf.detach() for _path, leaf in walk(value) if isinstance(leaf, Tensor)]


def _difference(student: Tensor, teacher: Tensor, maps: Maps, floor: float = 0.0) -> float:
    """Return max |teacher - repeated student| / max |student|; infinite where the shapes do not fit.

    A student smaller than ``floor`` is measured against that.
    """
    plain = {d: m.innermost for d, m in maps.items() if m.innermost is not None}
    # The default layout says the same of every size: a dimension may hold the batch.
    wide = [n * (plain.get(d) or 1) for d, n in enumerate(student.shape)]
    if any(m.size != student.shape[d] for d, m in maps.items() if d not in plain):
        raise OtherBatch
    if tuple(teacher.shape) != take_index(wide, {d: m for d, m in maps.items() if d not in plain}):
        return float("inf")
    if not (student.is_floating_point() and teacher.is_floating_point()) or not student.numel():
        return 0.0  # bool and int may flip on a rounding; what they lead to is compared
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


def _student_tensors(model: nn.Module) -> Fetch:
    tensors = dict(named_tensors(model))
    constant: dict[str, bool] = {}

    def fetch(name: str) -> Any:
        tensor = tensors.get(name)
        if tensor is None:
            return None
        tensor = tensor.detach()
        if not tensor.is_floating_point():
            return tensor.clone()
        if name not in constant:  # each is fetched for both networks and for the model
            constant[name] = _is_constant(tensor)
        value = tensor.to(torch.float64, copy=True)
        if constant[name]:
            generator = torch.Generator().manual_seed(sum(name.encode()))
            value += 0.25 * torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value.device)
        return value

    return fetch


def _is_constant(tensor: Tensor) -> bool:
    head = tensor.flatten()[:16]
    return tensor.numel() > 1 and bool((head == head[0]).all()) and bool((tensor == head[0]).all())


def _teacher_tensors(model: nn.Module, plan: Plan, student: Fetch) -> Fetch:
    canonical = canonical_names(model)

    def fetch(name: str) -> Any:
        value = student(canonical.get(name, name))
        param_map = plan.params.get(canonical.get(name, name))
        if value is None or param_map is None:
            return value
        generator = torch.Generator().manual_seed(sum(name.encode()))
        with in_single():  # the noise; the weight is in float64 already
            return param_map.widen(value, 0.25, generator)

    return fetch
