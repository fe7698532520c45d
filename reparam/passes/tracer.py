"""Record the forward pass of a model as an fx graph that stays true to the model.

Three things differ from ``torch.fx.symbolic_trace``:

* every node carries its value on the meta device (``node.meta["val"]``), so ranks, lengths and types are known
  while tracing, and parameters and buffers are graph values;
* ``module.training`` is a graph value (a ``get_attr`` node), so train and eval can be switched after tracing;
* a module whose forward cannot be recorded (control flow on the training flag, on sizes or on data) becomes a
  leaf on demand, and the graph inside it is recorded separately, for analysis only (``trace_inner``).
"""

from __future__ import annotations

import contextlib
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from reparam.passes.carried import refuse_draws
from reparam.passes.constants import known_or_why, known_value, places
from reparam.passes.contexts import Context, around, noting
from reparam.passes.functionalize import (
    chunk,
    drop_unused,
    functionalize,
    is_inplace,
    refuse_new_weights,
    setitem,
    storage,
)
from reparam.passes.intrinsics import intrinsics
from reparam.passes.listening import TRACERS, listed_tensors, training_property
from reparam.passes.memory import Memory, remember, remembered, shapes_of, signature
from reparam.passes.meta import Unknown, has_tensor, run_leaf_on_meta, run_on_meta
from reparam.passes.modes import refuse, require, require_mode, told
from reparam.passes.proxies import HintProxy, nodes_of, proxies_have_types, source_line
from reparam.passes.recorder import Recorder
from reparam.passes.restore import refuse_assigned_buffers, restore, snapshot
from reparam.passes.seeds import draws_kept
from reparam.passes.skeleton import named_tensors, to_meta
from reparam.passes.state import function_key
from reparam.passes.values import plain


class ModelTracer(Recorder):
    """See the module's docstring.

    Args:
        example_args: positional inputs of the root on the meta device.
        example_kwargs: keyword inputs.
        training: for the analysis of a leaf: the train mode; sizes and branches are then concrete too.
        specialised: paths of modules whose own control flow may ask for sizes and train flags: sizes are those of
            the example, with a guard, and flags are ``mode``.
        mode: see ``specialised``; ``read_mode`` tells whether it mattered.
        memory: what earlier recordings found out; added to.
        forced: for the analysis of a leaf: the answers to its first branches on sizes; the others are the example's.
            ``decisions`` holds the lines of all of them and what was answered.

    ``deciding`` holds the memory of the buffers whose values decided something.
    """

    def __init__(
        self,
        example_args: Sequence[Any] = (),
        example_kwargs: Mapping[str, Any] | None = None,
        training: bool | None = None,
        specialised: frozenset[str] = frozenset(),
        mode: bool = False,
        memory: Memory | None = None,
        forced: tuple[bool, ...] = (),
    ) -> None:
        super().__init__()
        self.forced, self.decisions = forced, []
        self.proxy_buffer_attributes = True
        self.example_args, self.example_kwargs = example_args, dict(example_kwargs or {})
        self.fixed_training, self.specialised, self.mode = training, specialised, mode
        self.memory = memory or Memory()
        self.read_mode = False
        self.running: list[str] = [""]
        self.flags: dict[str, bool] = {}
        self.outputs: dict[str, list[Any]] = {}
        self.leaves: dict[str, str] = {}
        self.path: list[str] = []
        self._evaluating = 0
        self._cache: dict[str, fx.Proxy] = {}
        self._names: dict[int, str] = {}
        self.deciding: set[int] = set()
        self._autocasts: list[Context] = []

    # -- entry -------------------------------------------------------------------------------------------------

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]
        """Record ``root`` and return its graph."""
        self._names = {}
        for name, tensor in named_tensors(root):
            self._names.setdefault(id(tensor), name)
        states = [(module, snapshot(module)) for module in root.modules()]
        if self.fixed_training is not None:
            _forget_counts(root)
        TRACERS.append(self)
        try:
            patches = training_property(), listed_tensors(), proxies_have_types(), draws_kept()
            blocks = noting(self._autocasts, lambda: not self._evaluating and self is TRACERS[-1])
            with contextlib.ExitStack() as stack:
                for patch in (*patches, intrinsics(self._intrinsic, self._function), blocks):
                    stack.enter_context(patch)
                graph = super().trace(root, concrete_args)
                refuse_assigned_buffers(root)
                for module, state in states:
                    self.refuse_replaced(module, state)
        finally:
            TRACERS.pop()
            for module, state in states:
                restore(module, state)
        functionalize(graph)
        drop_unused(graph)
        return graph

    def _intrinsic(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._evaluating or self is not TRACERS[-1]:
            return NotImplemented
        return self.create_proxy("call_function", function, args, kwargs)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Make one placeholder per example input that holds a tensor; other inputs are constants."""
        names = _parameter_names(root_fn)
        args = [
            self._placeholder(names[i] if i < len(names) else f"input_{i}", a) for i, a in enumerate(self.example_args)
        ]
        kwargs = {name: self._placeholder(name, value) for name, value in self.example_kwargs.items()}

        def call(root: nn.Module) -> Any:
            before, mark = snapshot(root), self.last_node()

            def forward() -> Any:
                return root_fn(root, *args, **kwargs)

            result = refuse_draws(root, forward)
            self.refuse_state(root, forward, before, mark, result)
            return result

        return call, [self.root]

    def _placeholder(self, name: str, value: Any) -> Any:
        if not has_tensor(value):
            return value
        node = self.create_node("placeholder", name, (), {})
        node.meta["val"] = value
        return self.proxy(node)

    # -- nodes -------------------------------------------------------------------------------------------------

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Wrap a node."""
        return HintProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        """Turn a value of the traced program into a graph argument."""
        if issubclass(type(a), fx.Proxy):
            return a.node
        if isinstance(a, nn.Parameter) and id(a) in self._names:
            return self.create_node("get_attr", self._names[id(a)], (), {})
        if isinstance(a, torch.device) and a.type == "meta" and self._names:
            # Read off a parameter that is no graph value: the graph asks for where it is then.
            parameter = self.create_node("get_attr", next(iter(self._names.values())), (), {})
            return self.create_node("call_function", getattr, (parameter, "device"), {})
        if isinstance(a, Tensor) and a.is_meta and a not in self.tensor_attrs:
            raise fx.proxy.TraceError(f"{source_line()}: a tensor was made from parameters that are not there yet")
        if isinstance(a, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(a):
            raise fx.proxy.TraceError(f"{source_line()}: torch.vmap or torch.func.grad have no place in a graph")
        if type(a) is OrderedDict:
            pairs = [(key, value) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (self.create_arg(pairs),), {})
        if isinstance(a, dict) and is_dataclass(a):
            items = {str(key): self.create_arg(value) for key, value in a.items()}
            return self.create_node("call_function", type(a), (), items)
        return super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        """Record an operator; a Python function that libraries keep from being traced into, where that is asked for."""
        target = getattr(target, "reparam_plain", target)
        if kind == "call_function" and isinstance(target, FunctionType) and self.specialised and not self._evaluating:
            name = function_key(target)
            if name in self.specialised and name not in self.running:
                return self._inside(name, target, args, kwargs)
        return super().create_proxy(kind, target, args, kwargs, *rest, **options)

    def _inside(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.running.append(name)
        try:
            return function(*args, **kwargs)
        finally:
            self.running.pop()

    def _function(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Trace into a function, or keep it as one operator where that fails."""
        if self._evaluating or self is not TRACERS[-1] or self.fixed_training is not None:
            return NotImplemented
        mark, name = self.last_node(), function_key(function)
        try:
            value = self._inside(name, function, args, kwargs)
            self.check_known(mark)
            return value
        except Exception:
            self.rollback(mark)
            if name in self.specialised:
                raise
            return self.create_proxy("call_function", function, args, kwargs)

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> fx.Node:
        """Add a node and compute its value on the meta device."""
        if target is operator.setitem:
            target = setitem
        if (kind, target) == ("call_method", "chunk") or target is torch.chunk:
            kind, target = "call_function", chunk
        if target is operator.getitem:
            args = (args[0], places(args[1], self))
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        node.meta["module"] = self.path[-1] if self.path else ""
        node.meta["source"] = source_line()
        node.meta["around"] = around(self._autocasts)
        if kind not in ("placeholder", "output"):
            node.meta["val"] = self.evaluate(node, lambda n: n.meta["val"])
            if isinstance(node.meta["val"], Unknown):
                node.meta["val"] = known_or_why(node, self.known)
        refuse_new_weights(node)
        if is_inplace(node) and isinstance(node.args[0], fx.Node) and storage(node.args[0]) in self.deciding:
            raise fx.proxy.TraceError(f"{source_line()}: {node.args[0].target} decides a size and is written")
        return node

    def known(self, node: fx.Node) -> Any:
        """Return the value of a node on the CPU.

        Raises:
            LookupError: it is not known while recording.
        """
        self._evaluating += 1
        try:
            return known_value(node, self.root, self.deciding)
        finally:
            self._evaluating -= 1

    def evaluate(self, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
        """Compute a node on the meta device, from these values of the nodes in front of it."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
        args, kwargs = plain(args), plain(kwargs)
        self._evaluating += 1
        try:
            if node.target in (refuse, require, require_mode):
                return None  # both modes are recorded, whatever mode the network is in
            if node.op == "get_attr":
                return to_meta(operator.attrgetter(str(node.target))(self.root))
            if node.op == "call_module":
                return self._run_leaf(self.root.get_submodule(str(node.target)), args, kwargs)
            return self._run(node, args, kwargs)
        except Exception as error:
            return Unknown(f"{type(error).__name__}: {error}")
        finally:
            self._evaluating -= 1

    def _run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        shapes = shapes_of((args, kwargs))
        if shapes is None:
            return run_on_meta(node.op, node.target, args, kwargs)
        return self._remembered((node.target, shapes), lambda: run_on_meta(node.op, node.target, args, kwargs), args)

    def _run_leaf(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        key = (signature(module), vars(module).get("training"), shapes_of((args, kwargs)))
        if key[0] is None or key[2] is None:
            return run_leaf_on_meta(module, args, kwargs)
        return self._remembered(key, lambda: run_leaf_on_meta(module, args, kwargs), (args, kwargs))

    def _remembered(self, key: Any, compute: Callable[[], Any], given: Any) -> Any:
        value = remembered(self.memory, key)
        if value is None:
            value = compute()
            remember(self.memory, key, value, given)
        return value

    # -- modules and attributes ----------------------------------------------------------------------------------

    def training_of(self, module: nn.Module) -> Any:
        """Return what ``module.training`` is to the traced program."""
        actual = vars(module).get("training", True)
        if self.fixed_training is not None:
            return self.fixed_training
        if self._evaluating or self.submodule_paths is None or module not in self.submodule_paths:
            return actual
        path = self.submodule_paths[module]
        return self.create_proxy("get_attr", f"{path}.training" if path else "training", (), {})

    def refuse_new_mode(self, module: nn.Module) -> None:
        """Refuse code that sets the mode of a module (a frozen norm): no graph does that.

        Raises:
            TraceError: it does.
        """
        if not self._evaluating and self.submodule_paths and module in self.submodule_paths:
            raise fx.proxy.TraceError(f"{source_line()}: the mode of {self.submodule_paths[module]} is set")

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Return a proxy for a parameter or buffer, the value itself for anything else."""
        self._cache = parameter_proxy_cache
        if self._evaluating or not isinstance(attr_val, Tensor) or id(attr_val) not in self._names:
            return attr_val
        name = self._names[id(attr_val)]
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Trace into every module; those that cannot be traced become leaves in ``call_module``."""
        return False

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace into ``m``, or keep it as a leaf where that fails."""
        if self._evaluating or self.submodule_paths is None or m not in self.submodule_paths:
            return forward(*args, **kwargs)
        path = self.submodule_paths[m]
        mark = self.last_node()
        state = snapshot(m)
        self.path.append(path)
        self.running.append(path)
        try:
            result = self.recorded(m, lambda: forward(*args, **kwargs), mark, state)
        except Exception as error:
            self.rollback(mark)
            # Code that failed half way may have left symbolic values in the module's attributes.
            restore(m, state)
            self.leaves[path] = told(error)
            result = self.create_proxy("call_module", path, args, kwargs)
            if isinstance(result.node.meta["val"], Unknown):
                raise
        finally:
            self.path.pop()
            self.running.pop()
        self.outputs.setdefault(path, []).append(nodes_of(result))
        return result


def _forget_counts(root: nn.Module) -> None:
    """Let norms with cumulative averages have a momentum: it is a number that they compute from their count of calls.

    For analysis only, where no rule asks for it: a leaf runs its own code.
    """
    for module in root.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.momentum is None:
            module.momentum = 0.1


def _parameter_names(function: Callable[..., Any]) -> list[str]:
    import inspect

    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(inspect.unwrap(function)).parameters.values()
    return [p.name for p in parameters if p.kind in kinds][1:]
