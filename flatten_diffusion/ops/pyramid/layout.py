"""Which keys the queries of a window see: rows of a table of tokens and of cells, from the grid alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..windows import Picture


@dataclass(frozen=True)
class Cells:
    """How finely a query sees, by distance.

    Args:
        window: side of the windows, in tokens, within which keys are exact.
        ring: side of the cells in the eight windows around, of which keys are means; divides the window.
        far: least side of the cells beyond, and of those of other frames and pictures.
        budget: at most so many far cells, over all frames and pictures: their side grows until they fit, so that cost
            is linear in the tokens. 0 for no bound: `far` it is, and cost grows with the tokens' square.
        opened: how many far cells each head of each window halves (into four), then how many of those of half the side,
            and so on; (): none. Those go first of which pooling loses most, see `pyramid_attention`; a side that is odd
            is not halved.

    A side is a divisor of the window, or the window doubled any number of times.

    Raises:
        ValueError: a number out of its range, or a side that is none of these.
    """

    window: int = 8
    ring: int = 2
    far: int = 1
    budget: int = 64
    opened: tuple[int, ...] = (16, 16)

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("ring", 1), ("far", 1), ("budget", 0)):
            _check_number(name, getattr(self, name), least)
        if not isinstance(self.opened, tuple):
            raise ValueError(f"opened is {self.opened!r}: pass a tuple of whole numbers.")
        for number in self.opened:
            _check_number("opened", number, 1)
        if self.window % self.ring:
            raise ValueError(f"ring is {self.ring} and the window {self.window}: pass one of its divisors.")
        side = self.window
        while side < self.far:
            side *= 2
        if side % self.far or side > max(self.window, self.far):
            raise ValueError(f"far is {self.far} and the window {self.window}: pass a divisor of it, or it doubled.")

    def larger(self, side: int) -> int:
        """The next side a cell may have."""
        if side >= self.window:
            return 2 * side
        return next(s for s in range(side + 1, self.window + 1) if self.window % s == 0)


def _check_number(name: str, number: object, least: int) -> None:
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise ValueError(f"{name} is {number!r}: pass a whole number, at least {least}.")


class Sides(NamedTuple):
    """The sides of cells at one size of pictures: of the ring; of the far cells, the largest first, then what it is
    halved into where it would reach into the ring; and of those that are opened, the largest first."""

    ring: int
    far: tuple[int, ...]
    opened: tuple[int, ...]

    def pooled(self) -> list[int]:
        """All but 1, each once, in the order of the table: the opened ones are the last."""
        return sorted({self.ring, *self.far, *self.opened, *(side // 2 for side in self.opened)} - {1})


def cell_sides(pictures: Sequence[Picture], cells: Cells) -> Sides:
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
    opened = [side >> stage for stage in range(len(cells.opened)) if side % (2 << stage) == 0]
    return Sides(min(cells.ring, side), tuple(far), tuple(opened))


def keys_per_query(pictures: Sequence[Picture], cells: Cells) -> int:
    """How many keys a query's softmax is over, in the window that has most; those that masks leave out included."""
    layouts = [layout(tuple(pictures), cells, at, torch.device("cpu")) for at in range(len(pictures))]
    more = 3 * sum(count for count, _ in zip(cells.opened, cell_sides(pictures, cells).opened, strict=False))
    return min(max(int(one.number.max()) for one in layouts) + more, sum(math.prod(picture) for picture in pictures))


class Layout(NamedTuple):
    """Of the windows of one picture, W = frames * windows of a frame: see `layout`.

    Attributes:
        rows: [W, K] of the table; its last row, which is no key, where a window has fewer keys than K.
        number: [W], of its keys.
        tokens: [W], of its own tokens.
        first: row of the first cell that can be opened; all from there on can.
        far: for each side of `Sides.opened`, rows [W, n] of the cells of that side among `rows`, and where they are.
        children: [from `first` on, 4] rows of the cells of half the side in each.
    """

    rows: torch.Tensor
    number: torch.Tensor
    tokens: torch.Tensor
    first: int
    far: list[tuple[torch.Tensor, torch.Tensor]]
    children: torch.Tensor


@functools.lru_cache(maxsize=32)
def layout(pictures: tuple[Picture, ...], cells: Cells, at: int, device: torch.device) -> Layout:
    """Of picture number `at`. The table holds all tokens, then for each of `Sides.pooled` the cells of every frame,
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
    top, own = sides.far[0], sum(picture[0] for picture in pictures[:at])
    found = []
    for frame in range(own, own + pictures[at][0]):
        near, cells_beyond = _seen(frames[frame], [(s, starts[s][frame]) for s in (1, sides.ring, *sides.far)], size)
        others = [
            cells_beyond[0]
            if other == frame
            else _cells_of(height, width, top, starts[top][other]).expand(len(near), -1)
            for other, (height, width) in enumerate(frames)
        ]
        found.append([near, torch.cat(others, dim=1), *cells_beyond[1:]])
    parts = [torch.cat(part) for part in zip(*found, strict=True)]
    rows = torch.cat(parts, dim=1)
    seen = rows >= 0
    number = seen.sum(dim=1)
    # Fused kernels want biases aligned to 8 entries; the last one is never a key.
    length = 8 * _across(int(number.max()) + 1, 8)
    slots = (seen.cumsum(dim=1) - 1).masked_fill(~seen, length - 1)
    compact = torch.full((len(rows), length), total).scatter(1, slots, rows.masked_fill(~seen, total))
    widths = [part.shape[1] for part in parts]
    places = [
        (rows.masked_fill(~seen, total).to(device), place.to(device))
        for rows, seen, place in zip(*(x.split(widths, dim=1) for x in (rows, seen, slots)), strict=True)
    ]
    none = torch.empty((len(rows), 0), dtype=torch.long, device=device)
    far = [places[1 + stage] if 1 + stage < len(places) else (none, none) for stage in range(len(sides.opened))]
    children = [
        _children(height, width, side, starts[side // 2][frame])
        for side in sorted(sides.opened)
        for frame, (height, width) in enumerate(frames)
    ]
    halves = torch.cat([*children, torch.full((1, 4), -1)])
    tokens = seen[:, : math.prod(min(size, side) for side in frames[own])].sum(dim=1)
    return Layout(
        compact.to(device),
        number.to(device),
        tokens.to(device),
        starts[min(sides.opened)][0] if sides.opened else total,
        far,
        halves.masked_fill(halves < 0, total).to(device),
    )


def _seen(frame: tuple[int, int], levels: list[tuple[int, int]], size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Rows that the windows of a frame see of it, [W, n] each, -1 for none: own tokens and cells of the ring, and the
    far cells from the largest side to the smallest. `levels`: their sides and first rows, tokens first."""
    height, width = frame
    down, across = _across(height, size), _across(width, size)
    row, column = torch.arange(down).repeat_interleave(across), torch.arange(across).repeat(down)
    tall, wide = min(size, height), min(size, width)
    (_, first), (ring, ring_first), (side, start), *halves = levels
    own = _square(frame, 1, first, (row * tall, column * wide), (tall, wide))[0]
    ratio = size // ring
    corner = ((row - 1) * ratio, (column - 1) * ratio)
    around, i, j = _square(frame, ring, ring_first, corner, (3 * ratio, 3 * ratio))
    own_cells = (i // ratio == row[:, None]) & (j // ratio == column[:, None])
    near = torch.cat([own, around.masked_fill(own_cells, -1)], dim=1)
    origin = torch.zeros_like(row)
    part, i, j = _square(frame, side, start, (origin, origin), (_across(height, side), _across(width, side)))
    far = [part.masked_fill(_touches(i, j, side, row, column, size), -1)]
    for side, start in halves:
        parents = (3 * size - 1) // (2 * side) + 2
        corner = (2 * ((row - 1) * size // (2 * side)), 2 * ((column - 1) * size // (2 * side)))
        part, i, j = _square(frame, side, start, corner, (2 * parents, 2 * parents))
        seen = ~_touches(i, j, side, row, column, size) & _touches(i // 2, j // 2, 2 * side, row, column, size)
        far.append(part.masked_fill(~seen, -1))
    return near, far


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


def _children(height: int, width: int, side: int, first: int) -> torch.Tensor:
    """[cells, 4]: rows of the four halves of each cell of a frame, -1 outside of the frame."""
    down, across = _across(height, side), _across(width, side)
    row, column = torch.arange(down).repeat_interleave(across), torch.arange(across).repeat(down)
    return _square((height, width), side // 2, first, (2 * row, 2 * column), (2, 2))[0]


def _across(length: int, side: int) -> int:
    return -(-length // side)
