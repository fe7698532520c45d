"""Which layers get branches: the argument, the recipes' conditions, and what the plan says about every layer."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import torch
from torch import nn

from reparam.errors import InputError, KernelError, near_matches
from reparam.ops import recipes
from reparam.ops.block import check_start, merge, new_tensors, wide_frame, widening
from reparam.ops.expressions import Expression, Weight, has_norms
from reparam.ops.frames import Frame
from reparam.ops.params import ParamMap
from reparam.ops.recipes import Recipe, Site, Unfit
from reparam.passes.capture import Capture
from reparam.passes.layers import matching
from reparam.passes.plan import Plan
from reparam.passes.rows import BranchPlan
from reparam.passes.seeds import generators_kept
from reparam.passes.sites import Operator, find_operators
from reparam.passes.skeleton import canonical_names

Branches = str | Recipe | Mapping[str | type, str | Recipe | None] | None
"""A recipe; or name, glob, ``re:`` pattern or module type -> recipe or None. The first entry that matches counts."""

REST = "*"
"""The entry of a mapping that stands for all other layers, under the recipe's own condition."""


def check_branches(branches: Any) -> dict[str | type, Recipe | None]:
    """Return the argument as a mapping, empty for None.

    Raises:
        InputError: an unknown recipe or option, or an entry of another type.
    """
    if branches is None:
        return {}
    if not isinstance(branches, Mapping):
        return {REST: recipes.get(branches)}
    for entry in branches:
        if not isinstance(entry, (str, type)):
            raise InputError(f"a branches entry is a name, a glob, 're:...' or a module type, not {entry!r}")
        try:
            re.compile(entry.removeprefix("re:") if isinstance(entry, str) and entry.startswith("re:") else "")
        except re.error as error:
            raise InputError(f"branches entry {entry!r} is no regular expression: {error}") from error
    return {entry: None if value is None else recipes.get(value) for entry, value in branches.items()}


def check_init(init: Any, branches: Any) -> str:
    """Return ``init`` if it is a way to start.

    Raises:
        InputError: it is not, or there are no branches to start.
    """
    if init not in recipes.INITS:
        raise InputError(f"init must be one of {', '.join(map(repr, recipes.INITS))}, not {init!r}")
    if init != "student" and not branches:
        raise InputError(f"init={init!r} says how branches start, and there are none; pass branches=...")
    return str(init)


def add_branches(
    model: nn.Module, capture: Capture, plan: Plan, wanted: dict[str | type, Recipe | None], init: str
) -> Plan:
    """Return the plan with branches.

    Args:
        model: the student.
        capture: its recorded forward pass.
        plan: of its channels.
        wanted: from :func:`check_branches`.
        init: one of :data:`reparam.ops.recipes.INITS`.

    Raises:
        InputError: an entry matches nothing, or its recipe fits none of the layers that it is for.
    """
    if not wanted:
        return plan
    operators = find_operators(capture, init)
    entries = _assign(model, wanted, [layer.name for layer in plan.layers])
    chosen: list[BranchPlan] = []
    reasons: dict[str, str] = {}
    for layer in plan.layers:
        recipe = wanted.get(entries.get(layer.name, ""))
        if recipe is None:
            continue
        operator = operators.get(layer.name) or Operator(layer.name, reason=_unseen(capture, layer.name))
        try:
            chosen.append(_branched(operator, recipe, plan, entries[layer.name] == REST))
        except (Unfit, KernelError) as error:
            reasons[layer.name] = str(error)
    _check_all_used(wanted, entries, chosen, reasons)
    return replace(
        plan,
        branches=tuple(chosen),
        unbranched=reasons,
        wide_parameters=plan.wide_parameters + sum(b.wide_parameters for b in chosen),
    )


def _unseen(capture: Capture, name: str) -> str:
    """Return why no graph shows an operator that applies a weight as it is."""
    leaf = next((path for path in capture.leaves if not path or name.startswith(f"{path}.")), None)
    if leaf is not None:
        return f"inside {leaf or 'code without a graph'}, which runs as it is"
    if any(node.op == "get_attr" and node.target == name for node in capture.nodes()):
        return "its weight is computed before it is used"
    return "not used by this forward pass"


def _assign(model: nn.Module, wanted: Iterable[str | type], layers: list[str]) -> dict[str, str | type]:
    """Return which entry is for each layer; every entry must match one."""
    names = canonical_names(model)
    modules = {path: module for path, module in model.named_modules() if path}
    result: dict[str, str | type] = {}
    for entry in wanted:
        if isinstance(entry, type):
            paths = [path for path, module in model.named_modules() if isinstance(module, entry)]
            above = tuple(f"{path}." if path else "" for path in paths)
            found = {first for name, first in names.items() if name.startswith(above)}
        else:
            found = matching(entry, modules, names)
        mine = [name for name in layers if name in found]
        if not mine:
            near = "" if isinstance(entry, type) else near_matches(entry.removeprefix("re:"), [*modules, *names])
            raise InputError(f"branches entry {entry!r} matches no convolution or linear layer{near}")
        free = [name for name in mine if name not in result]
        if not free and entry != REST:  # a default may have nothing left to decide
            earlier = ", ".join(sorted({repr(result[name]) for name in mine}))
            raise InputError(
                f"branches entry {entry!r} decides no layer: the first entry that matches counts, and {earlier} stands "
                "before it; move it to the front"
            )
        result.update(dict.fromkeys(free, entry))
    return result


def _branched(operator: Operator, recipe: Recipe, plan: Plan, condition: bool) -> BranchPlan:
    """Return the branches of an operator.

    Raises:
        Unfit, KernelError: there are none, with the reason.
    """
    if operator.site is None:
        raise Unfit(operator.reason)
    site = operator.site
    reason = recipe.unfit(site) if condition else ""
    if reason:
        raise Unfit(reason)
    if "transpose" in site.operator:
        raise Unfit("a transposed convolution: recipes are written for convolutions and linear layers")
    expression = recipe.expression(site)
    norms = tuple(mean for mean in operator.norms if mean in plan.statistics)
    absorbed = operator.bias or (norms and norms == operator.norms)
    if has_norms(expression) and not absorbed:
        raise Unfit(
            "its branches end in norms and merge into a bias, but it has none of its own, and what reads it is no "
            "batch norm that could take it up; give it bias=True, or use a recipe without norms (orepa, expandnet)"
        )
    return _measured(expression, site, recipe, plan.params.get(site.name), operator.bias or None, norms)


def _measured(
    expression: Expression, site: Site, recipe: Recipe, host: ParamMap | None, bias: str | None, norms: tuple[str, ...]
) -> BranchPlan:
    """Count parameters and the work of merging."""
    host = host or ParamMap((site.outputs, site.inputs // site.groups, *site.size))
    counts = _counts(_Measured(_structure(expression), replace(site, name=""), host, expression, site))
    return BranchPlan(site, recipe, bias, norms if has_norms(expression) else (), *counts)


@dataclass(frozen=True)
class _Measured:
    """Branches of an operator; those of another one with the same sizes are equal."""

    structure: Any
    sizes: Site
    host: ParamMap
    expression: Expression = field(compare=False)
    site: Site = field(compare=False)


def _structure(value: Any) -> Any:
    """Return what decides about the size of an expression: everything but the functions that fill its weights."""
    if is_dataclass(value):
        filled = ("fixed", "start") if isinstance(value, Weight) else ()
        items = vars(value).items()
        return type(value), tuple((name, v is None if name in filled else _structure(v)) for name, v in items)
    if isinstance(value, tuple):
        return tuple(map(_structure, value))
    return value if type(value).__hash__ is not None else id(value)  # which stays its own while the key is kept


@functools.lru_cache(maxsize=1024)
def _counts(of: _Measured) -> tuple[int, int, int, int]:
    """Parameters of student and teacher, and their work of merging, on the meta device, where branches have to fit."""
    from torch.utils.flop_counter import FlopCounterMode  # late: it imports triton where that is installed

    expression, site = of.expression, of.site
    around = widening(site, of.host, noise=False)
    trained = [name for name, slot in expression.slots() if slot.kind == "weight"]
    counts, work = [], []
    for frame, wide in ((Frame(site.inputs, site.groups), False), (wide_frame(site, around), True)):
        tensors = new_tensors(expression, torch.empty(of.host.shape, device="meta"))
        maps = dict(expression.maps(around))
        if wide:
            tensors = {name: tensors[name].new_empty(maps[name].wide_shape) for name in tensors}
        tensors[""] = torch.empty(of.host.wide_shape if wide else of.host.shape, device="meta")
        with FlopCounterMode(display=False) as counter:
            merge(expression, site, frame, tensors.__getitem__)
        counts.append(sum(tensors[name].numel() for name in trained))
        work.append(counter.get_total_flops() // 2)
    return counts[0], counts[1], work[0], work[1]


def check_starts(model: nn.Module, plan: Plan) -> None:
    """Compare what new branches make with the layers that they are for; see :func:`reparam.ops.block.check_start`."""
    for branch in plan.branches:
        weight = model.get_parameter(branch.site.name).detach()
        if weight.device.type == "meta":
            continue
        with generators_kept(weight.device), torch.no_grad():
            check_start(branch.recipe.expression(branch.site), branch.site, weight, str(branch.recipe))


def check_fits(capture: Capture, plan: Plan) -> None:
    """Compare the branches of a plan from a file with the network.

    Raises:
        ValueError: they are not those of its operators.
    """
    found = {init: find_operators(capture, init) for init in {branch.site.init for branch in plan.branches}}
    for branch in plan.branches:
        operator = found[branch.site.init].get(branch.site.name) or Operator(branch.site.name)
        norms = set(branch.norms) <= {*operator.norms} & {*plan.statistics}
        if branch.site.init not in recipes.INITS or branch.site != operator.site or not norms:
            raise ValueError(f"the branches of {branch.site.name} are those of another layer")
        if branch.bias != (operator.bias or None):
            raise ValueError(f"the branches of {branch.site.name} have another bias")
        try:
            branch.recipe.expression(branch.site)
        except (Unfit, KernelError) as error:
            raise ValueError(f"{branch.site.name}: {error}") from error


def _check_all_used(
    wanted: Mapping[str | type, Recipe | None],
    entries: Mapping[str, str | type],
    chosen: list[BranchPlan],
    reasons: Mapping[str, str],
) -> None:
    done = {entries[branch.site.name] for branch in chosen}
    for entry, recipe in wanted.items():
        mine = [name for name, other in entries.items() if other == entry]
        named = isinstance(entry, str) and not set(entry) & set("*?[") and not entry.startswith("re:")
        failed = [name for name in mine if name in reasons]
        if recipe is None or not mine or (entry in done and not (named and failed)):
            continue
        kinds: dict[str, list[str]] = {}
        for name in failed:
            kinds.setdefault(reasons[name], []).append(name)
        text = "; ".join(f"{_some(names)}: {reason}" for reason, names in list(kinds.items())[:5])
        if not named:
            where = "" if entry == REST else f" (entry {entry!r})"
            raise InputError(f"recipe {str(recipe)!r}{where} fits no layer of this network: {text}")
        raise InputError(f"recipe {str(recipe)!r} does not fit where entry {entry!r} wants it: {text}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
