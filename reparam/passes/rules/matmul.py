"""Products of tensors that sum over a dimension: equal maps on both sides, then division by the replica counts."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from reparam.ops.maps import Maps, ReplicaMap
from reparam.ops.steps import Scale
from reparam.passes.call import At, Call, counts_scale
from reparam.passes.records import record_layer
from reparam.passes.registry import rule
from reparam.passes.rules.linear import output_map
from reparam.passes.splits import chosen_part
from reparam.passes.streams import produced
from reparam.passes.values import Free, Pair, Refuse, Value, student


@rule(torch.einsum, "einsum", mixing=True)
def einsum(call: Call, equation: Value, *operands: Value) -> Value:
    """Einstein summation in the equation form."""
    if not isinstance(equation, str):
        raise Refuse("einsum in the sublist form")
    nested = len(call.args) == 2 and isinstance(call.args[1], (tuple, list))
    places = [At(("args", 1, k)) for k in range(len(call.args[1]))] if nested else [
        At(("args", k)) for k in range(1, len(call.args))
    ]  # fmt: skip
    letters, output = _letters(call, equation, places)
    maps = sum_product(call, places, letters, output)
    return call.result(maps)


def _letters(call: Call, equation: str, places: list[At]) -> tuple[list[str], str]:
    """Expand an equation to one letter per dimension; ``...`` becomes capital letters counted from the right."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    spare = [c for c in "ZYXWVUTSRQPONM" if c not in equation]
    longest = 0
    result = []
    for term, place in zip(terms, places, strict=True):
        rank = student(call.get(place)).dim()
        extra = rank - len(term.replace("...", ""))
        longest = max(longest, extra)
        result.append(term.replace("...", "".join(reversed(spare[:extra]))))
    if not arrow:
        joined = "".join(result)
        right = "..." + "".join(sorted(c for c in set(joined) if joined.count(c) == 1 and c not in spare))
    return result, right.replace("...", "".join(reversed(spare[:longest])))


def sum_product(call: Call, places: list[At], letters: list[str], output: str) -> Maps:
    """Give every letter one map in all operands and divide by the counts of the summed letters.

    A parameter takes its share of the division into itself where one widened letter of it is summed. A table of
    positions is no such parameter: its own letter counts tokens, which are not repeated.
    """
    chosen = {letter: _map_of(call, places, letters, letter) for letter in dict.fromkeys("".join(letters))}
    summed = [letter for letter in chosen if letter not in output]
    tables = call.planner.roles.tables
    for letter in summed:
        phi = chosen[letter]
        if phi is not None and phi.uniform is None:
            chosen[letter] = ReplicaMap.repeat(phi.size, int(phi.counts.max()))
    for place, term in zip(places, letters, strict=True):
        value = call.get(place)
        if isinstance(value, Free):
            inputs = [k for k, letter in enumerate(term) if letter in summed]
            outs = [k for k, letter in enumerate(term) if letter in output and _only_in(letter, term, letters)]
            mapped = [k for k in inputs if chosen[term[k]] is not None]
            if inputs and outs and len(set(term)) == len(term) and call.node not in tables:
                in_dim = mapped[0] if mapped else inputs[-1]
                return _with_weight(call, places, letters, output, place, in_dim, outs, chosen)
    for place, term in zip(places, letters, strict=True):
        call.match(
            place, {k: m for k, c in enumerate(term) if (m := chosen[c]) is not None and _fits(call, place, k, m)}
        )
    for letter in summed:
        if (replica_map := chosen[letter]) is not None:
            call.scale_out(counts_scale(replica_map, 0, -1.0))
    return {k: m for k, c in enumerate(output) if (m := chosen[c]) is not None}


def _fits(call: Call, place: At, dim: int, replica_map: ReplicaMap) -> bool:
    return bool(student(call.get(place)).shape[dim] == replica_map.size)


def _only_in(letter: str, term: str, letters: list[str]) -> bool:
    return sum(letter in other for other in letters) == 1 and letter in term


def _with_weight(
    call: Call,
    places: list[At],
    letters: list[str],
    output: str,
    place: At,
    in_dim: int,
    outs: list[int],
    chosen: Any,
) -> Maps:
    """One operand is a free parameter with summed and own dimensions: a linear operator."""
    term = letters[places.index(place)]
    value = student(call.get(place))
    out_dim = _own_dim(call, term, output, [k for k in outs if value.shape[k] > 1] or outs)
    wanted = {k: m for k, c in enumerate(term) if (m := chosen[c]) is not None}
    wanted[out_dim] = output_map(call, value.shape[out_dim], place)
    weight = call.weight(place, wanted, out_dim, in_dim)
    for k, letter in enumerate(term):
        chosen[letter] = weight.maps.get(k)
        if k == out_dim and k in weight.maps:
            chosen[letter] = produced(call, place, weight.maps[k])
    for other, other_term in zip(places, letters, strict=True):
        if other is not place:
            call.match(
                other,
                {k: m for k, c in enumerate(other_term) if (m := chosen[c]) is not None and _fits(call, other, k, m)},
            )
    for letter in [c for c in chosen if c not in output and c != term[in_dim]]:
        if chosen[letter] is not None:
            call.scale_out(counts_scale(chosen[letter], 0, -1.0))
    _record(call, places, place, weight, (out_dim, in_dim), math.prod(value.shape[k] for k in outs))
    return {k: m for k, c in enumerate(output) if (m := chosen[c]) is not None}


def _own_dim(call: Call, term: str, output: str, outs: list[int]) -> int:
    """Which of its own dimensions a parameter widens: heads and their width may both be among them."""
    choice = chosen_part(call, [output.index(term[k]) for k in outs]) if len(outs) > 1 else None
    return outs[-1 if choice is None else choice]


def _record(call: Call, places: list[At], place: At, weight: Pair, dims: tuple[int, int], outputs: int) -> None:
    """Tell the planner what became of this layer; the first dimension of the result is the batch."""
    data = [s for p in places if p is not place and isinstance(s := call.source(p), fx.Node)]
    if data:
        batch = call.s.shape[0] if call.s.dim() > 1 else 1
        positions = call.s.numel() // max(batch * outputs, 1)
        counts = (positions * weight.s.numel(), positions * weight.t.numel())
        record_layer(call.planner, call.node, data[0], call.source(place), weight, dims, counts)


def _map_of(call: Call, places: list[At], letters: list[str], letter: str) -> ReplicaMap | None:
    """The widest map of a letter among the operands; None where an operand broadcasts or all are narrow."""
    found: list[ReplicaMap] = []
    for place, term in zip(places, letters, strict=True):
        value = call.get(place)
        if isinstance(value, Pair):
            found += [value.maps[k] for k, c in enumerate(term) if c == letter and k in value.maps]
    sizes = {
        student(call.get(p)).shape[k]
        for p, t in zip(places, letters, strict=True)
        for k, c in enumerate(t)
        if c == letter
    }
    if not found or (len(sizes) > 1 and max(sizes) != max(m.size for m in found)):
        return None
    known = [t for p, t in zip(places, letters, strict=True) if isinstance(call.get(p), Pair)]
    if sizes == {1} and len(found) < sum(t.count(letter) for t in known):
        return None  # one index that broadcasts: code may rely on it (a view that drops it)
    return max(found, key=lambda m: (m.size, len(m)))


def _product(call: Call, first: Any, second: Any, left: str, right: str, output: str) -> Value:
    return call.result(sum_product(call, [first, second], [left, right], output))


@rule(
    torch.matmul,
    "matmul",
    operator.matmul,
    "__matmul__",
    torch.bmm,
    "bmm",
    torch.mm,
    "mm",
    torch.mv,
    "mv",
    torch.dot,
    "dot",
    mixing=True,
)
def matmul(call: Call, input: Value, other: Value) -> Value:
    """Matrix products with batch dimensions and vectors."""
    a, b = student(input), student(other)
    batch = "ZYXWVUTS"
    left = "k" if a.dim() == 1 else "".join(reversed(batch[: a.dim() - 2])) + "ik"
    right = "k" if b.dim() == 1 else "".join(reversed(batch[: b.dim() - 2])) + "kj"
    depth = max(a.dim(), b.dim()) - 2
    output = "".join(reversed(batch[: max(depth, 0)])) + ("i" if a.dim() > 1 else "") + ("j" if b.dim() > 1 else "")
    return _product(call, "input", "other", left, right, output)


@rule(torch.outer, "outer", torch.ger)
def outer(call: Call, input: Value, vec2: Value) -> Value:
    """Outer product: nothing is summed."""
    return _product(call, "input", "vec2", "i", "j", "ij")


@rule(torch.tensordot, mixing=True)
def tensordot(call: Call, a: Value, b: Value, dims: Value = 2, out: Value = None) -> Value:
    """A product that sums over the named dimensions of both tensors."""
    first, second = student(a).dim(), student(b).dim()
    if not isinstance(dims, (int, tuple, list)) or (not isinstance(dims, int) and len(dims) != 2):
        raise Refuse("dimensions in another form than a number or two lists")
    ends = (range(first - dims, first), range(dims)) if isinstance(dims, int) else dims
    pairs = [(i % first, j % second) for i, j in zip(*(_listed(end) for end in ends), strict=True)]
    left, right = list("abcdefghijkl"[:first]), list("mnopqrstuvwx"[:second])
    for i, j in pairs:
        right[j] = left[i]
    output = [c for c in (*left, *right) if (c in left) != (c in right)]
    return _product(call, "a", "b", "".join(left), "".join(right), "".join(output))


def _listed(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


@rule(torch.addmm, "addmm", mixing=True)
def addmm(call: Call, input: Value, mat1: Value, mat2: Value, *, beta: Value = 1, alpha: Value = 1) -> Value:
    """``beta input + alpha mat1 @ mat2``."""
    return _add_product(call, "mat1", "mat2", ["ik", "kj"], "ij")


@rule(torch.baddbmm, "baddbmm", mixing=True)
def baddbmm(call: Call, input: Value, batch1: Value, batch2: Value, *, beta: Value = 1, alpha: Value = 1) -> Value:
    """``beta input + alpha batch1 @ batch2``."""
    return _add_product(call, "batch1", "batch2", ["bik", "bkj"], "bij")


def _add_product(call: Call, first: str, second: str, letters: list[str], output: str) -> Value:
    """The division by the counts of the summed maps goes into alpha."""
    maps = sum_product(call, [At(call.path(first)), At(call.path(second))], letters, output)
    factor = 1.0
    for step in call.edit.out:
        if not isinstance(step, Scale) or step.dim is not None:
            raise Refuse("a factor of its own for each index")
        factor *= step.factors[0]
    call.edit.out.clear()
    if factor != 1.0:
        alpha = call.get("alpha")
        call.set("alpha", (1 if alpha is None else student(alpha)) * factor)
    rank, size = len(output), student(call.get("input")).dim()
    shape = student(call.get("input")).shape
    own = {d - rank + size: m for d, m in maps.items() if d - rank + size >= 0}
    call.match("input", {d: m for d, m in own.items() if shape[d] == m.size})
    return call.result(maps)
