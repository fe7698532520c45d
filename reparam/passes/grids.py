"""What kind of map a value is, and how it becomes ``[N, C, H, W]``: channels first or last, or tokens of a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reparam.errors import InputError

_PREFIX = 16
"""Class, distillation and register tokens in front of those of the grid, at most."""

Size = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """Where the channels of a value are.

    Attributes:
        kind: ``"first"`` for ``[N, C, H, W]``, ``"last"`` for ``[N, H, W, C]``, ``"tokens"`` for ``[N, L, C]``,
            ``"tokens first"`` for ``[N, C, L]``.
        prefix: tokens in front of those of the grid.
    """

    kind: str = "first"
    prefix: int = 0

    def to_map(self, value: Tensor, image: Size) -> Tensor:
        """Return the value as ``[N, C, H, W]``; tokens lie in rows, in the aspect ratio of the image.

        Args:
            value: of this layout.
            image: height and width of the images.

        Raises:
            InputError: the tokens form no grid.
        """
        if self.kind == "first":
            return value
        if self.kind == "last":
            return value.permute(0, 3, 1, 2)
        tokens = value if self.kind == "tokens first" else value.transpose(1, 2)
        tokens = tokens[:, :, self.prefix :]
        grid = grid_of(tokens.shape[2], image)
        if grid is None:
            raise InputError(
                f"{tokens.shape[2]} tokens (behind {self.prefix} class tokens) form no grid in the aspect ratio of "
                f"images {list(image)}; train with images of the size that the model was made for"
            )
        return tokens.unflatten(2, grid)

    def from_map(self, maps: Tensor, value: Tensor) -> Tensor:
        """Return a value whose map is ``maps``; tokens in front of the grid are those of ``value``.

        Args:
            maps: ``[N, C, H, W]``, as `to_map` returned them for ``value`` or others of their size.
            value: of this layout.
        """
        if self.kind == "first":
            return maps
        if self.kind == "last":
            return maps.permute(0, 2, 3, 1)
        tokens, own = maps.flatten(2), value if self.kind == "tokens first" else value.transpose(1, 2)
        joined = torch.cat([own[:, :, : self.prefix], tokens], dim=2) if self.prefix else tokens
        return joined if self.kind == "tokens first" else joined.transpose(1, 2)

    def to_vector(self, value: Tensor) -> Tensor:
        """Return the value as ``[N, C]``: vectors as they are, the average over positions of anything else."""
        if value.dim() <= 2:
            return value
        channel = 1 if self.kind.endswith("first") else value.dim() - 1
        return value.mean([dim for dim in range(1, value.dim()) if dim != channel])


MAP = Layout()


def layout_of(
    shape: Sequence[int], image: Size, grids: Sequence[Size], channels_last: bool = False
) -> tuple[Layout, Size, int] | None:
    """Return layout, height and width, and channels of a value, or None where it is no map.

    Height and width have the aspect ratio of the image up to one pixel. Tokens belong to the grid of the last map, or
    are as many as a grid has in the aspect ratio of the image; those too many are class tokens, at most 16 of them.
    Where a shape can be read in two ways, ``channels_last`` decides.

    Args:
        shape: of the value, 3 or 4 numbers.
        image: height and width.
        grids: sizes of maps before this value, the last one first.
        channels_last: whether operators around the value say that its channels are last.
    """
    if len(shape) == 4:
        first, last = (shape[2], shape[3]), (shape[1], shape[2])
        order = [(last, Layout("last"), shape[3]), (first, MAP, shape[1])]
        size, layout, width = min(order if channels_last else order[::-1], key=lambda item: _deviation(item[0], image))
        return (layout, size, width) if _deviation(size, image) <= 1 and size[0] <= 1.25 * image[0] else None
    length, width = shape[1], shape[2]
    for grid in grids[:1]:
        if (prefix := _prefix(length, grid)) is not None:
            return Layout("tokens", prefix), grid, width
        if (prefix := _prefix(width, grid)) is not None:
            return Layout("tokens first", prefix), grid, length
    for prefix in range(_PREFIX + 1):
        square = grid_of(length - prefix, image)
        if square is not None and _prefix(length, square) is not None:
            return Layout("tokens", prefix), square, width
    return None


def grid_of(length: int, image: Size) -> Size | None:
    """Return the height and width of a grid of so many positions in the aspect ratio of the image, or None."""
    if length < 1:
        return None
    height = max(1, round(math.sqrt(length * image[0] / image[1])))
    for rows in (height, height - 1, height + 1):
        if rows > 0 and length % rows == 0 and _deviation((rows, length // rows), image) < 1:
            return rows, length // rows
    return None


def _prefix(length: int, grid: Size) -> int | None:
    area = grid[0] * grid[1]
    more = length - area
    return more if 0 <= more <= _PREFIX and more < area else None


def _deviation(size: Size, image: Size) -> float:
    """By how many pixels a size misses the aspect ratio of the image."""
    return abs(size[0] * image[1] - size[1] * image[0]) / max(image)
