"""Top-1 accuracy, and the parity of two models on real images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

PARITY_TOLERANCE = 1e-5
"""Largest relative error of the logits at which an extracted student counts as equal (float32)."""

Batch = tuple[Tensor, Tensor]


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


@torch.no_grad()
def top1(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Return the accuracy of ``model`` in percent. The model has to be in evaluation mode."""
    correct, count = 0, 0
    for images, labels in batches:
        correct += int((model(images).argmax(dim=1) == labels).sum())
        count += len(labels)
    return 100 * correct / max(count, 1)


@torch.no_grad()
def parity(reference: nn.Module, other: nn.Module, batches: Iterable[Batch]) -> Parity:
    """Compare the logits of two models in evaluation mode on all ``batches``."""
    differences, sizes = [], []
    agreed, count = 0, 0
    for images, _ in batches:
        expected, found = reference(images), other(images)
        differences.append((found.double() - expected.double()).abs().max())
        sizes.append(expected.double().abs().max())
        agreed += int((expected.argmax(dim=1) == found.argmax(dim=1)).sum())
        count += len(images)
    max_abs, scale = float(torch.stack(differences).max()), float(torch.stack(sizes).max())
    return Parity(max_abs, max_abs / scale if scale else max_abs, agreed / count)


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, each counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def all_finite(model: nn.Module) -> bool:
    """Whether no parameter holds NaN or Inf and no buffer NaN (a buffer may be a mask of -inf)."""
    checks = [parameter.isfinite().all() for parameter in model.parameters()]
    checks += [~buffer.isnan().any() for buffer in model.buffers()]
    return bool(torch.stack(checks).all()) if checks else True
