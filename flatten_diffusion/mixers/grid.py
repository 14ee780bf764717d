"""How tokens fill an image."""

from __future__ import annotations

import math
from typing import Union

Grid = Union[tuple[int, int], tuple[int, int, int], tuple[tuple[int, int, int], ...]]  # noqa: UP007 (an alias, 3.10)
"""How tokens in row-major order fill an image: (height, width), (frames, height, width), or one such triple for each
of several images that follow one another (reference images)."""


def images_of(grid: Grid) -> list[tuple[int, int, int]]:
    """(frames, height, width) of each image of a grid."""
    if isinstance(grid[0], int):
        frames, height, width = (1, *grid) if len(grid) == 2 else grid
        return [(frames, height, width)]
    return list(grid)


def count_tokens(grid: Grid) -> int:
    """How many tokens fill the grid."""
    return sum(math.prod(picture) for picture in images_of(grid))


def describe_grid(grid: Grid) -> str:
    """As text: 4x6, 2x4x6 (frames first), or 4x6 + 3x3."""
    return " + ".join("x".join(map(str, picture[0 if picture[0] > 1 else 1 :])) for picture in images_of(grid))
