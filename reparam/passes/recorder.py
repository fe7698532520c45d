"""Record the code of one module: again in the other train mode where it branches on that, and undone where it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from reparam.passes.answers import Answers, name_of
from reparam.passes.carried import prepare_next_call, refuse_draws
from reparam.passes.contexts import NOTED
from reparam.passes.memory import signature
from reparam.passes.meta import Unknown
from reparam.passes.modes import BranchOnTraining, choose, differences, put, require_mode
from reparam.passes.proxies import iter_nodes, nodes_of
from reparam.passes.restore import refuse_assigned_buffers, replaced_tensors, restore, snapshot


class Recorder(Answers):
    """The part of a tracer that records modules; ``ModelTracer`` says what its attributes mean."""

    outputs: dict[str, list[Any]]
    _cache: dict[str, fx.Proxy]
    _repeating = False

    def recorded(self, m: nn.Module, forward: Callable[[], Any], mark: fx.Node | None, state: dict[str, Any]) -> Any:
        """Run ``forward``; where it branches on a training flag, in both modes."""
        start = self.last_node()  # behind a guard of the mode, if there is one
        try:
            result = refuse_draws(m, forward)
            self.check_known(mark)
            refuse_assigned_buffers(m)
            self.refuse_replaced(m, state)
            self.refuse_state(m, forward, state, start, result)
            return result
        except BranchOnTraining as branch:
            if branch.target in self.flags:
                raise
            self.rollback(mark)
            restore(m, state)
            known = signature(m) or branch.target
            if known not in self.memory.structural:
                merged = self._merged(m, branch.target, forward, mark, state)
                if merged is not None:
                    return merged[0]
                self.memory.structural.add(known)
            if self.path[-1] not in self.specialised:
                raise fx.proxy.TraceError(f"{branch}, and does other things in train mode") from branch
            return self._in_one_mode(m, branch.target, forward, mark, state)

    def refuse_state(
        self, m: nn.Module, forward: Callable[[], Any], before: dict[str, Any], mark: fx.Node | None, result: Any
    ) -> None:
        """Refuse a forward that does something else in its next call, because of what this one left in attributes.

        Args:
            m: the module.
            forward: its call.
            before: the `snapshot` of the module in front of it.
            mark: the last node in front of what was recorded.
            result: what the call returned.

        Raises:
            TraceError: it does; names the attributes.
        """
        if self._repeating:
            return
        kept = snapshot(m)
        changed = prepare_next_call(m, before)
        if not changed:
            return
        last, first = self.last_node(), self._nodes_after(mark)
        self._repeating = True
        try:
            again = forward()
            second = self._nodes_after(last)
            self._name_alike(first, second)
            alike = differences(first, second, (nodes_of(result), nodes_of(again))) == []
        except Exception:
            alike = False
        finally:
            self._repeating = False
            self.rollback(last)
            restore(m, kept)
        if not alike:
            raise fx.proxy.TraceError(
                f"{type(m).__name__} keeps state in {', '.join(changed)}, and a graph would repeat that of now; "
                "keep it in a buffer that is changed in place, or in a submodule that stays as it is"
            )

    def _name_alike(self, first: list[fx.Node], second: list[fx.Node]) -> None:
        """Let constants that both calls computed, each for itself, be the same one."""
        kept = {n.target: getattr(self.root, str(n.target)) for n in first if _is_constant(n)}
        for node in filter(_is_constant, second):
            value = getattr(self.root, str(node.target))
            same = (name for name, one in kept.items() if one.dtype == value.dtype and torch.equal(one, value))
            node.target = next(same, node.target)

    def _merged(
        self, m: nn.Module, target: str, forward: Callable[[], Any], mark: fx.Node | None, state: dict[str, Any]
    ) -> tuple[Any] | None:
        """Record both modes; where they differ in constants only, the flag chooses those. None where in more."""
        runs: list[tuple[list[fx.Node], Any]] = []
        first = mark
        try:
            for flag in (False, True):
                restore(m, state)
                self.flags[target] = flag
                first = self.last_node()
                result = self.recorded(m, forward, first, state)
                runs.append((self._nodes_after(first), result))
        except Exception:
            if not runs:
                raise
        finally:
            del self.flags[target]
        results = tuple(nodes_of(result) for _nodes, result in runs)
        unlike = differences(runs[0][0], runs[1][0], results) if len(runs) == 2 else None
        if unlike is None:
            self.rollback(mark)
            restore(m, state)
            return None
        self.rollback(first)
        if not unlike:
            self.memory.indifferent.add(target)
        for found in unlike:
            with self.graph.inserting_before(found.node):
                flag_node = self.create_node("get_attr", target, (), {})
                chosen = self.create_node("call_function", choose, (flag_node, found.second, found.first), {})
            for new in (flag_node, chosen):
                new.meta.update({key: found.node.meta[key] for key in NOTED})
            chosen.meta["val"] = found.first  # the values behind it are those of eval mode
            put(found.node, found.place, chosen)
        return (runs[0][1],)

    def _in_one_mode(
        self, m: nn.Module, target: str, forward: Callable[[], Any], mark: fx.Node | None, state: dict[str, Any]
    ) -> Any:
        self.read_mode = True
        flag = self.create_proxy("get_attr", target, (), {})
        self.create_proxy("call_function", require_mode, (flag, self.mode, target.rpartition(".")[0]), {})
        self.flags[target] = self.mode
        try:
            return self.recorded(m, forward, mark, state)
        finally:
            del self.flags[target]

    def last_node(self) -> fx.Node | None:
        """Return the node that was recorded last."""
        return next(iter(reversed(self.graph.nodes)), None)

    def _nodes_after(self, mark: fx.Node | None) -> list[fx.Node]:
        found = []
        for node in reversed(self.graph.nodes):
            if node is mark:
                break
            found.append(node)
        return found[::-1]

    def check_known(self, mark: fx.Node | None) -> None:
        """Refuse what was recorded after ``mark`` where a value depends on data.

        Raises:
            TraceError: it does.
        """
        for node in self._nodes_after(mark):
            value = node.meta.get("val")
            if isinstance(value, Unknown):
                source = value.source or f"{node.meta.get('source', '')}: {name_of(node)}"
                raise fx.proxy.TraceError(f"{source}: {value.reason}")

    def refuse_replaced(self, m: nn.Module, state: dict[str, Any]) -> None:
        """Refuse a module that computes with what an earlier call left in its attributes: a graph has no memory.

        Raises:
            TraceError: it does.
        """
        for name, old in replaced_tensors(m, state):
            target = self.tensor_attrs.get(old)
            if target is not None and any(n.op == "get_attr" and n.target == target for n in self.graph.nodes):
                raise fx.proxy.TraceError(
                    f"{type(m).__name__} computes with its attribute {name} of an earlier call, and sets it anew; "
                    "reset it before, or make it a buffer that is changed in place"
                )

    def rollback(self, mark: fx.Node | None) -> None:
        """Forget what was recorded after ``mark``."""
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


def _is_constant(node: fx.Node) -> bool:
    """Whether a node reads a tensor that code made from no input."""
    return node.op == "get_attr" and str(node.target).startswith("_tensor_constant")
