"""An image's tokens cut into windows: as tensors of windows, and as views of blocks of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..focused_linear.eager import block_elements

ImageSize = tuple[int, int, int]
"""(frames, height, width) of tokens in row-major order."""


class JoinArguments(NamedTuple):
    """What every way to join windows is given, see `join_windows`."""

    mixed: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    pictures: tuple[ImageSize, ...]
    size: int
    key_mask: torch.Tensor | None
    scale: float


def windows_of(tokens: torch.Tensor, pictures: Sequence[ImageSize], size: int) -> list[torch.Tensor]:
    """[B, N, ...] -> for each image [B * windows, tokens of a window, ...]; missing ones at the edges are zero."""
    rest = tokens.shape[2:]
    windows = []
    for part, picture in zip(tokens.split([math.prod(p) for p in pictures], dim=1), pictures, strict=True):
        _, height, width = picture
        (rows, columns), (down, across) = _cut(picture, size)
        x = part.reshape(-1, height, width, *rest)
        if not fits(picture, size):
            padding = (*[0] * 2 * len(rest), 0, columns * across - width, 0, rows * down - height)
            x = F.pad(x, padding)
        x = x.reshape(-1, rows, down, columns, across, *rest).transpose(2, 3)
        windows.append(x.reshape(-1, down * across, *rest))
    return windows


def from_windows(windows: Sequence[torch.Tensor], pictures: Sequence[ImageSize], size: int) -> torch.Tensor:
    """The inverse of `windows_of`."""
    parts = []
    for part, picture in zip(windows, pictures, strict=True):
        frames, height, width = picture
        (rows, columns), (down, across) = _cut(picture, size)
        rest = part.shape[2:]
        x = part.reshape(-1, rows, columns, down, across, *rest).transpose(2, 3)
        x = x.reshape(-1, rows * down, columns * across, *rest)[:, :height, :width]
        parts.append(x.reshape(-1, frames * height * width, *rest))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def window_indices(pictures: Sequence[ImageSize], size: int, device: torch.device) -> torch.Tensor:
    """[N]: which window each token is in, counted from 0."""
    count, indices = 0, []
    tokens = sum(math.prod(picture) for picture in pictures)
    for part in windows_of(torch.zeros(1, tokens, device=device), pictures, size):
        indices.append(torch.arange(count, count + len(part), device=device)[:, None].expand(part.shape))
        count += len(part)
    return from_windows(indices, pictures, size)[0]


def fits(picture: ImageSize, size: int) -> bool:
    """Whether windows fill the frames without going beyond."""
    (rows, columns), (down, across) = _cut(picture, size)
    return picture[1:] == (rows * down, columns * across)


def _cut(picture: ImageSize, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Windows down and across a frame, and tokens down and across a window."""
    _, height, width = picture
    down, across = min(size, height), min(size, width)
    return (-(-height // down), -(-width // across)), (down, across)


class Block(NamedTuple):
    """Windows of one size side by side: tokens first .. first + height * width are the frame they are cut from."""

    first: int
    height: int
    width: int
    rows: slice
    columns: slice
    down: int
    across: int

    def _view(self, x: torch.Tensor, sample: int) -> torch.Tensor:
        """[H, window rows, window columns, down, across, D], a view."""
        frame = x[sample, self.first : self.first + self.height * self.width].unflatten(0, (self.height, self.width))
        part = frame[self.rows, self.columns].unflatten(1, (-1, self.across)).unflatten(0, (-1, self.down))
        return part.permute(4, 0, 2, 1, 3, 5)

    def take(self, x: torch.Tensor, sample: int, dtype: torch.dtype) -> torch.Tensor:
        """[B, N, H, D] -> a copy of the block's tokens, [H, W, t, D]."""
        view = self._view(x, sample)
        copy = torch.empty(view.shape, dtype=dtype, device=x.device).copy_(view)
        return copy.flatten(3, 4).flatten(1, 2)

    def put(self, x: torch.Tensor, sample: int, part: torch.Tensor) -> None:
        """The inverse of `take`, into x."""
        view = self._view(x, sample)
        view.copy_(part.view(view.shape))


def blocks(pictures: Sequence[ImageSize], size: int, x: torch.Tensor) -> Iterator[Block]:
    """All windows, the smaller ones at the lower and right edges too, in blocks that fit the cache."""
    limit = max(block_elements(x) // (x.shape[2] * max(x.shape[3], size * size)), 1)
    first = 0
    for frames, height, width in pictures:
        for _ in range(frames):
            for top, bottom, down in _spans(height, size):
                for left, right, across in _spans(width, size):
                    wide = max(limit // (down * across), 1) * across
                    for column in range(left, right, wide):
                        columns = slice(column, min(column + wide, right))
                        high = max(limit // (down * (columns.stop - column)), 1) * down
                        for row in range(top, bottom, high):
                            rows = slice(row, min(row + high, bottom))
                            yield Block(first, height, width, rows, columns, down, across)
            first += height * width


def _spans(length: int, size: int) -> list[tuple[int, int, int]]:
    """(start, stop, size of a window): the whole windows of a side, then what is left."""
    whole = length // size * size
    spans = [(0, whole, size), (whole, length, length - whole)]
    return [span for span in spans if span[0] < span[1]]
