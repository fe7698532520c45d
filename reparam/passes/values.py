"""Values of the lock-step interpretation: every graph value in the student's and in the teacher's world."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx

from reparam.ops.maps import Maps, clean


class Refuse(Exception):
    """A rule cannot carry the maps of its arguments through its operator; the message is the reason."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A tensor in both worlds (on the meta device).

    The invariant: ``t == s.index_select(dim, maps[dim].index)`` over all mapped dimensions. The one exception is a
    weight that is divided by the replica counts of the dimensions ``divided``: only a linear operator may read it.
    """

    s: Tensor
    t: Tensor
    maps: Maps = field(default_factory=dict)
    divided: tuple[int, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "maps", clean(self.maps))

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.s.dim()

    def describe(self) -> str:
        """Return shapes in both worlds."""
        return f"{list(self.s.shape)} -> {list(self.t.shape)}"


@dataclass(frozen=True)
class Int:
    """A number that differs between the worlds, because it comes from a widened dimension."""

    s: Any
    t: Any


@dataclass(frozen=True, eq=False)
class Free:
    """A value that depends on parameters and buffers only; its maps are chosen when an operator asks for them."""

    node: fx.Node
    s: Any


Value = Any
"""A structure (tuple, list, dict, slice) of Pair, Int, Free and plain Python values."""


def walk(value: Value, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield (path, leaf) for every leaf of a structure."""
    if isinstance(value, (tuple, list)):
        for k, item in enumerate(value):
            yield from walk(item, (*path, k))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from walk(item, (*path, key))
    elif isinstance(value, slice):
        for name in ("start", "stop", "step"):
            yield from walk(getattr(value, name), (*path, name))
    else:
        yield path, value


def holds_tensor(value: Value) -> bool:
    """Whether a structure holds a tensor, not only sizes and other numbers."""
    return any(isinstance(leaf, Tensor) for _path, leaf in walk(value))


def transform(value: Value, function: Callable[[Any], Any]) -> Value:
    """Apply ``function`` to every leaf; ``torch.Size`` becomes a tuple, named tuples stay what they are."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(transform(item, function) for item in value))
    if isinstance(value, tuple):
        items = [transform(item, function) for item in value]
        named = type(value).__module__ == "torch.return_types"
        return type(value)(items) if named else tuple(items)
    if isinstance(value, list):
        return [transform(item, function) for item in value]
    if isinstance(value, dict):
        return like(value, {key: transform(item, function) for key, item in value.items()})
    if isinstance(value, slice):
        return slice(*(transform(getattr(value, n), function) for n in ("start", "stop", "step")))
    return function(value)


def like(kind: dict[Any, Any], items: dict[Any, Any]) -> dict[Any, Any]:
    """Return a dict of the class of ``kind`` where that is a dataclass too: code may read its items as attributes."""
    if is_dataclass(kind):
        return type(kind)(**items)
    return OrderedDict(items) if type(kind) is OrderedDict else items


def student(value: Value) -> Any:
    """Return the student's world of a structure."""
    return transform(value, lambda leaf: leaf.s if isinstance(leaf, (Pair, Int, Free)) else leaf)


def teacher(value: Value) -> Any:
    """Return the teacher's world of a structure."""
    return transform(value, _teacher_leaf)


def _teacher_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Free):
        raise Refuse(f"the maps of parameter {leaf.node.target} are not decided")
    return leaf.t if isinstance(leaf, (Pair, Int)) else leaf


def narrow_value(value: Any) -> Value:
    """Wrap a student value that is the same in the teacher."""
    return transform(value, lambda leaf: Pair(leaf, leaf) if isinstance(leaf, Tensor) else leaf)


def join(s: Any, t: Any, maps: Callable[[Tensor, Tensor], Maps]) -> Value:
    """Pair up two structures of the same form; ``maps`` gives the maps of each pair of tensors."""
    if isinstance(s, torch.Tensor):
        return Pair(s, t, maps(s, t))
    if isinstance(s, dict):
        return like(s, {key: join(s[key], t[key], maps) for key in s})
    if isinstance(s, tuple) and hasattr(s, "_fields"):
        return type(s)(*(join(a, b, maps) for a, b in zip(s, t, strict=True)))
    if isinstance(s, (tuple, list)):
        if len(s) != len(t):
            raise Refuse(f"{len(s)} values become {len(t)} in the teacher")
        items = [join(a, b, maps) for a, b in zip(s, t, strict=True)]
        return items if type(s) is list else tuple(items)
    if isinstance(s, bool) and s != t:
        raise Refuse("a condition on sizes differs")
    if isinstance(s, (int, float)) and s != t:
        return Int(s, t)
    return s


def is_wide(leaf: Any) -> bool:
    """Whether a leaf differs between the worlds."""
    return isinstance(leaf, Int) or (isinstance(leaf, Pair) and bool(leaf.maps))


def plain(value: Any) -> Any:
    """Turn fx's immutable containers into ordinary ones."""
    if isinstance(value, dict):
        return like(value, {k: plain(v) for k, v in value.items()})
    if isinstance(value, list):
        return [plain(v) for v in value]
    if type(value) is tuple:
        return tuple(plain(v) for v in value)
    if isinstance(value, slice):
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    return value
