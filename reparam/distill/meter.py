"""Losses and training accuracy of an epoch, collected without waiting for the device at every step."""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from torch import Tensor

from reparam.distill.distributed import Group
from reparam.distill.transfer import finest


class Meter:
    """Sums over the steps of an epoch, of this process.

    Args:
        names: of the networks that have a loss.
        group: the processes; results are those of all.
        state: of an earlier part of the same epoch, see `state`.
    """

    def __init__(self, names: tuple[str, ...], group: Group, state: dict[str, Any] | None = None) -> None:
        self.names, self._group = names, group
        self._sums = torch.zeros(len(names), 3, dtype=finest(group.device), device=group.device)
        if state is not None and group.main:
            self._sums += state["sums"].to(self._sums)
            self._sums[:, 0] *= group.world  # a loss is the mean over processes, and there may be others now

    def add(self, name: str, loss: Tensor, logits: Tensor, labels: Tensor, share: float) -> None:
        """Take in the loss of a network; ``share`` is how much of a step it stands for."""
        row = self._sums[self.names.index(name)]
        row[0] += loss.detach() * share
        row[1] += (logits.detach().argmax(dim=1) == labels).sum()
        row[2] += len(labels)

    def take(self, other: Meter) -> None:
        """Take in what another meter of the same networks holds, and empty it."""
        self._sums += other._sums
        other._sums.zero_()

    def bad(self) -> str | None:
        """Name a network whose loss was NaN or Inf in this process; None if all were finite."""
        if bool(self._sums.isfinite().all()):
            return None
        losses = self._sums[:, 0].tolist()
        return next(
            f"the {name}'s loss is {loss}" for name, loss in zip(self.names, losses, strict=True) if not isfinite(loss)
        )

    def averages(self, steps: int) -> dict[str, float]:
        """Return mean loss and training accuracy in percent of each network, over all processes."""
        sums = self._group.sum(self._sums).tolist()
        averages = {}
        for name, (loss, correct, count) in zip(self.names, sums, strict=True):
            averages[f"{name}_loss"] = loss / steps / self._group.world
            averages[f"{name}_train_top1"] = 100 * correct / count
        return averages

    def state(self) -> dict[str, Any]:
        """Return the sums of all processes, for a checkpoint in the middle of an epoch."""
        sums = self._group.sum(self._sums).cpu()
        sums[:, 0] /= self._group.world
        return {"sums": sums}
