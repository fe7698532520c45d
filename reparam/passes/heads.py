"""``add_heads``: parallel copies of the last linear operator of a stage. ``merge_heads``: one operator again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from reparam.errors import CaptureError, InputError, ModelError, near_matches
from reparam.passes.example import Inputs, example_for
from reparam.passes.folding.record import record_calls
from reparam.passes.folding.surgery import put_module
from reparam.passes.head_modules import COMBINATIONS, Heads, Merged, Passing, Place, copies, give, merged, take
from reparam.passes.last_operator import Search, check_different
from reparam.passes.meta import run_module_on_meta
from reparam.passes.modes import told
from reparam.passes.skeleton import rebuild, skeleton_of
from reparam.passes.stages import stages as find_stages
from reparam.passes.validate import check_model

M = TypeVar("M", bound=nn.Module)


def add_heads(
    model: M,
    stages: str | int | Sequence[str] = "last",
    count: int = 10,
    example_input: Any = None,
    *,
    combine: str = "mean",
    generator: torch.Generator | None = None,
) -> M:
    """Return a copy of a network with parallel heads in the place of the last linear operator of some stages.

    The module of the operator ``g`` becomes `Heads`: ``count`` copies with weights drawn anew, each with a batch norm
    of its own, and the mean of all ``z_j = BN_j(g_j(x))`` goes on. A batch norm that followed the operator lets values
    pass (`Passing`) until `merge_heads` gives it the bias of the merged operator. Class and code of the network stay.

    **Which operator.** From the value that the stage returned the graph is followed backwards to the first convolution
    or linear layer: through norms, activations and poolings; behind a residual sum, a concatenation or a gate along
    the value of full size with most linear operators behind it, which is the branch and not its shortcut. No name or
    class is looked at. A module that is itself a convolution or linear layer stands for itself.

    **Features.** ``z_j`` is the output of the module ``<operator>.norms.<j>``; `head_names` returns these names for
    `reparam.tap`. Norms start with weight 1 and bias 0, also where the norm they replace started otherwise (a residual
    branch that starts as zero): the chain of Kdiffusion wants features of variance 1.

    Args:
        model: a network; not touched. Its weights stay, but for those of the chosen operators and of their norms.
        stages: "last" for the deepest stage, "all", a number for so many of the deepest ones, or names: of modules
            that return a stage's feature (those of `reparam.passes.stages.stages`), of modules whose code holds the
            operator, or of operators.
        count: ``m``, at least 2.
        example_input: see :func:`reparam.plan`.
        combine: what goes on in train mode, "mean" of the heads or a "random" one in each call; in eval mode the mean.
        generator: of the random weights; torch's own without it.

    Raises:
        InputError: one head, an unknown stage (near matches are listed), a stage without a linear operator at its end,
            or an operator that cannot be replaced: it is no module, is shared or called several times, or neither it
            nor anything behind it has room for the bias of the merged operator.
        CaptureError: the forward pass cannot be recorded.
        ModelError: the model cannot be handled.

    Source: Kdiffusion, section on parallel features: heads on the last layer of each stage, with norms of their own.
    """
    _check(model, count, combine)
    skeleton = skeleton_of(model)
    inputs = example_for(model, skeleton, example_input)
    try:
        recording = record_calls(skeleton, *inputs)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__}: the forward pass cannot be recorded, and heads are found on its graph: "
            f"{told(error)}"
        ) from error
    found = Search(recording, model)
    places = [
        found.place(name, earlier, inside) for name, earlier, inside in _chosen(model, stages, example_input, found)
    ]
    check_different(places)
    result = _copied(model)
    for place in places:
        _put_heads(result, place, count, combine, generator)
    _check_runs(result, inputs)
    return result


def head_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the names under which a tap finds the features of heads, ``path of the operator -> m names``.

    Args:
        model: of `add_heads`, or a module around it.
    """
    return {path: tuple(f"{path}.norms.{j}" for j in range(len(heads.norms))) for path, heads in _heads(model).items()}


def merge_heads(model: M) -> M:
    """Return a copy of a network without heads: the class, state-dict keys and parameter count of before.

    Every head is fused with its norm in eval mode (transform I of DBB), then kernels and biases are averaged (II), in
    float64. The bias goes to where the original network has room for one: to the batch norm that followed the
    operator; else to the operator's own bias; else forward through sums to norms and biases behind (networks with norms
    in front of convolutions). In eval mode the result computes what the heads computed.

    A batch norm that gets the bias has weight 1 and the variance ``1 - eps``, as the variance of the mean of all heads
    is not known; its running mean is. Where training goes on, its statistics become true, and so another function.

    Args:
        model: of `add_heads`, or a module around it, in any mode; not touched.

    Raises:
        InputError: there are no heads.
        ModelError: a merged weight is not finite.

    Source: Kdiffusion (weights 1/m at inference); Ding et al., "Diverse Branch Block" (CVPR 2021), transforms I and II.
    """
    if not _heads(model):
        raise InputError(f"{type(model).__name__} has no heads to merge; reparam.passes.heads.add_heads puts them in")
    result: Any = _copied(model)
    shifts: list[tuple[str, Heads, Tensor]] = []
    for path, heads in _heads(result).items():
        root = path.removesuffix(heads.place.path)
        found = merged(heads)
        _check_finite(path, found)
        operator = copy.deepcopy(heads.operators[0])
        own = torch.zeros_like(found.bias) if found.own is None else found.own
        if heads.place.norm is not None:
            passing = result.get_submodule(root + heads.place.norm)
            assert isinstance(passing, Passing)
            result = put_module(result, root + heads.place.norm, _released(passing, found, own))
        elif found.own is not None:
            own = found.bias
        else:
            shifts.append((root, heads, found.bias))
        _fill(operator, found, own)
        result = put_module(result, path, operator.train(heads.training))
    for root, heads, bias in shifts:
        for taker in heads.place.takers:
            take(result.get_submodule(root + taker.path), taker, bias)
    merged_model: M = result
    return merged_model


# Adding --------------------------------------------------------------------------------------------------------------


def _check(model: Any, count: Any, combine: Any) -> None:
    check_model(model)
    if any(isinstance(module, Heads) for module in model.modules()):
        raise InputError("the model has heads already; name all stages in one call, or merge_heads(model) first")
    if isinstance(count, bool) or not isinstance(count, int) or count < 2:
        raise InputError(f"count must be a whole number of at least 2, got {count!r}: one head is the operator itself")
    if combine not in COMBINATIONS:
        raise InputError(
            f"combine={combine!r}{near_matches(str(combine), COMBINATIONS)}; choose from {', '.join(COMBINATIONS)}"
        )


def _chosen(model: nn.Module, stages: Any, example: Any, search: Search) -> list[tuple[str, list[str], bool]]:
    """Name, earlier stages and whether the operator has to be inside, for every stage asked for."""
    found = find_stages(model, example)
    features = [name for name in found.features if search.calls.get(name)]
    if isinstance(stages, str) and stages not in ("last", "all"):
        stages = [stages]
    if isinstance(stages, Sequence) and not isinstance(stages, str):
        if not stages:
            raise InputError("stages is empty; give 'last', 'all', a number or names")
        _check_names(model, stages)
        return [(name, features[: features.index(name)] if name in features else [], name not in features)
                for name in stages]  # fmt: skip
    if not features:
        raise InputError(f"{found.model}: no stages are found: {found.reason}; give names (stages=['path.of.a.conv'])")
    number = {"last": 1, "all": len(features)}.get(stages, stages) if isinstance(stages, str) else stages
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= len(features):
        raise InputError(
            f"stages={stages!r}: give 'last', 'all', names, or a number from 1 to {len(features)}; the stages of "
            f"{found.model} are {', '.join(features)}"
        )
    return [(name, features[:k], False) for k, name in enumerate(features)][-number:]


def _check_names(model: nn.Module, names: Sequence[Any]) -> None:
    known = [name for name, _ in model.named_modules() if name]
    for name in names:
        if name not in known:
            raise InputError(f"stages: no module {name!r}{near_matches(str(name), known)}")


def _put_heads(model: nn.Module, place: Place, count: int, combine: str, generator: torch.Generator | None) -> None:
    operator = model.get_submodule(place.path)
    eps, momentum = 1e-5, 0.1
    if place.norm is not None:
        norm: Any = model.get_submodule(place.norm)
        eps, momentum = norm.eps, getattr(norm, "momentum", momentum)
        put_module(model, place.norm, Passing(norm))
    heads = Heads(copies(operator, count, generator), place, eps, momentum, combine)
    put_module(model, place.path, heads.train(operator.training))


def _check_runs(model: nn.Module, inputs: Inputs) -> None:
    """Insist that the network's own code gets along with the new modules."""
    skeleton = skeleton_of(model).eval()
    try:
        run_module_on_meta(skeleton, *inputs)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__}: its code looks into a module that heads replace ({type(error).__name__}: {error})"
            "; choose another operator by its module's name"
        ) from error


def _heads(model: nn.Module) -> dict[str, Heads]:
    return {path: module for path, module in model.named_modules() if isinstance(module, Heads)}


def _copied(model: M) -> M:
    return rebuild(model, lambda _name, tensor: tensor.clone())


# Merging -------------------------------------------------------------------------------------------------------------


def _released(passing: Passing, found: Merged, own: Tensor) -> nn.Module:
    """The batch norm of before, with the bias of the merged operator."""
    norm = passing.norm
    give(norm, found, own)
    for name, parameter in norm.named_parameters(recurse=False):
        parameter.requires_grad_(passing.trained[name])
    norm.training = passing.training
    return norm


def _fill(operator: Any, found: Merged, own: Tensor) -> None:
    with torch.no_grad():
        operator.weight.copy_(found.kernel.weight)
        if operator.bias is not None:
            operator.bias.copy_(own)


def _check_finite(path: str, found: Merged) -> None:
    if not bool(torch.isfinite(found.kernel.weight).all() & torch.isfinite(found.bias).all()):
        raise ModelError(f"{path}: the merged heads hold NaN or Inf; look at the statistics of their norms")


__all__ = ["Heads", "add_heads", "head_names", "merge_heads"]
