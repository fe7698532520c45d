"""The losses of the distillation methods, one file per family: pure functions, and modules where they have parameters.

Every loss is a scalar tensor. Half-precision inputs are computed in float32, also under autocast; other precisions stay
as they are. Gradients stay finite for all finite logits up to the size where the loss itself overflows, and where a
direction is not defined (a constant row, two equal samples) they are zero.

Gradients reach the student, and the modules' own parameters: the teacher is a constant. Four functions leave that to
the caller and are differentiable with respect to all logits: ``kd``, ``dkd``, ``double_decoupled``,
``smoothed_cross_entropy``.

Class indices and image numbers are compared with their range on the CPU. On other devices that would make the host
wait in every step, and there torch's own index assertion ends the run.

| family | file | public names |
|---|---|---|
| soft targets | ``soft.py`` | ``kd``, ``smoothed_cross_entropy``, ``soft_loss``, ``SOFT_LOSSES`` |
| decoupled | ``decoupled.py`` | ``dkd`` |
| decoupled, with an assistant (Gap-KD) | ``gap.py`` | ``double_decoupled`` |
| standardised logits (LSKD) | ``standardised.py`` | ``standardise``, ``lskd`` |
| correlation (DIST) | ``correlation.py`` | ``dist``, ``correlation_distance`` |
| relations (RKD) | ``relations.py`` | ``rkd``, ``rkd_distance``, ``rkd_angle`` |
| attention maps (AT) | ``attention.py`` | ``attention_map``, ``attention_transfer`` |
| hints (FitNet) | ``hints.py`` | ``hint``, ``Connector``, ``FitNet`` |
| contrast (CRD) | ``contrast.py`` | ``noise_contrast``, ``CRD`` |
| review (ReviewKD) | ``review.py`` | ``hcl``, ``ABF``, ``ReviewKD`` |
| what to compare | ``levels.py`` | ``match_levels``, ``pair_embeddings`` |
"""

from reparam.distill.losses.attention import attention_map, attention_transfer
from reparam.distill.losses.contrast import CRD, noise_contrast
from reparam.distill.losses.correlation import correlation_distance, dist
from reparam.distill.losses.decoupled import dkd
from reparam.distill.losses.gap import double_decoupled
from reparam.distill.losses.hints import Connector, FitNet, hint
from reparam.distill.losses.levels import match_levels, pair_embeddings
from reparam.distill.losses.relations import rkd, rkd_angle, rkd_distance
from reparam.distill.losses.review import ABF, ReviewKD, hcl
from reparam.distill.losses.soft import SOFT_LOSSES, kd, smoothed_cross_entropy, soft_loss
from reparam.distill.losses.standardised import lskd, standardise

__all__ = [
    "ABF",
    "CRD",
    "SOFT_LOSSES",
    "Connector",
    "FitNet",
    "ReviewKD",
    "attention_map",
    "attention_transfer",
    "correlation_distance",
    "dist",
    "dkd",
    "double_decoupled",
    "hcl",
    "hint",
    "kd",
    "lskd",
    "match_levels",
    "noise_contrast",
    "pair_embeddings",
    "rkd",
    "rkd_angle",
    "rkd_distance",
    "smoothed_cross_entropy",
    "soft_loss",
    "standardise",
]
