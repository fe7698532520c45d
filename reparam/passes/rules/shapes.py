"""Reshapes: other shapes of the same elements in the same order.

Input and output dimensions fall into segments of equal products. Each segment is proven by itself with labels (see
``movement``), so the proof costs as much as the widened segment and not as the whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from reparam.ops.maps import Maps
from reparam.passes.call import At, Call
from reparam.passes.registry import rule
from reparam.passes.rules.movement import find_maps
from reparam.passes.splits import split_layout
from reparam.passes.values import Free, Pair, Refuse, Value, is_wide, student, walk


def _reshaped(call: Call, x: Pair) -> Value:
    """Run the operator and prove its result segment by segment."""
    return call.result(lambda s, t: reshape_maps(x, list(s.shape), list(t.shape)))


def reshape_maps(x: Pair, shape: list[int], wide_shape: list[int]) -> Maps:
    """Return the maps of a reshape of ``x`` to ``shape`` in the student and ``wide_shape`` in the teacher.

    Raises:
        Refuse: the teacher's elements do not lie as the student's.
    """
    maps: Maps = {}
    if len(shape) != len(wide_shape):
        raise Refuse("the results have different ranks")
    for ins, outs in _segments(list(x.s.shape), shape):
        if math.prod(x.t.shape[d] for d in ins) != math.prod(wide_shape[d] for d in outs):
            raise Refuse("the widened dimension would move into another one")
        sizes, wide_sizes = [shape[d] for d in outs], [wide_shape[d] for d in outs]
        if not any(d in x.maps for d in ins):
            if sizes != wide_sizes:
                raise Refuse("the sizes of a narrow dimension would change")
            continue
        if math.prod(sizes) > 1 and any(d in x.maps and x.s.shape[d] == 1 for d in ins):
            # They could join a dimension that is a batch or a resolution.
            raise Refuse("the replicas of a single channel would join another dimension")
        s = torch.arange(math.prod(sizes)).view([x.s.shape[d] for d in ins])
        t = s
        for k, d in enumerate(ins):
            if d in x.maps:
                t = t.index_select(k, torch.tensor(x.maps[d].index))
        found = find_maps(s.reshape(sizes), t.reshape(wide_sizes))
        maps.update({outs[k]: m for k, m in found.items()})
    return maps


def reshape_sizes(x: Pair, sizes: Sequence[int]) -> list[list[int]]:
    """Return candidates for the teacher's shape of a reshape of ``x`` to the student shape ``sizes``.

    Input and output dimensions fall into segments of equal products; the widening of a segment can go to any one
    output dimension of it.
    """
    candidates: list[list[int]] = [[]]
    for ins, outs in _segments(list(x.s.shape), list(sizes)):
        wide = math.prod(x.t.shape[d] for d in ins)
        plain = math.prod(x.s.shape[d] for d in ins)
        options: list[list[int]] = []
        if wide == plain or not outs:
            options = [[sizes[d] for d in outs]]
        else:
            for d in outs:
                if sizes[d] and (sizes[d] * wide) % plain == 0:
                    options.append([sizes[o] * wide // plain if o == d else sizes[o] for o in outs])
        candidates = [[*head, *tail] for head in candidates for tail in options]
    return candidates


def _segments(ins: list[int], outs: list[int]) -> list[tuple[list[int], list[int]]]:
    """Cut two shapes of equal product into the finest segments of equal products."""
    segments: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(ins) or j < len(outs):
        a, b = [i] if i < len(ins) else [], [j] if j < len(outs) else []
        i, j = i + len(a), j + len(b)
        pa, pb = math.prod(ins[d] for d in a), math.prod(outs[d] for d in b)
        while pa != pb:
            if pa < pb and i < len(ins):
                a, pa, i = [*a, i], pa * ins[i], i + 1
            elif j < len(outs):
                b, pb, j = [*b, j], pb * outs[j], j + 1
            else:
                break
        # A dimension of size 1 belongs to what stands in front of it, unless it has a partner.
        while i < len(ins) and ins[i] == 1 and (j == len(outs) or outs[j] != 1):
            a, i = [*a, i], i + 1
        while j < len(outs) and outs[j] == 1 and (i == len(ins) or ins[i] != 1):
            b, j = [*b, j], j + 1
        segments.append((a, b))
    return segments


@rule(torch.reshape, "reshape", "view", torch.flatten, "flatten", torch.unflatten, "unflatten", "reshape_as", "view_as")
def reshape(call: Call, input: Value, *sizes: Value, **kwargs: Value) -> Value:
    """Another shape of the same elements in the same order; constant sizes that no longer fit are rewritten."""
    if len(sizes) == 1 and isinstance(sizes[0], torch.dtype):
        return call.result(dict(call.pair("input").maps))
    for k, other in enumerate(sizes):
        if isinstance(other, Free):
            call.match(At(("args", 1 + k)), {})
    # The replicas of a single index could go to any dimension, also to one that has more indices elsewhere.
    x = call.narrow("input", [d for d, m in call.pair("input").maps.items() if m.size == 1])
    if not any(is_wide(leaf) for _p, leaf in walk([call.args, call.kwargs])):
        return call.result()
    chosen = _by_choice(call, x)
    if chosen is not None:
        return chosen
    try:
        return _reshaped(call, x)
    except Refuse as refusal:
        if str(getattr(call.node.target, "__name__", call.node.target)) == "flatten":
            raise
        return _with_sizes(call, x, sizes, kwargs, refusal)


def _by_choice(call: Call, x: Pair) -> Value | None:
    """Give the replicas of dimensions that are split to the parts that were chosen; None where nothing was chosen."""
    shape = list(call.s.shape)
    wide, chosen = list(shape), False
    for ins, outs in _segments(list(x.s.shape), shape):
        mapped = [d for d in ins if d in x.maps]
        if len(mapped) != 1 or any(x.s.shape[d] != 1 for d in ins if d != mapped[0]):
            for d in mapped:
                if len(ins) != 1 or len(outs) != 1:
                    return None
                wide[outs[0]] = len(x.maps[d])
            continue
        found = split_layout(call, x, mapped[0], outs)
        if found is None:
            part = max(range(len(outs)), key=lambda k: (shape[outs[k]] > 1, k))
            wide[outs[part]] = shape[outs[part]] * len(x.maps[mapped[0]]) // x.s.shape[mapped[0]]
            continue
        layout, part = found
        call.align("input", mapped[0], layout)
        wide[outs[part]], chosen = shape[outs[part]] * (layout.uniform or 1), True
    if not chosen:
        return None
    if str(getattr(call.node.target, "__name__", call.node.target)) != "flatten":
        _write_sizes(call, shape, wide)
    return _reshaped(call, call.pair("input"))


def _with_sizes(call: Call, x: Pair, sizes: tuple[Value, ...], kwargs: dict[str, Value], refusal: Refuse) -> Value:
    """Try the candidates for the teacher's sizes, most natural first."""
    shape = list(call.s.shape)
    for candidate in reshape_sizes(x, shape):
        saved = (list(call.args), dict(call.kwargs), dict(call.edit.constants))
        steps = {path: list(todo) for path, todo in call.edit.steps.items()}
        try:
            _write_sizes(call, shape, candidate)
            return _reshaped(call, x)
        except Refuse:
            call.args, call.kwargs, call.edit.constants = saved
            call.edit.steps = steps
    raise refusal


def _write_sizes(call: Call, shape: list[int], candidate: list[int]) -> None:
    """Replace the sizes that changed; an unchanged size stays as it is (it may be a batch or a resolution)."""
    name = str(getattr(call.node.target, "__name__", call.node.target))
    if name in ("reshape_as", "view_as"):
        raise Refuse("the shape of another tensor")
    if name == "unflatten":
        dim = student(call.args[1]) % (len(shape) - len(call.args[2]) + 1)
        places = [At(("args", 2, k)) for k in range(len(call.args[2]))]
        pairs = list(zip(places, range(dim, dim + len(places)), strict=True))
    elif "shape" in call.kwargs or "size" in call.kwargs:
        key = "shape" if "shape" in call.kwargs else "size"
        pairs = [(At(("kwargs", key, k)), k) for k in range(len(shape))]
    elif isinstance(call.args[1], (tuple, list)):
        pairs = [(At(("args", 1, k)), k) for k in range(len(shape))]
    else:
        pairs = [(At(("args", 1 + k)), k) for k in range(len(shape))]
    for place, k in pairs:
        if student(call.get(place)) != -1:
            call.resize(place, candidate[k])
