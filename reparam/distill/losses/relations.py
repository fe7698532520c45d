"""RKD: distances and angles among the samples of a batch, instead of the samples themselves.

Embeddings are ``[N, ...]``; everything behind the batch dimension is one vector, and its length may differ between
student and teacher. No loss here changes when a network's embeddings are shifted or multiplied by a positive number.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from reparam.distill.losses.shared import check_floating, check_samples, constant, full_precision, promote, unit
from reparam.errors import InputError


def rkd(student: Tensor, teacher: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0) -> Tensor:
    """Relational distillation: ``distance_weight * rkd_distance + angle_weight * rkd_angle``; the teacher is detached.

    Args:
        student: embeddings ``[N, ...]``, ``N >= 3`` (``N >= 2`` with ``angle_weight`` 0).
        teacher: embeddings ``[N, ...]``.
        distance_weight: weight of the distances.
        angle_weight: weight of the angles; 0 leaves them out.

    Raises:
        InputError: numbers of samples differ or are too small.

    Source: Park et al., "Relational Knowledge Distillation" (CVPR 2019). Weights as in the common CIFAR-100 recipe.
    """
    loss = distance_weight * rkd_distance(student, teacher)
    return loss + angle_weight * rkd_angle(student, teacher) if angle_weight else loss


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between relative distances, the mean over all pairs of two different samples.

    The relative distance of a pair is its Euclidean distance divided by the mean distance of all pairs. (The authors'
    code divides by N^2, counting each sample with itself, and leaves distances of 0 out of the mean.) Equal samples
    have distance and gradient 0. The teacher is detached.

    Args:
        student: embeddings ``[N, ...]``, ``N >= 2``.
        teacher: embeddings ``[N, ...]``.

    Raises:
        InputError: numbers of samples differ, or there are fewer than 2.

    Source: Park et al. (CVPR 2019), equations 5 to 8.
    """
    own, other = _embeddings(student, teacher, 2, "distances need")
    count = len(own)
    errors = F.smooth_l1_loss(_relative_distances(own), _relative_distances(other), reduction="sum")
    return errors / (count * (count - 1))


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between cosines of angles, the mean over all triples of three different samples.

    The cosine of (i, j, k) is that of the angle at j between the directions to i and to k; where two of the samples are
    equal it counts as 0, with gradient 0. (The authors' code divides by N^3.) Memory grows with ``N^2 (N + D)``. The
    teacher is detached.

    Args:
        student: embeddings ``[N, ...]``, ``N >= 3``.
        teacher: embeddings ``[N, ...]``.

    Raises:
        InputError: numbers of samples differ, or there are fewer than 3.

    Source: Park et al. (CVPR 2019), equations 9 and 10.
    """
    own, other = _embeddings(student, teacher, 3, "angles need")
    count = len(own)
    errors = F.smooth_l1_loss(_cosines(own), _cosines(other), reduction="none")
    total = errors.sum() - errors.diagonal(dim1=1, dim2=2).sum()  # without the angles between a direction and itself
    return total / (count * (count - 1) * (count - 2))


def _embeddings(student: Tensor, teacher: Tensor, needed: int, why: str) -> tuple[Tensor, Tensor]:
    """Both as vectors ``[N, D]`` of moderate size."""
    if student.ndim < 2 or teacher.ndim < 2 or len(student) != len(teacher):
        raise InputError(
            "embeddings of student and teacher must be [N, ...] with equal N; "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )
    check_floating(student, teacher)
    check_samples(len(student), needed, why)
    if student.numel() == 0 or teacher.numel() == 0:
        raise InputError(f"embeddings are empty: {list(student.shape)} and {list(teacher.shape)}")
    return _moderate(promote(student).flatten(1)), _moderate(constant(teacher).flatten(1))


def _moderate(vectors: Tensor) -> Tensor:
    """Divide by a constant, which neither distances nor angles notice, so that squares can neither over nor underflow.

    The first sample is subtracted before: the size that counts is that of the differences.
    """
    shifted = vectors - vectors[:1].detach()
    size = shifted.detach().abs().amax()
    return shifted / torch.where(size > 0, size, 1)


def _relative_distances(vectors: Tensor) -> Tensor:
    """``[N, N]`` distances divided by their mean over different samples; by differences, since products cancel."""
    count = len(vectors)
    distances = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / (count * (count - 1))
    return distances / torch.where(mean > 0, mean, 1)


def _cosines(vectors: Tensor) -> Tensor:
    """``[N, N, N]``: entry (j, i, k) is the cosine of the angle at j between i and k."""
    with full_precision(vectors):
        directions = unit(vectors[None] - vectors[:, None])
        return torch.bmm(directions, directions.transpose(1, 2))
