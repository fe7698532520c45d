"""Training methods, one file each: GPD, and the losses against a static teacher."""

from reparam.distill.methods import at, crd, dist, dkd, fitnet, gpd, kd, lskd, reviewkd, rkd
from reparam.distill.methods.base import (
    Batch,
    Distiller,
    Outputs,
    Weights,
    distiller,
    distillers,
    get_distiller,
    weights_of,
)

__all__ = [
    "Batch",
    "Distiller",
    "Outputs",
    "Weights",
    "at",
    "crd",
    "dist",
    "distiller",
    "distillers",
    "dkd",
    "fitnet",
    "get_distiller",
    "gpd",
    "kd",
    "lskd",
    "reviewkd",
    "rkd",
    "weights_of",
]
