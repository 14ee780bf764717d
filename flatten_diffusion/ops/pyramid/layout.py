"""Which keys the queries of a window see: rows of a table of tokens and of cells, from the grid alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..windows import ImageSize


@dataclass(frozen=True)
class Cells:
    """How finely a query sees, by distance.

    Args:
        window: side of the windows, in tokens, within which keys are exact.
        ring: side of the cells in the eight windows around, of which keys are means; divides the window.
        far: least side of the cells beyond, and of those of other frames and images.
        budget: at most so many far cells, over all frames and images: their side grows until they fit, so that cost
            is linear in the tokens. 0 for no bound: `far` it is, and cost grows with the tokens' square.
        opened: how many far cells of the largest mass under a window's mean query are read more finely, per head.
        opened_cell: side of the cells they are read as; 1 for token by token.

    A side is a divisor of the window, or the window doubled any number of times.

    Raises:
        ValueError: a number out of its range, or a side that is none of these.
    """

    window: int = 8
    ring: int = 2
    far: int = 1
    budget: int = 256
    opened: int = 0
    opened_cell: int = 1

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("ring", 1), ("far", 1), ("budget", 0), ("opened", 0), ("opened_cell", 1)):
            number = getattr(self, name)
            if not isinstance(number, int) or isinstance(number, bool) or number < least:
                raise ValueError(f"{name} is {number!r}: pass a whole number, at least {least}.")
        if self.window % self.ring:
            raise ValueError(f"ring is {self.ring} and the window {self.window}: pass one of its divisors.")
        for name in ("far", "opened_cell"):
            cell, side = getattr(self, name), self.window
            while side < cell:
                side *= 2
            if side % cell or side > max(self.window, cell):
                raise ValueError(f"{name} is {cell} and the window {self.window}: pass a divisor of it, or it doubled.")

    def larger(self, side: int) -> int:
        """The next side a cell may have."""
        if side >= self.window:
            return 2 * side
        return next(s for s in range(side + 1, self.window + 1) if self.window % s == 0)


class Sides(NamedTuple):
    """The sides of cells at one size of images: of the ring, of the far cells (the largest first, then what it is
    halved into where it would reach into the ring), and of what opened cells are read as (None: none are)."""

    ring: int
    far: tuple[int, ...]
    opened: int | None

    def pooled(self) -> list[int]:
        """All but 1, each once, in the order of the table."""
        return sorted({self.ring, *self.far, self.opened or 1} - {1})


def cell_sides(pictures: Sequence[ImageSize], cells: Cells) -> Sides:
    """See `Sides`."""
    side, longest = cells.far, max(max(picture[1:]) for picture in pictures)
    while (
        cells.budget
        and side < longest
        and sum(f * _across(h, side) * _across(w, side) for f, h, w in pictures) > (cells.budget)
    ):
        side = cells.larger(side)
    far = [side]
    while far[-1] > cells.window:
        far.append(far[-1] // 2)
    opened = max(small for small in range(1, cells.opened_cell + 1) if side % small == 0)
    return Sides(min(cells.ring, side), tuple(far), opened if cells.opened and opened < side else None)


def keys_per_query(pictures: Sequence[ImageSize], cells: Cells) -> int:
    """How many keys a query's softmax is over, in the window that has most; those that masks leave out included."""
    layouts = [layout(tuple(pictures), cells, at, torch.device("cpu")) for at in range(len(pictures))]
    children = layouts[0].children
    more = 0 if children is None else min(cells.opened, len(children)) * (children.shape[1] - 1)
    return max(int(one.number.max()) for one in layouts) + more


class Layout(NamedTuple):
    """Of the windows of one image, W = frames * windows of a frame: see `layout`.

    Attributes:
        rows: [W, K] of the table; its last row, which is no key, where a window has fewer keys than K.
        number: [W], of its keys.
        tokens: [W], of its own tokens.
        first: row of the first cell of the largest side; the F cells of it, of every frame, follow one another.
        far: bool [W, F], which of these the window sees.
        slots: [W, F], where in `rows` it sees them.
        children: [F, m] rows of what each is opened into, None where nothing is opened.
    """

    rows: torch.Tensor
    number: torch.Tensor
    tokens: torch.Tensor
    first: int
    far: torch.Tensor
    slots: torch.Tensor
    children: torch.Tensor | None


@functools.lru_cache(maxsize=32)
def layout(pictures: tuple[ImageSize, ...], cells: Cells, at: int, device: torch.device) -> Layout:
    """Of image number `at`. The table holds all tokens, then for each of `Sides.pooled` the cells of every frame,
    row by row, and a last row that is no key."""
    sides, size = cell_sides(pictures, cells), cells.window
    frames = [(height, width) for count, height, width in pictures for _ in range(count)]
    starts: dict[int, list[int]] = {}
    total = 0
    for side in [1, *sides.pooled()]:
        starts[side] = []
        for height, width in frames:
            starts[side].append(total)
            total += _across(height, side) * _across(width, side)
    top = sides.far[0]
    own = sum(picture[0] for picture in pictures[:at])
    parts = []
    for frame in range(own, own + pictures[at][0]):
        *near, far = _near(frames[frame], [(s, starts[s][frame]) for s in (1, sides.ring, *sides.far)], size)
        others = [
            far if other == frame else _cells_of(height, width, top, starts[top][other]).expand(len(far), -1)
            for other, (height, width) in enumerate(frames)
        ]
        parts.append(torch.cat([*near, *others], dim=1))
    rows = torch.cat(parts)
    seen, far_count = rows >= 0, sum(_across(h, top) * _across(w, top) for h, w in frames)
    slots, number = seen.cumsum(dim=1) - 1, seen.sum(dim=1)
    # Fused kernels want biases aligned to 8 entries.
    compact = torch.full((len(rows), 8 * _across(int(number.max()), 8)), total)
    compact[torch.arange(len(rows))[:, None].expand_as(rows)[seen], slots[seen]] = rows[seen]
    children = None
    if sides.opened is not None:
        start, ratio = starts[sides.opened], top // sides.opened
        parts = [_children(h, w, top, sides.opened, ratio, first) for (h, w), first in zip(frames, start, strict=True)]
        children = torch.cat(parts)
        children = children.masked_fill(children < 0, total).to(device)
    tokens = seen[:, : math.prod(min(cells.window, side) for side in frames[own])].sum(dim=1)
    tensors = (compact, number, tokens, seen[:, -far_count:], slots[:, -far_count:])
    compact, number, tokens, far, slots = (x.to(device) for x in tensors)
    return Layout(compact, number, tokens, starts[top][0], far, slots, children)


def _near(frame: tuple[int, int], levels: list[tuple[int, int]], size: int) -> list[torch.Tensor]:
    """Rows that the windows of a frame see of it, [W, n] each, -1 for none: own tokens, cells of the ring, the far
    ones from the smallest to the largest side. `levels`: their sides and first rows, tokens first."""
    height, width = frame
    down, across = _across(height, size), _across(width, size)
    row, column = torch.arange(down).repeat_interleave(across), torch.arange(across).repeat(down)
    tall, wide = min(size, height), min(size, width)
    (_, first), (ring, ring_first), *far = levels
    own = _square(frame, 1, first, (row * tall, column * wide), (tall, wide))[0]
    ratio = size // ring
    corner = ((row - 1) * ratio, (column - 1) * ratio)
    around, i, j = _square(frame, ring, ring_first, corner, (3 * ratio, 3 * ratio))
    own_cells = (i // ratio == row[:, None]) & (j // ratio == column[:, None])
    found = [own, around.masked_fill(own_cells, -1)]
    for side, start in far[:0:-1]:
        parents = (3 * size - 1) // (2 * side) + 2
        corner = (2 * ((row - 1) * size // (2 * side)), 2 * ((column - 1) * size // (2 * side)))
        part, i, j = _square(frame, side, start, corner, (2 * parents, 2 * parents))
        seen = ~_touches(i, j, side, row, column, size) & _touches(i // 2, j // 2, 2 * side, row, column, size)
        found.append(part.masked_fill(~seen, -1))
    side, start = far[0]
    origin = torch.zeros_like(row)
    part, i, j = _square(frame, side, start, (origin, origin), (_across(height, side), _across(width, side)))
    return [*found, part.masked_fill(_touches(i, j, side, row, column, size), -1)]


def _square(
    frame: tuple[int, int], side: int, first: int, corner: tuple[torch.Tensor, torch.Tensor], shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of the cells in a rectangle of `shape` from each corner [W] on, [W, n], -1 outside of the frame; and their
    places down and across."""
    high, wide = (_across(length, side) for length in frame)
    i = (corner[0][:, None] + torch.arange(shape[0])).repeat_interleave(shape[1], dim=1)
    j = (corner[1][:, None] + torch.arange(shape[1])).repeat(1, shape[0])
    inside = (i >= 0) & (i < high) & (j >= 0) & (j < wide)
    return (first + i * wide + j).masked_fill(~inside, -1), i, j


def _touches(
    i: torch.Tensor, j: torch.Tensor, side: int, row: torch.Tensor, column: torch.Tensor, size: int
) -> torch.Tensor:
    """Whether cells reach into the window at (row, column) or the eight around it."""
    down = (i * side < (row[:, None] + 2) * size) & ((i + 1) * side > (row[:, None] - 1) * size)
    return down & (j * side < (column[:, None] + 2) * size) & ((j + 1) * side > (column[:, None] - 1) * size)


def _cells_of(height: int, width: int, side: int, first: int) -> torch.Tensor:
    """[1, cells]: rows of all cells of a frame."""
    return torch.arange(first, first + _across(height, side) * _across(width, side))[None]


def _children(height: int, width: int, side: int, small: int, ratio: int, first: int) -> torch.Tensor:
    """[cells, ratio ** 2]: rows of the small cells in each cell of a frame, -1 outside of the frame."""
    down, across = _across(height, side), _across(width, side)
    row, column = torch.arange(down).repeat_interleave(across), torch.arange(across).repeat(down)
    return _square((height, width), small, first, (row * ratio, column * ratio), (ratio, ratio))[0]


def _across(length: int, side: int) -> int:
    return -(-length // side)
