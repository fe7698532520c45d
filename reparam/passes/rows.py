"""The rows of a plan: layers, branches, contractions and edits, with their form in files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reparam.ops import recipes
from reparam.ops.params import ParamMap
from reparam.ops.recipes import Recipe, Site
from reparam.ops.steps import Step, step_from_json


@dataclass(frozen=True)
class LayerPlan:
    """One conv or linear weight.

    Args:
        name: path of the parameter.
        operator: operator that uses it.
        source: file and line of the call.
        shape: of the parameter, in the student.
        wide_shape: the same in the teacher.
        inputs: the input side is widened, or is the network's own input.
        outputs: the output side is widened, or is the network's own output.
        reason: why a side keeps its width, or an empty string.
        multiply_adds: of the student, per sample.
        wide_multiply_adds: of the teacher, per sample.
    """

    name: str
    operator: str
    source: str
    shape: tuple[int, ...]
    wide_shape: tuple[int, ...]
    inputs: bool
    outputs: bool
    reason: str
    multiply_adds: int
    wide_multiply_adds: int

    @property
    def widened(self) -> bool:
        """Whether both sides are widened as far as the network allows."""
        return self.inputs and self.outputs and self.wide_shape != self.shape


@dataclass(frozen=True)
class ContractionPlan:
    """A node in front of which values return to student width, with the reason."""

    node: str
    operator: str
    module: str
    source: str
    reason: str


@dataclass(frozen=True)
class BranchPlan:
    """The branches of one convolution or linear layer.

    Args:
        site: the student's operator.
        recipe: what is written in its place.
        bias: the operator's own bias, which takes up that of merged norms; None where it has none.
        norms: running means of the batch norms behind it, which take up the bias of merged norms instead.
        parameters: trained values in the student's branches, besides the operator's own weight.
        wide_parameters: the same of the teacher.
        merge_multiply_adds: to merge the student's branches, once per forward pass whatever the batch.
        wide_merge_multiply_adds: the same of the teacher.
    """

    site: Site
    recipe: Recipe
    bias: str | None
    norms: tuple[str, ...]
    parameters: int
    wide_parameters: int
    merge_multiply_adds: int
    wide_merge_multiply_adds: int

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        plain = {name: getattr(self, name) for name in _BRANCH_FIELDS}
        return {**plain, "norms": list(self.norms), "site": self.site.to_json(), "recipe": str(self.recipe)}


_BRANCH_FIELDS = ("bias", "parameters", "wide_parameters", "merge_multiply_adds", "wide_merge_multiply_adds")


@dataclass(frozen=True)
class EditPlan:
    """How the teacher's node differs from the student's (see ``reparam.passes.call.NodeEdit``)."""

    steps: tuple[tuple[tuple[Any, ...], tuple[Step, ...]], ...] = ()
    constants: tuple[tuple[tuple[Any, ...], Any], ...] = ()
    out: tuple[Step, ...] = ()


# -- in files --------------------------------------------------------------------------------------------------------


def check_types(row: Mapping[str, Any], types: Mapping[str, type]) -> None:
    """Raise TypeError where a value of ``row`` is not of its type."""
    for name, kind in types.items():
        if not isinstance(row[name], kind) or (kind is int and isinstance(row[name], bool)):
            raise TypeError(f"{name} is {row[name]!r:.40}, not a {kind.__name__}")


def check_strings(values: list[Any]) -> None:
    """Raise TypeError where something is no text."""
    if not all(isinstance(value, str) for value in values):
        raise TypeError("something else stands where text is needed")


def sizes(values: Any) -> tuple[int, ...]:
    """Return a list of sizes as a tuple."""
    if not isinstance(values, list) or not all(type(n) is int and n >= 0 for n in values):
        raise TypeError(f"{values!r:.40} is no list of sizes")
    return tuple(values)


def param_map_from(row: dict[str, Any]) -> ParamMap:
    """Return a parameter map from its JSON value."""
    shape = sizes(row["shape"])
    dims = [*sizes(row["divide"]), *sizes(row["noise"] or [])]
    if any(dim >= len(shape) for dim in dims):
        raise ValueError(f"a parameter of shape {list(shape)} has no dimension {max(dims)}")
    return ParamMap.from_json(row)


def layer_from(row: dict[str, Any]) -> LayerPlan:
    """Return a layer from its JSON value."""
    types = {"multiply_adds": int, "wide_multiply_adds": int, "inputs": bool, "outputs": bool}
    check_types(row, {**types, "name": str, "operator": str, "source": str, "reason": str})
    return LayerPlan(**{**row, "shape": sizes(row["shape"]), "wide_shape": sizes(row["wide_shape"])})


def branch_from(row: dict[str, Any]) -> BranchPlan:
    """Return the branches of a layer from their JSON value."""
    check_types(row, dict.fromkeys(_BRANCH_FIELDS[1:], int))
    check_strings([*row["norms"], *([] if row["bias"] is None else [row["bias"]]), row["recipe"]])
    plain = {name: row[name] for name in _BRANCH_FIELDS}
    return BranchPlan(
        site=Site.from_json(row["site"]), recipe=recipes.get(row["recipe"]), norms=tuple(row["norms"]), **plain
    )


def contraction_from(row: dict[str, Any]) -> ContractionPlan:
    """Return a contraction from its JSON value."""
    result = ContractionPlan(**row)
    check_strings(list(row.values()))
    return result


def edit_to_json(edit: EditPlan) -> dict[str, Any]:
    """Return an edit as a JSON value."""
    return {
        "steps": [[list(path), [step.to_json() for step in steps]] for path, steps in edit.steps],
        "constants": [[list(path), _constant_to_json(value)] for path, value in edit.constants],
        "out": [step.to_json() for step in edit.out],
    }


def edit_from_json(data: dict[str, Any]) -> EditPlan:
    """Inverse of :func:`edit_to_json`."""
    return EditPlan(
        tuple((tuple(path), tuple(step_from_json(step) for step in steps)) for path, steps in data["steps"]),
        tuple((tuple(path), _constant_from_json(value)) for path, value in data["constants"]),
        tuple(step_from_json(step) for step in data["out"]),
    )


def _constant_to_json(value: Any) -> Any:
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, tuple):
        return {"tuple": [_constant_to_json(v) for v in value]}
    return value


def _constant_from_json(value: Any) -> Any:
    if isinstance(value, dict) and "slice" in value:
        return slice(*value["slice"])
    if isinstance(value, dict) and "tuple" in value:
        return tuple(_constant_from_json(v) for v in value["tuple"])
    return value
