"""What a planning pass decides."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from torch import fx

from reparam.ops.params import ParamMap
from reparam.passes.call import NodeEdit
from reparam.passes.rows import ContractionPlan, LayerPlan
from reparam.passes.values import Value


class Restart(Exception):
    """What was learned makes an earlier decision wrong; planning starts again with it."""


class Meeting(NamedTuple):
    """Two layers whose outputs meet, and the operator where they do."""

    node: fx.Node
    first: str
    second: str


@dataclass
class State:
    """Everything that one planning pass decides.

    ``refused`` holds leaf modules (by path) and functions (by ``function_key``) that had to stay at student width,
    with the reason.
    """

    params: dict[str, ParamMap] = field(default_factory=dict)
    linear: dict[str, bool] = field(default_factory=dict)
    env: dict[fx.Node, Value] = field(default_factory=dict)
    edits: dict[fx.Node, NodeEdit] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    statistics: set[str] = field(default_factory=set)
    layers: dict[str, LayerPlan] = field(default_factory=dict)
    contractions: dict[fx.Node, ContractionPlan] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    splits: dict[str, Any] = field(default_factory=dict)
    meetings: list[Meeting] = field(default_factory=list)

    def copy(self) -> State:
        """Return a copy that can be changed independently."""
        return State(**{f.name: copy.copy(getattr(self, f.name)) for f in fields(self)})


def function_key(function: Any) -> str:
    """Return the name of a Python function that was not traced into: ``"torchvision.ops.misc:swish"``."""
    return f"{function.__module__}:{function.__qualname__}"


def operator_name(node: fx.Node) -> str:
    """Return a readable operator name."""
    if node.op == "call_function":
        return getattr(node.target, "__name__", str(node.target))
    return str(node.target)
