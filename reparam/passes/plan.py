"""The plan: what ``expand`` does to a model, as immutable data. Two tables and their explanation.

(a) parameter or buffer -> :class:`~reparam.ops.params.ParamMap`; (b) node edits and module attributes. Everything that
expands, extracts, saves and loads reads these tables and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path as FilePath
from types import MappingProxyType
from typing import Any

from reparam.errors import FormatError, InputError
from reparam.ops.maps import ReplicaMap
from reparam.ops.params import ParamMap
from reparam.passes.example import inputs_from_json
from reparam.passes.ratios import Ratio, ratio_from_json, ratio_to_json
from reparam.passes.rows import (
    BranchPlan,
    ContractionPlan,
    EditPlan,
    LayerPlan,
    branch_from,
    check_strings,
    check_types,
    contraction_from,
    edit_from_json,
    edit_to_json,
    layer_from,
    param_map_from,
)

VERSION = 2
"""Of the JSON form. 2: branches."""

STATISTICS = "student_statistics"
"""Prefix of the student's own norm statistics in a teacher's state_dict."""


@dataclass(frozen=True, repr=False)
class Plan:
    """What would be widened, what not and why. Immutable; ``str(plan)`` is a table.

    Args:
        model: class name of the student.
        ratio: replicas per channel, or a mapping of names and patterns to them, in its order.
        inputs: the example input, as shapes and dtypes.
        params: parameter or buffer -> map; those that are not listed stay as they are.
        edits: node name -> edit.
        attributes: module attributes that change (``"features.0.groups": 64``).
        statistics: buffers of which the student keeps its own; at ratio 1 they are the same ones.
        layers: every conv and linear weight.
        contractions: nodes in front of which values return to student width.
        value_maps: node name -> maps of its tensors, in order; the invariant that verification checks.
        leaves: modules kept as they are, with the reason.
        graph: fingerprint of the captured graph.
        notes: what a user should know.
        specialised: modules and functions that were recorded for the sizes of the example input, with guards.
        opened: modules without a graph whose submodules were recorded one by one.
        branches: layers with branches.
        unbranched: layers that were to have branches and have none -> the reason.
    """

    model: str
    ratio: Ratio
    inputs: Mapping[str, Any]
    params: Mapping[str, ParamMap]
    edits: Mapping[str, EditPlan]
    attributes: Mapping[str, Any]
    statistics: tuple[str, ...]
    layers: tuple[LayerPlan, ...]
    contractions: tuple[ContractionPlan, ...]
    value_maps: Mapping[str, tuple[tuple[tuple[int, ReplicaMap], ...], ...]]
    leaves: Mapping[str, str]
    graph: str
    parameters: int
    wide_parameters: int
    notes: tuple[str, ...] = field(default=())
    specialised: tuple[str, ...] = field(default=())
    opened: tuple[str, ...] = field(default=())
    branches: tuple[BranchPlan, ...] = field(default=())
    unbranched: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("inputs", "params", "edits", "attributes", "value_maps", "leaves", "ratio", "unbranched"):
            if isinstance(getattr(self, name), Mapping):
                object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __repr__(self) -> str:
        return (
            f"<Plan of {self.model}, ratio {self.ratio}: {len(self.layers)} conv and linear weights, "
            f"{self.coverage:.1%} widened, {len(self.contractions)} contractions; print it for the table>"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self  # immutable

    @property
    def coverage(self) -> float:
        """Share of conv and linear weight values that are widened on both sides, in [0, 1].

        The network's own inputs and outputs count as done. 0 for ratio 1 and for a model without such weights.
        """
        total = sum(_numel(layer.shape) for layer in self.layers)
        done = sum(_numel(layer.shape) for layer in self.layers if layer.widened)
        return done / total if total else 0.0

    @property
    def own_statistics(self) -> bool:
        """Whether the student has norm statistics of its own; at ratio 1 both networks see the same values."""
        return self.ratio != 1

    @property
    def multiply_adds(self) -> tuple[int, int]:
        """Multiply-adds of the conv and linear layers per sample: of the student, of the teacher."""
        return sum(x.multiply_adds for x in self.layers), sum(x.wide_multiply_adds for x in self.layers)

    # -- for people ----------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        rows = [("layer", "operator", "shape", "teacher", "widened", "multiply-adds")]
        for layer in self.layers:
            word = "yes" if layer.widened else "no"
            word += f" ({layer.reason})" if layer.reason else ""
            work = f"{_count(layer.multiply_adds)} -> {_count(layer.wide_multiply_adds)}"
            rows.append((layer.name, layer.operator, shape_text(layer.shape), shape_text(layer.wide_shape), word, work))
        widths = [max(len(row[k]) for row in rows) for k in range(6)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join([*lines, "", *self._summary()])

    def _summary(self) -> list[str]:
        before, after = self.multiply_adds
        lines = [
            f"{self.model}, ratio {self.ratio}: "
            f"{self.coverage:.1%} of the conv and linear weights widened on both sides",
            f"parameters {_count(self.parameters)} -> {_count(self.wide_parameters)}, "
            f"multiply-adds per sample {_count(before)} -> {_count(after)}",
            f"planned with the input {describe_spec(self.inputs)}",
        ]
        for c in self.contractions:
            where = f" in {c.module}" if c.module else ""
            lines.append(f"contracted before {c.operator} ({c.node}{where}, {c.source}): {c.reason}")
        return [*lines, *self._branch_lines(), *self.notes]

    def _branch_lines(self) -> list[str]:
        if not (self.branches or self.unbranched):
            return []
        kinds: dict[str, list[BranchPlan]] = {}
        for branch in self.branches:
            kinds.setdefault(f"{branch.recipe}, init {branch.site.init}", []).append(branch)
        lines = []
        for kind, found in kinds.items():
            lines.append(f"branches {kind}: {len(found)} layers: {', '.join(b.site.name for b in found)}")
        extra, wide = (sum(getattr(b, f"{w}parameters") for b in self.branches) for w in ("", "wide_"))
        work = sum(b.wide_merge_multiply_adds for b in self.branches)
        lines.append(
            f"branch parameters {_count(extra)} -> {_count(wide)}, "
            f"multiply-adds to merge the teacher's, once per forward pass: {_count(work)}"
        )
        reasons: dict[str, list[str]] = {}
        for name, reason in self.unbranched.items():
            reasons.setdefault(reason, []).append(name)
        return [*lines, *(f"no branches for {', '.join(names)}: {reason}" for reason, names in reasons.items())]

    def to_dot(self) -> str:
        """Return the plan as a graphviz graph: layers in order, widened ones filled, with their shapes."""
        from reparam.passes.drawing import to_dot

        return to_dot(self)

    def draw(self, path: str | FilePath) -> FilePath:
        """Write the drawing as SVG or PNG (by the ending) with graphviz, as dot text where that is not installed.

        Returns:
            The file that was written (its ending is ``.dot`` for the text).
        """
        from reparam.passes.drawing import draw

        return draw(self, FilePath(path))

    # -- for files -----------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Return the plan as JSON text; :meth:`from_json` is its inverse.

        Raises:
            InputError: ``example_input`` held an object that is no tensor, number, text, list, tuple or dict.
        """
        data = {
            "format": "reparam-plan",
            "version": VERSION,
            "model": self.model,
            "ratio": ratio_to_json(self.ratio),
            "inputs": dict(self.inputs),
            "params": {name: m.to_json() for name, m in self.params.items()},
            "edits": {name: edit_to_json(edit) for name, edit in self.edits.items()},
            "attributes": dict(self.attributes),
            "statistics": list(self.statistics),
            "layers": [asdict(layer) for layer in self.layers],
            "contractions": [asdict(c) for c in self.contractions],
            "value_maps": {
                name: [[[d, m.to_json()] for d, m in maps] for maps in tensors]
                for name, tensors in self.value_maps.items()
            },
            "leaves": dict(self.leaves),
            "graph": self.graph,
            "parameters": self.parameters,
            "wide_parameters": self.wide_parameters,
            "notes": list(self.notes),
            "specialised": list(self.specialised),
            "opened": list(self.opened),
            "branches": [branch.to_json() for branch in self.branches],
            "unbranched": dict(self.unbranched),
        }
        try:
            return json.dumps(data)
        except TypeError as error:
            raise InputError(
                f"the plan cannot be written: an example input or a constant is no JSON value ({error})"
            ) from error

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan.

        Raises:
            FormatError: not a plan, or of a version that this release does not know.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise FormatError(f"not a plan: the text is not JSON ({error})") from error
        if not isinstance(data, dict) or data.get("format") != "reparam-plan":
            raise FormatError("not a plan: the JSON has no 'format': 'reparam-plan'")
        if data.get("version") != VERSION:
            raise FormatError(
                f"this plan has version {data.get('version')!r}, this release of reparam reads version {VERSION}; "
                "make the plan again, or install the release that wrote it"
            )
        try:
            return _plan_from(data)
        except InputError as error:
            raise FormatError(f"the plan cannot be used here: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise FormatError(f"the plan is damaged: {type(error).__name__}: {error}") from error


_TYPES: dict[str, type] = {
    "model": str, "inputs": dict, "params": dict, "edits": dict, "attributes": dict, "statistics": list,
    "layers": list, "contractions": list, "value_maps": dict, "leaves": dict, "graph": str, "parameters": int,
    "wide_parameters": int, "notes": list, "specialised": list, "opened": list, "branches": list,
    "unbranched": dict,
}  # fmt: skip


def _plan_from(data: dict[str, Any]) -> Plan:
    def tensors(rows: list[Any]) -> tuple[Any, ...]:
        return tuple(tuple((int(d), ReplicaMap.from_json(m)) for d, m in maps) for maps in rows)

    check_types(data, _TYPES)
    inputs_from_json(data["inputs"])
    check_strings(
        [*data["statistics"], *data["notes"], *data["specialised"], *data["opened"], *data["leaves"].values()]
    )
    return Plan(
        model=data["model"],
        ratio=ratio_from_json(data["ratio"]),
        inputs=data["inputs"],
        params={name: param_map_from(m) for name, m in data["params"].items()},
        edits={name: edit_from_json(edit) for name, edit in data["edits"].items()},
        attributes={name: tuple(v) if isinstance(v, list) else v for name, v in data["attributes"].items()},
        statistics=tuple(data["statistics"]),
        layers=tuple(layer_from(row) for row in data["layers"]),
        contractions=tuple(contraction_from(row) for row in data["contractions"]),
        value_maps={name: tensors(rows) for name, rows in data["value_maps"].items()},
        leaves=data["leaves"],
        graph=data["graph"],
        parameters=data["parameters"],
        wide_parameters=data["wide_parameters"],
        notes=tuple(data["notes"]),
        specialised=tuple(data["specialised"]),
        opened=tuple(data["opened"]),
        branches=tuple(map(branch_from, data["branches"])),
        unbranched=data["unbranched"],
    )


def describe_spec(inputs: Mapping[str, Any]) -> str:
    """Return the example input of a plan in short: ``float32[2, 3, 224, 224]``."""

    def one(value: Any) -> str:
        if isinstance(value, dict) and "tensor" in value:
            return f"{value['dtype']}{list(value['tensor'])}"
        return "..." if isinstance(value, dict) and "value" not in value else repr(value.get("value"))

    given = [one(v) for v in inputs.get("args", ())]
    return ", ".join([*given, *(f"{name}={one(v)}" for name, v in inputs.get("kwargs", {}).items())])


def _numel(shape: tuple[int, ...]) -> int:
    result = 1
    for n in shape:
        result *= n
    return result


def shape_text(shape: tuple[int, ...]) -> str:
    """Return a shape as text: 64x32x3x3."""
    return "x".join(map(str, shape))


def _count(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f}{unit}"
    return str(int(value))
