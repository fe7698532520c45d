"""``plan`` and ``expand``: capture, plan to a fixpoint, rewrite, verify."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from reparam.ops.params import ParamMap
from reparam.passes.example import Inputs, batch_of, describe_inputs, example_for, normalise, random_like
from reparam.passes.plan import EditPlan, LayerPlan, Plan
from reparam.passes.planner import Planner
from reparam.passes.skeleton import canonical_names, named_tensors, skeleton_of
from reparam.passes.state import State, operator_name
from reparam.passes.teacher import Teacher
from reparam.passes.tracer import Capture, key_of, trace
from reparam.passes.validate import check_branches, check_model, check_noise, check_ratio, ignored_parameters
from reparam.passes.values import Pair, walk
from reparam.passes.verify import Rewritten, verify
from reparam.passes.widen import build_teacher, rewrite


def plan(
    model: nn.Module,
    ratio: int = 2,
    *,
    branches: Any = None,
    example_input: Any = None,
    ignore: Iterable[str | type] = (),
) -> Plan:
    """Return what ``expand`` would do to ``model``, and change nothing. No weight is read: a meta model will do.

    Args:
        model: the student.
        ratio: replicas per channel, an int >= 1.
        branches: branch recipe; this release has none.
        example_input: a tensor, a tuple of positional inputs or a dict of keyword inputs; found from timm's
            configuration or the first layers where None.
        ignore: names, globs or module types of layers that keep their width.

    Raises:
        InputError: a wrong argument.
        ModelError: a model that cannot be expanded.
        CaptureError: the forward pass cannot be recorded.
    """
    ratio = check_ratio(ratio)
    check_branches(branches)
    check_model(model, values=False)
    capture, inputs = capture_model(model, example_input)
    return make_plan(model, capture, inputs, ratio, ignored_parameters(model, ignore))


def expand(
    model: nn.Module,
    ratio: int = 2,
    *,
    branches: Any = None,
    example_input: Any = None,
    noise: float = 0.25,
    ignore: Iterable[str | type] = (),
    verify: bool = True,
) -> Teacher:
    """Return a dynamic teacher: a network with ``ratio`` times the channels that computes the function of ``model``.

    The model is not touched. The result is an ``fx.GraphModule`` with the student's state_dict keys plus the
    student's own norm statistics under ``student_statistics.``, on its device, in its dtypes and mode.

    Args:
        model: the student.
        ratio: replicas per channel, an int >= 1.
        branches: branch recipe; this release has none.
        example_input: see :func:`plan`.
        noise: symmetry breaking, relative to the rms of each weight, in [0, 1]. It sums to zero over the replicas
            of each input, so the function stays exact. Drawn from torch's default generator.
        ignore: see :func:`plan`.
        verify: run both networks once in float64 and compare every node.

    Source: GPD (ICLR 2025), inverse reparameterization, channel level; exact here.

    Raises:
        InputError, ModelError, CaptureError: see :func:`plan`; also NaN or Inf among the weights.
        VerificationError: a node of the teacher differs from the student's.
    """
    ratio, noise = check_ratio(ratio), check_noise(noise)
    check_branches(branches)
    check_model(model)
    capture, inputs = capture_model(model, example_input)
    made = make_plan(model, capture, inputs, ratio, ignored_parameters(model, ignore))
    if verify:
        verify_plan(model, capture, made, inputs, batch=_verified_batch(example_input))
    return build_teacher(model, capture, made, noise)


def _verified_batch(example_input: Any) -> int | None:
    """One sample is enough where the input was found; what the user gave is used as it is."""
    return 1 if example_input is None else batch_of(normalise(example_input))


def capture_model(model: nn.Module, example_input: Any = None) -> tuple[Capture, Inputs]:
    """Record the forward pass of ``model``; also returns the example input on the meta device."""
    skeleton = skeleton_of(model)
    inputs = example_for(model, skeleton, example_input)
    return trace(skeleton, *inputs), inputs


def verify_plan(model: nn.Module, capture: Capture, made: Plan, inputs: Inputs, batch: int | None) -> float:
    """Compare student and teacher at every node in float64; returns the largest relative error."""
    device = next(model.parameters()).device
    if device.type == "meta":
        return 0.0
    # MPS has no float64.
    where = torch.device("cpu") if device.type == "mps" else device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        real = random_like(inputs, where, torch.float64, batch)
    worst = 0.0
    for part in [capture] if capture.train is None else [capture, capture.train]:
        steps: dict[str, nn.Module] = {}
        graph, nodes = rewrite(part.graph, made.edits, steps)
        steps = {name: step.to(device) for name, step in steps.items()}
        worst = max(worst, verify(model, part, Rewritten(graph, steps, nodes), made, real).error)
    return worst


def make_plan(model: nn.Module, capture: Capture, inputs: Inputs, ratio: int, ignored: dict[str, str]) -> Plan:
    """Plan to a fixpoint and freeze the decisions."""
    state = Planner(capture, ratio, ignored).run()
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model)}
    params = {name: m for name, m in state.params.items() if not m.is_identity}
    return Plan(
        model=type(model).__name__,
        ratio=ratio,
        inputs=describe_inputs(*inputs),
        params=params,
        edits={key_of(node): _freeze(edit) for node, edit in state.edits.items() if edit},
        attributes=state.attributes,
        statistics=tuple(name for name in shapes if name in state.statistics),
        layers=tuple(_layers(model, capture, state, shapes, ignored)),
        contractions=tuple(state.contractions.values()),
        value_maps=_value_maps(capture, state),
        leaves=capture.leaves,
        graph=fingerprint(capture),
        parameters=sum(p.numel() for p in model.parameters()),
        wide_parameters=_wide_parameters(model, params),
        notes=tuple(_notes(capture)),
    )


def _freeze(edit: Any) -> EditPlan:
    return EditPlan(
        tuple((path, tuple(steps)) for path, steps in edit.steps.items()),
        tuple(edit.constants.items()),
        tuple(edit.out),
    )


def _value_maps(capture: Capture, state: State) -> dict[str, Any]:
    result = {}
    for node in (n for graph in capture.graphs for n in graph.nodes):
        leaves = [leaf for _path, leaf in walk(state.env.get(node)) if isinstance(leaf, (Pair, Tensor))]
        maps = tuple(tuple(leaf.maps.items()) if isinstance(leaf, Pair) else () for leaf in leaves)
        if any(maps):
            result[key_of(node)] = maps
    return result


def _layers(
    model: nn.Module, capture: Capture, state: State, shapes: dict[str, tuple[int, ...]], ignored: dict[str, str]
) -> list[LayerPlan]:
    """Every weight of a linear operator, in the model's order; also those that no rule has met."""
    found = []
    canonical = canonical_names(model)
    for name, module_shape in shapes.items():
        if canonical[name] != name:
            continue  # tied: it stands under its first name
        layer = state.layers.get(name)
        if layer is not None:
            wide = state.params[name].wide_shape if name in state.params else layer.shape
            found.append(dataclasses.replace(layer, wide_shape=wide))
        elif _is_linear_weight(model, name):
            reason = ignored.get(name) or _unmet(capture, name)
            operator = type(model.get_submodule(name.rpartition(".")[0])).__name__
            found.append(LayerPlan(name, operator, "", module_shape, module_shape, False, False, reason, 0, 0))
    return found


def _is_linear_weight(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return leaf == "weight" and isinstance(module, kinds)


def _unmet(capture: Capture, name: str) -> str:
    for path, reason in capture.leaves.items():
        if name.startswith(path + "."):
            return f"inside {path}, which is kept as it is: {reason}"
    return "not used by this forward pass"


def _wide_parameters(model: nn.Module, params: dict[str, ParamMap]) -> int:
    total = 0
    for name, parameter in model.named_parameters():
        shape = params[name].wide_shape if name in params else tuple(parameter.shape)
        count = 1
        for n in shape:
            count *= n
        total += count
    return total


def _notes(capture: Capture) -> list[str]:
    if not capture.eval_only:
        return []
    return [
        "the network branches on its training flag and its train mode cannot be recorded: the teacher keeps the eval "
        "mode branch in both modes"
    ]


def fingerprint(capture: Capture) -> str:
    """Return a short digest of the structure of the captured graphs: operators, names and constants."""
    digest = hashlib.sha256()
    for node in (n for graph in capture.graphs for n in graph.nodes):
        digest.update(
            f"{node.op} {node.name} {operator_name(node)} {_stable(node.args)} {_stable(node.kwargs)}\n".encode()
        )
    return digest.hexdigest()[:16]


def _stable(value: Any) -> str:
    """A representation without memory addresses."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_stable(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "(" + ",".join(map(_stable, value)) + ")"
    if isinstance(value, (fx.Node, int, float, str, bool, slice, type(None), torch.dtype, torch.device)):
        return "device" if isinstance(value, torch.device) else str(value)
    return type(value).__name__
