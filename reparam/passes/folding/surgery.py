"""Folding applied to the modules of a copy: the smallest modules whose own code changes get another one."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from reparam.ops.kernels import Kernel
from reparam.passes.contexts import surround
from reparam.passes.folding.edits import Analysis, Edit
from reparam.passes.folding.emit import Code, Emitter, Missing
from reparam.passes.folding.module import FoldedModule, layer, with_weights
from reparam.passes.folding.ops import value_of
from reparam.passes.folding.record import Call, Recording, call_of, record_calls
from reparam.passes.folding.scopes import Scopes
from reparam.passes.skeleton import named_tensors


class Surgery:
    """Applies the edits of an analysis to a copy of a model.

    Args:
        model: the copy; changed.
        recording: of its meta skeleton.
        analysis: what folds.
        at_root: rewrite the network's own code, whatever could be done inside.
    """

    def __init__(self, model: nn.Module, recording: Recording, analysis: Analysis, at_root: bool = False) -> None:
        self.model, self.recording, self.analysis = model, recording, analysis
        self.scopes = Scopes(recording, analysis)
        if at_root:
            self.scopes.to_root()
        self.called = {call.path for call in recording.root.calls()}
        self.trainable = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
        self.originals = dict(model.named_modules(remove_duplicate=False))
        self.tensors = dict(named_tensors(model))
        self.copies: dict[str, int] = {}

    def run(self) -> nn.Module:
        """Return the folded model."""
        codes = self._codes()
        made = Counter(_module_of(edit) for _, code in codes.values() for edit in code.layers.values())
        made.update(path for path in self._still_called(codes) if path in made)
        self.copies = {path: count for path, count in made.items() if path and count > 1}
        for path in sorted(codes, key=lambda p: -len(p.split(".")) if p else 1):
            scope, code = codes[path]
            module = self._made(scope, code)
            if not path:
                return module
            replace_module(self.model, self.originals[path], module)
        return self.model

    @staticmethod
    def _still_called(codes: dict[str, tuple[Call, Code]]) -> set[str]:
        """Return the paths of modules that new code calls as they were."""
        return {
            code.foreign.get(name, f"{path}.{name}".strip("."))
            for path, (_, code) in codes.items()
            for name in (str(n.target) for n in code.steps if n.op == "call_module")
            if name not in code.layers
        }

    def _codes(self) -> dict[str, tuple[Call, Code]]:
        """Write the code of every module that changes; what is missing in one is done in the code that calls it."""
        aliases: dict[fx.Node, list[fx.Node]] = {}
        for node in self.analysis.ops:
            aliases.setdefault(self.analysis.regions.value(node), []).append(node)
        while True:
            self.scopes.settle()
            found: dict[str, tuple[Call, Code]] = {}
            by_node = {edit.node: edit for edit in self.analysis.edits}
            for scope in self.scopes.all():
                if scope.path in found:
                    continue
                module = self.recording.skeleton.get_submodule(scope.path)
                try:
                    code = Emitter(scope, module, by_node, self.scopes.inlined, aliases).run()
                except (Missing, TypeError):
                    if scope.parent is None:
                        raise
                    self.scopes.lift(scope.path)
                    break
                found[scope.path] = scope, code
            else:
                return found

    # -- one module ----------------------------------------------------------------------------------------------------

    def _made(self, scope: Call, code: Code) -> nn.Module:
        old = self._current(scope.path)
        steps = code.steps
        simple = scope.parent is not None and len(code.inputs) == 1 and not code.foreign and not code.attributes
        if simple and not steps and code.result is code.inputs[0]:
            return nn.Identity().eval()
        if scope.parent is not None and len(code.layers) == 1:
            (edit,) = code.layers.values()
            assert edit.kernel is not None
            same = self._same_class(scope, edit, old)
            if same is not None:
                return with_weights(same, edit.kernel, self._trains(edit))
            if simple and len(steps) == 1 and code.result is steps[0]:
                return layer(edit.kernel, self._trains(edit))
        return self._folded(scope, code, old)

    def _current(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)

    def _trains(self, edit: Edit) -> bool:
        """Whether the layer that an operator stands for was trainable."""
        path = _module_of(edit)
        own = [train for name, train in self.trainable.items() if name.startswith(f"{path}." if path else "")]
        return any(own) if own else True

    def _same_class(self, scope: Call, edit: Edit, old: nn.Module) -> nn.Module | None:
        """Return a copy of a layer that can take the new weight and bias as its own; None if there is none."""
        assert edit.main is not None and edit.kernel is not None
        alone = [e for e in self.analysis.edits if e.scope is scope]
        skeleton = self.recording.skeleton.get_submodule(scope.path)
        if len(alone) != 1 or call_of(edit.main) is not scope or not _reads_own(edit.main, skeleton):
            return None
        before = self.analysis.originals[edit.main]
        if not _same_geometry(before, edit.kernel) or any(True for _ in old.children()):
            return None
        module = copy.deepcopy(old)
        if type(old).__module__.startswith("torch.nn.modules."):
            return module
        return module if _takes_weights(skeleton, edit.kernel, scope) else None

    def _folded(self, scope: Call, code: Code, old: nn.Module) -> nn.Module:
        layers = {name: layer(e.kernel, self._trains(e)) for name, e in code.layers.items() if e.kernel is not None}
        for name, path in code.foreign.items():
            layers[name] = self._current(path)
        used = {str(n.target) for n in code.steps if n.op == "call_module"} - set(layers)
        read = {name: path for name, path in code.attributes.items()}
        root = self._pruned(old, scope.path, "", used, set(read)) or nn.Module()
        if root is old:
            root = copy.copy(old)
        for name, module in layers.items():
            holder = _holder(root, name)
            holder.add_module(name.rpartition(".")[2], module)
        for name, path in read.items():
            _put_tensor(root, name, self._tensor(path))
        surround(code.graph)
        return FoldedModule(root, code.graph, f"Folded{type(old).__name__}".replace("FoldedFolded", "Folded"))

    def _tensor(self, path: str) -> Tensor:
        found = self.tensors.get(path)
        if found is None:
            found = operator.attrgetter(path)(self.recording.skeleton)
        return found

    def _pruned(self, module: nn.Module, path: str, name: str, used: set[str], read: set[str]) -> nn.Module | None:
        """Return a module with what is still needed inside it; None if it is not needed."""
        prefix = f"{name}." if name else ""
        if name in used:
            return module
        inside = any(n.startswith(prefix) for n in used | read)
        called = any(f"{path}.{n}".strip(".") in self.called for n in _paths(module, name)) if name else True
        if not called and not inside:
            return module
        if not inside and name:
            return None
        shell = nn.Module().eval()
        if not name:
            hidden = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
            vars(shell).update({k: v for k, v in vars(module).items() if k not in hidden})
        for key, child in module._modules.items():
            kept = None if child is None else self._pruned(child, path, prefix + key, used, read)
            if kept is not None:
                shell.add_module(key, kept)
        if name and f"{path}.{name}".strip(".") not in self.called and shell._modules == module._modules:
            return module  # a list of modules, all of them needed
        self._keep_tensors(module, shell, path, prefix, read)
        return shell

    def _keep_tensors(self, module: nn.Module, shell: nn.Module, path: str, prefix: str, read: set[str]) -> None:
        """Keep the parameters and buffers that the new code reads, and those that the old one did not."""
        known = {str(n.target) for n in self.recording.graph.nodes if n.op == "get_attr"}
        for kind in ("_parameters", "_buffers"):
            for key, tensor in vars(module)[kind].items():
                if prefix + key in read or (not prefix and f"{path}.{key}".strip(".") not in known):
                    vars(shell)[kind][key] = tensor
                    if key in module._non_persistent_buffers_set:
                        shell._non_persistent_buffers_set.add(key)


def _module_of(edit: Edit) -> str:
    """Return the path of the layer that an operator stands for."""
    assert edit.main is not None
    return str(edit.main.meta.get("module") or "")


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, wherever it is."""
    for parent in list(root.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new


def put_module(root: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """Return ``root`` with another module at ``path``."""
    if not path:
        return new
    replace_module(root, root.get_submodule(path), new)
    return root


def _paths(module: nn.Module, name: str) -> Iterator[str]:
    for inner, _ in module.named_modules():
        yield f"{name}.{inner}".strip(".")


def _holder(root: nn.Module, name: str) -> nn.Module:
    """Return the module that holds an attribute, made where it does not exist."""
    holder = root
    for part in name.split(".")[:-1]:
        if part not in holder._modules:
            holder.add_module(part, nn.Module().eval())
        holder = holder.get_submodule(part)
    return holder


def _put_tensor(root: nn.Module, name: str, tensor: Tensor) -> None:
    holder, key = _holder(root, name), name.rpartition(".")[2]
    if key in holder._parameters or key in holder._buffers:
        return
    if isinstance(tensor, nn.Parameter):
        holder.register_parameter(key, tensor)
    else:
        holder.register_buffer(key, tensor, persistent=not key.startswith("_tensor_constant"))


def _reads_own(main: fx.Node, skeleton: nn.Module) -> bool:
    """Whether an operator takes weight and bias of its own module as they are."""
    own = vars(skeleton).get("_parameters", {})
    values = [main.args[k] if len(main.args) > k else main.kwargs.get(n) for k, n in ((1, "weight"), (2, "bias"))]
    for name, value in zip(("weight", "bias"), values, strict=True):
        if name not in own:
            return False
        if value is None and own[name] is None:
            continue
        if not (isinstance(value, fx.Node) and value.op == "get_attr" and value_of(value).shape == own[name].shape):
            return False
    return True


def _same_geometry(before: Kernel, after: Kernel) -> bool:
    names = ("stride", "padding", "dilation", "output_padding", "groups", "transposed")
    same = all(getattr(before, name) == getattr(after, name) for name in names)
    return same and before.weight.shape == after.weight.shape


def _takes_weights(skeleton: nn.Module, kernel: Kernel, scope: Call) -> bool:
    """Whether the code of a layer uses its weight and bias as they are, also a bias that it did not have."""
    module = copy.deepcopy(skeleton)
    for name, value in (("weight", kernel.weight), ("bias", kernel.bias)):
        module.register_parameter(name, None if value is None else nn.Parameter(torch.empty_like(value, device="meta")))
    args, kwargs = fx.node.map_arg((tuple(scope.args), scope.kwargs), value_of)
    try:
        graph = record_calls(module, args, dict(kwargs)).graph
    except Exception:
        return False
    read = [str(n.target) for n in graph.nodes if n.op == "get_attr"]
    operators = [n for n in graph.nodes if n.op in ("call_function", "call_method", "call_module")]
    before = [n for n in scope.nodes() if n.op in ("call_function", "call_method", "call_module")]
    wanted = ["weight"] if kernel.bias is None else ["bias", "weight"]
    return sorted(read) == wanted and [n.target for n in operators] == [n.target for n in before]
