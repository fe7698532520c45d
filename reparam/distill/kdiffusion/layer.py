"""One layer of Kdiffusion with its connector."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from reparam.distill.kdiffusion.options import Options
from reparam.distill.kdiffusion.steps import chain, guided, last_prediction, mean_of, permutation
from reparam.distill.losses.hints import Connector
from reparam.distill.losses.shared import as_map, fit_size, shrink
from reparam.errors import InputError


class LayerLoss(nn.Module):
    """``middle * chain + guide * guided`` of one layer, behind a connector that is trained with the student.

    The connector is a 1 x 1 convolution with norm, or nothing where the widths are equal; then maps get the teacher's
    height and width (`reparam.distill.losses.Connector`). All heads of a batch go through it at once, so that they
    share the statistics of its norm. That makes it one affine function for all of them, and its value of the mean of
    the heads is the mean of its values.

    Args:
        student: example of a head's feature, ``[N, C, H, W]`` or ``[N, C]``; only its shape is read.
        teacher: example of the teacher's feature.
        options: the settings.
        weight: of this layer (`Options.layer_weight`), for the chain's loss.

    Raises:
        InputError: no connector joins these sizes: no maps or vectors, a vector for a map, or a map that is higher
            but narrower than the other.
    """

    def __init__(self, student: Tensor, teacher: Tensor, options: Options, weight: float = 1.0) -> None:
        super().__init__()
        check_joinable(student, teacher)
        ours, theirs = as_map(student).shape[1], as_map(teacher).shape[1]
        self.options, self.weight = options, weight
        self.numbers = options.diffusion()
        self.connector = None if ours == theirs else Connector(ours, theirs, options.connector_norm)
        self.width = ours

    def join(self, features: Sequence[Tensor], teacher: Tensor) -> Tensor:
        """The features behind the connector, ``[m, N, C, H, W]`` of the teacher's size."""
        if len(features) != self.options.features:
            raise InputError(f"expected {self.options.features} features, one per head, got {len(features)}")
        size = as_map(teacher).shape[2:]
        maps = torch.cat([shrink(as_map(feature), size) for feature in features])
        if maps.shape[1] != self.width:
            raise InputError(f"made for features of {self.width} channels, got {list(features[0].shape)}")
        joined = fit_size(maps, size) if self.connector is None else self.connector(maps, (size[0], size[1]))
        return joined.unflatten(0, (len(features), -1))

    def forward(
        self,
        features: Sequence[Tensor],
        teacher: Tensor,
        head: Callable[[Tensor], Tensor] | None = None,
        order: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            features: of the heads.
            teacher: the teacher's feature; detached.
            head: the teacher's next layer; None leaves the guided loss out.
            order: of the features; drawn if None.
            generator: of the order and of Gaussian noise.
        """
        options = self.options
        joined = self.join(features, teacher)
        if order is None:
            order = permutation(options, len(teacher), generator, teacher.device)
        loss = options.middle * self.weight * chain(joined, teacher, self.numbers, order, options, generator)
        if head is None or not options.guide:
            return loss
        estimate = mean_of(joined) if options.guide_from == "mean" else last_prediction(joined, order)
        return loss + options.guide * guided(estimate, teacher, head, options)


def check_joinable(student: Tensor, teacher: Tensor) -> None:
    """Insist on two features that a 1 x 1 convolution with pooling, or with repeated pixels, brings together.

    Raises:
        InputError: it cannot.
    """
    ours, theirs = as_map(student), as_map(teacher)
    found = f"the student's feature {list(student.shape)} and the teacher's {list(teacher.shape)}"
    if not ours.numel() or len(ours) != len(theirs):
        raise InputError(f"{found} must hold equally many images, at least one")
    if student.ndim == 2 and theirs.shape[2:].numel() > 1:
        raise InputError(
            f"{found} cannot be joined: a vector knows nothing of places; compare with the teacher's pooled feature, "
            "or put the heads on a layer in front of the pooling"
        )
    taller, wider = (theirs.shape[k] - ours.shape[k] for k in (2, 3))
    if taller * wider < 0:
        raise InputError(
            f"{found} cannot be joined: one is higher, the other wider; choose stages of equal aspect ratio"
        )


__all__ = ["LayerLoss", "check_joinable"]
