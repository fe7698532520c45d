"""Teachers on disk: safetensors with the plan as versioned JSON in the header. Nothing is ever pickled."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from reparam.errors import CaptureError, FormatError, InputError, near_matches
from reparam.passes.branches import check_fits
from reparam.passes.capture import Capture, key_of
from reparam.passes.example import inputs_from_json
from reparam.passes.freeze import fingerprint
from reparam.passes.parts import record
from reparam.passes.plan import Plan
from reparam.passes.seeds import generators_kept
from reparam.passes.skeleton import first_floating_dtype, skeleton_of
from reparam.passes.teacher import Teacher, require_teacher
from reparam.passes.validate import check_model
from reparam.passes.widen import build_teacher


def save(teacher: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a teacher as safetensors; the plan goes into the file's metadata. The write is atomic.

    Raises:
        InputError: not a teacher, or the folder does not exist.
    """
    from reparam.weight_files import write_tensors

    owner = require_teacher(teacher)
    target = Path(path)
    if not target.parent.is_dir():
        raise InputError(f"the folder {target.parent} does not exist; make it first")
    if target.is_dir():
        raise InputError(f"{target} is a folder; name the file in it")
    tensors = _unshared(owner.state_dict())
    text = owner.plan.to_json()
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode  # as the user's umask says; safetensors makes it private
    try:
        # One entry: safetensors writes several in random order, and equal teachers give equal files.
        write_tensors(tensors, temporary, metadata={"reparam_plan": text})
        temporary.chmod(mode)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep one name of each tied tensor, contiguous on the CPU; loading finds the ties in the student."""
    seen: set[tuple[int, Any]] = set()
    result = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        result[name] = tensor.detach().cpu().contiguous()
    return result


def load(path: str | os.PathLike[str], student: nn.Module) -> Teacher:
    """Read a teacher that ``save`` wrote.

    Args:
        path: the file.
        student: a model of the class that was expanded; its weights are not used, its device, dtypes, mode and
            ``requires_grad`` are.

    Raises:
        FormatError: the file is missing, damaged, of another version, or does not fit the student.
    """
    check_model(student, values=False)
    tensors, plan = _read(Path(path))
    if plan.model != type(student).__name__:
        raise FormatError(f"{path} holds a teacher of {plan.model}, the given student is a {type(student).__name__}")
    _check_shapes(path, student, plan)
    capture = _capture(path, student, plan)
    _check_names(path, student, capture, plan)
    device = next(student.parameters()).device
    try:
        check_fits(capture, plan)
        with generators_kept(device):
            teacher = build_teacher(student, capture, plan, 0.0)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FormatError(f"{path}: the plan does not fit the given student: {error}") from error
    _load_tensors(path, teacher, tensors)
    return teacher


def _capture(path: Any, student: nn.Module, plan: Plan) -> Capture:
    """Record the student with the inputs of the file, in the student's own dtype."""
    dtypes = {p.dtype for p in student.parameters() if p.is_floating_point()}
    dtype = first_floating_dtype(student)

    def own(value: Any) -> Any:
        wrong = isinstance(value, Tensor) and value.is_floating_point() and value.dtype not in dtypes
        return value.to(dtype) if wrong and dtype is not None else value

    inputs = pytree.tree_map(own, inputs_from_json(plan.inputs))
    try:
        capture = record(skeleton_of(student), inputs, plan.specialised, plan.opened)
        same = fingerprint(capture) == plan.graph
    except CaptureError:
        same = False
    if not same:
        raise FormatError(
            f"{path}: the graph of the given student differs from the one that was expanded; build the student with "
            "the same arguments, and use the library versions that wrote the file"
        )
    return capture


def _check_names(path: Any, student: nn.Module, capture: Capture, plan: Plan) -> None:
    """Whatever the plan names exists in the student; it changes numbers and tuples, nothing else."""
    buffers = dict(student.named_buffers(remove_duplicate=False))
    nodes = {key_of(node) for graph in capture.graphs for node in graph.nodes}
    modules = dict(student.named_modules())
    for name in (*plan.edits, *plan.value_maps):
        if name not in nodes:
            raise FormatError(f"{path}: the plan does not fit the given student: its graph has no {name}")
    for name in plan.statistics:
        if name not in buffers:
            raise FormatError(f"{path}: the plan does not fit the given student: it has no buffer {name}")
    for name, value in plan.attributes.items():
        holder, _, leaf = name.rpartition(".")
        old = vars(modules[holder]).get(leaf) if holder in modules else None
        if leaf.startswith("_") or not isinstance(old, (int, float, tuple)) or not isinstance(value, type(old)):
            raise FormatError(f"{path}: the plan does not fit the given student: it has no attribute {name}")


def _read(path: Path) -> tuple[dict[str, Tensor], Plan]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FormatError(f"{path} does not exist")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if "reparam_plan" not in metadata:
                raise FormatError(f"{path} holds no plan: it is not a teacher written by reparam.save")
            plan = Plan.from_json(metadata["reparam_plan"])
            return {name: file.get_tensor(name) for name in file.keys()}, plan  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} is no readable safetensors file (truncated or damaged): {error}") from error


def _check_shapes(path: Any, student: nn.Module, plan: Plan) -> None:
    shapes = {name: tuple(t.shape) for name, t in [*student.named_parameters(), *student.named_buffers()]}
    for name, param_map in plan.params.items():
        if name not in shapes:
            raise FormatError(f"{path}: the student has no {name}{near_matches(name, shapes)}")
        if shapes[name] != param_map.shape:
            raise FormatError(f"{path}: {name} was {list(param_map.shape)}, the given student has {list(shapes[name])}")


def _load_tensors(path: Any, teacher: Teacher, tensors: dict[str, Tensor]) -> None:
    own = teacher.state_dict()
    for name, tensor in tensors.items():
        if name in own and own[name].shape != tensor.shape:
            raise FormatError(
                f"{path}: {name} has shape {list(tensor.shape)}, the teacher needs {list(own[name].shape)}"
            )
    unexpected = [name for name in tensors if name not in own]
    covered = {own[name].data_ptr() for name in tensors if name in own}
    missing = [n for n, t in own.items() if n not in tensors and (t.data_ptr() not in covered or not t.numel())]
    if unexpected or missing:
        raise FormatError(f"{path} does not fit: missing {missing[:5]}, unexpected {unexpected[:5]}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
