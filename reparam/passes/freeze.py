"""A planning pass frozen into a :class:`~reparam.passes.plan.Plan`: maps, edits, and what a person wants to know."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

from reparam.ops.params import ParamMap
from reparam.passes.capture import Capture, key_of
from reparam.passes.example import Inputs, describe_inputs
from reparam.passes.layers import find_layers, resolve
from reparam.passes.modes import require
from reparam.passes.plan import Plan
from reparam.passes.planner import Planner
from reparam.passes.ratios import Ratio, Ratios
from reparam.passes.registry import find_rule
from reparam.passes.rows import EditPlan, LayerPlan
from reparam.passes.skeleton import canonical_names, named_tensors
from reparam.passes.splits import Choices
from reparam.passes.state import State, operator_name
from reparam.passes.streams import Streams
from reparam.passes.values import Pair, walk


def make_plan(
    model: nn.Module,
    capture: Capture,
    inputs: Inputs,
    ratio: Ratio,
    ignored: dict[str, str],
    choices: Choices,
) -> tuple[Plan, State]:
    """Plan to a fixpoint and freeze the decisions.

    Args:
        model: the student.
        capture: its recorded forward pass.
        inputs: example input on the meta device.
        ratio: as given by the user.
        ignored: parameter name -> reason, for parameters that must stay as they are.
        choices: see :class:`~reparam.passes.planner.Planner`.
    """
    state = Planner(capture, _ratios(capture, ratio, ignored, choices), ignored, choices=choices).run()
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model)}
    params = {name: m for name, m in state.params.items() if not m.is_identity}
    wide = {name for name, m in params.items() if m.wide_shape != shapes.get(name)}
    made = Plan(
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
        notes=(
            *_notes(capture),
            *_without_rules(capture, wide),
        ),
        specialised=tuple(sorted(capture.specialised)),
    )
    return made, state


def _ratios(capture: Capture, ratio: Ratio, ignored: dict[str, str], choices: Choices) -> Ratios:
    """Decide the ratio of every layer; for a mapping, a planning pass with one ratio shows which layers must agree."""
    if isinstance(ratio, int):
        return Ratios(ratio)
    streams = Streams()
    state = Planner(capture, Ratios(2), ignored, streams, choices).run()
    return resolve(ratio, capture.root, find_layers(capture, streams.layers), state.meetings, ignored)


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
            # The operator may see another form of it: normalised, reshaped, computed from it.
            wide = state.params[name].wide_shape if name in state.params else module_shape
            layer = dataclasses.replace(layer, shape=module_shape, wide_shape=wide)
            if not (layer.widened or layer.reason):
                layer = dataclasses.replace(layer, reason=_COMPUTED)
            found.append(layer)
        elif _is_linear_weight(model, name):
            reason = ignored.get(name) or _unmet(capture, state, name)
            operator = type(model.get_submodule(name.rpartition(".")[0])).__name__
            found.append(LayerPlan(name, operator, "", module_shape, module_shape, False, False, reason, 0, 0))
    return found


_COMPUTED = "what is computed from it, from parameters alone, keeps its width"


def _is_linear_weight(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return leaf == "weight" and isinstance(module, kinds)


def _unmet(capture: Capture, state: State, name: str) -> str:
    for path, reason in (*state.refused.items(), *capture.leaves.items()):
        if name.startswith(path + "."):
            return f"inside {path}, which is kept as it is: {reason}"
    if any(node.op == "get_attr" and node.target == name for node in capture.nodes()):
        return _COMPUTED
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
    paths = {node.meta["specialised"] for node in capture.nodes() if node.target is require}
    guarded = [path or "the network itself" for path in sorted(paths)]
    notes = (
        [
            "recorded for what the example input is like, because they branch on sizes or other properties: "
            f"{', '.join(guarded)}; inputs that would take another branch are refused when the teacher runs"
        ]
        if guarded
        else []
    )
    if not capture.eval_only:
        return notes
    return [
        *notes,
        "the network branches on its training flag and its train mode cannot be recorded: the teacher keeps the eval "
        "mode branch in both modes",
    ]


def _without_rules(capture: Capture, wide: Collection[str]) -> list[str]:
    """Name the operators without a rule, and the modules without a graph, that read weights.

    Nothing else says why these weights keep their width: the operators that take what comes out have no say in it.

    Args:
        capture: the recorded network.
        wide: weights that are widened.
    """
    reading: dict[str, dict[str, None]] = {}
    weights: dict[fx.Node, str] = {}  # and what is computed from one weight alone
    for node in capture.nodes():
        if node.op == "get_attr" and isinstance(node.meta.get("val"), nn.Parameter):
            if node.meta["val"].dim() > 1 and node.target not in wide:
                weights[node] = str(node.target)
            continue
        read = {weights[source]: None for source in node.all_input_nodes if source in weights}
        if node.op == "call_module":
            why = capture.leaves.get(str(node.target), "it has no graph")
            reading.setdefault(f"{node.target}, which is kept as it is ({why})", {}).update(read)
        elif node.op in ("call_function", "call_method"):
            if find_rule(node.op, node.target) is None:
                reading.setdefault(f"{operator_name(node)}, which has no rule", {}).update(read)
            elif len(read) == 1 and all(source in weights for source in node.all_input_nodes):
                weights[node] = next(iter(read))
    notes = []
    for reader, read in reading.items():
        if read:
            first, *others = read
            notes.append(f"{first}{f' and {len(others)} more' * bool(others)}: kept at student width, read by {reader}")
    exported = (node.target for node in capture.nodes() if isinstance(node.target, torch._ops.OpOverload))
    if any(target.namespace == "aten" for target in exported):
        notes.append("operators such as aten.conv2d.default are those of exported programs: plan the module itself")
    return notes


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
