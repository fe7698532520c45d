"""Gap-KD's double decoupling: the target class is learned from the teacher, the other classes from an assistant."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from reparam.distill.losses.decoupled import check_targets, decouple
from reparam.distill.losses.shared import check_logits, check_temperature, divergence


def double_decoupled(
    student: Tensor,
    teacher: Tensor,
    assistant: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    prefactor: bool = False,
) -> Tensor:
    """Double decoupling: ``alpha * TCKL + beta * NCKL``, each times ``T^2``; the mean over the batch.

    TCKL is the divergence from the teacher's to the student's binary distribution (target class, all others), NCKL the
    one from the assistant's to the student's distribution over the other classes. With the teacher as its own assistant
    and no prefactor this is exactly ``dkd``. All probabilities stay logarithms, as there. Differentiable with respect
    to all three sets of logits: detach those of frozen networks.

    | form | where | here |
    |---|---|---|
    | ``KL(other classes)`` | left side of equation 14; the released code | ``prefactor=False``, the default |
    | ``(1 - p_assistant(target)) KL(other classes)`` | right side of equation 14 | ``prefactor=True`` |
    | a temperature per epoch in both terms | the text | pass ``reparam.distill.schedules.temperature`` by epoch |
    | a constant temperature of 4 | the released code, for the student | pass 4 |

    The two sides of equation 14 contradict each other. Its left side is what the equation defines and what equation 11
    weighs, and the factor would couple the terms again, which the paper argues against: so it is left out by default.
    Equations 8 to 14 show neither temperature nor ``T^2``; the text and the code have both.

    Args:
        student: logits ``[N, C]``, ``C >= 2``.
        teacher: logits ``[N, C]``.
        assistant: logits ``[N, C]``.
        target: class indices ``[N]``, int64.
        alpha: weight of the target-class term (beta of the paper's equation 11, "alpha" of its table 4).
        beta: weight of the non-target-class term (gamma of equation 11, "beta" of table 4).
        temperature: ``T > 0``.
        prefactor: multiply the second term of every image by the assistant's probability of all other classes, at
            this temperature.

    Raises:
        InputError: shapes do not fit, ``C < 2``, a target is no class, or ``temperature`` is not positive.

    Source: Gap-KD, equations 11 to 14.
    """
    check_logits(student, teacher)
    check_logits(student, assistant)
    check_temperature(temperature)
    check_targets("double_decoupled", student, target)
    student_binary, student_others = decouple(student, target, temperature)
    teacher_binary, _ = decouple(teacher, target, temperature)
    assistant_binary, assistant_others = decouple(assistant, target, temperature)
    target_term = divergence(teacher_binary, student_binary)
    other_term = divergence(assistant_others, student_others)
    if prefactor:
        rows = F.kl_div(student_others, assistant_others, reduction="none", log_target=True).sum(dim=1)
        other_term = (assistant_binary[:, 1].exp() * rows).mean()
    return (alpha * target_term + beta * other_term) * temperature**2
