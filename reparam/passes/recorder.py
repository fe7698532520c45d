"""Record the code of one module: again in the other train mode where it branches on that, and undone where it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from reparam.passes.answers import Answers, name_of
from reparam.passes.memory import signature
from reparam.passes.meta import Unknown
from reparam.passes.modes import BranchOnTraining, choose, differences, put, require_mode
from reparam.passes.proxies import iter_nodes, nodes_of
from reparam.passes.restore import refuse_assigned_buffers, replaced_tensors, restore


class Recorder(Answers):
    """The part of a tracer that records modules; ``ModelTracer`` says what its attributes mean."""

    outputs: dict[str, list[Any]]
    _cache: dict[str, fx.Proxy]

    def recorded(self, m: nn.Module, forward: Callable[[], Any], mark: fx.Node | None, state: dict[str, Any]) -> Any:
        """Run ``forward``; where it branches on a training flag, in both modes."""
        try:
            result = forward()
            self.check_known(mark)
            refuse_assigned_buffers(m)
            self.refuse_state(m, state)
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
                new.meta.update({key: found.node.meta[key] for key in ("module", "source")})
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
        node = self.last_node()
        while node is not None and node is not mark and node.op != "root":
            if isinstance(node.meta.get("val"), Unknown):
                source = node.meta.get("source", "")
                raise fx.proxy.TraceError(f"{source}: {name_of(node)}: {node.meta['val'].reason}")
            node = node.prev

    def refuse_state(self, m: nn.Module, state: dict[str, Any]) -> None:
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
