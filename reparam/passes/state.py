"""What a planning pass decides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from reparam.ops.params import ParamMap
from reparam.passes.call import NodeEdit
from reparam.passes.plan import ContractionPlan, LayerPlan
from reparam.passes.values import Value


class Restart(Exception):
    """What was learned makes an earlier decision wrong; planning starts again with it."""


@dataclass
class State:
    """Everything that one planning pass decides."""

    params: dict[str, ParamMap] = field(default_factory=dict)
    linear: dict[str, bool] = field(default_factory=dict)
    env: dict[fx.Node, Value] = field(default_factory=dict)
    edits: dict[fx.Node, NodeEdit] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    statistics: set[str] = field(default_factory=set)
    layers: dict[str, LayerPlan] = field(default_factory=dict)
    contractions: dict[fx.Node, ContractionPlan] = field(default_factory=dict)

    def copy(self) -> State:
        """Return a copy that can be changed independently."""
        return State(
            dict(self.params), dict(self.linear), dict(self.env), dict(self.edits), dict(self.attributes),
            set(self.statistics), dict(self.layers), dict(self.contractions),
        )  # fmt: skip


def operator_name(node: fx.Node) -> str:
    """Return a readable operator name."""
    if node.op == "call_function":
        return getattr(node.target, "__name__", str(node.target))
    return str(node.target)
