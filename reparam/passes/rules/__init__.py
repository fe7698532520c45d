"""Operator rules, one file per family. Importing this package registers all of them."""

from reparam.passes.rules import (
    broadcast,
    linear,
    matmul,
    movement,
    norm,
    pointwise,
    query,
    reduction,
    shapes,
    spatial,
)

__all__ = ["broadcast", "linear", "matmul", "movement", "norm", "pointwise", "query", "reduction", "shapes", "spatial"]
