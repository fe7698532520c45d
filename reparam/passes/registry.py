"""The registry of operator rules.

A rule is a function ``rule(call, <the operator's parameters>)`` whose signature binds the operator's arguments. It
receives values of both worlds (``reparam.passes.values``), prepares the teacher's call through ``call`` and returns
the value of the result. Raising :class:`~reparam.passes.values.Refuse` makes the planner contract instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any

from torch import fx

RuleFunction = Callable[..., Any]


@dataclass(frozen=True)
class Rule:
    """A rule and the family file it stands in.

    Args:
        function: the rule.
        family: name of the file in ``reparam/passes/rules``.
        mixing: the operator sums over a channel dimension (a producer in front of it is worth widening);
            a function where that depends on the arguments.
        signature: the operator's parameters.
        statistics: parameters that the operator updates in train mode; the student keeps its own.
    """

    function: RuleFunction
    family: str
    mixing: bool | Callable[[fx.Node], bool]
    signature: inspect.Signature
    statistics: tuple[str, ...] = ()

    def mixes(self, node: fx.Node) -> bool:
        """Whether the operator of this node sums over channels."""
        return self.mixing(node) if callable(self.mixing) else self.mixing


RULES: dict[Any, Rule] = {}


def rule(
    *targets: Any, mixing: bool | Callable[[fx.Node], bool] = False, statistics: tuple[str, ...] = ()
) -> Callable[[RuleFunction], RuleFunction]:
    """Register a rule for functions (by object) and tensor methods (by name); ``None`` targets are skipped.

    Raises:
        ValueError: a target has a rule already.
    """

    def register(function: RuleFunction) -> RuleFunction:
        parameters = list(inspect.signature(function).parameters.values())[1:]
        entry = Rule(
            function, function.__module__.rsplit(".", 1)[-1], mixing, inspect.Signature(parameters), statistics
        )
        for target in targets:
            if target is None:
                continue
            if target in RULES and RULES[target].function is not function:
                raise ValueError(f"{target} has a rule already, in {RULES[target].family}")
            RULES[target] = entry
        return function

    return register


def find_rule(kind: str, target: Any) -> Rule | None:
    """Return the rule of a node's target, or None."""
    if kind not in ("call_function", "call_method"):
        return None
    if isinstance(target, type) and is_dataclass(target):
        target = dict
    try:
        return RULES.get(target)
    except TypeError:  # unhashable target
        return None


def statistics_of(node: fx.Node) -> list[fx.Node]:
    """Return the graph arguments of a node that its operator updates in train mode."""
    entry = find_rule(node.op, node.target)
    if entry is None or not entry.statistics:
        return []
    given = entry.signature.bind(*node.args, **node.kwargs).arguments
    return [given[name] for name in entry.statistics if isinstance(given.get(name), fx.Node)]
