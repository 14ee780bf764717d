"""Which keys the queries of a window see: rows of a table of tokens and of cells, from the grid alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..windows import ImageSize

_BOUNDS = {"window": (1, 32), "ring": (1, 32), "far": (1, 1024), "budget": (0, 4096)}
_MOST_STAGES, _MOST_OPENED = 8, 256


@dataclass(frozen=True)
class Cells:
    """How finely a query sees, by distance and by what pooling would lose.

    Args:
        window: side of the windows, in tokens, within which keys are exact; at most 32.
        ring: side of the cells in the eight windows around, of which keys are means; divides the window.
        far: least side of the cells beyond, and of those of other frames and images; at most 1024.
        budget: at most so many far cells, over all frames and images: their side grows until they fit, so that cost
            is linear in the tokens; at most 4096. 0 for no bound: `far` it is, and cost grows with the tokens' square.
        opened: how many cells each head of each window opens (cuts into four), stage by stage: of those of the far
            side first, then of half of it, and so on, those of the ring among them; (): none. Up to 8 stages of 1 to
            256 cells. Those of which pooling loses most are opened, see `pyramid_attention`. Odd sides are not.

    A side is a divisor of the window, or the window doubled any number of times.

    Raises:
        ValueError: a number out of its range, or a side that is none of these.
    """

    window: int = 8
    ring: int = 2
    far: int = 1
    budget: int = 64
    opened: tuple[int, ...] = (24, 24)

    def __post_init__(self) -> None:
        for name, (least, most) in _BOUNDS.items():
            if not _is_whole(getattr(self, name), least, most):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r:.60}: pass a whole number, at least {least} and at most {most}."
                )
        if (
            not isinstance(self.opened, (tuple, list))
            or len(self.opened) > _MOST_STAGES
            or not all(_is_whole(number, 1, _MOST_OPENED) for number in self.opened)
        ):
            raise ValueError(
                f"opened is {self.opened!r:.60}: pass up to {_MOST_STAGES} whole numbers from 1 to {_MOST_OPENED} in a "
                "tuple, one for each stage, or ()."
            )
        object.__setattr__(self, "opened", tuple(self.opened))  # a list in JSON
        if self.window % self.ring:
            raise ValueError(f"ring is {self.ring} and the window {self.window}: pass one of its divisors.")
        side = self.window
        while side < self.far:
            side *= 2
        if side % self.far or side > max(self.window, self.far):
            raise ValueError(f"far is {self.far} and the window {self.window}: pass a divisor of it, or it doubled.")


def _is_whole(number: object, least: int, most: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and least <= number <= most


class Sides(NamedTuple):
    """The sides of cells at one size of images: of the ring; of the far cells, the largest first, then what it is
    halved into where it would reach into the ring; and of those that are opened, the largest first."""

    ring: int
    far: tuple[int, ...]
    opened: tuple[int, ...]

    def pooled(self) -> list[int]:
        """All but 1, each once, in the order of the table: those that are opened last."""
        others = {self.ring, *self.far, *(side // 2 for side in self.opened)} - {1, *self.opened}
        return [*sorted(others), *sorted(self.opened)]


def cell_sides(images: Sequence[ImageSize], cells: Cells) -> Sides:
    """See `Sides`."""
    side, longest = cells.far, max(max(height, width) for _, height, width in images)
    while cells.budget and side < longest and number_of_cells(images, [side]) > cells.budget:
        side = _next_side(side, cells.window)
    far = [side]
    while far[-1] > cells.window:
        far.append(far[-1] // 2)
    opened = [side >> stage for stage in range(len(cells.opened)) if side % (2 << stage) == 0]
    return Sides(min(cells.ring, side), tuple(far), tuple(opened))


def number_of_cells(images: Sequence[ImageSize], sides: Sequence[int]) -> int:
    """Of all frames, of all of these sides."""
    return sum(
        count * _across(height, side) * _across(width, side) for side in sides for count, height, width in images
    )


def _next_side(side: int, window: int) -> int:
    """The next larger side that a cell may have."""
    if side >= window:
        return 2 * side
    return next(larger for larger in range(side + 1, window + 1) if window % larger == 0)


def keys_per_query(images: Sequence[ImageSize], cells: Cells) -> int:
    """At most so many keys a query's softmax is over, in the window that has most; what masks leave out included."""
    layouts = [layout(tuple(images), cells, at, torch.device("cpu")) for at in range(len(images))]
    more = 3 * sum(count for count, _ in zip(cells.opened, cell_sides(images, cells).opened, strict=False))
    return min(max(int(one.number.max()) for one in layouts) + more, sum(math.prod(image) for image in images))


class Layout(NamedTuple):
    """Of the windows of one image, W = frames * windows of a frame: see `layout`.

    Attributes:
        rows: [W, K] of the table; its last row, which is no key, where a window has fewer keys than K.
        number: [W], of its keys.
        tokens: [W], of its own tokens.
        first: row of the first cell that can be opened; all from there on can, but for the last row.
        candidates: for each side of `Sides.opened`, rows [W, n] of the cells of that side among `rows`, and where in
            `rows` they are.
        quarters: [from `first` on, 4] rows of the cells of half the side in each.
    """

    rows: torch.Tensor
    number: torch.Tensor
    tokens: torch.Tensor
    first: int
    candidates: list[tuple[torch.Tensor, ...]]
    quarters: torch.Tensor


@functools.lru_cache(maxsize=32)
def layout(images: tuple[ImageSize, ...], cells: Cells, at: int, device: torch.device) -> Layout:
    """Of image number `at`. The table holds all tokens, then for each of `Sides.pooled` the cells of every frame,
    row by row, and a last row that is no key."""
    sides = cell_sides(images, cells)
    frames = [(height, width) for count, height, width in images for _ in range(count)]
    starts: dict[int, list[int]] = {}
    last = 0
    for side in [1, *sides.pooled()]:
        starts[side] = []
        for height, width in frames:
            starts[side].append(last)
            last += _across(height, side) * _across(width, side)
    top, before = sides.far[0], sum(image[0] for image in images[:at])
    found = []
    for frame in range(before, before + images[at][0]):
        levels = [(side, starts[side][frame]) for side in (1, sides.ring, *sides.far)]
        own, ring, whole, *halved = _seen_of_frame(frames[frame], levels, cells.window)
        everywhere = [
            whole if other == frame else _cells_of(height, width, top, starts[top][other]).expand(len(whole), -1)
            for other, (height, width) in enumerate(frames)
        ]
        found.append([own, ring, torch.cat(everywhere, dim=1), *halved])
    parts = [torch.cat(part) for part in zip(*found, strict=True)]
    rows, widths = torch.cat(parts, dim=1), [part.shape[1] for part in parts]
    seen = rows >= 0
    rows, number = rows.masked_fill(~seen, last), seen.sum(dim=1)
    # Fused kernels want biases aligned to 8 entries; the last one is never a key.
    length = 8 * _across(int(number.max()) + 1, 8)
    slots = (seen.cumsum(dim=1) - 1).masked_fill(~seen, length - 1)
    compact = torch.full((len(rows), length), last).scatter(1, slots, rows)
    side_of = torch.tensor([1, sides.ring, *sides.far]).repeat_interleave(torch.tensor(widths))
    candidates = [tuple(x[:, side_of == side].to(device) for x in (rows, slots)) for side in sides.opened]
    quarters = [
        _quarters(height, width, side, starts[side // 2][frame])
        for side in sorted(sides.opened)
        for frame, (height, width) in enumerate(frames)
    ]
    cut = torch.cat([*quarters, torch.full((1, 4), -1)])
    return Layout(
        compact.to(device),
        number.to(device),
        seen[:, : widths[0]].sum(dim=1).to(device),
        starts[min(sides.opened)][0] if sides.opened else last,
        candidates,
        cut.masked_fill(cut < 0, last).to(device),
    )


def _seen_of_frame(frame: tuple[int, int], levels: list[tuple[int, int]], size: int) -> list[torch.Tensor]:
    """Rows that the windows of a frame see of it, [W, n] each, -1 for none: own tokens, cells of the ring, and the far
    cells from the largest side to the smallest. `levels`: sides and first rows of these, in this order."""
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
    origin = torch.zeros_like(row)
    part, i, j = _square(frame, side, start, (origin, origin), (_across(height, side), _across(width, side)))
    parts = [own, around.masked_fill(own_cells, -1), part.masked_fill(_touches(i, j, side, row, column, size), -1)]
    for side, start in halves:
        parents = (3 * size - 1) // (2 * side) + 2
        corner = (2 * ((row - 1) * size // (2 * side)), 2 * ((column - 1) * size // (2 * side)))
        part, i, j = _square(frame, side, start, corner, (2 * parents, 2 * parents))
        seen = ~_touches(i, j, side, row, column, size) & _touches(i // 2, j // 2, 2 * side, row, column, size)
        parts.append(part.masked_fill(~seen, -1))
    return parts


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


def _quarters(height: int, width: int, side: int, first: int) -> torch.Tensor:
    """[cells, 4]: rows of the four cells of half the side in each of a frame, -1 outside of the frame."""
    down, across = _across(height, side), _across(width, side)
    row, column = torch.arange(down).repeat_interleave(across), torch.arange(across).repeat(down)
    return _square((height, width), side // 2, first, (2 * row, 2 * column), (2, 2))[0]


def _across(length: int, side: int) -> int:
    return -(-length // side)
