"""Files of weights: safetensors, and checkpoints that ``torch.load(..., weights_only=True)`` accepts."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reparam.errors import FormatError, InputError

WEIGHT_KEYS = ("state_dict", "model", "model_state_dict", "weights")
"""Entries of a checkpoint under which the weights are looked for, in this order."""

EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
"""The same for the averaged weights, which are read when ``ema=True``."""

_SHOWN = 8


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
        raise FormatError(f"{path} is truncated or not a safetensors file: {brief(error)}") from error
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
        raise FormatError(f"{path} is truncated or not a checkpoint: {brief(error)}") from error


def _refusal(error: BaseException) -> str:
    found = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return found[1] if found else brief(error)


def _unwrap(content: Any, path: Path, ema: bool) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise FormatError(f"{path} holds a {type(content).__name__}, not weights by name")
    if {"version", "steps", "owner"} <= set(content):
        raise FormatError(
            f"{path} is a checkpoint of a training run; write its student first: "
            f"reparam evaluate {path} --output FOLDER"
        )
    for key in EMA_KEYS if ema else WEIGHT_KEYS:
        if _is_state(content.get(key)):
            return dict(content[key])
    if ema:
        raise FormatError(f"{path} has no averaged weights under {listed(EMA_KEYS)}; it holds {listed(content)}")
    if not _is_state(content):
        raise FormatError(f"{path} has no weights under {listed(WEIGHT_KEYS)}; it holds {listed(content)}")
    return dict(content)


def _is_state(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items())


def brief(error: BaseException) -> str:
    """Return the first line of an error, for messages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def listed(names: Iterable[Any]) -> str:
    """Return names for messages, the first ones of many."""
    shown = [str(name) for name in names]
    rest = len(shown) - _SHOWN
    return ", ".join(shown[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written, because the disk is full for instance.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error
