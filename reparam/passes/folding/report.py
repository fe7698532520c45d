"""What folding did to a network, and what it left and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from reparam.passes.folding.edits import Analysis
from reparam.passes.folding.ops import value_of
from reparam.passes.folding.record import Recording, call_of


@dataclass(frozen=True)
class FoldReport:
    """What folding did.

    Args:
        norms: batch and instance norms with running statistics, before and after.
        linear: convolutions and linear layers, before and after.
        kept: norms that stay -> the reason.
        grown: what was left because it would have more weights -> from how many operators.
        left: convolutions and linear layers that no rule could read -> the reason.
        parameters: numbers in all parameters, before and after.
        copies: layers that became several -> how many.
    """

    norms: tuple[int, int]
    linear: tuple[int, int]
    kept: dict[str, str] = field(default_factory=dict)
    grown: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)
    copies: dict[str, int] = field(default_factory=dict)

    def joined(self, path: str, inner: FoldReport) -> FoldReport:
        """Return this report with that of a module inside.

        Args:
            path: of the module.
            inner: its report.
        """

        def under(names: dict[str, Any]) -> dict[str, Any]:
            return {f"{path}.{name}".strip("."): value for name, value in names.items()}

        return FoldReport(
            (self.norms[0] + inner.norms[0], self.norms[1] + inner.norms[1]),
            (self.linear[0] + inner.linear[0], self.linear[1] + inner.linear[1]),
            self.kept | under(inner.kept),
            self.grown | under(inner.grown),
            self.left | under(inner.left),
            self.parameters,
            self.copies | under(inner.copies),
        )

    def __str__(self) -> str:
        lines = [
            f"norms: {self.norms[0]} -> {self.norms[1]}",
            f"convolutions and linear layers: {self.linear[0]} -> {self.linear[1]}",
        ]
        if self.parameters[0]:
            lines.append(f"parameters: {self.parameters[0]:,} -> {self.parameters[1]:,}")
        lines += [f"{name} is copied {n} times, for calls with different norms" for name, n in self.copies.items()]
        lines += [f"stays: {name}: {reason}" for name, reason in [*self.kept.items(), *self.left.items()]]
        lines += [f"stays: {name}: {reason}; pass allow_growth=True to fold it" for name, reason in self.grown.items()]
        return "\n".join(lines)


def report_of(recording: Recording, analysis: Analysis) -> FoldReport:
    """Return the report of an analysis."""
    ops = analysis.ops
    order = [n for n in recording.graph.nodes if n in ops]
    norms = [n for n in order if ops[n].norm]
    linear = [n for n in order if ops[n].kind == "kernel"]
    edited = {e.node for e in analysis.edits} | {n for e in analysis.edits for n in e.covered}
    made = sum(e.main is not None for e in analysis.edits)
    left = [n for n in norms if n not in edited and n in analysis.live]
    rest = [n for n in linear if n not in edited and n in analysis.live]
    reasons = {_name(n): analysis.movement.reasons.get(n, "") for n in left}
    grown = {
        _name(n): f"{len(region.covered)} operators would be one with {region.shape.weight.numel():,} weights"
        for n, region in analysis.regions.grown.items()
        if n in analysis.live and n not in edited
    }
    unbatched = {_name(n): _UNBATCHED for n in recording.graph.nodes if _is_unbatched(n) and n not in ops}
    before, after = len(linear) + len(unbatched), len(rest) + made + len(unbatched)
    return FoldReport((len(norms), len(left)), (before, after), reasons, grown, unbatched)


_UNBATCHED = "its input comes without a batch dimension; fold with an example_input that has one"


def _is_unbatched(node: fx.Node) -> bool:
    """Whether a node is a convolution of one sample."""
    name = str(getattr(node.target, "__name__", ""))
    if not name.startswith("conv") or name[-2:] not in ("1d", "2d", "3d") or "needed" not in node.meta:
        return False
    value = value_of(node)
    return isinstance(value, Tensor) and value.dim() == int(name[-2]) + 1


def _name(node: fx.Node) -> str:
    return call_of(node).path or node.name
