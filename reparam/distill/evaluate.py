"""Accuracy of the networks of a run on the test images, and how exactly they agree, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reparam.distill.distributed import Group
from reparam.distill.transfer import finest

PARITY_TOLERANCE = 1e-5
"""Largest relative error of the logits at which an extracted student counts as equal (float32)."""

FOLDED_TOLERANCE = 1e-4
"""The same for a folded one, whose arithmetic is another."""

Batches = Iterable[tuple[Tensor, Tensor]]
Place = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Parity:
    """How far two models differ on the same images.

    Attributes:
        max_abs: largest absolute difference of a logit.
        max_rel: the same divided by the largest logit of the reference.
        argmax_agreement: share of images with the same predicted class, in [0, 1].
    """

    max_abs: float
    max_rel: float
    argmax_agreement: float

    @property
    def passed(self) -> bool:
        """Whether the difference is rounding: ``max_rel`` within `PARITY_TOLERANCE`."""
        return self.max_rel <= PARITY_TOLERANCE

    def as_dict(self) -> dict[str, float]:
        """Return the numbers by name, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Entry:
    """A network to measure.

    Attributes:
        name: what the table calls it.
        network: a module in evaluation mode, or another function of images ``[N, C, H, W]`` to logits.
        same_as: name of the entry, further up, whose logits it should have; None if there is none.
        tolerance: largest relative error at which it counts as equal.
        parameters: how many to report, where the network is no module or gives out others: a student's view gives the
            teacher's.
    """

    name: str
    network: Callable[[Tensor], Tensor]
    same_as: str | None = None
    tolerance: float = PARITY_TOLERANCE
    parameters: int | None = None


@dataclass(frozen=True)
class Row:
    """The measurements of a network.

    Attributes:
        name: of the entry.
        top1: accuracy in percent.
        top5: the same for the five best classes; None for fewer than six classes.
        parameters: how many it has, each counted once.
        same_as: the entry that it was compared with.
        parity: how far it differs from that.
        passed: whether that is within the tolerance; None without comparison.
    """

    name: str
    top1: float
    top5: float | None
    parameters: int
    same_as: str | None = None
    parity: Parity | None = None
    passed: bool | None = None


def top1(model: nn.Module, batches: Batches, group: Group | None = None, place: Place = lambda images: images) -> float:
    """Return the accuracy of ``model`` in percent. The model has to be in evaluation mode."""
    return measure([Entry("", model)], batches, group, place)[0].top1


def parity(reference: nn.Module, other: nn.Module, batches: Batches) -> Parity:
    """Compare the logits of two models in evaluation mode on all ``batches``."""
    found = measure([Entry("reference", reference), Entry("other", other, "reference")], batches)[1].parity
    assert found is not None  # it has a reference
    return found


@torch.no_grad()
def measure(
    entries: Sequence[Entry], batches: Batches, group: Group | None = None, place: Place = lambda images: images
) -> list[Row]:
    """Run all networks on all images once and measure them.

    Args:
        entries: the networks.
        batches: images ``[N, C, H, W]`` and labels ``[N]``, of this process's share of the data.
        group: the processes; accuracies are those of all shares, parity that of this process's share.
        place: gives images dtype and memory format.
    """
    tallies = [_Tally() for _ in entries]
    for images, labels in batches:
        seen: dict[str, Tensor] = {}
        placed = place(images)
        for entry, tally in zip(entries, tallies, strict=True):
            logits = entry.network(placed)
            seen[entry.name] = logits
            tally.add(logits, labels, None if entry.same_as is None else seen[entry.same_as])
    return [tally.row(entry, group) for entry, tally in zip(entries, tallies, strict=True)]


class _Tally:
    """Sums of one network, on its device."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None
        self._differences: list[Tensor] = []
        self._classes = 0

    def add(self, logits: Tensor, labels: Tensor, reference: Tensor | None) -> None:
        self._classes = logits.shape[1]
        best = logits.topk(min(5, self._classes), dim=1).indices
        hits = best == labels[:, None]
        agreed = torch.zeros((), device=logits.device)
        if reference is not None:
            kind = finest(logits.device)
            wanted = reference.to(kind)
            self._differences.append(torch.stack([(logits.to(kind) - wanted).abs().max(), wanted.abs().max()]))
            agreed = (logits.argmax(dim=1) == reference.argmax(dim=1)).sum()
        count = torch.tensor(len(labels), device=logits.device)
        found = torch.stack([hits[:, 0].sum(), hits.sum(), agreed.long(), count])
        self._counts = found if self._counts is None else self._counts + found

    def row(self, entry: Entry, group: Group | None) -> Row:
        own = torch.zeros(4, dtype=torch.long) if self._counts is None else self._counts
        total = own if group is None else group.sum(own.to(group.device))
        first, five, _, count = total.tolist()
        result: dict[str, Any] = {
            "name": entry.name,
            "top1": 100 * first / max(count, 1),
            "top5": 100 * five / max(count, 1) if self._classes > 5 else None,
            "parameters": entry.parameters,
        }
        if entry.parameters is None:
            assert isinstance(entry.network, nn.Module)  # a function comes with their number
            result["parameters"] = count_parameters(entry.network)
        if entry.same_as is not None and self._differences:
            largest, scale = torch.stack(self._differences).max(dim=0).values.tolist()
            _, _, agreed, seen = own.tolist()
            found = Parity(largest, largest / scale if scale else largest, agreed / seen)
            result |= {"same_as": entry.same_as, "parity": found, "passed": found.max_rel <= entry.tolerance}
        return Row(**result)


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, each counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def all_finite(model: nn.Module) -> bool:
    """Whether no parameter holds NaN or Inf and no buffer NaN (a buffer may be a mask of -inf)."""
    checks = [parameter.isfinite().all() for parameter in model.parameters()]
    checks += [~buffer.isnan().any() for buffer in model.buffers()]
    return bool(torch.stack(checks).all()) if checks else True
