"""Buffers that code changes in place: the teacher's own memory has to change, not a realigned copy of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from reparam.passes.functionalize import written
from reparam.passes.state import Restart
from reparam.passes.values import Refuse

if TYPE_CHECKING:
    from reparam.passes.call import Call
    from reparam.passes.planner import Planner

_FIRST = ("args", 0)


def keep_writes(planner: Planner, node: fx.Node, call: Call) -> None:
    """Let a buffer keep its width where the operator that changes it in place would change a realigned copy.

    Raises:
        Restart: it is wide, and is narrow from now on.
        Refuse: it is narrow, and its new values are wide.
    """
    buffer = written(node)
    name = None if buffer is None else planner.name_of(buffer)
    if name is None or not (call.edit.out or any(path[:2] == _FIRST for path in call.edit.steps)):
        return
    if planner.state.params[name].maps:
        planner.preferred[name] = {}
        raise Restart
    raise Refuse(f"it changes {name} in place, which has the student's width")
