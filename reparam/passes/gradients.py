"""Code that takes gradients inside its forward pass: energies, forces, scores."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

T = TypeVar("T")


def without_gradients(call: Callable[[], T]) -> T:
    """Return what ``call`` returns without gradients; what runs inside has them only where it cannot do without."""
    try:
        with torch.no_grad():
            return call()
    except RuntimeError as error:
        if not needs_gradients(error):
            raise
    with torch.no_grad():  # for the result
        return with_gradients(call)()


def needs_gradients(error: Exception) -> bool:
    """Whether an error is torch's about a gradient of what was computed without."""
    return "does not require grad" in str(error)


def takes_gradients(graph: fx.Graph) -> bool:
    """Whether a graph takes gradients.

    A graph knows nothing of the ``torch.enable_grad()`` around such code.
    """
    return any(node.target in TAKE or (node.op, node.target) == ("call_method", "backward") for node in graph.nodes)


TAKE = (torch.autograd.grad, torch.autograd.backward)
"""Functions that take gradients."""


def is_cut_off(error: Exception) -> bool:
    """Whether an error is torch's about a gradient with respect to what the result was not computed from."""
    return "appears to not have been used in the graph" in str(error)


def with_gradients(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function take gradients inside, also where its caller wants none of what it returns."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with torch.enable_grad():
            result = forward(*args, **kwargs)
        return pytree.tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, result)

    return run
