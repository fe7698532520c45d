"""Free values: which parameters a value is computed from, and how maps of the value can come from maps of those."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor, fx

from reparam.ops.maps import Maps, ReplicaMap, clean
from reparam.passes.values import Free, Value


def substitute(value: Any, env: dict[fx.Node, Value]) -> Any:
    """Replace nodes by their values in an argument structure."""
    if isinstance(value, fx.Node):
        return env[value]
    if isinstance(value, dict):
        return {k: substitute(v, env) for k, v in value.items()}
    if isinstance(value, list):
        return [substitute(v, env) for v in value]
    if type(value) is tuple:
        return tuple(substitute(v, env) for v in value)
    if isinstance(value, slice):
        return slice(*(substitute(getattr(value, n), env) for n in ("start", "stop", "step")))
    return value


def is_wider(new: Maps, old: Maps) -> bool:
    """Whether ``new`` widens a dimension that ``old`` leaves narrow."""
    return any(dim not in old for dim in clean(new))


def placements(maps: Maps, value: Tensor, source: Tensor) -> Iterator[Maps]:
    """Yield ways to give the dimensions of a source the maps of a value that is computed from it."""
    items = sorted(maps.items())

    def place(k: int, used: dict[int, ReplicaMap]) -> Iterator[Maps]:
        if k == len(items):
            if used:
                yield dict(used)
            return
        dim, replica_map = items[k]
        offset = source.dim() - value.dim()
        candidates = sorted(range(source.dim()), key=lambda d: (d != dim, d != dim + offset, d))
        for candidate in candidates:
            if candidate in used:
                continue
            for behind in (replica_map, _of_blocks(replica_map, source.shape[candidate])):
                if behind is not None and source.shape[candidate] == behind.size:
                    yield from place(k + 1, {**used, candidate: behind})
                    break
        yield from place(k + 1, used)

    yield from place(0, {})


def _of_blocks(replica_map: ReplicaMap, size: int) -> ReplicaMap | None:
    """The map of the outer one of two dimensions that were flattened into one; None where that is narrow."""
    inner, rest = divmod(replica_map.size, max(size, 1))
    if rest or inner < 2 or len(replica_map) % inner:
        return None
    blocks = replica_map.index.reshape(-1, inner)
    whole = bool((blocks == blocks[:, :1] + np.arange(inner)).all()) and not (blocks[:, 0] % inner).any()
    return ReplicaMap(blocks[:, 0] // inner, size) if whole else None


def ancestors(node: fx.Node, env: dict[fx.Node, Value]) -> list[fx.Node]:
    """Return the free nodes that ``node`` is computed from, and itself, in topological order."""
    order: dict[fx.Node, None] = {}

    def add(current: fx.Node) -> None:
        if current in order or not isinstance(env.get(current), Free):
            return
        for parent in current.all_input_nodes:
            add(parent)
        order[current] = None

    add(node)
    return list(order)
