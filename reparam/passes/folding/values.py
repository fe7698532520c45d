"""Who uses a value, what for, and where an operator that moves elements puts its channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from reparam.passes.folding.ops import value_of
from reparam.passes.state import operator_name
from reparam.passes.values import plain

_QUERIES = {"size", "dim", "numel", "ndimension", "stride", "is_contiguous", "element_size"}

_NEW = set("zeros_like ones_like empty_like full_like new_zeros new_ones new_full new_empty new_tensor".split())
_LIKE = _NEW | {"reshape_as", "view_as", "expand_as", "type_as"}


def is_query(node: fx.Node) -> bool:
    """Whether a node asks for sizes, not for values."""
    if node.op == "call_method":
        return node.target in _QUERIES
    return node.target is getattr and node.args[1] in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")


def asks_size(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user only needs the size or type of a value."""
    if is_query(user):
        return True
    name = operator_name(user)
    first = user.args[0] if user.args else None
    return name in _LIKE and (name in _NEW or (first is not node and node in user.args[1:]))


def users_of(node: fx.Node) -> set[fx.Node]:
    """Return the users of a value that read its elements."""
    return {user for user in node.users if "needed" in user.meta and not asks_size(user, node)}


def follow(node: fx.Node, value: fx.Node, dim: int) -> tuple[int, Tensor] | None:
    """Follow the channels of ``value`` along ``dim`` through the operator of ``node``.

    Returns:
        The dimension they are along behind it, and the channel at each of its places; None if they do not stay whole,
        or if what is the same all over a channel would not stay so.
    """
    meta = value_of(value)
    channels = meta.shape[dim] if dim < meta.dim() else 0
    if channels < 2:
        return None
    # Codes that no average of others gives.
    codes = torch.rand(channels, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    shape = [channels if d == dim else 1 for d in range(meta.dim())]
    given = codes.reshape(shape).expand(meta.shape).contiguous()

    def feed(other: fx.Node) -> Any:
        known = given if other is value else value_of(other)
        return torch.zeros(known.shape) if isinstance(known, Tensor) and known.is_meta else known

    args, kwargs = plain(fx.node.map_arg((node.args, node.kwargs), feed))
    try:
        target: Any = node.target
        result = getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)
    except Exception:
        return None
    wide = [d for d in range(result.dim()) if not torch.allclose(result, result.narrow(d, 0, 1), rtol=1e-12, atol=0)]
    if len(wide) != 1:
        return None
    row = result.movedim(wide[0], 0).flatten(1)[:, 0] if result.dim() > 1 else result
    order = codes.argsort()
    found = torch.searchsorted(codes[order], row * (1 - 1e-12)).clamp(max=channels - 1)
    index = order[found]
    return (wide[0], index) if torch.allclose(codes[index], row, rtol=1e-10, atol=0) else None
