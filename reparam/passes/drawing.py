"""A plan as a graphviz graph."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from reparam.errors import InputError
from reparam.passes.plan import Plan, shape_text


def to_dot(plan: Plan) -> str:
    """Return the plan in graphviz's language: layers in order, widened ones filled, with their shapes."""
    lines = ["digraph plan {", "  rankdir=TB;", '  node [shape=box, fontname="Helvetica", style=filled];']
    for k, layer in enumerate(plan.layers):
        colour = "#cfe8cf" if layer.widened else "#f2d3c8"
        label = f"{layer.name}\\n{layer.operator} {shape_text(layer.shape)} -> {shape_text(layer.wide_shape)}"
        label += f"\\n{layer.reason}" if layer.reason else ""
        lines.append(f'  n{k} [label="{label.replace(chr(34), chr(39))}", fillcolor="{colour}"];')
        if k:
            lines.append(f"  n{k - 1} -> n{k};")
    return "\n".join([*lines, "}"])


def draw(plan: Plan, target: Path) -> Path:
    """Write the drawing; see :meth:`reparam.passes.plan.Plan.draw`."""
    kind = target.suffix.lstrip(".").lower()
    if kind not in ("svg", "png", "dot"):
        raise InputError(f"cannot draw a plan as {target.name!r}: the ending must be .svg, .png or .dot")
    program = shutil.which("dot")
    if kind == "dot" or program is None:
        target = target.with_suffix(".dot")
        target.write_text(plan.to_dot())
        return target
    drawn = subprocess.run([program, f"-T{kind}"], input=plan.to_dot().encode(), capture_output=True, check=True)
    target.write_bytes(drawn.stdout)
    return target
