"""Operator rules, one file per family. Importing this package registers all of them."""

from reparam.passes.rules import (
    assignment,
    attention,
    broadcast,
    creation,
    embedding,
    indexing,
    linear,
    matmul,
    movement,
    norm,
    pointwise,
    projection,
    query,
    recurrent,
    reduction,
    shapes,
    spatial,
)

__all__ = [
    "assignment", "attention", "broadcast", "creation", "embedding", "indexing", "linear", "matmul", "movement", "norm",
    "pointwise", "projection", "query", "recurrent", "reduction", "shapes", "spatial",
]  # fmt: skip
