"""Questions about a value (shape, size, rank) and arithmetic on the answers."""

from __future__ import annotations

import builtins
import math
import operator
from collections import OrderedDict

import torch

from reparam.passes.call import Call
from reparam.passes.modes import pick, refuse, require
from reparam.passes.registry import rule
from reparam.passes.rules.broadcast import narrow_numbers
from reparam.passes.values import Free, Pair, Refuse, Value, join


@rule(getattr)
def attribute(call: Call, value: Value, name: Value) -> Value:
    """``x.shape``, ``x.device``, ``x.dtype``, ``x.T``, ``x.real``."""
    if isinstance(value, tuple):
        # A field of a named tuple: ``x.max(1).values``.
        fields = call.source("value").meta["val"]
        return next(item for item, field in zip(value, fields, strict=True) if field is getattr(fields, name))
    pair = call.pair("value")
    if name in ("shape", "device", "dtype", "ndim", "layout", "is_cuda", "requires_grad", "itemsize"):
        return join(call.s, getattr(pair.t, name), lambda _s, _t: {})
    if name in ("T", "mT"):
        first = 0 if name == "T" else pair.ndim - 2
        return call.result({first + pair.ndim - 1 - d if d >= first else d: m for d, m in pair.maps.items()})
    if name in ("real", "imag"):
        return call.result(dict(pair.maps))
    if name == "data":
        if pair.divided:
            call.planner.undivide(pair.name)
        return call.result(dict(pair.maps))
    raise Refuse(f"attribute {name}")


@rule("size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "stride", "get_device")
def size(call: Call, input: Value, *args: Value, **kwargs: Value) -> Value:
    """Sizes; those of a widened dimension differ between the worlds."""
    call.pair("input")
    return call.result()


@rule(torch.numel, torch.is_tensor, torch.is_floating_point, torch.is_complex)
def size_function(call: Call, input: Value) -> Value:
    """Functions that ask about a tensor."""
    call.pair("input")
    return call.result()


_ROUNDINGS = (math.prod, builtins.int, builtins.float, builtins.len, operator.index)
"""Functions under which a width stays a multiple of the student's."""


@rule(
    math.ceil, math.floor, math.sqrt, math.prod, math.log, math.log2, builtins.int, builtins.float, builtins.len,
    builtins.round, builtins.sum, builtins.max, builtins.min, operator.index, torch.Size, torch.sym_int,
    torch.sym_float,
)  # fmt: skip
def arithmetic(call: Call, *args: Value, **kwargs: Value) -> Value:
    """Arithmetic on sizes: done in each world."""
    if any(isinstance(leaf, (Pair, Free)) for leaf in [*args, *kwargs.values()]):
        raise Refuse("a tensor among plain numbers")
    if call.node.target not in _ROUNDINGS:
        narrow_numbers(call)
    return call.result()


@rule(OrderedDict, dict, list, tuple, "keys", "values", "items", "get")
def container(call: Call, *args: Value, **kwargs: Value) -> Value:
    """Containers pass their items on where the result has the same form; else they are contracted."""
    if len(args) == 1 and isinstance(call.s, OrderedDict):
        return {key: value for key, value in args[0]}
    raise Refuse("a container of mapped values")


@rule(torch._assert)
def assertion(call: Call, condition: Value, message: Value = "") -> Value:
    """Asserts on sizes hold in the student; on mapped sizes they compare student values."""
    if isinstance(condition, (Pair, Free)):
        raise Refuse("an assertion about a tensor")
    return None


@rule(pick)
def picked(call: Call, condition: Value, wanted: Value, first: Value, second: Value) -> Value:
    """One of two values, by a condition on sizes: both have to be alike."""
    if isinstance(first, Free) or isinstance(second, Free):
        first, second = call.demand("first", {}), call.demand("second", {})
    if not (isinstance(first, Pair) and isinstance(second, Pair)):
        call.narrow_int("first")
        call.narrow_int("second")
        return call.result()
    # The value of the other way may be None when this runs, and no step could follow it: such values are narrow.
    if first.maps != second.maps:
        for name in ("first", "second"):
            call.narrow(name, None, "the other way of a branch on a size gives it another layout")
    return call.result(dict(call.pair("first").maps))


@rule(require, refuse)
def required(call: Call, value: Value, expected: Value, message: Value) -> Value:
    """A guard is about the student's sizes."""
    call.narrow_int("value")
    return None
