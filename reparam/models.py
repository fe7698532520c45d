"""Models and weights by name: what the command line and the trainer accept as ``MODEL`` and ``--checkpoint``.

A model is a timm name (``resnet18``), a Python file and a callable in it (``nets/unet.py:build``), or a module and
a callable in it (``torchvision.models:resnet18``). Weights come from safetensors files or from checkpoints that
``torch.load(..., weights_only=True)`` accepts; nothing in a weight file is ever executed.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from reparam.errors import FormatError, InputError, ModelError, near_matches
from reparam.weight_files import brief, listed, read_weights

PREFIXES = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile put before every key."""

TIMM_SCHEMES = ("hf-hub:", "hf_hub:", "local-dir:")
"""Beginnings of names that timm resolves itself, although they hold a colon."""


def load_model(
    spec: str,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    pretrained: bool = False,
    ema: bool = False,
    drop_path: float | None = None,
    new_classifier: bool = False,
) -> nn.Module:
    """Build the model that ``spec`` names and load its weights.

    Args:
        spec: a timm name (``"resnet18"``), ``"path/to/file.py:callable"`` or ``"package.module:callable"``. The
            callable is a function or class that returns an ``nn.Module``.
        num_classes: number of classes, handed to timm or to the callable; ``None`` leaves its default.
        in_chans: number of input channels, handed on in the same way.
        checkpoint: weights to load, see `load_weights`.
        pretrained: ask timm or the callable for its pretrained weights (this may download).
        ema: read the averaged weights of the checkpoint.
        drop_path: drop path rate, handed on as ``drop_path_rate``; ``None`` leaves its default.
        new_classifier: see `load_weights`.

    Raises:
        InputError: no such model, file, module or callable (near matches are listed), or it does not take one of
            the arguments.
        ModelError: the callable raised, or did not return an ``nn.Module``.
        FormatError: the checkpoint is damaged, would execute code, or does not fit.

    Example:
        >>> load_model("torch.nn:Identity")
        Identity()
    """
    if not isinstance(spec, str) or not spec:
        raise InputError(f"a model is named by a string such as 'resnet18' or 'nets.py:build', got {spec!r}")
    if pretrained and checkpoint is not None:
        raise InputError("pretrained and a checkpoint were both given; choose the one whose weights you want")
    if ema and checkpoint is None:
        raise InputError("ema chooses the averaged weights of a checkpoint, and no checkpoint was given")
    wishes: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans, "pretrained": pretrained or None}
    wishes["drop_path_rate"] = drop_path
    options = {name: value for name, value in wishes.items() if value is not None}
    if ":" in spec and not spec.startswith(TIMM_SCHEMES):
        model = _from_callable(spec, options)
    else:
        model = _from_timm(spec, options)
    if checkpoint is not None:
        load_weights(model, checkpoint, ema=ema, new_classifier=new_classifier)
    return model


def load_weights(
    model: nn.Module, path: str | os.PathLike[str], *, ema: bool = False, new_classifier: bool = False
) -> None:
    """Load weights from ``path`` into ``model``; every key has to fit.

    Args:
        model: changed in place, and only if everything fits.
        path: a safetensors file, or a checkpoint saved by ``torch.save``. The weights may be the whole file or lie
            under one of `WEIGHT_KEYS`; ``module.`` and ``_orig_mod.`` before every key are dropped.
        ema: read the weights under one of `EMA_KEYS` instead.
        new_classifier: where the file has another number of classes (tensors differ in their first size alone, all
            from one number to one other), the classifier keeps the model's own weights, and a warning says so.

    Raises:
        FormatError: the file is missing, damaged, would execute code, or its weights do not fit the model; the
            message lists the missing, unexpected and mismatched keys.
    """
    state = read_weights(path, ema=ema)
    expected = model.state_dict(keep_vars=True)
    state = _complete_tied(_strip_prefixes(state, expected), expected)
    if new_classifier:
        state = _with_own_classifier(state, expected, path)
    if _misfits(state, expected):
        _rehearse(model, state, path)
    model.load_state_dict(state, strict=True)


# Building ------------------------------------------------------------------------------------------------------------


def _from_timm(name: str, options: dict[str, Any]) -> nn.Module:
    if name.endswith(".py"):
        raise InputError(f"{name!r} names a file, but no model in it; write {name}:callable")
    try:
        import timm
    except ImportError as error:
        raise InputError(
            f"{name!r} is read as the name of a timm model, and timm is not installed; "
            "`pip install timm`, or name the model as package.module:callable or path/to/file.py:callable"
        ) from error
    if not name.startswith(TIMM_SCHEMES) and not timm.is_model(name):
        if Path(name).is_file():
            raise InputError(f"{name!r} is a file; name the model itself, and give a file of weights as its checkpoint")
        raise InputError(
            f"timm {timm.__version__} has no model {name!r}{near_matches(name, timm.list_models())} "
            "(other models are named as package.module:callable or path/to/file.py:callable)"
        )
    try:
        return timm.create_model(name, **options)
    except Exception as error:
        raise ModelError(f"timm could not build {_call(name, options)}: {_located(error)}") from error


def _from_callable(spec: str, options: dict[str, Any]) -> nn.Module:
    place, _, attribute = spec.rpartition(":")
    if not place or not attribute:
        raise InputError(f"{spec!r} is not of the form path/to/file.py:callable or package.module:callable")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    target: Any = module
    for name in attribute.split("."):
        if not hasattr(target, name):
            public = [key for key, value in vars(target).items() if callable(value) and not key.startswith("_")]
            raise InputError(f"{place} has no {attribute!r}{near_matches(name, public)}")
        target = getattr(target, name)
    return _call_builder(target, spec, options)


def _call_builder(target: Any, spec: str, options: dict[str, Any]) -> nn.Module:
    if isinstance(target, nn.Module):
        raise InputError(f"{spec} is a module object; name the class or function that builds it")
    if not callable(target):
        raise InputError(f"{spec} is a {type(target).__name__}; name a class or function that builds a model")
    unknown = sorted(set(options) - _accepted(target, options))
    if unknown:
        raise InputError(f"{spec} takes no argument {', '.join(unknown)}; its signature is {_signature(target)}")
    try:
        model = target(**options)
    except Exception as error:
        refused = re.search(r"unexpected keyword argument '(\w+)'", str(error)) if type(error) is TypeError else None
        if refused and refused[1] in options:  # behind its **kwargs
            raise InputError(f"{spec} takes no argument {refused[1]}: {_located(error)}") from error
        raise ModelError(f"{_call(spec, options)} failed: {_located(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{_call(spec, options)} returned a {type(model).__name__}, not an nn.Module")
    return model


def _accepted(target: Callable[..., Any], options: dict[str, Any]) -> set[str]:
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return set(options)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return set(options)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {parameter.name for parameter in parameters if parameter.kind in named}


def _signature(target: Callable[..., Any]) -> str:
    return f"{getattr(target, '__name__', 'callable')}{inspect.signature(target)}"


def _call(name: str, options: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())})"


def _located(error: BaseException) -> str:
    """The message with the line of source that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{brief(error)} (at {frames[-1].filename}:{frames[-1].lineno})" if frames else brief(error)


@contextmanager
def _first_on_path(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        folder = path.parent
        siblings = [str(other) for other in folder.glob("*.py")] if folder.is_dir() else []
        raise InputError(f"no such file: {path}{near_matches(str(path), siblings)}")
    name = f"_reparam_model_{abs(hash(path.resolve())):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _first_on_path(str(path.parent.resolve())):
            spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ModelError(f"importing {path} failed: {_located(error)}") from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        with _first_on_path(os.getcwd()):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise InputError(f"there is no module {name!r} (a file is named as path/to/file.py:callable)") from error
        raise ModelError(f"importing {name} failed: {_located(error)}") from error
    except Exception as error:
        raise ModelError(f"importing {name} failed: {_located(error)}") from error


# Fitting -------------------------------------------------------------------------------------------------------------


def _strip_prefixes(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stripped = True
    while stripped and not set(state) <= set(expected):
        stripped = False
        for prefix in PREFIXES:
            if all(key.startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
                stripped = True
    return state


def _complete_tied(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give a tied weight that the file holds under one of its names to the others as well."""
    given = {id(expected[key]): value for key, value in state.items() if key in expected}
    tied = {key: given[id(value)] for key, value in expected.items() if key not in state and id(value) in given}
    return {**state, **tied}


def _with_own_classifier(
    state: dict[str, Tensor], expected: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> dict[str, Tensor]:
    """Take the tensors of a classifier for other classes from the model."""
    others = {key for key, value in expected.items() if key in state and state[key].shape != value.shape}
    sizes = {(tuple(state[key].shape[:1]), tuple(expected[key].shape[:1])) for key in others}
    if len(sizes) != 1 or any(state[key].shape[1:] != expected[key].shape[1:] for key in others):
        return state
    ((old,), (new,)) = sizes.pop()
    warnings.warn(
        f"{os.fspath(path)} is for {old} classes, and there are {new}: {listed(sorted(others))} start anew",
        stacklevel=4,
    )
    return {**state, **{key: expected[key].detach() for key in others}}


def _misfits(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    counters = "num_batches_tracked"  # absent from old checkpoints; batch norm fills it in
    missing = [key for key in expected if key not in state and not key.endswith(counters)]
    unexpected = [key for key in state if key not in expected]
    shared = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    mismatched = [f"{key} (file {list(state[key].shape)}, model {list(expected[key].shape)})" for key in shared]
    groups = {"missing": missing, "unexpected": unexpected, "mismatched": mismatched}
    return [f"{len(keys)} {name}: {listed(keys)}" for name, keys in groups.items() if keys]


def _rehearse(model: nn.Module, state: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Let a copy of the model try, since its load hooks may rename keys; raise what does not fit."""
    try:
        copy.deepcopy(model).load_state_dict(state, strict=True)
    except Exception as error:
        misfits = "; ".join(_misfits(state, model.state_dict()))
        raise FormatError(
            f"{os.fspath(path)} does not fit {type(model).__name__}: {misfits}. "
            "Is it a checkpoint of this model, with this number of classes and input channels?"
        ) from error
