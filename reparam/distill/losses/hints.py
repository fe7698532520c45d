"""FitNet: one layer of the student has to become one layer of the teacher, seen through a connector."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from reparam.distill.losses.shared import as_map, check_floating, constant, fit_size, promote, shrink
from reparam.errors import InputError


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two features of equal shape, over all elements; the teacher is detached.

    Args:
        student: any shape.
        teacher: the same shape.

    Raises:
        InputError: shapes differ, or are empty.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets" (ICLR 2015), equation 3 as a mean without the factor
    1/2, to which the usual weight of 100 belongs.
    """
    if student.shape != teacher.shape or student.numel() == 0:
        raise InputError(
            "a hint needs features of equal shapes, not empty; "
            f"got {list(student.shape)} and {list(teacher.shape)}; use FitNet, which has a connector"
        )
    check_floating(student, teacher)
    return F.mse_loss(promote(student), constant(teacher))


class Connector(nn.Module):
    """From student features to teacher features: a 1 x 1 convolution and its norm, at the teacher's height and width.

    Larger maps are average-pooled first, which a 1 x 1 convolution does not mind, so that the norm sees what is
    compared and there is less to compute; smaller ones repeat pixels last. Vectors ``[N, C]`` are maps of size 1 x 1.

    Args:
        student_channels: channels of the student.
        teacher_channels: channels of the teacher.
        norm: False leaves the batch norm out; the convolution has a bias then.
    """

    def __init__(self, student_channels: int, teacher_channels: int, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(student_channels, teacher_channels, 1, bias=not norm)
        self.norm = nn.BatchNorm2d(teacher_channels) if norm else nn.Identity()

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Student features ``[N, C, H, W]`` or ``[N, C]`` to maps ``[N, C_teacher, *size]``."""
        maps = as_map(features)
        if maps.shape[1] != self.conv.in_channels:
            raise InputError(f"the connector takes {self.conv.in_channels} channels, got {list(features.shape)}")
        small = shrink(maps.to(self.conv.weight.dtype), size)
        return fit_size(self.norm(self.conv(small)), size)


class FitNet(nn.Module):
    """``hint`` behind a connector that is trained with the student.

    Args:
        student: example of the student's features, ``[N, C, H, W]`` or ``[N, C]``; only its shape is read.
        teacher: example of the teacher's features.
        norm: whether the connector has a batch norm.

    Raises:
        InputError: examples (or, later, features) are no maps or vectors, or numbers of images or channels differ.

    Source: Romero et al. (ICLR 2015), equation 3. The paper's regressor is a convolution just large enough to reach the
    teacher's size; a 1 x 1 convolution and pooling do for all pairs of sizes.
    """

    def __init__(self, student: Tensor, teacher: Tensor, norm: bool = True) -> None:
        super().__init__()
        self.connector = Connector(as_map(student).shape[1], as_map(teacher).shape[1], norm)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of a batch: student and teacher features to a scalar; the teacher is detached."""
        target = as_map(teacher)
        if len(student) != len(target) or target.shape[1] != self.connector.conv.out_channels:
            raise InputError(
                f"FitNet was made for {self.connector.conv.out_channels} teacher channels and equally many images; "
                f"got {list(student.shape)} and {list(teacher.shape)}"
            )
        return hint(self.connector(student, (target.shape[2], target.shape[3])), target)
