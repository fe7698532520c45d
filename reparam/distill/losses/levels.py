"""Which feature maps of two networks belong together where one has more of them than the other; embeddings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor

from reparam.errors import InputError


def match_levels(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """Pair the feature maps of two networks, from the deep end.

    All levels of the network with fewer of them are used, in their order, and the deepest is paired with the deepest.
    Of all such choices that one whose sizes differ least: the sum of ``|log(side / side)|`` over the pairs, where a
    side is ``sqrt(H W)``. Among equals, as in networks whose maps all have one size, the deeper levels. Channels do not
    count. Only shapes are read, so the choice is the same in every run and on every device.

    Args:
        student: maps ``[N, C, H, W]``, shallow to deep.
        teacher: the same of the teacher.

    Returns:
        Pairs of positions ``(in student, in teacher)``, shallow to deep.

    Raises:
        InputError: a network has no maps.
    """
    if not student or not teacher:
        raise InputError(
            f"a method that compares features needs some of both networks; got {len(student)} and {len(teacher)} maps. "
            "Use a method that compares logits, such as kd, dkd or dist"
        )
    few, many = (student, teacher) if len(student) <= len(teacher) else (teacher, student)
    last = len(many) - 1
    own, other = [_log_side(maps) for maps in few], [_log_side(maps) for maps in many]

    def cost(chosen: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        difference = sum(abs(own[k] - other[position]) for k, position in enumerate(chosen))
        return round(difference, 6), tuple(-position for position in chosen)

    chosen = min(((*rest, last) for rest in itertools.combinations(range(last), len(few) - 1)), key=cost)
    pairs = list(enumerate(chosen))
    return tuple(pairs if few is student else ((there, here) for here, there in pairs))


def pair_embeddings(student: Tensor | None, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
    """Insist on the embeddings ``[N, D]`` of both networks.

    Raises:
        InputError: one is missing or no matrix.
    """
    if student is None or teacher is None or student.ndim != 2 or teacher.ndim != 2:
        found = [None if value is None else list(value.shape) for value in (student, teacher)]
        raise InputError(
            f"the method compares what enters the classifiers, [N, D], of both networks; got {found[0]} and {found[1]}"
        )
    return student, teacher


def _log_side(maps: Tensor) -> float:
    if maps.ndim != 4 or not maps.numel():
        raise InputError(f"levels are maps [N, C, H, W], not empty; got {list(maps.shape)}")
    return 0.5 * math.log(maps.shape[2] * maps.shape[3])
