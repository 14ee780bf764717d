"""Fewer tokens than the image has: means of groups, spread back to their members."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..base import Context
from ..grid import images_of


def one_image(context: Context, tokens: int, mixer: str) -> tuple[int, int]:
    """(height, width) of a call's only image. Raises ValueError, naming the mixer, unless its tokens fill it."""
    pictures = [] if context.grid is None else images_of(context.grid)
    if len(pictures) != 1 or pictures[0][0] != 1:
        raise ValueError(f"{mixer} needs the grid of one image, not {context.grid}.")
    _, height, width = pictures[0]
    if height * width != tokens:
        raise ValueError(f"A grid of {height}x{width} does not hold {tokens} tokens.")
    return height, width


def at_least_float(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are taken in."""
    return torch.promote_types(dtype, torch.float32)


def without_masked(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Tokens [B, N, ...] with zeros where the mask [B, N] is False, whatever is there."""
    return tokens if mask is None else tokens.masked_fill(~mask.reshape(*mask.shape, *[1] * (tokens.ndim - 2)), 0.0)


def group_means(tokens: torch.Tensor, group: torch.Tensor, groups: int, mask: torch.Tensor | None) -> torch.Tensor:
    """[B, groups, H, D], the means of tokens [B, N, H, D] over those of each group that the mask leaves; zeros where it
    leaves none. group: int64 [B, N], mask: bool [B, N] or None for all."""
    dtype = at_least_float(tokens.dtype)
    counts = group_counts(group, groups, mask, dtype).clamp(min=1.0)
    sums = tokens.new_zeros(len(tokens), groups, *tokens.shape[2:], dtype=dtype)
    index = group[..., None, None].expand_as(tokens)
    sums = sums.scatter_add(1, index, without_masked(tokens, mask).to(dtype))
    return (sums / counts[..., None, None]).to(tokens.dtype)


def group_counts(group: torch.Tensor, groups: int, mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """[B, groups]: how many members the mask leaves each."""
    ones = torch.ones(group.shape, dtype=dtype, device=group.device) if mask is None else mask.to(dtype)
    return ones.new_zeros(len(group), groups).scatter_add(1, group, ones)


def to_members(tokens: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """[B, N, H, D]: to every member what its group of tokens [B, groups, H, D] has."""
    return tokens.gather(1, group[..., None, None].expand(-1, -1, *tokens.shape[2:]))


def cells_of(tokens: torch.Tensor, grid: tuple[int, int], cell: tuple[int, int]) -> torch.Tensor:
    """[B, N, ...] -> [B, cells, rows columns, ...] for cells of (rows, columns), both row by row; zeros (False) where a
    cell at the right or the bottom reaches beyond the grid."""
    rows, columns = cell
    image = tokens.reshape(*tokens.shape[:2], -1).unflatten(1, grid)
    image = F.pad(image, (0, 0, 0, -grid[1] % columns, 0, -grid[0] % rows))
    image = image.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).transpose(2, 3)
    cells = image.flatten(3, 4).flatten(1, 2)
    return cells.reshape(*cells.shape[:3], *tokens.shape[2:])


def tokens_of(cells: torch.Tensor, grid: tuple[int, int], cell: tuple[int, int]) -> torch.Tensor:
    """The inverse of `cells_of`."""
    (rows, columns), rest = cell, cells.shape[3:]
    image = cells.unflatten(2, (rows, columns)).unflatten(1, (-(-grid[0] // rows), -(-grid[1] // columns)))
    image = image.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, : grid[0], : grid[1]]
    return image.reshape(len(cells), grid[0] * grid[1], *rest)
