"""What values are to an attention: what reaches it, which of their dimensions count its heads, what joins its scores.

Read off the graph before planning, from shapes alone; where nothing is found, nothing is claimed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from reparam.passes.registry import find_rule
from reparam.passes.values import holds_tensor

Labels = tuple[frozenset[int], ...]
"""For each dimension of a value, the parts of a split that lie in it."""

_STEPS = 400
"""Nodes that are followed at most from one split."""


class Roles:
    """What the values of a network's graphs are to its attentions.

    Args:
        graphs: the graphs.
    """

    heads: set[fx.Node]
    """Nodes whose values reach a product of two computed values before any other mixing operator."""

    tables: set[fx.Node]
    """Products of queries with a table of positions, which are added to the scores of an attention.

    The table's own dimension counts tokens, not channels, although the operator is that of a linear layer.
    """

    def __init__(self, graphs: Iterable[fx.Graph]) -> None:
        self._nodes = [node for graph in graphs for node in graph.nodes]
        self._mixing = {node for node in self._nodes if _mixes(node)}
        self._computed: set[fx.Node] = set()
        for node in self._nodes:
            given = [n for n in node.all_input_nodes if n in self._computed]
            # What is computed from sizes of values and from parameters is no computed value.
            if node.op == "placeholder" or any(holds_tensor(n.meta.get("val")) for n in given):
                self._computed.add(node)
        self._products = {node for node in self._mixing if self._is_product(node)}
        self._parts: dict[fx.Node, tuple[int | None, int | None]] = {}
        self.heads = set()
        for node in reversed(self._nodes):
            for user in node.users:
                if (user in self.heads and user not in self._mixing) or user in self._products:
                    self.heads.add(node)
        self.tables = self._find_tables()

    def _is_product(self, node: fx.Node) -> bool:
        """Whether a node multiplies matrices none of which comes from parameters alone."""
        entry = find_rule(node.op, node.target)
        if entry is None or entry.family not in ("attention", "matmul"):
            return False
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        return len(tensors) > 1 and all(n in self._computed for n in tensors[:2])

    def _find_tables(self) -> set[fx.Node]:
        scores = self._behind(self._products)
        queries = self._behind(self.heads) - scores
        found = set()
        for node in self._mixing - self._products:
            entry = find_rule(node.op, node.target)
            asked = any(n in queries for n in node.all_input_nodes)
            if entry is not None and entry.family == "matmul" and asked and self._meets(node, scores):
                found.add(node)
        return found

    def _behind(self, nodes: set[fx.Node]) -> set[fx.Node]:
        """Return these nodes and what is computed from them before any mixing."""
        found = set(nodes)
        for node in self._nodes:
            given = [n for n in node.all_input_nodes if n in found]
            if node not in self._mixing and any(holds_tensor(n.meta.get("val")) for n in given):
                found.add(node)
        return found

    def _meets(self, node: fx.Node, scores: set[fx.Node]) -> bool:
        """Whether a value that comes from this node meets scores before any mixing."""
        reached, stack = {node}, [node]
        while stack:
            current = stack.pop()
            for user in current.users if holds_tensor(current.meta.get("val")) else ():
                if self._is_mask(user, current):
                    return True  # the mask of an attention
                if user in reached or user in self._mixing:
                    continue
                reached.add(user)
                if any(n in scores and n not in reached for n in user.all_input_nodes):
                    return True
                stack.append(user)
        return False

    def _is_mask(self, product: fx.Node, value: fx.Node) -> bool:
        entry = find_rule(product.op, product.target)
        if product not in self._products or entry is None or entry.family != "attention":
            return False
        return value is entry.signature.bind(*product.args, **product.kwargs).arguments.get("attn_mask")

    # -- which part of a split is the number of heads -----------------------------------------------------------------

    def parts(self, node: fx.Node, dims: Sequence[int]) -> tuple[int | None, int | None]:
        """Follow dimensions of a value to the products of attention: which counts heads, which is their width.

        Args:
            node: the operator that makes them.
            dims: the dimensions.

        Returns:
            Indices into ``dims``, None where there is not exactly one.
        """
        if node not in self._parts:
            self._parts[node] = self._follow(node, dims) if node in self.heads else (None, None)
        return self._parts[node]

    def _follow(self, node: fx.Node, dims: Sequence[int]) -> tuple[int | None, int | None]:
        own = {dim: k for k, dim in enumerate(dims)}
        start = tuple(frozenset({own[d]} if d in own else ()) for d in range(node.meta["val"].dim()))
        counts: set[int] = set()
        widths: set[int] = set()
        for labels, batch in self._arrivals(node, start):
            counts |= {k for d in batch for k in labels[d]}
            widths |= {k for d, held in enumerate(labels) if d not in batch for k in held}
        widths -= counts
        return (counts.pop() if len(counts) == 1 else None, widths.pop() if len(widths) == 1 else None)

    def _arrivals(self, node: fx.Node, labels: Labels) -> Iterator[tuple[Labels, list[int]]]:
        """Yield the labels of values of this one that a product gets, with the product's batch dimensions."""
        known: dict[fx.Node, Labels] = {node: labels}
        stack, steps = [node], 0
        while stack and steps < _STEPS:
            current = stack.pop()
            for user in current.users:
                steps += 1
                if user in self._products and isinstance(current.meta.get("val"), Tensor):
                    yield known[current], _batch_dims(user, current)
                elif user not in known and user not in self._mixing:
                    passed = _passed(user, current, known[current])
                    if passed is not None:
                        known[user] = passed
                        stack.append(user)


def _mixes(node: fx.Node) -> bool:
    entry = find_rule(node.op, node.target)
    if entry is None:
        return node.op == "call_module"
    return entry.mixes(node)


def _batch_dims(product: fx.Node, operand: fx.Node) -> list[int]:
    """The dimensions of an operand that are neither summed nor its own in the result."""
    rank = operand.meta["val"].dim()
    if product.target is not torch.einsum:
        return list(range(rank - 2))
    equation = str(product.args[0]).replace(" ", "")
    left, _arrow, right = equation.partition("->")
    terms = left.split(",")
    places = [n for a in product.args[1:] for n in (a if isinstance(a, (tuple, list)) else [a])]
    mine = next((t for t, n in zip(terms, places, strict=False) if n is operand), "")
    if "..." in equation:
        return []
    return [d for d, c in enumerate(mine) if c in right and sum(c in t for t in terms) > 1]


_ORDERS = ("permute", "transpose", "swapaxes", "movedim", "t")


def _passed(node: fx.Node, source: fx.Node, labels: Labels) -> Labels | None:
    """Labels behind an operator; None where they are lost."""
    name = str(getattr(node.target, "__name__", node.target))
    given, val = source.meta.get("val"), node.meta.get("val")
    if isinstance(given, (tuple, list)):
        # One of several pieces: their labels were worked out when they were cut.
        return labels if isinstance(val, Tensor) and val.dim() == len(labels) else None
    if not isinstance(given, Tensor):
        return None
    if name in _ORDERS:
        return _permuted(node, given.dim(), labels, name)
    if isinstance(val, (tuple, list)):
        return _pieces(node, name, given, val, labels)
    if not isinstance(val, Tensor):
        return None
    if name == "getattr":
        return (*labels[:-2], labels[-1], labels[-2]) if node.args[1:] == ("mT",) else None
    if name in ("unsqueeze", "stack"):
        return _with_dimension(node, labels)
    if node.target is operator.getitem:
        return _indexed(node.args[1], labels)
    if name == "select":
        dim = int(node.args[1]) % len(labels)  # type: ignore[arg-type]
        return tuple(held for d, held in enumerate(labels) if d != dim)
    if given.shape != val.shape and math.prod(given.shape) == math.prod(val.shape):
        return _reshaped(list(given.shape), list(val.shape), labels)
    if val.dim() >= given.dim():
        # Element by element, or along a dimension: each dimension stays at its place from the right.
        return (*[frozenset[int]()] * (val.dim() - given.dim()), *labels)
    return None


def _with_dimension(node: fx.Node, labels: Labels) -> Labels | None:
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if not isinstance(dim, int):
        return None
    at = dim % (len(labels) + 1)
    return (*labels[:at], frozenset(), *labels[at:])


def _permuted(node: fx.Node, rank: int, labels: Labels, name: str) -> Labels | None:
    sample = torch.empty(tuple(range(2, rank + 2)), device="meta")
    try:
        args, kwargs = node.args[1:], node.kwargs
        moved = getattr(sample, name)(*args, **kwargs)
    except (TypeError, RuntimeError, IndexError):
        return None
    return tuple(labels[size - 2] for size in moved.shape)


def _pieces(node: fx.Node, name: str, given: Tensor, val: Any, labels: Labels) -> Labels | None:
    piece = val[0] if val and isinstance(val[0], Tensor) else None
    if piece is None:
        return None
    if piece.dim() == given.dim():
        return labels
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if name != "unbind" or not isinstance(dim, int):
        return None
    return tuple(held for d, held in enumerate(labels) if d != dim % given.dim())


def _indexed(index: Any, labels: Labels) -> Labels | None:
    items = list(index) if isinstance(index, tuple) else [index]
    if any(not isinstance(i, (int, slice, type(None), type(Ellipsis))) for i in items):
        return None
    if Ellipsis in items:
        k = items.index(Ellipsis)
        taken = sum(i is not None and i is not Ellipsis for i in items)
        items[k : k + 1] = [slice(None)] * (len(labels) - taken)
    found: list[frozenset[int]] = []
    rest = list(labels)
    for item in items:
        if item is None:
            found.append(frozenset())
        elif isinstance(item, slice):
            found.append(rest.pop(0))
        else:
            rest.pop(0)
    return (*found, *rest)


def _reshaped(ins: list[int], outs: list[int], labels: Labels) -> Labels | None:
    """Dimensions that are joined hold what their parts held; where a part is split once more, labels are lost."""
    found: list[frozenset[int]] = []
    i = j = 0
    while i < len(ins) and j < len(outs):
        if 1 in (ins[i], outs[j]) and ins[i] != outs[j]:
            found += [frozenset()] if outs[j] == 1 else []
            i, j = i + (ins[i] == 1), j + (outs[j] == 1)
            continue
        held, left, right, first = labels[i], ins[i], outs[j], j
        i, j = i + 1, j + 1
        while left != right:
            if left < right and i < len(ins):
                held, left, i = held | labels[i], left * ins[i], i + 1
            elif left > right and j < len(outs):
                right, j = right * outs[j], j + 1
            else:
                return None
        if held and j - first > 1:
            return None
        found += [held] * (j - first)
    return (*found, *[frozenset[int]()] * (len(outs) - j))
