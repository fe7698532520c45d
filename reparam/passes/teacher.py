"""The dynamic teacher: an ``fx.GraphModule`` over the student's own module tree with wider tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from reparam.errors import InputError, ModelError
from reparam.ops.block import module_at
from reparam.passes.contexts import as_code
from reparam.passes.example import inputs_from_json
from reparam.passes.gradients import takes_gradients, with_gradients
from reparam.passes.interface import Interface
from reparam.passes.parts import HOST, host_of
from reparam.passes.plan import Plan
from reparam.passes.program import Program
from reparam.passes.skeleton import copied, rebind_hooks

_NOT_COPIED = ("_graph", "_views", "_skeleton", "_programs", "_interface", "meta", "_code", "_shell", HOST)
_METHODS = ("no_weight_decay", "no_weight_decay_keywords", "group_matcher")


class Teacher(fx.GraphModule):
    """A widened network that computes the function of its student.

    Made by ``reparam.expand`` and ``reparam.load``. Its modules, parameter names and buffers are those of the
    student; ``teacher.meta["reparam"]`` holds the :class:`~reparam.passes.plan.Plan`, ``teacher.student_statistics``
    the student's own norm statistics.
    """

    def __init__(
        self,
        root: nn.Module,
        programs: Sequence[Program],
        plan: Plan,
        skeleton: nn.Module,
        shell: nn.Module | None = None,
    ) -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name=f"{plan.model}Teacher")
        # Adopt the whole tree: fx would copy only what the graph refers to, and drop buffers and train flags.
        for name, value in vars(root).items():
            if name not in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set") and name[:1] != "_":
                if not callable(value):
                    self.__dict__.setdefault(name, value)
            elif name.startswith("_tensor_constant"):
                self.__dict__[name] = value
        self._modules.update(root._modules)
        self._parameters.update(root._parameters)
        self._buffers.update(root._buffers)
        self._non_persistent_buffers_set.update(root._non_persistent_buffers_set)
        self.training = root.training
        self.meta["reparam"] = plan
        # In a tuple, so that it is no submodule: its tensors are on the meta device.
        self._skeleton = (skeleton,)
        # One program; or two, for eval and train mode, where the student's own forward branches on its mode.
        self._programs = tuple(programs)
        self._interface = Interface(skeleton.forward, inputs_from_json(plan.inputs), plan.model)
        # In a tuple as well: the view's parameters are this module's, it must be no submodule either.
        self._views: tuple[Any, ...] = ()
        # Of the student's class, over this module's own tensors: it runs what Python code of that class is needed.
        self._shell = (host_of(root if shell is None else shell, self),)
        if any(node.target == HOST for node in self._programs[0].graph.nodes):
            # Past nn.Module, which would register it: its modules are this module's own.
            self.__dict__[HOST] = self._shell[0]
        self.graph = self._programs[0].graph

    def train(self, mode: bool = True) -> Teacher:
        """Set the train mode, as the student's own class does: it may keep some norms in eval mode."""
        super().train(mode)
        shell = self._shell[0]
        if type(shell).train is not nn.Module.train:
            shell.train(mode)
        shell.training = mode
        return self

    def recompile(self) -> Any:
        """Generate the forward again; it follows the train mode where there are two programs."""
        with as_code(self.graph):
            code = super().recompile()
        if takes_gradients(self.graph):
            type(self).forward = with_gradients(type(self).forward)
        if len(self.__dict__.get("_programs", ())) > 1:
            in_eval, in_train = type(self).forward, self._programs[1].function()

            def forward(module: Teacher, *args: Any, **kwargs: Any) -> Any:
                return (in_train if module.training else in_eval)(module, *args, **kwargs)

            type(self).forward = forward
        interface = self.__dict__.get("_interface")
        if interface is not None and not interface.plain:
            graph_forward = type(self).forward

            def called(module: Teacher, *args: Any, **kwargs: Any) -> Any:
                return graph_forward(module, *interface.bind(args, kwargs))

            type(self).forward = called
        if HOST in self.__dict__:
            # Python code takes what it always took, also inputs that the example left out (detection targets).
            type(self).forward = lambda module, *args, **kwargs: module.__dict__[HOST](*args, **kwargs)
        return code

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a teacher's state_dict, see ``nn.Module``.

        Raises:
            InputError: it is the student's: which of its many expansions is wanted, a state_dict cannot say.
        """
        for name, row in self.plan.params.items():
            value = state_dict.get(name)
            if isinstance(value, Tensor) and tuple(value.shape) == row.shape != row.wide_shape:
                raise InputError(
                    f"{name} has the student's shape {list(row.shape)}, the teacher's is {list(row.wide_shape)}: load "
                    "these weights into the student and expand it again; a teacher's own come from its state_dict()"
                )
        return super().load_state_dict(state_dict, *args, **kwargs)

    @property
    def plan(self) -> Plan:
        """The plan this teacher was made by."""
        plan: Plan = self.meta["reparam"]
        return plan

    @property
    def skeleton(self) -> nn.Module:
        """The student on the meta device: class, hooks and structure without weights."""
        return self._skeleton[0]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            skeleton = self.__dict__.get("_skeleton")
            value = getattr(skeleton[0], name, None) if skeleton and name in _METHODS else None
            if value is None:
                raise
            return value

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        root = nn.Module()
        mine = {k: v for k, v in vars(self).items() if k not in _NOT_COPIED}
        root.__dict__.update({k: copy.deepcopy(v, memo) for k, v in mine.items()})
        # Its plain attributes may hold modules of this teacher, in a list for instance: the copy's hold the copies.
        shell: nn.Module = object.__new__(type(self._shell[0]))
        memo[id(self._shell[0])] = shell
        vars(shell).update({k: copy.deepcopy(v, memo) for k, v in vars(self._shell[0]).items()})
        result = Teacher(root, [p.copy() for p in self._programs], self.plan, copied(self.skeleton), shell)
        rebind_hooks(result, memo)
        result.meta.update({k: v for k, v in self.meta.items() if k != "reparam"})
        memo[id(self)] = result
        for old in self._views:
            memo[id(old)] = old.for_copy(result)
        return result

    def __reduce__(self) -> Any:
        raise InputError(
            "a teacher is not pickled; write it with reparam.save(teacher, path) and read it with reparam.load"
        )

    def __copy__(self) -> Teacher:
        return copy.deepcopy(self)


def check_names(model: nn.Module) -> None:
    """Refuse a network whose own modules or tensors have names that a teacher uses for something else.

    Raises:
        ModelError: it has such names.
    """
    used = {*dir(fx.GraphModule(nn.Module(), fx.Graph())), *dir(Teacher), *_NOT_COPIED} - {*dir(nn.Module())}
    taken = sorted(used.intersection([*model._modules, *model._parameters, *model._buffers]))
    if taken:
        raise ModelError(
            f"{type(model).__name__} has modules or tensors named {', '.join(taken)}, and a teacher, which is a "
            "torch.fx.GraphModule, has attributes of these names: rename them, or expand a module that holds the "
            "network (torch.nn.Sequential(model))"
        )


def statistics_tree(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """Return a module tree that holds copies of the given buffers under their own paths."""
    tree = nn.Module()
    for name in names:
        path, _, leaf = name.rpartition(".")
        persistent = leaf not in model.get_submodule(path)._non_persistent_buffers_set
        add_buffer(tree, name, model.get_buffer(name).detach().clone(), persistent)
    return tree


def add_buffer(tree: nn.Module, name: str, tensor: Tensor, persistent: bool) -> None:
    """Register a buffer under a dotted name; modules on the way are made where there are none."""
    *path, leaf = name.split(".")
    module_at(tree, path).register_buffer(leaf, tensor, persistent=persistent)


def require_teacher(value: Any) -> Teacher:
    """Return ``value`` if it is a teacher.

    Raises:
        InputError: it is something else.
    """
    if isinstance(value, Teacher):
        return value
    if isinstance(getattr(value, "module", None), Teacher):
        raise InputError("the teacher is wrapped (DDP or EMA); pass the teacher itself, usually wrapper.module")
    if isinstance(getattr(value, "_orig_mod", None), Teacher):
        raise InputError("the teacher is compiled; pass the teacher itself (compiled._orig_mod)")
    if hasattr(value, "teacher") and isinstance(value.teacher, Teacher):
        raise InputError(f"this is the {type(value).__name__} of a teacher; pass the teacher itself: .teacher of it")
    raise InputError(f"a teacher made by reparam.expand or reparam.load is needed, not {type(value).__name__}")
