"""Apply a plan: the wider module tree and the rewritten graph."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from reparam.ops.steps import STEPS, Step
from reparam.passes.blocks import add_blocks, insert_blocks
from reparam.passes.capture import Capture, key_of
from reparam.passes.contexts import NOTED, surround
from reparam.passes.parts import HOST, BoundPart, Given, bind, relative
from reparam.passes.plan import STATISTICS, Plan
from reparam.passes.program import Program
from reparam.passes.rows import EditPlan
from reparam.passes.skeleton import canonical_names, module_and_attribute, rebuild
from reparam.passes.teacher import Teacher, statistics_tree
from reparam.passes.torch_recurrent import compact


def build_teacher(model: nn.Module, capture: Capture, plan: Plan, noise: float) -> Teacher:
    """Return the teacher of ``model`` under ``plan``; the model is not touched."""
    canonical = canonical_names(model)

    def widen(name: str, tensor: Tensor) -> Tensor:
        param_map = plan.params.get(canonical[name])
        return tensor.clone() if param_map is None else param_map.widen(tensor, noise)

    root = rebuild(model, widen)
    for path, value in plan.attributes.items():
        holder, name = module_and_attribute(root, path)
        setattr(holder, name, value)
    describe_widths(root)
    compact(root)
    for path in ("", *capture.parts):
        for name, value in vars(capture.root.get_submodule(path)).items():
            if name.startswith("_tensor_constant"):
                root.get_submodule(path).register_buffer(name, value, persistent=False)
    if plan.statistics and plan.own_statistics:
        root.add_module(STATISTICS, statistics_tree(model, plan.statistics))
    add_blocks(root, model, plan, noise)
    steps: dict[str, nn.Module] = {}
    programs = []
    for part in capture.modes:
        graph, nodes = rewrite(part.graph, plan.edits, steps)
        insert_blocks(graph, plan, canonical, nodes)
        surround(graph)
        programs.append(Program(graph, {path: _renamed(calls, nodes) for path, calls in part.outputs.items()}))
    if steps:
        holder = nn.Module()
        for name, module in steps.items():
            holder.add_module(name, module.to(_device(model)))
        holder.train(model.training)
        root.add_module(STEPS, holder)
    for path, (part_programs, part_steps, given) in programs_of_parts(capture, plan).items():
        module = root.get_submodule(path)
        moved = {name: step.to(_device(model)).train(module.training) for name, step in part_steps.items()}
        bind(module, part_programs, moved, given)
    return Teacher(root, programs, plan, capture.root)


def programs_of_parts(capture: Capture, plan: Plan) -> dict[str, BoundPart]:
    """Return what runs in place of the parts' own code, by path; a part in which nothing is wider stays as it is."""
    result: dict[str, BoundPart] = {}
    canonical = canonical_names(capture.root)
    for path, part in capture.parts.items():
        if not any(_is_changed(mode, plan, canonical) for mode in part.modes):
            continue
        steps: dict[str, nn.Module] = {}
        graphs = [rewrite(mode.graph, plan.edits, steps)[0] for mode in part.modes]
        for graph in graphs:
            surround(graph)
        result[path] = [Program(relative(graph, path)) for graph in graphs], steps, Given(path, part.inputs)
    return result


def _is_changed(part: Capture, plan: Plan, canonical: Mapping[str, str]) -> bool:
    for node in part.graph.nodes:
        inside = f"{node.target}."
        used = [node.target] if node.op == "get_attr" else [n for n in canonical if n.startswith(inside)]
        if node.op not in ("get_attr", "call_module"):
            used = []
        if key_of(node) in plan.edits or any(canonical.get(name) in plan.params for name in used):
            return True
    return False


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def rewrite(
    graph: fx.Graph, edits: Mapping[str, EditPlan], steps: dict[str, nn.Module]
) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Copy a graph with the edits of a plan.

    Args:
        graph: the student's.
        edits: node key -> edit.
        steps: the modules of the inserted steps are added here.

    Returns:
        The new graph, and the new node of every old one (behind its out steps).
    """
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    shared: dict[Any, fx.Node] = {}

    def insert(value: fx.Node, todo: tuple[Step, ...]) -> fx.Node:
        for step in todo:
            key = (value, step)
            if key not in shared:
                name = f"step_{len(steps)}"
                steps[name] = step.build()
                shared[key] = new.call_module(f"{STEPS}.{name}", (value,))
                shared[key].meta.update(step=step, **_where(value))
            value = shared[key]
        return value

    def unpack(value: Any) -> Any:
        """Take the items out of a node whose value is a tuple, list or dict, so that one of them can change."""
        whole = known.get(value) if isinstance(value, fx.Node) else None
        if not isinstance(whole, (tuple, list, dict)):
            return value
        keys = list(whole) if isinstance(whole, dict) else range(len(whole))
        items = {key: _item(new, value, key) for key in keys}
        known.update({item: whole[key] for key, item in items.items()})
        if isinstance(whole, dict):
            return items
        return list(items.values()) if isinstance(whole, list) else _Tuple(items.values())

    known: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        edit: EditPlan = edits.get(key_of(node)) or EditPlan()
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
        holder: dict[str, Any] = {"args": _mutable(args), "kwargs": _mutable(kwargs)}
        for path, value in edit.constants:
            _write(holder, path, functools.partial(_constant, value), unpack)
        for path, todo in edit.steps:
            _write(holder, path, functools.partial(insert, todo=todo), unpack)
        if node.op == "output":
            env[node] = new.output(_final(holder["args"])[0])
            break
        args, kwargs = _final(holder["args"]), _final(holder["kwargs"])
        target = HOST if node.op == "call_module" and not node.target else node.target
        copied = new.create_node(node.op, target, args, kwargs, node.name, node.type)
        copied.meta.update({k: v for k, v in node.meta.items() if k in NOTED})
        env[node] = insert(copied, edit.out)
        known[env[node]] = node.meta.get("val")
    return new, env


def _where(node: fx.Node) -> dict[str, Any]:
    """What is computed from a value alone has the gradients that the value has, whoever uses it first."""
    return {"around": node.meta["around"]} if "around" in node.meta else {}


def _item(graph: fx.Graph, value: fx.Node, key: Any) -> fx.Node:
    item = graph.call_function(operator.getitem, (value, key))
    item.meta.update(_where(value))
    return item


def _constant(value: Any, _old: Any) -> Any:
    return value


def _mutable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _mutable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        items = [_mutable(v) for v in value]
        return items if isinstance(value, list) else _Tuple(items)
    return value


class _Tuple(list[Any]):
    """A tuple while it is being edited."""


def _final(value: Any) -> Any:
    if isinstance(value, _Tuple):
        return tuple(_final(v) for v in value)
    if isinstance(value, list):
        return [_final(v) for v in value]
    if isinstance(value, dict):
        return {k: _final(v) for k, v in value.items()}
    return value


def _write(
    holder: Any, path: tuple[Any, ...], change: Callable[[Any], Any], unpack: Callable[[Any], Any] = lambda node: node
) -> None:
    head, *rest = path
    if rest:
        inner = holder[head] = unpack(holder.get(head) if isinstance(holder, dict) else holder[head])
        if isinstance(inner, slice):
            parts = {n: getattr(inner, n) for n in ("start", "stop", "step")}
            parts[rest[0]] = change(parts[rest[0]])
            holder[head] = slice(parts["start"], parts["stop"], parts["step"])
            return
        _write(inner, tuple(rest), change, unpack)
    elif isinstance(holder, dict):
        holder[head] = change(holder.get(head))
    else:
        holder[head] = change(holder[head])


def _renamed(calls: list[Any], env: dict[fx.Node, fx.Node]) -> list[Any]:
    return [
        fx.node.map_aggregate(call, lambda n: env[n].name if isinstance(n, fx.Node) and n in env else None)
        for call in calls
    ]


def describe_widths(root: nn.Module) -> None:
    """Bring the attributes that state a width (``in_channels``, ``num_features`` ...) in line with the tensors."""
    for module in root.modules():
        for name, value in stated_widths(module, module._parameters.get("weight")).items():
            setattr(module, name, value)


def stated_widths(module: nn.Module, weight: Tensor | None) -> dict[str, int]:
    """Return the attributes of ``module`` that state a width, as they must be for this weight."""
    widths = {} if weight is None else _widths(module, weight)
    return {name: value for name, value in widths.items() if type(getattr(module, name, None)) is int}


def _widths(module: nn.Module, weight: Tensor) -> dict[str, int]:
    shape = list(weight.shape)
    if isinstance(module, nn.modules.conv._ConvNd) and len(shape) >= 2:
        groups = module.groups
        first, second = shape[0], shape[1]
        if module.transposed:
            return {"in_channels": first, "out_channels": second * groups}
        return {"in_channels": second * groups, "out_channels": first}
    if isinstance(module, nn.Linear) and len(shape) == 2:
        return {"out_features": shape[0], "in_features": shape[1]}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": shape[1]}
    if len(shape) == 1:
        return {"num_features": shape[0], "num_channels": shape[0], "num_parameters": shape[0]}
    return {}
