"""What one recording learns and the next one need not find out again: a network has hundreds of equal batch norms."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from reparam.passes.skeleton import known_mask

_STATE = frozenset(vars(nn.Module())) | {"training"}


@dataclass
class Memory:
    """Facts about modules, by what decides them.

    Args:
        home: the device of the network, which recordings on the meta device do not know.
        structural: modules, and training flags, whose train mode does other things than their eval mode.
        indifferent: training flags that decide nothing, for this network and these inputs.
        results: module or operator, and inputs -> its result, where that is one new tensor.
        runs: operator and inputs of the teacher's world -> its result.
        proofs: operator that moves elements, sizes and maps -> the maps of its results.
        graphs: module, mode, inputs and forced answers -> the graph inside it, and its branches on sizes.
    """

    home: torch.device = field(default_factory=lambda: torch.device("cpu"))
    structural: set[Hashable] = field(default_factory=set)
    indifferent: set[str] = field(default_factory=set)
    results: dict[Hashable, Any] = field(default_factory=dict)
    runs: dict[Hashable, Any] = field(default_factory=dict)
    proofs: dict[Hashable, Any] = field(default_factory=dict)
    graphs: dict[Hashable, tuple[fx.Graph, list[tuple[str, bool]]]] = field(default_factory=dict)


def signature(module: nn.Module) -> Hashable | None:
    """Return what decides the forward of a module: class, sizes, settings and masks; None where that may be more.

    A module with submodules, hooks or attributes of other types has no signature.
    """
    own = vars(module)
    if own["_modules"] or any(
        own[name] for name in own if name.endswith("_hooks") or name.endswith("_hooks_with_kwargs")
    ):
        return None
    settings = tuple((name, value) for name, value in own.items() if name not in _STATE)
    if "forward" in own or not all(isinstance(value, _SETTINGS) for _name, value in settings):
        return None
    tensors = tuple(
        (name, None if value is None else (tuple(value.shape), value.dtype, _true_places(value)))
        for holder in (own["_parameters"], own["_buffers"])
        for name, value in holder.items()
    )
    try:
        hash(settings)
    except TypeError:
        return None
    return type(module), settings, tensors


def _true_places(buffer: Tensor) -> Hashable:
    mask = known_mask(buffer)
    return None if mask is None else tuple(mask.flatten().nonzero().flatten().tolist())


_SETTINGS = (int, float, str, bool, tuple, torch.dtype, type(None))


def shapes_of(values: Any) -> Hashable | None:
    """Return sizes and types of all tensors in a structure and the values of the rest; None where one has no hash."""
    key = _key(values)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Tensor, tuple(value.shape), value.dtype, value.stride()
    if isinstance(value, (tuple, list)):
        return (type(value), *map(_key, value))
    if isinstance(value, dict):
        return (dict, *((name, _key(item)) for name, item in value.items()))
    if isinstance(value, slice):
        return slice, _key(value.start), _key(value.stop), _key(value.step)
    return type(value), value  # 1, 1.0 and True are equal


def remembered(memory: Memory, key: Hashable) -> Any:
    """Return a new tensor like the one that was remembered, or None."""
    known = memory.results.get(key)
    return None if known is None else torch.empty_like(known)


def remember(memory: Memory, key: Hashable, value: Any, given: Any) -> None:
    """Remember a result that is one new tensor: what shares the memory of an input is not the same as a new one."""
    if not isinstance(value, Tensor):
        return
    storages = {v.untyped_storage()._cdata for v in pytree.tree_leaves(given) if isinstance(v, Tensor)}
    if value.untyped_storage()._cdata not in storages:
        memory.results[key] = value
