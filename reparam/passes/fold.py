"""``fold``: every linear region of a network becomes one operator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from reparam.errors import CaptureError
from reparam.passes.example import Inputs, example_for
from reparam.passes.folding.edits import analyse
from reparam.passes.folding.record import record_calls
from reparam.passes.folding.report import FoldReport, report_of
from reparam.passes.folding.surgery import Surgery, put_module
from reparam.passes.meta import run_module_on_meta
from reparam.passes.modes import told
from reparam.passes.skeleton import rebuild, skeleton_of
from reparam.passes.validate import check_eval, check_model
from reparam.passes.watch import watch


def fold(model: nn.Module, example_input: Any = None, *, allow_growth: bool = False) -> nn.Module:
    """Return a network that computes the same with fewer operators.

    Norms in eval mode, parallel and serial branches, scales and shifts become part of the convolutions and linear
    layers around them, wherever that is exact. What matters is what the recorded graph computes, not which classes
    it was written with. Weights are computed in float64 and returned in each layer's dtype, on its device. The model
    is not touched.

    Modules keep their class and name: a convolution gets another weight and a bias, a norm that is gone becomes
    ``nn.Identity``; the smallest modules whose own code changes become graph modules. If nothing folds, the result
    is a deep copy.

    What is preserved is ``forward`` as it was recorded, in eval mode: another method of a module that calls a norm
    which is gone computes something else. Where code branches on a size or an argument between operators that fold,
    its module becomes a graph that refuses other sizes and arguments than those of the example. A graph module takes
    no keyword arguments that its ``forward`` did not have, and has no hooks of the module that it replaces, nor of
    those whose operators are gone. Hooks are part of what is recorded: they are called while folding, on a copy
    without data. A layer that is called with several norms is copied, once for each.

    Args:
        model: a network in eval mode.
        example_input: a tensor, a tuple of positional inputs or a dict of keyword inputs; found from timm's
            configuration or the first layers where None.
        allow_growth: also fold sequences that have more weights as one operator than as several.

    Source: RepVGG (CVPR 2021), DBB (CVPR 2021), for any graph of linear operators.

    Raises:
        InputError: a wrong argument.
        ModelError: the model is in train mode, holds NaN or Inf, or would after folding.
        CaptureError: the forward pass cannot be recorded.
    """
    return fold_with_report(model, example_input, allow_growth=allow_growth)[0]


def fold_with_report(
    model: nn.Module, example_input: Any = None, *, allow_growth: bool = False
) -> tuple[nn.Module, FoldReport]:
    """Return what :func:`fold` returns, and what was folded and what was not.

    Args:
        model: see :func:`fold`.
        example_input: see :func:`fold`.
        allow_growth: see :func:`fold`.

    Raises:
        InputError, ModelError, CaptureError: see :func:`fold`.
    """
    check_model(model)
    check_eval(model, ", where norms use the statistics of the batch and nothing can be folded")
    skeleton = skeleton_of(model)
    result, report = _folded(model, skeleton, example_for(model, skeleton, example_input), allow_growth)
    return result, replace(report, parameters=(_numbers(model), _numbers(result)))


def _numbers(model: nn.Module) -> int:
    """Return how many numbers the parameters of a model hold."""
    return sum(parameter.numel() for parameter in model.parameters())


def _folded(model: nn.Module, skeleton: nn.Module, inputs: Inputs, allow_growth: bool) -> tuple[nn.Module, FoldReport]:
    """Fold a copy of a model, and what is inside modules that have no graph.

    Raises:
        ModelError, CaptureError: see :func:`fold`.
    """
    try:
        recording = record_calls(skeleton, *inputs)
    except Exception as error:
        return _folded_inside(model, skeleton, inputs, allow_growth, _untraceable(model, error))
    analysis = analyse(recording, model, allow_growth)
    report = report_of(recording, analysis)
    result = _copied(model)
    if analysis.edits:
        surgery = Surgery(result, recording, analysis)
        result = surgery.run()
        if not _runs(result, inputs):
            # Code around a module reads what is gone: the network's own code is written anew.
            surgery = Surgery(_copied(model), recording, analysis, at_root=True)
            result = surgery.run()
        report = replace(report, copies=surgery.copies)
    for node in recording.graph.nodes:
        if node.op == "call_module" and _same_module(result, model, str(node.target)):
            path = str(node.target)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            given = tuple(args), dict(kwargs)
            part, inside = _folded_inside(model.get_submodule(path), skeleton.get_submodule(path), given, allow_growth)
            result = put_module(result, path, part)
            report = report.joined(path, inside)
    return result, report


def _copied(model: nn.Module) -> nn.Module:
    return rebuild(model, lambda _name, tensor: tensor.clone())


def _same_module(result: nn.Module, model: nn.Module, path: str) -> bool:
    """Whether a module is still where it was."""
    try:
        return bool(path) and type(result.get_submodule(path)) is type(model.get_submodule(path))
    except AttributeError:
        return False


def _folded_inside(
    model: nn.Module, skeleton: nn.Module, inputs: Inputs, allow_growth: bool, error: Exception | None = None
) -> tuple[nn.Module, FoldReport]:
    """Fold the outermost modules with a graph inside a copy of one that has none.

    Raises:
        Exception: ``error``, where there is nothing with a graph either.
    """
    seen = watch(skeleton, inputs)
    result, report = _copied(model), FoldReport((0, 0), (0, 0))
    todo = [(name, child) for name, child in skeleton.named_children()]
    found = False
    while todo:
        path, child = todo.pop(0)
        if next(child.parameters(), None) is None:
            continue
        calls = seen.calls.get(path, [])
        if calls and seen.closed(child, path) and len({_kind(call) for call in calls}) == 1:
            try:
                part, inside = _folded(model.get_submodule(path), child, calls[0], allow_growth)
            except CaptureError:
                pass
            else:
                result, report, found = put_module(result, path, part), report.joined(path, inside), True
                continue
        todo += [(f"{path}.{name}", inner) for name, inner in child.named_children()]
    if error is not None and not found:
        raise error
    return result, report


def _kind(call: Inputs) -> str:
    """Return what a graph depends on: structure, ranks and constants of a call."""
    leaves, structure = pytree.tree_flatten(call)
    return str([structure, [(v.dim(), v.dtype) if isinstance(v, Tensor) else v for v in leaves]])


def _untraceable(model: nn.Module, error: Exception) -> CaptureError:
    return CaptureError(
        f"{type(model).__name__}: the forward pass cannot be recorded as a graph: {told(error)}. "
        "It branches on data or calls code that refuses symbolic values, and so does all inside it"
    )


def _runs(model: nn.Module, inputs: Inputs) -> bool:
    skeleton = skeleton_of(model)
    try:
        run_module_on_meta(skeleton, *inputs)
    except Exception:
        return False
    return True


__all__ = ["FoldReport", "fold", "fold_with_report"]
