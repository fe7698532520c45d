"""Checks of the model and of the arguments before any work is done."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from reparam.errors import InputError, ModelError, near_matches
from reparam.passes.skeleton import canonical_names, named_tensors
from reparam.passes.splits import HEADS

_WRAPPERS = {
    "DistributedDataParallel": "pass model.module",
    "DataParallel": "pass model.module",
    "FullyShardedDataParallel": "expand the model before wrapping it",
    "OptimizedModule": "pass the model itself (model._orig_mod) and compile the result",
}


def check_noise(noise: Any) -> float:
    """Return the noise amplitude.

    Raises:
        InputError: not a number in [0, 1].
    """
    if isinstance(noise, bool) or not isinstance(noise, (int, float)) or not 0 <= noise <= 1:
        raise InputError(f"noise must be a number in [0, 1] (relative to the rms of each weight), not {noise!r}")
    return float(noise)


def check_heads(heads: Any) -> str:
    """Return ``heads`` if it is a choice of what attention widens.

    Raises:
        InputError: it is not.
    """
    if heads not in HEADS:
        raise InputError(f"heads must be one of {', '.join(map(repr, HEADS))}, not {heads!r}")
    return str(heads)


def check_model(model: Any, values: bool = True) -> None:
    """Refuse models that cannot be expanded.

    Args:
        model: what the user gave.
        values: also look for NaN and Inf.

    Raises:
        InputError: not a module.
        ModelError: wrapped, compiled, already a teacher, lazy, quantized, scripted, without parameters, or with
            NaN or Inf among its weights.
    """
    if isinstance(model, type):
        raise InputError(f"model must be a torch.nn.Module, not the class {model.__name__}; make an instance of it")
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    for path, child in model.named_modules():
        _check_module(path, child)
    _check_tensors(model, type(model).__name__, values)


def check_eval(model: nn.Module, reason: str) -> None:
    """Refuse a model with a module in train mode.

    Args:
        model: what the user gave.
        reason: why that matters; goes on after "is in train mode".

    Raises:
        ModelError: it has one.
    """
    for path, module in model.named_modules():
        if module.training:
            where = f"{path} ({type(module).__name__})" if path else f"the model ({type(model).__name__})"
            raise ModelError(f"{where} is in train mode{reason}; call model.eval() first")


def _check_module(path: str, module: nn.Module) -> None:
    """Refuse a wrapper, a teacher, a scripted or a quantized module, at the root (path "") or inside."""
    name = type(module).__name__
    where = f"{path}: the module" if path else "the model"
    for cls in type(module).__mro__:
        if cls.__name__ in _WRAPPERS and cls.__module__.startswith("torch."):
            way = _WRAPPERS[cls.__name__].replace("model", f"{path}", 1) if path else _WRAPPERS[cls.__name__]
            raise ModelError(f"{where} is wrapped in {cls.__name__}: {way}")
    meta = getattr(module, "meta", None)
    if (isinstance(meta, dict) and "reparam" in meta) or name == "StudentView":
        raise ModelError(
            f"{where} ({name}) is a teacher or a view of one already; reparam.extract(teacher) gives its student"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(f"{where} ({name}) is a ScriptModule; pass the Python module it was made from")
    quantized = type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic", "torchao."))
    if quantized and name not in ("FloatFunctional", "FXFloatFunctional"):  # those stand in float networks
        raise ModelError(f"{path}: {name} is quantized; expand the model before quantizing it")


def _check_tensors(model: nn.Module, name: str, values: bool) -> None:
    for path, tensor in named_tensors(model):
        if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
            raise ModelError(f"{path} is not initialised (a lazy module); run the model once before expanding it")
        if tensor.is_quantized:
            raise ModelError(f"{path} is quantized; expand the model before quantizing it")
        floating = tensor.is_floating_point() and tensor.device.type != "meta"
        if values and floating and not bool(torch.isfinite(tensor.detach().sum(dtype=torch.float64))):
            # A buffer may hold Inf on purpose (an attention mask); a weight or a statistic may not.
            strict = isinstance(tensor, nn.Parameter) or path.rpartition(".")[2].startswith("running_")
            bad = int((~torch.isfinite(tensor.detach()) if strict else torch.isnan(tensor.detach())).sum())
            if bad:
                raise ModelError(f"{path} holds {bad} NaN or Inf values; load good weights first")
    if next(model.parameters(), None) is None:
        raise ModelError(f"the model ({name}) has no parameters; there is nothing to expand")


def ignored_parameters(model: nn.Module, ignore: Iterable[Any]) -> dict[str, str]:
    """Resolve ``ignore`` entries to canonical parameter names.

    Args:
        model: the student.
        ignore: names or globs of modules or parameters, or module types.

    Returns:
        Parameter name -> reason.

    Raises:
        InputError: an entry matches nothing; near matches are listed.
    """
    if isinstance(ignore, (str, type)) or not isinstance(ignore, Iterable):
        ignore = (ignore,)
    canonical = canonical_names(model)
    modules = dict(model.named_modules())
    result: dict[str, str] = {}
    for entry in ignore:
        found = _matches(entry, modules, canonical)
        if not found:
            word = entry if isinstance(entry, str) else entry.__name__
            names = [*modules, *canonical] if isinstance(entry, str) else [type(m).__name__ for m in modules.values()]
            raise InputError(f"ignore entry {entry!r} matches no module or parameter{near_matches(word, names)}")
        for name in found:
            result[canonical[name]] = f"ignored ({entry if isinstance(entry, str) else entry.__name__})"
    return result


def _matches(entry: Any, modules: Mapping[str, nn.Module], canonical: Mapping[str, str]) -> list[str]:
    if isinstance(entry, type):
        paths = [path for path, module in modules.items() if isinstance(module, entry)]
    elif isinstance(entry, str):
        paths = [path for path in modules if path and fnmatch.fnmatchcase(path, entry)]
    else:
        raise InputError(f"an ignore entry is a name, a glob or a module type, not {type(entry).__name__}")
    inside = [n for n in canonical for path in paths if not path or n.startswith(path + ".")]
    direct = [n for n in canonical if isinstance(entry, str) and fnmatch.fnmatchcase(n, entry)]
    return list(dict.fromkeys([*inside, *direct]))
