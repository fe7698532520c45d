"""Watch code without a graph run: what it calls its modules with, and which of their parameters it reads itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from reparam.passes.example import Inputs
from reparam.passes.meta import run_module_on_meta
from reparam.passes.skeleton import named_tensors, rebuild

_HARMLESS = ("dtype", "device", "requires_grad", "is_cuda", "is_floating_point")
"""What code may ask a parameter for without a look at its values or sizes."""


@dataclass
class Seen:
    """What was seen.

    Args:
        calls: path of a submodule -> its calls, on the meta device, in order.
        reads: name of a parameter or buffer -> the modules that were running when it was used, per use.
        transformed: paths of submodules that run inside ``torch.vmap`` or a derivative of ``torch.func``.
    """

    calls: dict[str, list[Inputs]] = field(default_factory=dict)
    reads: dict[str, set[tuple[str, ...]]] = field(default_factory=dict)
    transformed: set[str] = field(default_factory=set)

    def closed(self, module: nn.Module, path: str) -> bool:
        """Whether a module is a function of what it is called with, which a graph may take the place of.

        It is not where code outside reads its parameters (tied weights, a decoder that uses an embedding), nor inside
        transforms of ``torch.func``.
        """
        names = (f"{path}.{name}" for name, _tensor in named_tensors(module))
        outside = any(path not in running for name in names for running in self.reads.get(name, ()))
        return not outside and path not in self.transformed


def watch(module: nn.Module, inputs: Inputs) -> Seen:
    """Run a module (a meta skeleton) in both modes; on zeros and random values where the meta device fails."""
    seen = Seen()
    for training in (False, True):
        copy = rebuild(module, _as_it_is).train(training)
        if _run(copy, seen, partial(run_module_on_meta, copy, *inputs)):
            continue
        for sign in (0, 1, -1):
            if sign == -1 and _all_called(module, seen):
                break  # else: code behind a mask that was empty
            real = rebuild(module, partial(_filled, sign=abs(sign))).train(training)
            args, kwargs = pytree.tree_map(partial(_filled, "", sign=sign), inputs)
            with torch.no_grad():
                _run(real, seen, partial(real, *args, **kwargs))
    return seen


def _as_it_is(_name: str, tensor: Tensor) -> Tensor:
    return tensor


def _filled(_name: str, value: Any, sign: int) -> Any:
    """Return zeros; or values under which masks are hardly ever full, and layers keep the size of what goes through."""
    if not isinstance(value, Tensor):
        return value
    if not sign or not value.is_floating_point():
        return torch.zeros_like(value, device="cpu")
    if value.dim() < 2:
        return torch.ones_like(value, device="cpu")  # scales and variances
    generator = torch.Generator().manual_seed(value.numel())
    return sign * torch.randn(value.shape, generator=generator).to(value.dtype) / max(value[:1].numel() ** 0.5, 1.0)


def _all_called(module: nn.Module, seen: Seen) -> bool:
    return all(name in seen.calls for name, child in module.named_modules() if name and child._parameters)


def _run(module: nn.Module, seen: Seen, call: Callable[[], Any]) -> bool:
    """Call a copy of the module under hooks; returns whether it came to an end."""
    running: list[str] = []

    def enter(name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        running.append(name)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            seen.transformed.add(name)
            return
        found = pytree.tree_map(lambda v: v.detach().to("meta") if isinstance(v, Tensor) else v, (args, kwargs))
        seen.calls.setdefault(name, []).append(found)

    def leave(_module: nn.Module, _args: Any, _result: Any) -> None:
        running.pop()

    for name, child in module.named_modules():
        if name:
            child.register_forward_pre_hook(partial(enter, name), with_kwargs=True)
            child.register_forward_hook(leave)
    names: dict[int, list[str]] = {}
    for name, tensor in named_tensors(module):
        names.setdefault(id(tensor), []).append(name)
    try:
        with _Reads(names, running, seen):
            call()
    except Exception:
        return False
    return True


class _Reads(TorchFunctionMode):
    """Notes which parameters operators take, and what modules run then."""

    def __init__(self, names: Mapping[int, list[str]], running: Sequence[str], seen: Seen) -> None:
        super().__init__()
        self.names, self.running, self.seen = names, running, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note and go on."""
        kwargs = kwargs or {}
        name = getattr(getattr(func, "__self__", None), "__name__", getattr(func, "__name__", ""))
        if name not in _HARMLESS:
            for value in pytree.tree_leaves((args, kwargs)):
                known = self.names.get(id(value), []) if isinstance(value, Tensor) else []
                # A tied weight has the name of the module that reads it.
                own = [n for n in known if n.rpartition(".")[0] in self.running]
                for n in own or known:
                    self.seen.reads.setdefault(n, set()).add(tuple(self.running))
        return func(*args, **kwargs)
