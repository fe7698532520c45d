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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from reparam.errors import CaptureError
from reparam.passes.functionalize import chunk, drop_unused, functionalize, refuse_new_weights, setitem
from reparam.passes.intrinsics import intrinsics
from reparam.passes.meta import Unknown, run_leaf_on_meta, run_on_meta
from reparam.passes.proxies import HintProxy, iter_nodes, nodes_of, proxies_have_types, source_line
from reparam.passes.restore import refuse_assigned_buffers, restore, snapshot
from reparam.passes.skeleton import named_tensors, to_meta
from reparam.passes.values import plain


@dataclass
class Capture:
    """A recorded forward pass.

    Args:
        graph: nodes with ``meta["val"]`` (meta value), ``meta["module"]`` (path) and ``meta["source"]`` (file:line).
        root: the meta skeleton that the graph's targets refer to.
        outputs: module path -> the values that calls of it returned (structures of nodes), in call order.
        leaves: paths of the modules that are leaves, with the reason.
        train: the forward pass in train mode, where the root's own forward branches on its training flag; this
            one is then the eval mode's.
        in_train_mode: whether this is the forward pass in train mode of such a root.
        eval_only: the root branches on its training flag and only its eval mode can be recorded.
    """

    graph: fx.Graph
    root: nn.Module
    outputs: dict[str, list[Any]] = field(default_factory=dict)
    leaves: dict[str, str] = field(default_factory=dict)
    train: Capture | None = None
    in_train_mode: bool = False
    eval_only: bool = False

    @property
    def graphs(self) -> list[fx.Graph]:
        """The graphs of all modes."""
        return [self.graph] if self.train is None else [self.graph, self.train.graph]


def trace(root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Capture:
    """Record ``root`` (a meta skeleton) called with these meta inputs.

    Raises:
        CaptureError: the forward pass of ``root`` itself cannot be recorded.
    """
    tracer = ModelTracer(args, kwargs)
    try:
        graph = tracer.trace(root)
    except Exception as error:
        return _trace_modes(root, args, kwargs, error)
    return Capture(graph, root, tracer.outputs, tracer.leaves)


def _trace_modes(root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], error: Exception) -> Capture:
    """Record a root whose own forward has control flow: once per train mode where that decides, sizes guarded."""
    captures: list[Capture] = []
    for mode in (False, True):
        tracer = ModelTracer(args, kwargs, root_training=mode)
        try:
            graph = tracer.trace(root)
        except Exception as again:
            if captures:
                break  # the train mode branch alone cannot be recorded: the teacher says so when it gets there
            raise CaptureError(_untraceable(root, error)) from again
        captures.append(Capture(graph, root, tracer.outputs, tracer.leaves, in_train_mode=mode))
        if not tracer.read_root_mode:
            return captures[0]
    if len(captures) == 2:
        captures[0].train = captures[1]
        for node in captures[1].graph.nodes:
            node.meta["key"] = f"train:{node.name}"
    else:
        captures[0].eval_only = True
    return captures[0]


def key_of(node: fx.Node) -> str:
    """Return the name of a node in a plan: unique over the graphs of both train modes."""
    key: str = node.meta.get("key", node.name)
    return key


def trace_inner(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], training: bool) -> fx.Graph:
    """Record a leaf module for analysis: one train mode, branches and sizes as for these inputs."""
    tracer = ModelTracer(args, kwargs, training=training)
    return tracer.trace(module)


def _untraceable(root: nn.Module, error: Exception) -> str:
    return (
        f"{type(root).__name__}: the forward pass cannot be recorded as a graph: {type(error).__name__}: {error}. "
        "Its own forward branches on data or calls code that refuses symbolic values. Move that code into a "
        "submodule (submodules that cannot be recorded are kept as they are), or expand the submodules one by one"
    )


_TRACERS: list[ModelTracer] = []


@contextlib.contextmanager
def _training_property() -> Iterator[None]:
    """While tracing, ``module.training`` asks the innermost tracer instead of the instance."""

    def read(module: nn.Module) -> Any:
        return _TRACERS[-1].training_of(module)

    def write(module: nn.Module, value: bool) -> None:
        vars(module)["training"] = value

    if isinstance(vars(nn.Module).get("training"), property):
        yield
        return
    nn.Module.training = property(read, write)  # type: ignore[assignment]
    try:
        yield
    finally:
        del nn.Module.training


class ModelTracer(fx.Tracer):
    """See the module's docstring.

    Args:
        example_args: positional inputs of the root on the meta device.
        example_kwargs: keyword inputs.
        training: for the analysis of a leaf: the train mode; sizes and branches are then concrete too.
        root_training: what the root's own training flag is; sizes in its own control flow are then constants too,
            with a guard.
    """

    def __init__(
        self,
        example_args: Sequence[Any] = (),
        example_kwargs: Mapping[str, Any] | None = None,
        training: bool | None = None,
        root_training: bool | None = None,
    ) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True
        self.example_args, self.example_kwargs = example_args, dict(example_kwargs or {})
        self.fixed_training, self.root_training = training, root_training
        self.read_root_mode = False
        self.outputs: dict[str, list[Any]] = {}
        self.leaves: dict[str, str] = {}
        self.path: list[str] = []
        self._evaluating = 0
        self._cache: dict[str, fx.Proxy] = {}
        self._names: dict[int, str] = {}

    # -- entry -------------------------------------------------------------------------------------------------

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]
        """Record ``root`` and return its graph."""
        self._names = {}
        for name, tensor in named_tensors(root):
            self._names.setdefault(id(tensor), name)
        states = [(module, snapshot(module)) for module in root.modules()]
        _TRACERS.append(self)
        try:
            with _training_property(), proxies_have_types(), intrinsics(self._intrinsic):
                graph = super().trace(root, concrete_args)
                refuse_assigned_buffers(root)
        finally:
            _TRACERS.pop()
            for module, state in states:
                restore(module, state)
        functionalize(graph)
        drop_unused(graph)
        return graph

    def _intrinsic(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._evaluating or self is not _TRACERS[-1]:
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
            return root_fn(root, *args, **kwargs)

        return call, [self.root]

    def _placeholder(self, name: str, value: Any) -> Any:
        leaves = torch.utils._pytree.tree_leaves(value)
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
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
        if type(a) is OrderedDict:
            pairs = [(key, value) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (self.create_arg(pairs),), {})
        return super().create_arg(a)

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> fx.Node:
        """Add a node and compute its value on the meta device."""
        if target is operator.setitem:
            target = setitem
        if (kind, target) == ("call_method", "chunk") or target is torch.chunk:
            kind, target = "call_function", chunk
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        node.meta["module"] = self.path[-1] if self.path else ""
        node.meta["source"] = source_line()
        if kind not in ("placeholder", "output"):
            node.meta["val"] = self._evaluate(node)
        refuse_new_weights(node)
        return node

    def _evaluate(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        args, kwargs = plain(args), plain(kwargs)
        self._evaluating += 1
        try:
            if node.op == "get_attr":
                return to_meta(operator.attrgetter(str(node.target))(self.root))
            if node.op == "call_module":
                return run_leaf_on_meta(self.root.get_submodule(str(node.target)), args, kwargs)
            return run_on_meta(node.op, node.target, args, kwargs)
        except Exception as error:
            return Unknown(f"{type(error).__name__}: {error}")
        finally:
            self._evaluating -= 1

    # -- modules and attributes ----------------------------------------------------------------------------------

    def training_of(self, module: nn.Module) -> Any:
        """Return what ``module.training`` is to the traced program."""
        actual = vars(module).get("training", True)
        if self.fixed_training is not None:
            return self.fixed_training
        if self._evaluating or self.submodule_paths is None or module not in self.submodule_paths:
            return actual
        path = self.submodule_paths[module]
        if self.root_training is not None and path == "":
            self.read_root_mode = True
            return self.root_training
        return self.create_proxy("get_attr", f"{path}.training" if path else "training", (), {})

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
        mark = next(iter(reversed(self.graph.nodes)), None)
        state = snapshot(m)
        self.path.append(path)
        try:
            result = forward(*args, **kwargs)
            self._check_known(mark)
            refuse_assigned_buffers(m)
        except Exception as error:
            self._rollback(mark)
            # Code that failed half way may have left symbolic values in the module's attributes.
            restore(m, state)
            self.leaves[path] = f"{type(error).__name__}: {error}"
            result = self.create_proxy("call_module", path, args, kwargs)
            if isinstance(result.node.meta["val"], Unknown):
                raise
        finally:
            self.path.pop()
        self.outputs.setdefault(path, []).append(nodes_of(result))
        return result

    def _check_known(self, mark: fx.Node | None) -> None:
        node = next(iter(reversed(self.graph.nodes)), None)
        while node is not None and node is not mark and node.op != "root":
            if isinstance(node.meta.get("val"), Unknown):
                raise fx.proxy.TraceError(f"{node.target}: {node.meta['val'].reason}")
            node = node.prev

    def _rollback(self, mark: fx.Node | None) -> None:
        erased = set()
        for node in reversed(list(self.graph.nodes)):
            if node is mark:
                break
            erased.add(node)
            self.graph.erase_node(node)
        for name in [n for n, p in self._cache.items() if p.node in erased]:
            del self._cache[name]
        for path in list(self.outputs):
            calls = self.outputs[path]
            calls[:] = [c for c in calls if not any(n in erased for n in iter_nodes(c))]

    # -- questions that Python code asks -------------------------------------------------------------------------

    def length(self, proxy: fx.Proxy) -> int:
        """Answer ``len(value)``: of a tuple always, of a tensor only for analysis (it is a batch size)."""
        value = proxy.node.meta.get("val")
        if isinstance(value, (tuple, list, dict)):
            return len(value)
        return len(self.concrete(proxy))

    def concrete(self, proxy: fx.Proxy) -> Any:
        """Answer with the example's value where that is allowed."""
        value = proxy.node.meta.get("val")
        allowed = self.fixed_training is not None or (self.root_training is not None and not self.path)
        if not allowed or isinstance(value, (Tensor, Unknown)):
            name = getattr(proxy.node.target, "__name__", proxy.node.target)
            raise fx.proxy.TraceError(f"{source_line()}: control flow depends on the value of {name}")
        if self.fixed_training is None:
            self._guard(proxy, value)
        return value

    def _guard(self, proxy: fx.Proxy, value: Any) -> None:
        message = (
            f"{source_line()}: the network branches on a size here and was recorded for {value!r}; "
            "expand it again with an example_input of the size that is used now"
        )
        same = self.create_proxy("call_function", operator.eq, (proxy, value), {})
        self.create_proxy("call_function", torch._assert, (same, message), {})

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Answer ``if value:``."""
        return bool(self.concrete(obj))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Iterate over a tuple of known length."""
        items: Any = obj
        return iter([items[i] for i in range(self.length(obj))])

    def keys(self, obj: fx.Proxy) -> Any:
        """Iterate over the keys of a dict."""
        value = obj.node.meta.get("val")
        return value.keys() if isinstance(value, dict) else super().keys(obj)


def _parameter_names(function: Callable[..., Any]) -> list[str]:
    import inspect

    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(inspect.unwrap(function)).parameters.values()
    return [p.name for p in parameters if p.kind in kinds][1:]
