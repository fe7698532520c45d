"""Which recording, and which choices in it, widen most: plan, look what stayed narrow, and try what may help."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from reparam.errors import CaptureError
from reparam.passes.capture import Capture
from reparam.passes.example import Inputs, example_for
from reparam.passes.freeze import make_plan
from reparam.passes.guards import broken_guards
from reparam.passes.memory import Memory
from reparam.passes.parts import record
from reparam.passes.plan import Plan
from reparam.passes.ratios import Ratio
from reparam.passes.skeleton import home_of, skeleton_of
from reparam.passes.splits import Choices, alternatives, head_choices
from reparam.passes.state import State
from reparam.passes.validate import ignored_parameters

_TRIALS = 8
"""Plans that are tried at most for better choices of splits."""


def prepare(
    model: nn.Module,
    ratio: Ratio,
    example_input: Any = None,
    ignore: Iterable[str | type] = (),
    heads: str = "auto",
) -> tuple[Capture, Inputs, Plan]:
    """Record and plan a model whose weights are fine; also returns the example input, on the meta device."""
    skeleton = skeleton_of(model)
    inputs = example_for(model, skeleton, example_input)
    search = Search(model, skeleton, inputs, ratio, ignored_parameters(model, ignore), heads)
    search.run()
    return search.capture, inputs, search.plan


class Search:
    """Looks for the recording and the choices under which most of a model is widened.

    Args:
        model: the student.
        skeleton: its meta copy.
        inputs: example input on the meta device.
        ratio: as given by the user.
        ignored: parameter name -> reason, for parameters that must stay as they are.
        heads: what attention widens (``reparam.passes.splits.HEADS``).
    """

    capture: Capture
    plan: Plan
    state: State

    def __init__(
        self,
        model: nn.Module,
        skeleton: nn.Module,
        inputs: Inputs,
        ratio: Ratio,
        ignored: dict[str, str],
        heads: str,
    ) -> None:
        self.model, self.inputs, self.ratio, self.ignored, self.heads = model, inputs, ratio, ignored, heads
        self.skeleton, self.memory = skeleton, Memory(home_of(skeleton))
        self.choices: dict[str, int | str] = {}

    def run(self) -> None:
        """Plan; then look into leaves, then try other choices, then the parts of what has no graph."""
        self.capture = record(self.skeleton, self.inputs, memory=self.memory)
        self.plan, self.state = self._planned_heads(self.capture)
        self._look_into_leaves()
        self._choose_splits()
        self._open_leaves()
        narrow = self.plan.wide_parameters == self.plan.parameters and self.ratio != 1
        if "" in self.capture.leaves and narrow and not self.ignored:
            raise CaptureError(self.capture.leaves[""])

    def _planned(self, capture: Capture, choices: Choices) -> tuple[Plan, State]:
        return make_plan(self.model, capture, self.inputs, self.ratio, self.ignored, choices)

    def _planned_heads(self, capture: Capture) -> tuple[Plan, State]:
        """Plan; once more where heads are split so that what is to be widened is not the last part."""
        plan, state = self._planned(capture, self.choices)
        wanted = head_choices(state.splits, "count" if self.heads == "count" else "width")
        if wanted.items() <= self.choices.items():
            return plan, state
        self.choices = {**self.choices, **wanted}
        return self._planned(capture, self.choices)

    def _look_into_leaves(self) -> None:
        """Record modules that branch on sizes or train mode for the example, where they could only stay narrow.

        At first they are leaves: as such they go on to accept every size.
        """
        unfit: set[str] = {""}
        capture, state = self.capture, self.state
        while wanted := state.refused.keys() - capture.specialised - unfit:
            again = record(self.skeleton, self.inputs, capture.specialised | wanted, memory=self.memory)
            broken = broken_guards(again, self.inputs) | again.specialised_in_vain
            if again.eval_only and not capture.eval_only:
                broken |= wanted  # a module keeps both of its modes
            if broken & wanted:
                unfit |= broken
                continue
            plan, found = self._planned_heads(again)
            if _gain(plan) > _gain(self.plan):
                self.capture, self.plan, self.state = again, plan, found
            elif not any(_is_inside(path, wanted) for path in found.refused):
                return
            capture, state = again, found  # what was opened may gain nothing yet, since leaves in it are narrow

    def _choose_splits(self) -> None:
        """Try other parts of splits for the replicas, as long as something is narrow."""
        for trial in alternatives(self.state.splits, self.heads)[:_TRIALS]:
            if _is_complete(self.plan):
                return
            plan, state = self._planned(self.capture, {**self.choices, **trial})
            if _gain(plan) > _gain(self.plan):
                self.choices, self.plan, self.state = {**self.choices, **trial}, plan, state

    def _open_leaves(self) -> None:
        """Record the parts of modules that have no graph."""
        opened = {path for path in self.state.refused if ":" not in path}
        if not opened or "" in self.capture.leaves:
            return
        again = record(self.skeleton, self.inputs, self.capture.specialised, opened, self.memory)
        if not again.parts:
            return
        plan, state = self._planned(again, self.choices)
        if _gain(plan) > _gain(self.plan):
            self.capture, self.state = again, state
            self.plan = dataclasses.replace(plan, opened=tuple(sorted(opened)))


def _is_inside(path: str, modules: Iterable[str]) -> bool:
    """Whether a module lies in one of these."""
    return any(path.startswith(f"{module}.") for module in modules)


def _gain(plan: Plan) -> tuple[float, int]:
    """What a recording is compared by: widened layers, then parameters (between narrow ends, one side is wide only).

    With ratios of their own, layers may well be meant to be narrow on one side.
    """
    return plan.coverage if isinstance(plan.ratio, int) else 0.0, plan.wide_parameters


def _is_complete(plan: Plan) -> bool:
    """Whether no other choice can widen more; with ratios of their own, where nothing had to be contracted."""
    return plan.coverage > _ENOUGH or not (isinstance(plan.ratio, int) or plan.contractions)


_ENOUGH = 0.99
"""Share of widened weights from which on no other splits are tried: they would move work around for little."""
