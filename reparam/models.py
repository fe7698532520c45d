"""Models and weights by name: what the command line and the trainer accept as ``MODEL`` and ``--checkpoint``.

A model is a timm name (``resnet18``), a Python file and a callable in it (``nets/unet.py:build``), or a module and
a callable in it (``torchvision.models:resnet18``). Weights come from safetensors files or from checkpoints that
``torch.load(..., weights_only=True)`` accepts; nothing in a weight file is ever executed.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import inspect
import os
import pickle
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from reparam.errors import FormatError, InputError, ModelError, near_matches
from reparam.passes.files import write_tensors

WEIGHT_KEYS = ("state_dict", "model", "model_state_dict", "weights")
"""Entries of a checkpoint under which the weights are looked for, in this order."""

EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
"""The same for the averaged weights, which are read when ``ema=True``."""

PREFIXES = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile put before every key."""

TIMM_SCHEMES = ("hf-hub:", "hf_hub:", "local-dir:")
"""Beginnings of names that timm resolves itself, although they hold a colon."""
_SHOWN = 8


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


def read_weights(path: str | os.PathLike[str], *, ema: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file or checkpoint by name, on the CPU. See `load_weights`."""
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"no such weight file: {path}")
    if _looks_like_safetensors(path):
        if ema:
            raise FormatError(f"{path}: a safetensors file holds one set of weights, so there is no EMA to choose")
        return _read_safetensors(path)
    return _unwrap(_read_pickle(path), path, ema)


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the state_dict of ``model`` as a plain safetensors file that any strict load accepts.

    Tied weights are written under each of their names. The file appears whole or not at all.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    partial = path.with_name(path.name + ".partial")
    try:
        write_tensors(tensors, partial, {"format": "pt"})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _located(error: BaseException) -> str:
    """The message with the line of source that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{_brief(error)} (at {frames[-1].filename}:{frames[-1].lineno})" if frames else _brief(error)


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


# Reading -------------------------------------------------------------------------------------------------------------


def _looks_like_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" or head[8:9] == b"{"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if "reparam_plan" not in metadata:
            return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise FormatError(f"{path} is truncated or not a safetensors file: {_brief(error)}") from error
    raise FormatError(
        f"{path} is a teacher; read it with reparam.load, or write its student first: "
        f"reparam extract {path} MODEL --output student.safetensors"
    )


def _read_pickle(path: Path) -> Any:
    # timm stores its arguments as a Namespace, a bag of attributes without behaviour.
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FormatError(
            f"{path} was refused and nothing in it was executed: it holds more than tensors and plain values "
            f"({_refusal(error)}). Where the file is trusted, save its state_dict alone, best as safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise FormatError(f"{path} is truncated or not a checkpoint: {_brief(error)}") from error


def _refusal(error: BaseException) -> str:
    found = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return found[1] if found else _brief(error)


def _unwrap(content: Any, path: Path, ema: bool) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise FormatError(f"{path} holds a {type(content).__name__}, not weights by name")
    for key in EMA_KEYS if ema else WEIGHT_KEYS:
        if _is_state(content.get(key)):
            return dict(content[key])
    if ema:
        raise FormatError(f"{path} has no averaged weights under {_listed(EMA_KEYS)}; it holds {_listed(content)}")
    if not _is_state(content):
        raise FormatError(f"{path} has no weights under {_listed(WEIGHT_KEYS)}; it holds {_listed(content)}")
    return dict(content)


def _is_state(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items())


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
        f"{os.fspath(path)} is for {old} classes, and there are {new}: {_listed(sorted(others))} start anew",
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
    return [f"{len(keys)} {name}: {_listed(keys)}" for name, keys in groups.items() if keys]


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


def _listed(names: Iterable[Any]) -> str:
    shown = [str(name) for name in names]
    rest = len(shown) - _SHOWN
    return ", ".join(shown[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
