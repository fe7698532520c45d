"""A graph as a function over the attributes of a module, and where its named values are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from reparam.passes.contexts import as_code
from reparam.passes.gradients import takes_gradients, with_gradients


@dataclass
class Program:
    """A rewritten graph.

    Args:
        graph: the graph.
        outputs: module path of the student -> structures of node names, one per call of that module.
    """

    graph: fx.Graph
    outputs: dict[str, list[Any]] = field(default_factory=dict)

    def copy(self) -> Program:
        """Return an independent copy with the same node names."""
        new = fx.Graph()
        new.output(new.graph_copy(self.graph, {}))
        return Program(new, dict(self.outputs))

    def function(self) -> Callable[..., Any]:
        """Return ``forward(module, *inputs)``, generated as fx generates the forward of a graph module."""
        with as_code(self.graph):
            code = self.graph.python_code("self")
        scope = dict(code.globals)
        exec(compile(code.src, "<reparam graph>", "exec"), scope)
        forward: Callable[..., Any] = scope["forward"]
        return with_gradients(forward) if takes_gradients(self.graph) else forward
