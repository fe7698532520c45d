"""The example input: checked where it is given, found where it is not."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from reparam.errors import InputError
from reparam.passes.meta import describe, run_module_on_meta
from reparam.passes.skeleton import first_floating_dtype

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

_SIZES = {1: (256, 128, 64, 1024, 16000), 2: (224, 32, 64, 28, 96, 128, 256, 299, 384, 512), 3: (32, 16, 64, 112)}


def normalise(example: Any) -> Inputs:
    """Return positional and keyword inputs: a tensor, a tuple or list of inputs, or a dict of keyword inputs."""
    if isinstance(example, dict):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    if isinstance(example, Tensor):
        return (example,), {}
    raise InputError(
        f"example_input is a {type(example).__name__}; give a tensor, a tuple of positional inputs, or a dict of "
        "keyword inputs"
    )


def example_for(model: nn.Module, skeleton: nn.Module, example: Any) -> Inputs:
    """Return the example input on the meta device.

    Args:
        model: the student, for devices and dtypes.
        skeleton: its meta copy.
        example: what the user gave, or None.

    Raises:
        InputError: the model does not accept the given input, or no input can be found.
    """
    if example is None:
        return _find(model, skeleton)
    args, kwargs = normalise(example)
    _check_device_and_dtype(model, args, kwargs)
    args, kwargs = pytree.tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, (args, kwargs))
    error = _try(skeleton, args, kwargs)
    if error is not None:
        raise InputError(
            f"{type(model).__name__} does not accept the example_input {describe(args) if args else describe(kwargs)}: "
            f"{type(error).__name__}: {error}; give an input that model(...) itself accepts"
        ) from error
    return _two_samples(skeleton, (args, kwargs))


def batch_of(inputs: Inputs) -> int | None:
    """Return the first size of all tensors, or None where they differ."""
    sizes = {v.shape[0] if v.dim() else None for v in pytree.tree_leaves(inputs) if isinstance(v, Tensor)}
    return sizes.pop() if len(sizes) == 1 else None


def accepts(skeleton: nn.Module, inputs: Inputs) -> bool:
    """Whether a network (on the meta device) runs on these inputs, as far as that can be seen without data."""
    return _try(skeleton, *inputs) is None


def _two_samples(skeleton: nn.Module, inputs: Inputs) -> Inputs:
    """Plan with two samples where one was given: batch norm refuses to train on a single value per channel."""
    if batch_of(inputs) != 1:
        return inputs
    twice: Inputs = pytree.tree_map(
        lambda v: v.new_empty((2, *v.shape[1:])) if isinstance(v, Tensor) else v,
        inputs,
    )
    return inputs if _try(skeleton, *twice) is not None else twice


def _check_device_and_dtype(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
    if not tensors:
        raise InputError("example_input holds no tensor")
    devices = {p.device for p in model.parameters()}
    floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    for value in tensors:
        if value.device not in devices and len(devices) == 1:
            device = next(iter(devices))
            raise InputError(
                f"example_input is on {value.device} and the model on {device}; move it: example_input.to('{device}')"
            )
        if value.is_floating_point() and floats and value.dtype not in floats:
            dtype = next(iter(floats))
            raise InputError(f"example_input has dtype {value.dtype} and the model {dtype}; convert it: .to({dtype})")


def _try(skeleton: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
    try:
        run_module_on_meta(skeleton, args, kwargs)
    except NotImplementedError:
        return None  # an operator without a meta kernel: capture decides
    except RuntimeError as error:
        # Control flow on data: capture decides.
        return None if "meta" in str(error) else error
    except Exception as error:
        return error
    return None


def _find(model: nn.Module, skeleton: nn.Module) -> Inputs:
    dtype = first_floating_dtype(model) or torch.float32
    for shape in _candidates(model):
        args = (torch.empty(shape, device="meta", dtype=dtype),)
        if _try(skeleton, args, {}) is None:
            return args, {}
    names = [p.name for p in inspect.signature(model.forward).parameters.values() if p.default is p.empty]
    names = [n for n in names if n not in ("args", "kwargs")]
    call = f"({', '.join(names)})" if len(names) > 1 else "torch.randn(2, 3, 224, 224)"
    raise InputError(
        f"no example input can be found for {type(model).__name__}"
        f"{f', whose forward takes {len(names)} inputs' if len(names) > 1 else ''}; give one, for instance "
        f"example_input={call}"
    )


def _candidates(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Yield input shapes, batch 2: from timm's configuration, then from the first layers."""
    first = next((m for m in model.modules() if _input_channels(m)), None)
    channels, dims = _input_channels(first) or (3, 2)
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = config.get("input_size") if isinstance(config, dict) else getattr(config, "input_size", None)
    if size:
        own = getattr(getattr(model, "patch_embed", None), "img_size", None)
        spatial = tuple(own) if own else tuple(size[1:])
        yield (2, channels if dims == 2 else size[0], *spatial)
        yield (2, *size)
    if dims == 0:
        yield (2, channels)
        yield (2, 16, channels)
    for n in _SIZES.get(dims, ()):
        yield (2, channels, *([n] * dims))


def _input_channels(module: nn.Module | None) -> tuple[int, int] | None:
    """Return (input channels, spatial dimensions) of a layer that tells them, else None."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    for attribute in ("in_channels", "in_features", "num_features"):
        count = getattr(module, attribute, None)
        if isinstance(count, int) and count > 0:
            spatial = {"in_channels": max(weight.dim() - 2, 0), "in_features": 0, "num_features": 2}[attribute]
            return count, spatial
    return None


def describe_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs as JSON: shapes and dtypes of tensors, values of the rest."""
    return {"args": [_to_json(v) for v in args], "kwargs": {k: _to_json(v) for k, v in kwargs.items()}}


def _to_json(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        return {"list" if isinstance(value, list) else "tuple": [_to_json(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": {k: _to_json(v) for k, v in value.items()}}
    return {"value": value}


def inputs_from_json(data: Any) -> Inputs:
    """Inverse of :func:`describe_inputs`, on the meta device."""
    return tuple(_from_json(v) for v in data["args"]), {k: _from_json(v) for k, v in data["kwargs"].items()}


def _from_json(value: Any) -> Any:
    if "tensor" in value:
        return torch.empty(value["tensor"], dtype=getattr(torch, value["dtype"]), device="meta")
    if "dict" in value:
        return {k: _from_json(v) for k, v in value["dict"].items()}
    if "list" in value:
        return [_from_json(v) for v in value["list"]]
    if "tuple" in value:
        return tuple(_from_json(v) for v in value["tuple"])
    return value["value"]


def random_like(inputs: Inputs, device: torch.device | str, dtype: torch.dtype | None, batch: int | None) -> Inputs:
    """Return random inputs of these shapes: standard normal floats, zeros for integers.

    Args:
        inputs: shapes on the meta device.
        device: where to put them.
        dtype: of floating point inputs; None keeps theirs.
        batch: first dimension, where all tensors agree on it; None keeps it.
    """

    def fill(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape = list(value.shape)
        if batch is not None and shape:
            shape[0] = batch
        if value.is_floating_point() or value.is_complex():
            kind = dtype if dtype is not None and value.is_floating_point() else value.dtype
            return torch.randn(shape, device=device, dtype=kind)
        return torch.zeros(shape, device=device, dtype=value.dtype)

    filled: Inputs = pytree.tree_map(fill, inputs)
    return filled
