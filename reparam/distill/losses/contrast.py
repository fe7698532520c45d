"""CRD: the embeddings of an image in both networks have to be told from those of other images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from reparam.distill.losses.shared import (
    check_floating,
    check_indices,
    check_samples,
    check_temperature,
    constant,
    full_precision,
    promote,
    unit,
)
from reparam.errors import InputError


def noise_contrast(
    positive: Tensor, negative: Tensor, images: int, log_normaliser: Tensor | float = 0.0, temperature: float = 0.07
) -> Tensor:
    """Noise-contrastive loss: ``mean_batch [-log h(positive) - sum_k log(1 - h(negative_k))]``.

    ``h(u) = P / (P + K / M)`` with ``P = exp(u / T) / Z``, where K is the number of negatives of an image and M that of
    all images. Everything stays a logarithm. Differentiable with respect to both similarities.

    Args:
        positive: similarities (inner products of unit vectors) ``[N]`` of what belongs together.
        negative: similarities ``[N, K]`` of what does not.
        images: M, the number of images negatives are drawn from.
        log_normaliser: ``log Z``; 0 is the paper's formula.
        temperature: ``T > 0``.

    Raises:
        InputError: shapes do not fit or are empty, ``images`` or ``temperature`` is not positive.

    Source: Tian, Krishnan, Isola, "Contrastive Representation Distillation" (ICLR 2020), section 3: objective and form
    of h. Z is the constant of the memory bank that the authors' code adds after Wu et al. (CVPR 2018).
    """
    if positive.ndim != 1 or negative.shape[:1] != positive.shape or negative.ndim != 2 or negative.numel() == 0:
        raise InputError(
            "similarities must be [N] for the positives and [N, K] for the negatives, not empty; "
            f"got {list(positive.shape)} and {list(negative.shape)}"
        )
    check_floating(positive, negative)
    check_temperature(temperature)
    check_samples(images, 1, "contrast needs")
    offset = log_normaliser + math.log(negative.shape[1] / images)
    right = F.logsigmoid(promote(positive) / temperature - offset)
    wrong = F.logsigmoid(offset - promote(negative) / temperature).sum(1)
    return -(right + wrong).mean()


class CRD(nn.Module):
    """Contrastive distillation with a memory of all training images.

    Two linear layers embed the penultimate features of both networks as unit vectors. For each network the module
    remembers one vector per training image. A batch is compared crosswise: the student's vectors with what is
    remembered of the teacher, and the teacher's with what is remembered of the student, the image's own entry being
    right and K others, drawn anew for each image, being wrong. Afterwards the entries of the batch move towards the
    batch. The normaliser Z of each side is estimated in the first training batch and stays.

    The embeddings learn (give the module's parameters to the optimizer), the teacher's features do not. Memory and Z
    are buffers, part of the state_dict. Only training mode changes them. Of several processes (``torch.distributed`` is
    initialised) all hold the same memory: that of process 0 at first, and each step renews it with the batches of all.
    Negatives are drawn by each process for its own images.

    Args:
        student: example of the student's features ``[N, D]``; only its shape is read.
        teacher: example of the teacher's features.
        images: M, the number of training images.
        labels: the class of every training image, ``[M]``: negatives are then drawn from other classes, as in the
            paper's experiments. Without them, from all other images.
        negatives: K.
        width: of the embedding.
        temperature: ``T > 0``.
        momentum: share of an entry that stays when it is renewed, in [0, 1).

    Raises:
        InputError: examples are not ``[N, D]``, ``labels`` does not fit or has one class only, or a number is out of
            range.

    Source: Tian, Krishnan, Isola (ICLR 2020), section 3; Z, T = 0.07, momentum 0.5 and K = 16384 of the authors' code.
    """

    estimate: Tensor
    student_memory: Tensor
    teacher_memory: Tensor
    order: Tensor
    start: Tensor
    size: Tensor

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        images: int,
        labels: Tensor | None = None,
        negatives: int = 16384,
        width: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ) -> None:
        super().__init__()
        if student.ndim != 2 or teacher.ndim != 2:
            raise InputError(f"CRD needs features [N, D], got {list(student.shape)} and {list(teacher.shape)}")
        check_temperature(temperature)
        check_samples(images, 2, "a memory needs")
        if negatives < 1 or width < 1:
            raise InputError(f"CRD needs positive numbers of negatives and of channels, got {negatives} and {width}")
        if not 0 <= momentum < 1:
            raise InputError(f"momentum must lie in [0, 1), got {momentum}")
        self.images, self.negatives, self.temperature, self.momentum = images, negatives, temperature, momentum
        self.student_embedding = nn.Linear(student.shape[1], width)
        self.teacher_embedding = nn.Linear(teacher.shape[1], width)
        self.register_buffer("student_memory", F.normalize(torch.randn(images, width)))
        self.register_buffer("teacher_memory", F.normalize(torch.randn(images, width)))
        self.register_buffer("estimate", torch.full((2,), math.inf))
        self._shared = False
        self.register_load_state_dict_post_hook(_share_again)
        for name, table in zip(("order", "start", "size"), _classes(images, labels), strict=True):
            self.register_buffer(name, table, persistent=False)

    def forward(self, student: Tensor, teacher: Tensor, indices: Tensor, negatives: Tensor | None = None) -> Tensor:
        """The loss of a batch, the sum of both directions; in training mode the memory is renewed.

        Args:
            student: features ``[N, D]``.
            teacher: features ``[N, D']``; detached.
            indices: numbers ``[N]`` of the images in the training set, int64. Of an image that is there twice the
                last embedding counts in the memory.
            negatives: numbers ``[N, K']`` of the images to compare with; drawn if left out.

        Raises:
            InputError: shapes do not fit or an image number is out of range.
        """
        self._check(student, teacher, indices, negatives)
        if self.training:
            self._share()
        own = self._embed(self.student_embedding, student)
        other = self._embed(self.teacher_embedding, constant(teacher))
        if negatives is None:
            negatives = self.draw(indices)
        rows = torch.cat([indices[:, None], negatives], dim=1)
        loss = self._direction(own, self.teacher_memory, rows, 0) + self._direction(other, self.student_memory, rows, 1)
        if self.training:
            self._shared = True
            everyone = _gathered(indices)
            self._remember(self.student_memory, everyone, _gathered(own.detach()))
            self._remember(self.teacher_memory, everyone, _gathered(other.detach()))
        return loss

    def draw(self, indices: Tensor) -> Tensor:
        """Draw images ``[N, K]`` of other classes (without labels: other images), uniformly and with replacement."""
        start, size = self.start[indices, None], self.size[indices, None]
        ranks = torch.randint(2**62, (len(indices), self.negatives), device=indices.device) % (self.images - size)
        return self.order[torch.where(ranks < start, ranks, ranks + size)]

    def _check(self, student: Tensor, teacher: Tensor, indices: Tensor, negatives: Tensor | None) -> None:
        count = len(student)
        wanted = [count, self.student_embedding.in_features], [count, self.teacher_embedding.in_features]
        if (list(student.shape), list(teacher.shape)) != wanted or list(indices.shape) != [count] or count == 0:
            raise InputError(
                f"CRD was made for features [N, {wanted[0][1]}] and [N, {wanted[1][1]}] with image numbers [N]; "
                f"got {list(student.shape)}, {list(teacher.shape)} and {list(indices.shape)}"
            )
        check_floating(student, teacher)
        check_indices(indices, self.images, "image numbers")
        if negatives is not None:
            if negatives.ndim != 2 or len(negatives) != count or negatives.shape[1] == 0:
                raise InputError(f"negatives must be [N, K] with N = {count} and K >= 1, got {list(negatives.shape)}")
            check_indices(negatives, self.images, "negatives")

    def _embed(self, layer: nn.Linear, features: Tensor) -> Tensor:
        return unit(promote(layer(features.to(layer.weight.dtype))))

    def _direction(self, anchors: Tensor, memory: Tensor, rows: Tensor, side: int) -> Tensor:
        """Compare anchors ``[N, width]`` with remembered vectors; the first column of ``rows`` is the right one."""
        with full_precision(anchors):
            remembered = promote(memory[rows.flatten()].view(*rows.shape, -1))
            similarity = torch.bmm(remembered, anchors[:, :, None])[:, :, 0]
        scores = similarity.detach() / self.temperature
        found = scores.flatten().logsumexp(0) + math.log(self.images / rows.numel())
        if self.training and _processes() > 1 and not self._shared:
            found = _gathered(found[None]).logsumexp(0) - math.log(_processes())
        log_normaliser = torch.where(self.estimate[side].isinf(), found, promote(self.estimate[side]))
        if self.training:
            self.estimate[side] = log_normaliser
        return noise_contrast(similarity[:, 0], similarity[:, 1:], self.images, log_normaliser, self.temperature)

    @torch.no_grad()
    def _share(self) -> None:
        """Give all processes the memory of the first one, once; the host must not look at values in every step."""
        if _processes() > 1 and not self._shared:
            for buffer in (self.student_memory, self.teacher_memory, self.estimate):
                distributed.broadcast(buffer, 0)

    @torch.no_grad()
    def _remember(self, memory: Tensor, indices: Tensor, vectors: Tensor) -> None:
        # Of an image that is there twice all writes are that of its last place: in any order they do the same.
        places = torch.arange(len(indices), device=indices.device)
        last = torch.where(indices[:, None] == indices, places, -1).amax(1)
        renewed = self.momentum * promote(memory[indices]) + (1 - self.momentum) * promote(vectors)[last]
        memory[indices] = unit(renewed).to(memory.dtype)


def _share_again(loss: CRD, _keys: object) -> None:
    """Behind a roll-back all processes have to agree on memory and normalisers once more."""
    loss._shared = False


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _gathered(tensor: Tensor) -> Tensor:
    """Join the tensors of all processes along the first dimension, whose lengths may differ."""
    count = _processes()
    if count == 1:
        return tensor
    length = torch.tensor([len(tensor)], device=tensor.device)
    lengths = [torch.empty_like(length) for _ in range(count)]
    distributed.all_gather(lengths, length)
    sizes = [int(size) for size in lengths]
    padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in range(count)]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _classes(images: int, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Images sorted by class; for each image where its class begins in that order, and how large it is."""
    if labels is None:
        numbers = torch.arange(images)
        return numbers, numbers.clone(), torch.ones_like(numbers)
    if list(labels.shape) != [images] or labels.is_floating_point():
        found = f"{labels.dtype} {list(labels.shape)}"
        raise InputError(f"labels must be one class index per image, [{images}]; got {found}")
    _, member, counts = labels.cpu().unique(return_inverse=True, return_counts=True)
    if len(counts) < 2:
        raise InputError("all images are of one class: there is no other class to draw negatives from")
    return member.argsort(stable=True), (counts.cumsum(0) - counts)[member], counts[member]
