"""AT: the student has to look where the teacher looks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from reparam.distill.losses.shared import check_floating, check_levels, constant, fit_size, promote, unit
from reparam.errors import InputError


def attention_map(features: Tensor, power: float = 2.0) -> Tensor:
    """Where a layer is active: ``mean_c |A_c|^power``.

    Args:
        features: ``[N, C, H, W]``.
        power: at least 1.

    Returns:
        ``[N, H, W]``, not negative.

    Raises:
        InputError: not ``[N, C, H, W]``, or ``power`` below 1.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention" (ICLR 2017), section 3.1.
    """
    if features.ndim != 4:
        raise InputError(f"attention maps need features [N, C, H, W], got {list(features.shape)}")
    if not power >= 1:
        raise InputError(f"power must be at least 1, got {power}")
    check_floating(features)
    return promote(features).abs().pow(power).mean(1)


def attention_transfer(student: Sequence[Tensor], teacher: Sequence[Tensor], power: float = 2.0) -> Tensor:
    """Attention transfer: mean squared difference of normalised attention maps, summed over the levels.

    The map of an image is ``mean_c |A_c|^power`` as a vector over positions, divided by its norm; the mean is over
    images and positions. Channels may differ. Where sizes differ the larger map is average-pooled to the smaller. A
    map of zeros stays zero. The teacher is detached.

    Args:
        student: features ``[N, C, H, W]``, one per level.
        teacher: as many, with the same N.
        power: at least 1.

    Raises:
        InputError: numbers of levels or images differ, features are no maps, or ``power`` is below 1.

    Source: Zagoruyko and Komodakis (ICLR 2017), equation 2 with the squared difference and the mean of the authors'
    code, to which the usual weight of 1000 belongs.
    """
    check_levels(student, teacher)
    total = torch.zeros((), dtype=promote(student[0]).dtype, device=student[0].device)
    for own, other in zip(student, teacher, strict=True):
        maps = attention_map(_moderate(own), power), attention_map(_moderate(constant(other)), power)
        size = [min(lengths) for lengths in zip(maps[0].shape[1:], maps[1].shape[1:], strict=True)]
        first, second = (unit(fit_size(part[:, None], size).flatten(1)) for part in maps)
        total = total + F.mse_loss(first, second)
    return total


def _moderate(features: Tensor) -> Tensor:
    """Divide each image by a constant, which a normalised map does not notice, so that powers cannot overflow."""
    features = promote(features)
    size = features.detach().abs().flatten(1).amax(1).view(-1, *[1] * (features.ndim - 1))
    return features / torch.where(size > 0, size, 1)
