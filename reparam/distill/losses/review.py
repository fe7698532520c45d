"""ReviewKD: every level of the teacher is learnt from the student's own level and all deeper ones.

Lists of features go from shallow to deep. A pooled vector ``[N, C]`` counts as a map of size 1 x 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.distill.losses.shared import as_map, check_levels, constant, promote
from reparam.errors import InputError

_POOLED = (4, 2, 1)


def hcl(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Hierarchical context loss: squared differences at several sizes, summed over the levels.

    For each level ``[MSE(s, t) + sum_l w_l MSE(pool_l(s), pool_l(t))] / (1 + sum_l w_l)``, where ``pool_l`` averages to
    l x l for those l of 4, 2, 1 that are smaller than height and width, and w is 1/2, 1/4, 1/8 in the order of use.
    MSE is the mean over all elements. The teacher is detached.

    Args:
        student: maps ``[N, C, H, W]`` (or vectors ``[N, C]``), one per level.
        teacher: the same shapes.

    Raises:
        InputError: numbers of levels or shapes differ, or features are neither maps nor vectors.

    Source: Chen et al., "Distilling Knowledge via Knowledge Review" (CVPR 2021), the hierarchical context loss.
    """
    check_levels(student, teacher)
    total = torch.zeros((), dtype=promote(student[0]).dtype, device=student[0].device)
    for number, (own, other) in enumerate(zip(student, teacher, strict=True)):
        first, second = as_map(promote(own)), as_map(constant(other))
        if first.shape != second.shape:
            raise InputError(
                f"features of level {number} must have equal shapes, got {list(own.shape)} and {list(other.shape)}"
            )
        total = total + _context(first, second)
    return total


def _context(student: Tensor, teacher: Tensor) -> Tensor:
    loss = F.mse_loss(student, teacher)
    weight, weights = 1.0, 1.0
    for length in _POOLED:
        if length < min(student.shape[2:]):
            weight /= 2
            weights += weight
            pooled = F.adaptive_avg_pool2d(student, length), F.adaptive_avg_pool2d(teacher, length)
            loss = loss + weight * F.mse_loss(*pooled)
    return loss / weights


class ABF(nn.Module):
    """Attention-based fusion of one level with what comes from the deeper ones.

    ``x = BN(conv1x1(features))``; with a residual y, repeated to the size of x, ``x = z_0 x + z_1 y`` where
    ``z = sigmoid(conv1x1([x, y]))`` has two maps; x is resized (nearest pixel) and is the residual of the next level;
    the output is ``BN(conv3x3(x))``.

    Args:
        channels: of the student's features.
        mid_channels: of the residual.
        out_channels: of the teacher's features.
        fuse: whether there is a residual; the deepest level has none.

    Source: Chen et al. (CVPR 2021), the attention-based fusion; convolutions in front of a norm have no bias and start
    Kaiming-uniform (a = 1), as in the authors' code.
    """

    def __init__(self, channels: int, mid_channels: int, out_channels: int, fuse: bool) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, mid_channels, 1, bias=False)
        self.reduce_norm = nn.BatchNorm2d(mid_channels)
        self.attention = nn.Conv2d(2 * mid_channels, 2, 1) if fuse else None
        self.project = nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False)
        self.project_norm = nn.BatchNorm2d(out_channels)
        nn.init.kaiming_uniform_(self.reduce.weight, a=1)
        nn.init.kaiming_uniform_(self.project.weight, a=1)

    def forward(self, features: Tensor, residual: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Fuse one level.

        Args:
            features: ``[N, channels, H, W]``.
            residual: ``[N, mid_channels, h, w]`` of the deeper level; None exactly where the module does not fuse.
            size: height and width of the teacher's features.

        Returns:
            Output ``[N, out_channels, *size]`` and the residual ``[N, mid_channels, *size]`` for the next level.
        """
        if (residual is None) != (self.attention is None):
            raise InputError("an ABF module with fusion needs a residual, one without takes none")
        maps = self.reduce_norm(self.reduce(features.to(self.reduce.weight.dtype)))
        if self.attention is not None and residual is not None:
            deeper = _nearest(residual, maps.shape[2:])
            gates = torch.sigmoid(self.attention(torch.cat([maps, deeper], dim=1)))
            maps = maps * gates[:, :1] + deeper * gates[:, 1:]
        maps = _nearest(maps, size)
        return self.project_norm(self.project(maps)), maps


class ReviewKD(nn.Module):
    """Knowledge review: ``hcl`` between the student's levels, fused from deep to shallow, and the teacher's.

    Channels are those of the examples; sizes are those of each batch, so no model needs a table. The modules are
    trained with the student and are not part of it.

    Args:
        student: examples of the student's features, shallow to deep; only their shapes are read.
        teacher: examples of the teacher's features, equally many.
        mid_channels: of the residual; by default the channels of the student's deepest level, at most 512.

    Raises:
        InputError: numbers of levels differ, or examples are neither maps nor vectors.

    Source: Chen et al. (CVPR 2021), the residual framework.
    """

    def __init__(self, student: Sequence[Tensor], teacher: Sequence[Tensor], mid_channels: int | None = None) -> None:
        super().__init__()
        check_levels(student, teacher)
        self.student_channels = [as_map(part).shape[1] for part in student]
        self.teacher_channels = [as_map(part).shape[1] for part in teacher]
        mid = mid_channels or min(512, self.student_channels[-1])
        deepest = len(student) - 1
        self.levels = nn.ModuleList(
            ABF(own, mid, other, fuse=number < deepest)
            for number, (own, other) in enumerate(zip(self.student_channels, self.teacher_channels, strict=True))
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The loss of a batch: lists of features to a scalar; the teacher is detached.

        Raises:
            InputError: levels, numbers of images or channels are not those of the examples; in training mode also
                fewer than 2 values per channel, of which there are no statistics.
        """
        check_levels(student, teacher)
        for name, features, channels in (
            ("student", student, self.student_channels),
            ("teacher", teacher, self.teacher_channels),
        ):
            found = [as_map(part).shape[1] for part in features]
            if found != channels:
                raise InputError(f"ReviewKD was made for {name} channels {channels}, got {found}")
        return hcl(self.fuse(student, [as_map(part).shape[2:] for part in teacher]), teacher)

    def fuse(self, student: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
        """The student's features, shallow to deep, as maps of the teacher's channels and of these sizes."""
        residual: Tensor | None = None
        outputs: list[Tensor] = []
        for module, part, size in zip(reversed(self.levels), reversed(student), reversed(sizes), strict=True):
            maps = as_map(part)
            smallest = len(maps) * min(maps[0, 0].numel(), size[0] * size[1])
            if self.training and smallest < 2:
                raise InputError("batch statistics of a 1 x 1 map need at least 2 samples in training mode, got 1")
            output, residual = module(maps, residual, size)
            outputs.append(output)
        return outputs[::-1]


def _nearest(maps: Tensor, size: Sequence[int]) -> Tensor:
    height, width = size
    return maps if tuple(maps.shape[2:]) == (height, width) else F.interpolate(maps, size=(height, width))
