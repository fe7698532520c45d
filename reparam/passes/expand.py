"""``plan`` and ``expand``: capture, plan to a fixpoint, rewrite, verify."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from reparam.passes.branches import Branches, add_branches, check_branches, check_init, check_starts
from reparam.passes.capture import Capture
from reparam.passes.example import Inputs, accepts, batch_of, inputs_from_json, normalise, random_like
from reparam.passes.modes import require
from reparam.passes.plan import Plan
from reparam.passes.ratios import check_ratio
from reparam.passes.search import prepare
from reparam.passes.seeds import seeded
from reparam.passes.teacher import Teacher, check_names
from reparam.passes.validate import check_heads, check_model, check_noise
from reparam.passes.verify import OtherBatch, Rewritten, verify
from reparam.passes.widen import build_teacher, programs_of_parts, rewrite


def plan(
    model: nn.Module,
    ratio: int | Mapping[str, int] = 2,
    *,
    branches: Branches = None,
    init: str = "student",
    example_input: Any = None,
    ignore: Iterable[str | type] = (),
    heads: str = "auto",
) -> Plan:
    """Return what ``expand`` would do to ``model``, and change nothing. No weight is read: a meta model will do.

    A mapping as ``ratio`` gives each layer its own: how often its outputs are repeated. A layer is the weight of a
    convolution, a linear layer, an embedding or a recurrent layer. A key is a path or a glob of modules or parameters
    (a module stands for all layers inside it), or ``re:`` and a regular expression for a whole path. The first entry
    that matches a layer decides; each entry must decide one. A layer that no entry matches keeps its outputs, unless
    they meet those of others element by element (residual connections, gates, depthwise layers): such layers form a
    stream and share one ratio. Two entries that contradict each other along a stream are an error.

    Args:
        model: the student.
        ratio: replicas per channel, an int >= 1; or name or pattern -> ratio: ``{"layer4.*": 4, "*": 2}``.
        branches: branches beside layers (``"orepa"``, ``"acb"``, ``"dbb"``, ``"repvgg"``, ``"mobileone"``,
            ``"expandnet"``, or one of your own), with options behind a colon: ``"orepa:branches=4"``. A recipe is
            written for every layer that fulfils its condition; a mapping says where: name, glob, ``re:`` pattern or
            module type -> recipe, or None for no branches. The first entry that matches counts and overrides the
            recipe's condition, but for ``"*"``, which stands for the rest.
        init: ``"student"``: the function stays that of the model, new branches start with scale 0 and wake up in
            training. ``"scratch"``: the recipe's own scales; the teacher then computes the function of the model with
            branches.
        example_input: a tensor, a tuple of positional inputs or a dict of keyword inputs; found from timm's
            configuration or the first layers where None.
        ignore: names, globs or module types of layers that keep their width.
        heads: what attention widens: ``"width"`` (of each head), ``"count"`` (the number of heads), or ``"auto"``:
            the width, unless the number of heads lets more of the network be widened.

    Raises:
        InputError: a wrong argument.
        ModelError: a model that cannot be expanded.
        CaptureError: the forward pass cannot be recorded.
    """
    ratio, wanted, init = check_ratio(ratio), check_branches(branches), check_init(init, branches)
    check_model(model, values=False)
    check_names(model)
    capture, _inputs, made = prepare(model, ratio, example_input, ignore, check_heads(heads))
    return add_branches(model, capture, made, wanted, init)


def expand(
    model: nn.Module,
    ratio: int | Mapping[str, int] = 2,
    *,
    branches: Branches = None,
    init: str = "student",
    example_input: Any = None,
    noise: float = 0.25,
    ignore: Iterable[str | type] = (),
    heads: str = "auto",
    verify: bool = True,
) -> Teacher:
    """Return a dynamic teacher: a network with ``ratio`` times the channels that computes the function of ``model``.

    The model is not touched. The result is an ``fx.GraphModule`` with the student's state_dict keys plus the
    student's own norm statistics under ``student_statistics.``, on its device, in its dtypes and mode.

    Args:
        model: the student.
        ratio: replicas per channel, an int >= 1, or a mapping; see :func:`plan`.
        branches: see :func:`plan`. Branches are kept under ``reparam_branches.``, those without norms run as one
            convolution, those with norms as several in train mode.
        init: see :func:`plan`.
        example_input: see :func:`plan`.
        noise: symmetry breaking, relative to the rms of each weight, in [0, 1]. It sums to zero over the replicas
            of each input, so the function stays exact. Drawn from torch's default generator.
        ignore: see :func:`plan`.
        heads: see :func:`plan`.
        verify: run both networks once in float64 and compare every node.

    Source: GPD (ICLR 2025), inverse reparameterization, channel and branch level; exact here.

    Raises:
        InputError, ModelError, CaptureError: see :func:`plan`; also NaN or Inf among the weights.
        VerificationError: a node of the teacher differs from the student's.
    """
    ratio, noise = check_ratio(ratio), check_noise(noise)
    wanted, init = check_branches(branches), check_init(init, branches)
    check_model(model)
    check_names(model)
    capture, inputs, made = prepare(model, ratio, example_input, ignore, check_heads(heads))
    made = add_branches(model, capture, made, wanted, init)
    check_starts(model, made)
    if verify:
        verify_plan(model, capture, made, *verified_inputs(capture, made, inputs, example_input))
    return build_teacher(model, capture, made, noise)


def verified_inputs(capture: Capture, made: Plan, inputs: Inputs, example_input: Any) -> tuple[Inputs, int | None]:
    """Return the inputs on which to verify, and how many samples.

    What the user gave is used as it is. Where the input was found one sample is enough; and a smaller picture, if the
    network takes one and its own would cost minutes.
    """
    if example_input is not None:
        return inputs, batch_of(normalise(example_input))
    guarded = any(node.target is require for node in capture.nodes())
    # A quarter of the sides is large enough to have several of everything; smaller where that would still be costly.
    wanted = max(4, math.ceil(math.sqrt(made.multiply_adds[1] / _COSTLY)))
    divisors = sorted(range(2, 17), key=lambda k: (k < wanted > 4, abs(k - wanted)))
    for divisor in divisors if made.multiply_adds[1] > _COSTLY and not guarded else ():
        smaller = pytree.tree_map(functools.partial(_smaller, divisor=divisor), inputs)
        changed = any(a is not b for a, b in zip(*map(pytree.tree_leaves, (smaller, inputs)), strict=True))
        if changed and accepts(capture.root, smaller):
            return smaller, 1
    return inputs, 1


_COSTLY = 10**11
"""Multiply-adds of a teacher, per sample, above which a smaller input is looked for: seconds in float64."""


def _smaller(value: Any, divisor: int) -> Any:
    sizes = list(value.shape[2:]) if isinstance(value, Tensor) and value.dim() > 3 else []
    if not sizes or any(n % divisor for n in sizes):
        return value
    return value.new_empty((*value.shape[:2], *(n // divisor for n in sizes)))


def verify_plan(model: nn.Module, capture: Capture, made: Plan, inputs: Inputs, batch: int | None) -> float:
    """Compare student and teacher at every node in float64; returns the largest relative error.

    Args:
        model: the student.
        capture: its recorded forward pass.
        made: the plan.
        inputs: shapes of the inputs, on the meta device: those of the plan, or others that the network takes.
        batch: samples to use; None for as many as the plan has.

    Raises:
        VerificationError: they differ.
    """
    try:
        worst = _verified(model, capture, made, inputs, batch)
    except OtherBatch:
        worst = _verified(model, capture, made, inputs_from_json(made.inputs), None)
    for other in capture.batches:
        if other <= _FEW:
            with contextlib.suppress(OtherBatch):
                worst = max(worst, _verified(model, capture, made, inputs, other))
    return worst


_FEW = 4
"""Samples of another way through the code up to which that is verified too: more would cost too much."""


def _verified(model: nn.Module, capture: Capture, made: Plan, inputs: Inputs, batch: int | None) -> float:
    device = next(model.parameters()).device
    if device.type == "meta":
        return 0.0
    # MPS has no float64.
    where = torch.device("cpu") if device.type == "mps" else device
    with seeded(0, where):
        real = random_like(inputs, where, torch.float64, batch)
    parts = {
        path: (programs, _moved(dict(steps), where), call)
        for path, (programs, steps, call) in programs_of_parts(capture, made).items()
    }
    worst = 0.0
    for part in reversed(capture.all):
        steps: dict[str, nn.Module] = {}
        graph, nodes = rewrite(part.graph, made.edits, steps)
        rewritten = Rewritten(graph, _moved(steps, where), nodes, parts)
        given = random_like(part.inputs, where, torch.float64, None) if part.path else real
        worst = max(worst, verify(model, part, rewritten, made, given).error)
    return worst


def _moved(steps: dict[str, nn.Module], device: torch.device) -> dict[str, nn.Module]:
    return {name: step.to(device) for name, step in steps.items()}
