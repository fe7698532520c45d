"""What the losses have in common: checks of their arguments, precision, directions that are safe at zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn import functional as F

from reparam.errors import InputError

# Checks --------------------------------------------------------------------------------------------------------------


def check_logits(student: Tensor, teacher: Tensor) -> None:
    """Insist on two floating-point tensors ``[N, C]`` of equal sizes with at least one image."""
    if student.ndim != 2 or student.shape != teacher.shape:
        raise InputError(
            "logits of student and teacher must both be [N, C] with equal sizes; "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )
    check_floating(student, teacher)
    if student.numel() == 0:
        raise InputError(f"a batch mean needs at least one image and one class; got logits {list(student.shape)}")


def check_floating(*tensors: Tensor) -> None:
    """Insist on floating-point tensors."""
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise InputError(f"losses need floating-point tensors, got {tensor.dtype}")


def check_temperature(temperature: float) -> None:
    """Insist on a positive, finite temperature."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise InputError(f"temperature must be positive, got {temperature}")


def check_share(name: str, value: float) -> None:
    """Insist on a number in [0, 1]."""
    if not 0 <= value <= 1:
        raise InputError(f"{name} must lie in [0, 1], got {value}")


def check_samples(count: int, needed: int, why: str) -> None:
    """Insist on at least ``needed`` samples."""
    if count < needed:
        raise InputError(f"{why} at least {needed} samples, got {count}")


def check_indices(indices: Tensor, limit: int, what: str) -> None:
    """Insist on int64 numbers in [0, limit); their values are looked at on the CPU only, where nothing has to wait."""
    if indices.dtype != torch.int64:
        raise InputError(f"{what} must be int64, got {indices.dtype}")
    if indices.device.type != "cpu" or torch.compiler.is_compiling() or indices.numel() == 0:
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= limit:
        raise InputError(f"{what} must lie in [0, {limit - 1}], got {low if low < 0 else high}")


def check_levels(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    """Insist on two lists of features with equally many levels, and equally many images on each."""
    if isinstance(student, Tensor) or isinstance(teacher, Tensor):
        raise InputError("features must be lists of tensors, one per level; got a tensor")
    if len(student) != len(teacher) or not student:
        raise InputError(
            "features of student and teacher must have equally many levels, at least one; "
            f"got {len(student)} and {len(teacher)}"
        )
    for number, (own, other) in enumerate(zip(student, teacher, strict=True)):
        check_floating(own, other)
        if min(own.ndim, other.ndim) < 2 or len(own) != len(other) or own.numel() == 0 or other.numel() == 0:
            raise InputError(
                f"features of level {number} must be [N, C, ...] with equally many images, at least one; "
                f"got {list(own.shape)} and {list(other.shape)}"
            )


# Precision -----------------------------------------------------------------------------------------------------------


def promote(tensor: Tensor) -> Tensor:
    """Half precision as float32, everything else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def constant(teacher: Tensor) -> Tensor:
    """Cut a teacher's tensor off its graph, in full precision."""
    return promote(teacher.detach())


def full_precision(tensor: Tensor) -> AbstractContextManager[None]:
    """Switch autocast off on the tensor's device: it would round the operands of matrix products."""
    return torch.autocast(tensor.device.type, enabled=False)


def finite(log_probability: Tensor) -> Tensor:
    """Replace the -inf of an overflowed difference by the lowest finite number, so that 0 * log 0 is 0."""
    return log_probability.clamp_min(torch.finfo(log_probability.dtype).min)


# Distributions and directions ----------------------------------------------------------------------------------------


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Finite log probabilities of logits ``[N, C]`` at a temperature."""
    return finite(F.log_softmax(promote(logits) / temperature, dim=1))


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Batch mean of KL(p || q) for log probabilities ``[N, C]``."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def unit(vectors: Tensor) -> Tensor:
    """Divide by the Euclidean norm along the last dimension; no overflow and no underflow on the way.

    A vector of zeros stays zero, and so is its gradient.
    """
    size = vectors.detach().abs().amax(-1, keepdim=True)
    scaled = vectors / torch.where(size > 0, size, 1)  # the result does not depend on the size, so it may be a constant
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return torch.where(size > 0, scaled / torch.where(size > 0, norm, 1), 0)


def centred_unit(vectors: Tensor) -> Tensor:
    """Subtract the mean along the last dimension and divide by the norm.

    The result does not change when a row is shifted or multiplied by a positive number. A row that is constant up to
    rounding gives zeros, with gradient zero.
    """
    size = vectors.detach().abs().amax(-1, keepdim=True)
    moved = vectors - vectors[..., :1].detach()  # exact for nearly equal numbers, which a mean is not
    spread = moved.detach().abs().amax(-1, keepdim=True)
    varied = spread > 4 * torch.finfo(vectors.dtype).eps * size
    scaled = moved / torch.where(varied, spread, 1)
    return unit(torch.where(varied, scaled - scaled.mean(-1, keepdim=True), 0))


# Feature maps --------------------------------------------------------------------------------------------------------


def as_map(features: Tensor) -> Tensor:
    """A map ``[N, C, H, W]`` as it is, a pooled vector ``[N, C]`` as a map of size 1 x 1."""
    if features.ndim == 2:
        return features[:, :, None, None]
    if features.ndim != 4:
        raise InputError(f"features must be maps [N, C, H, W] or vectors [N, C], got {list(features.shape)}")
    return features


def shrink(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Average-pool maps that are larger than a height and width; the others stay."""
    pooled = (min(maps.shape[2], size[0]), min(maps.shape[3], size[1]))
    return maps if pooled == tuple(maps.shape[2:]) else F.adaptive_avg_pool2d(maps, pooled)


def fit_size(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bring maps to a height and width: average pooling where they are larger, repeated pixels where smaller."""
    pooled, wanted = shrink(maps, size), tuple(size)
    return pooled if tuple(pooled.shape[2:]) == wanted else F.interpolate(pooled, size=wanted, mode="nearest")
