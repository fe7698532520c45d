"""Tables of rows that are looked up: the columns are the choice of this producer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from reparam.passes.call import Call
from reparam.passes.registry import rule
from reparam.passes.rules.linear import output_map
from reparam.passes.state import Restart
from reparam.passes.streams import produced
from reparam.passes.values import Value, student


@rule(F.embedding, torch.embedding, mixing=True)
def embedding(
    call: Call,
    input: Value,
    weight: Value,
    padding_idx: Value = None,
    max_norm: Value = None,
    *args: Value,
    **kwargs: Value,
) -> Value:
    """Look-up of rows."""
    call.narrow("input", None, "positions")
    # torch.embedding has a truth value there.
    if max_norm is not None and not isinstance(max_norm, bool):
        return _renormalised(call)
    return _columns(call, student(input).dim())


@rule(F.embedding_bag, mixing=True)
def embedding_bag(
    call: Call,
    input: Value,
    weight: Value,
    offsets: Value = None,
    max_norm: Value = None,
    norm_type: Value = 2,
    scale_grad_by_freq: Value = False,
    mode: Value = "mean",
    sparse: Value = False,
    per_sample_weights: Value = None,
    include_last_offset: Value = False,
    padding_idx: Value = None,
) -> Value:
    """Sums, means or maxima of rows: each column by itself."""
    for name in ("input", "offsets", "per_sample_weights"):
        if call.get(name) is not None:
            call.narrow(name, None, "positions")
    return _columns(call, 1) if max_norm is None else _renormalised(call)


def _renormalised(call: Call) -> Value:
    """The operator changes its table in place: the table itself stays as it is, not a copy of it."""
    name = call.planner.name_of(source) if isinstance(source := call.source("weight"), fx.Node) else None
    if name is not None:
        call.planner.preferred[name] = {}
    if call.pair("weight").maps:
        raise Restart
    call.reason = "it rescales the rows of its table in place (max_norm)"
    return call.result()


def _columns(call: Call, dim: int) -> Value:
    """Choose the map of the table's columns, which are dimension ``dim`` of the result."""
    phi = output_map(call, student(call.get("weight")).shape[1])
    weight = call.match("weight", {} if phi.is_identity else {1: phi})
    return call.result({dim: produced(call, "weight", weight.maps[1])} if 1 in weight.maps else {})
