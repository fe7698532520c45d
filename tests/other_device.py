"""A second device in a process without a GPU: tensors that say they are on it, and compute on the CPU.

torch lets Python stand in for a device ("privateuseone"). A tensor on it is a shell around one on the CPU: each
operator runs on what is inside, unless one of its tensors is on another device, which raises as it does with CUDA. So
networks, losses and optimizers really run, numbers can be compared with those of the CPU, and a constant that was left
on the CPU is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

NAME = "othergpu"
DEVICE = torch.device("privateuseone:0")


class MixedDevicesError(RuntimeError):
    """An operator got tensors of both devices."""


class Elsewhere(Tensor):
    """A tensor on the other device; ``held`` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        """Return a shell around a CPU tensor."""
        shell = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE, requires_grad=False,
        )  # fmt: skip
        shell.held = held
        return shell

    def __repr__(self, **_: object) -> str:
        """Show what is inside."""
        return f"Elsewhere({self.held!r})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Answer questions about memory, which a shell has none of; results are shells, no parameters."""
        if func is Tensor.data_ptr:
            return args[0].held.data_ptr()
        if func is Tensor.untyped_storage:
            return args[0].held.untyped_storage()
        if func is Tensor.tolist:
            return args[0].detach().held.tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Run an operator."""
        return _run(func, args, kwargs or {})


_MOVES = ("aten::_to_copy", "aten::copy_", "aten::_foreach_copy_")
_INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")
_QUESTIONS = ("aten::_local_scalar_dense", "aten::is_same_size", "aten::equal", "aten::allclose")


_LOG: list[str] = []


@contextlib.contextmanager
def waits() -> Iterator[list[str]]:
    """Collect the operators that wait for a device: copies to and from it, values and sizes that are asked for."""
    before = len(_LOG)
    found: list[str] = []
    yield found
    found += _LOG[before:]


_SIZED = ("aten::nonzero", "aten::masked_select", "aten::unique_dim", "aten::_unique2", "aten::repeat_interleave")


def _stalls(name, args, there, shells, strays):
    masks = name in _INDEXED and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    waits = name in _QUESTIONS or name in _SIZED or masks
    crosses = (shells and not there) or (shells and strays)
    return [name] if waits or crosses else []


def _run(func, args, kwargs):
    name = func._schema.name
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    shells = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    named = kwargs.get("device")
    there = bool(shells) if named is None else torch.device(named).type == DEVICE.type
    # A number in a tensor of its own may come from the CPU, and index tensors of x[...] are moved by torch.
    strays = [t for t in tensors if not isinstance(t, Elsewhere) and t.dim() and t.device.type != "meta"]
    if shells and strays and name not in (*_MOVES, *_INDEXED):
        raise MixedDevicesError(
            f"{name} got tensors on {DEVICE} and on the CPU, of sizes {[list(t.shape) for t in strays]}"
        )
    if shells and any(isinstance(leaf, torch.Generator) for leaf in pytree.tree_leaves((args, kwargs))):
        raise MixedDevicesError(f"{name} on {DEVICE} got a generator of the CPU")
    _LOG.extend(_stalls(name, args, there, shells, strays))
    opened = pytree.tree_map(lambda v: v.held if isinstance(v, Elsewhere) else v, (args, kwargs))
    if there and named is not None:
        opened[1]["device"] = torch.device("cpu")
        opened[1].pop("pin_memory", None)
    result = func(*opened[0], **opened[1])
    if name in _QUESTIONS or not there:
        return result
    known = {id(shell.held): shell for shell in shells}

    def wrapped(value):
        if not isinstance(value, Tensor) or isinstance(value, Elsewhere):
            return value
        return known[id(value)] if id(value) in known else Elsewhere(value)

    return pytree.tree_map(wrapped, result)


class _Backend:
    """What torch asks a kind of device for."""

    amp_dtypes = (torch.float16, torch.bfloat16)

    def is_available(self):
        return True

    is_initialized = is_available

    def _is_in_bad_fork(self):
        return False

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def manual_seed_all(self, seed):
        """Seed nothing: numbers are drawn on the CPU."""

    def get_amp_supported_dtype(self):
        return list(self.amp_dtypes)


_KERNELS: list[torch.library.Library] = []


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return Elsewhere(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source, target, non_blocking=False):
    """Copy where Python's dispatch is off: what ``torch.tensor(..., device=...)`` does."""
    source, target = (v.held if isinstance(v, Elsewhere) else v for v in (source, target))
    return target.copy_(source)


def unwaited(values: Tensor) -> Tensor:
    """Return CPU values on the other device, as if nothing had to wait for them."""
    return Elsewhere(values)


def unavailable() -> str | None:
    """Return why there is no other device in this process; None where there is one now."""
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as setup
    except ImportError:
        return "this torch has no devices that are written in Python"
    if not _KERNELS:
        setup(NAME, backend_module=_Backend())
        library = torch.library.Library("aten", "IMPL")
        library.impl("empty.memory_format", _empty, "PrivateUse1")
        library.impl("empty_strided", _empty_strided, "PrivateUse1")
        library.impl("_copy_from", _copy_from, "PrivateUse1")
        everything = torch.library.Library("_", "IMPL")
        everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        _KERNELS.extend([library, everything])
    return None
