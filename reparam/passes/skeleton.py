"""Copies of a model that share no storage with it: on the meta device, or with other tensors in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import CellType, FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

_HOME = "reparam_home"
"""Attribute of a skeleton: the device of the network that it was made from."""


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer with its path; a tensor that several paths share comes once per path."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def canonical_names(module: nn.Module) -> dict[str, str]:
    """Map every parameter and buffer path to the first path of the same tensor (tied weights)."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in named_tensors(module)}


def rebuild(module: M, make: Callable[[str, Tensor], Tensor]) -> M:
    """Deep-copy ``module`` with each parameter and buffer replaced by ``make(name, tensor)``.

    Ties stay ties, ``requires_grad`` is kept, the original tensors are never copied.
    """
    memo: dict[int, Any] = {}
    originals: list[Tensor] = []
    for name, tensor in named_tensors(module):
        if id(tensor) in memo:
            continue
        originals.append(tensor)
        new = make(name, tensor.detach())
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = new
    result = copied(module, memo)
    vars(result).pop(_HOME, None)
    return result


def copied(module: M, memo: dict[int, Any] | None = None) -> M:
    """Deep-copy ``module``; hooks that hold its modules or their attributes hold those of the copy.

    A function is not copied with its module: ``lambda m, x, y: self.features.append(y)`` would go on to write into the
    original, and the copy would read what an earlier call of that left behind.

    Args:
        module: what to copy.
        memo: see ``copy.deepcopy``; filled.
    """
    memo = {} if memo is None else memo
    results = [item for item in _kept_tensors(module) if not item.is_leaf and id(item) not in memo]
    memo.update({id(item): item.detach().clone() for item in results})  # torch copies leaves only
    result = copy.deepcopy(module, memo)
    rebind_hooks(result, memo)
    return result


def _kept_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that modules keep as plain attributes: weights of hook-based norms, results of eval mode."""
    for child in module.modules():
        for value in vars(child).values():
            # Also in a list (recurrent modules keep all their weights in one) or a dict.
            inside = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
            yield from (item for item in inside if isinstance(item, Tensor))


def slots(module: nn.Module) -> dict[str, str]:
    """Map every parameter and buffer path to the first path of the same attribute of the same module.

    A module may stand under several names; tied weights of different modules are different attributes.
    """
    paths: dict[int, str] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        paths.setdefault(id(child), path)
    found = {}
    for name, _tensor in named_tensors(module):
        path, _, leaf = name.rpartition(".")
        first = paths[id(module.get_submodule(path))]
        found[name] = f"{first}.{leaf}" if first else leaf
    return found


def rebind_hooks(module: nn.Module, memo: dict[int, Any]) -> None:
    """See :func:`copied`, for a module that was copied with ``memo``."""
    for child in module.modules():
        for hooks in (child._forward_pre_hooks, child._forward_hooks):
            for key, hook in hooks.items():
                hooks[key] = _rebound(hook, memo)


def _rebound(hook: Callable[..., Any], memo: dict[int, Any]) -> Callable[..., Any]:
    """Return a function that holds the copies of what ``hook`` holds in its closure and its defaults."""
    if not isinstance(hook, FunctionType):
        return hook

    def new(value: Any) -> Any:
        return memo.get(id(value), value)

    def cell(old: CellType) -> CellType:
        return CellType(new(old.cell_contents)) if _is_set(old) and id(old.cell_contents) in memo else old

    closure = tuple(map(cell, hook.__closure__ or ()))
    defaults = tuple(map(new, hook.__defaults__ or ()))
    named = {name: new(value) for name, value in (hook.__kwdefaults__ or {}).items()}
    pairs = zip((*closure, *defaults), (*(hook.__closure__ or ()), *(hook.__defaults__ or ())), strict=True)
    if all(a is b for a, b in pairs) and all(named[n] is v for n, v in (hook.__kwdefaults__ or {}).items()):
        return hook
    made = FunctionType(hook.__code__, hook.__globals__, hook.__name__, defaults or None, closure or None)
    made.__kwdefaults__ = named or None
    vars(made).update(vars(hook))
    return made


def _is_set(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


MOST_VALUES = 2**16
"""Largest number of elements of a buffer that a skeleton knows: masks and indices; it must not hold a whole network."""


def skeleton_of(module: M) -> M:
    """Return a copy of ``module`` with parameters and buffers on the meta device; small buffers know their values."""
    skeleton = rebuild(module, lambda _name, tensor: tensor.to("meta"))
    values = dict(module.named_buffers(remove_duplicate=False))
    for name, buffer in skeleton.named_buffers(remove_duplicate=False):
        if not values[name].is_meta and values[name].numel() <= MOST_VALUES:
            vars(buffer)["reparam_values"] = values[name].detach()
    vars(skeleton)[_HOME] = next((tensor.device for _name, tensor in named_tensors(module)), torch.device("cpu"))
    modes = train_modes(skeleton)
    # Modules that keep results of their eval mode (attention biases) forget them here: those came from other weights.
    skeleton.train()
    for name, child in skeleton.named_modules():
        child.training = modes[name]
    return skeleton


def home_of(skeleton: nn.Module) -> torch.device:
    """Return the device of the network that a skeleton was made from."""
    home: torch.device = vars(skeleton).get(_HOME, torch.device("cpu"))
    return home if home.type != "meta" else torch.device("cpu")


def known_mask(buffer: Tensor | None) -> Tensor | None:
    """Return a copy of the values of a buffer of truth values on the CPU; None where it is another one."""
    values = vars(buffer).get("reparam_values") if buffer is not None and buffer.dtype == torch.bool else None
    return None if values is None else values.to("cpu", copy=True)


def train_modes(module: nn.Module) -> dict[str, bool]:
    """Return the train flag of every submodule by path."""
    return {name: child.training for name, child in module.named_modules()}


def module_and_attribute(root: nn.Module, target: str) -> tuple[nn.Module, str]:
    """Split ``a.b.weight`` into the module ``a.b`` and ``"weight"``."""
    path, _, name = target.rpartition(".")
    return root.get_submodule(path), name


def to_meta(value: object) -> object:
    """Return tensors as meta tensors, anything else unchanged."""
    return value.to("meta") if isinstance(value, Tensor) and value.device.type != "meta" else value


def first_floating_dtype(module: nn.Module) -> torch.dtype | None:
    """Return the dtype of the first floating point parameter, or None."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
