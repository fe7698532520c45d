"""Run one operator on meta tensors: shapes and dtypes without data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from reparam.passes.contexts import autocast_takes_meta
from reparam.passes.gradients import without_gradients
from reparam.passes.restore import replaced, unchanged
from reparam.passes.seeds import draws_kept
from reparam.passes.skeleton import known_mask, rebuild, to_meta


class Unknown:
    """The value of a node whose result cannot be computed on the meta device.

    Args:
        reason: why.
        source: the line and the operator, where it was recorded: the first one, whose value others are computed from.
    """

    def __init__(self, reason: str, source: str = "") -> None:
        self.reason, self.source = reason, source

    def __repr__(self) -> str:
        return f"Unknown({self.reason})"


def run_on_meta(kind: str, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run ``target`` as an fx node of this kind would, every tensor and every device replaced by meta."""
    args, options = pytree.tree_map(_to_meta, (tuple(args), dict(kwargs)))
    if "device" in options:
        options["device"] = torch.device("meta")
    if target is F.batch_norm:
        return _batch_norm(*args, **options)
    with torch.no_grad(), torch.device("meta"):
        if kind == "call_method":
            if target in ("cpu", "cuda"):
                return args[0]
            return getattr(args[0], target)(*args[1:], **options)
        return target(*args, **options)


def _batch_norm(
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    *_: Any,
    **__: Any,
) -> Tensor:
    """The commonest operator of all, and torch's meta kernel of it takes 5 ms."""
    for value in (running_mean, running_var, weight, bias):
        if value is not None and value.shape != input.shape[1:2]:
            raise RuntimeError(f"batch norm of {input.shape[1]} channels with a parameter of {list(value.shape)}")
    return torch.empty_like(input)


def _quick_norms() -> contextlib.AbstractContextManager[None]:
    """Let modules on the meta device use the batch norm above."""
    plain = F.batch_norm

    def quick(input: Tensor, running_mean: Any, running_var: Any, *args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(("weight", "bias", "training"), args, strict=False)) | kwargs
        channels = input.shape[1:2]
        usual = input.device.type == "meta" and all(
            value is None or value.shape == channels
            for value in (running_mean, running_var, given.get("weight"), given.get("bias"))
        )
        usual = usual and not (torch.is_grad_enabled() and input.requires_grad)  # a gradient is taken through it
        if given.get("training"):
            usual = usual and input.numel() > channels.numel()  # one value per channel is refused
        else:
            usual = usual and running_mean is not None and running_var is not None
        return (_batch_norm if usual else plain)(input, running_mean, running_var, *args, **kwargs)

    return replaced(F, "batch_norm", quick)


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("meta")
    return to_meta(value)


def run_module_on_meta(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run a module with meta parameters on meta inputs; its state is not changed."""
    args, kwargs = pytree.tree_map(_to_meta, (tuple(args), dict(kwargs)))
    on_meta = (unchanged(module), draws_kept(), _plain_tensors_on_meta(module), _quick_norms(), autocast_takes_meta())
    with torch.device("meta"), contextlib.ExitStack() as stack:
        for context in on_meta:
            stack.enter_context(context)
        return without_gradients(lambda: module(*args, **kwargs))


@contextlib.contextmanager
def _plain_tensors_on_meta(module: nn.Module) -> Iterator[None]:
    """Move tensors that modules keep as plain attributes (neither parameter nor buffer) for the time of a call."""
    moved = [
        (vars(child), name, value)
        for child in module.modules()
        for name, value in vars(child).items()
        if any(isinstance(v, Tensor) and v.device.type != "meta" for v in _listed(value))
    ]
    for holder, name, value in moved:
        holder[name] = pytree.tree_map(to_meta, value)
    try:
        yield
    finally:
        for holder, name, value in moved:
            holder[name] = value


def _listed(value: Any) -> list[Any]:
    """A tensor, or the items of a list of tensors (anchors per level)."""
    return list(value) if type(value) in (list, tuple) else [value]


def run_leaf_on_meta(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run a module that is kept as it is; where it looks at data, on zeros and its own masks."""
    try:
        return run_module_on_meta(module, args, kwargs)
    except (RuntimeError, NotImplementedError) as error:
        if "meta tensor" not in str(error) and not isinstance(error, NotImplementedError):
            raise
    masks = {name: mask for name, buffer in module.named_buffers() if (mask := known_mask(buffer)) is not None}
    module = rebuild(module, lambda name, tensor: masks.get(name, torch.zeros_like(tensor, device="cpu")))
    args, kwargs = pytree.tree_map(_to_zeros, (tuple(args), dict(kwargs)))
    with draws_kept():
        return pytree.tree_map(_to_meta, without_gradients(lambda: module(*args, **kwargs)))


def _to_zeros(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return torch.zeros_like(value, device="cpu") if isinstance(value, Tensor) else value


def has_tensor(value: Any) -> bool:
    """Whether a tensor is in an argument, at any depth."""
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def describe(value: Any) -> str:
    """Return a short description for messages: shapes of tensors, values of anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(describe(v) for v in value)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {describe(v)}" for k, v in value.items()) + "}"
    return repr(value)
