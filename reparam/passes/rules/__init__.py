"""Operator rules, one file per family. Importing this package registers all of them."""

from reparam.passes.rules import (
    broadcast,
    creation,
    indexing,
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

__all__ = [
    "broadcast", "creation", "indexing", "linear", "matmul", "movement", "norm", "pointwise", "query", "reduction",
    "shapes", "spatial",
]  # fmt: skip
