"""Partitions of a picture for softmax over few keys: windows, shifted windows, strided groups and neighbourhoods.

Each is a product of two axes. An axis lists groups of queries with the keys that the whole group reads; what a single
query of the group does not see is masked. Nothing is padded: groups at a border hold fewer tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Axis(NamedTuple):
    """Groups along one axis, and what each of their queries sees.

    Attributes:
        queries, keys: places [G, t] and [G, u], -1 where a group has none.
        offset: [G or 1, t, u], key minus query in steps of the mechanism; the index of position biases.
        seen: bool [G, t, u]; None where a query sees every key of its group.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    offset: torch.Tensor
    seen: torch.Tensor | None = None


class Pattern(NamedTuple):
    """The same spelt out for every pair of an axis, bool and int [L, L + 2 pad]: the keys begin `pad` places before
    the picture."""

    seen: torch.Tensor
    offset: torch.Tensor
    pad: int = 0


def groups(
    length: int, size: int, *, interval: int = 1, start: int = 0, margin: int = 0, device: torch.device | None = None
) -> Axis:
    """Tiles of size * interval places, the first at `start` <= 0; in each, the places that are `interval` apart are a
    group. Its queries also read the keys up to `margin` steps before and behind it."""
    tile = size * interval
    first = torch.arange(start, length, tile, device=device)[:, None] + torch.arange(interval, device=device)
    first = first.reshape(-1, 1)
    within = torch.arange(size, device=device)
    around = torch.arange(-margin, size + margin, device=device)
    queries, keys = first + interval * within, first + interval * around
    queries, keys = (x.masked_fill((x < 0) | (x >= length), -1) for x in (queries, keys))
    return Axis(queries, keys, (around - within[:, None])[None])


def groups_pattern(
    length: int,
    size: int,
    *,
    interval: int = 1,
    start: int = 0,
    margin: int = 0,
    zeros: bool = False,
    device: torch.device | None = None,
) -> Pattern:
    """As `groups`, from the pairs: a key is seen if it is of the query's tile and place in the interval, or at most
    `margin` steps beyond. With `zeros`, the places outside the picture are there."""
    tile, pad = size * interval, (size + margin) * interval if zeros else 0
    query = torch.arange(length, device=device)[:, None] - start
    key = torch.arange(-pad, length + pad, device=device) - start
    begin = query // tile * tile
    seen = (key >= begin - margin * interval) & (key < begin + tile + margin * interval)
    seen = seen & ((key - query) % interval == 0)
    return Pattern(seen, torch.div(key - query, interval, rounding_mode="floor"), pad)


def neighbourhoods(
    length: int, size: int, *, dilation: int = 1, stride: int = 1, device: torch.device | None = None
) -> Axis:
    """The `size` places around each query, of those that are a multiple of `dilation` away; moved inwards at borders,
    so that every query sees `size` keys (or all there are). With a stride, so many neighbours share their leader's.

    Queries go in tiles, whose keys overlap: they read at most four times the keys of one axis' neighbourhood.
    """
    tile = max(4, size)
    classes = torch.arange(min(dilation, length), device=device)[:, None, None]
    members = (length - classes + dilation - 1) // dilation
    most = -(-length // dilation)
    tile = min(tile, most)
    place = torch.arange(-(-most // tile), device=device)[:, None] * tile + torch.arange(tile, device=device)
    first = _first(place, members, size, stride)  # [classes, tiles, t]
    keys = first[..., :1] + torch.arange(min(tile + size + stride - 2, most), device=device)
    seen = (keys[..., None, :] >= first[..., None]) & (keys[..., None, :] < first[..., None] + size)
    seen = seen & (keys < members)[..., None, :]
    offset = (keys[..., None, :] - place[..., None]).clamp(1 - size, size - 1)
    place = place.expand(len(classes), -1, -1)
    queries = (classes + dilation * place).masked_fill(place >= members, -1)
    keys = (classes + dilation * keys).masked_fill(keys >= members, -1)
    return Axis(*(x.flatten(0, 1) for x in (queries, keys, offset, seen)))


def neighbourhoods_pattern(
    length: int, size: int, *, dilation: int = 1, stride: int = 1, device: torch.device | None = None
) -> Pattern:
    """As `neighbourhoods`, from the pairs."""
    query, key = torch.arange(length, device=device)[:, None], torch.arange(length, device=device)
    members = (length - query % dilation + dilation - 1) // dilation
    first = _first(query // dilation, members, size, stride)
    place = key // dilation
    seen = (query % dilation == key % dilation) & (place >= first) & (place < first + size)
    return Pattern(seen, (place - query // dilation).clamp(1 - size, size - 1))


def _first(place: torch.Tensor, members: torch.Tensor, size: int, stride: int) -> torch.Tensor:
    """The first key of each query's neighbourhood, both among the `members` of its class."""
    leader = torch.minimum(place // stride * stride + stride // 2, members - 1)
    return torch.minimum(leader - size // 2, members - size).clamp(min=0)


def cross(rows: torch.Tensor, columns: torch.Tensor, width: int) -> torch.Tensor:
    """Places [G, t] of rows and [F, s] of columns -> tokens [G * F, t * s] of a picture, -1 where there is none."""
    tokens = rows[:, None, :, None] * width + columns[None, :, None, :]
    absent = (rows < 0)[:, None, :, None] | (columns < 0)[None, :, None, :]
    return tokens.masked_fill(absent, -1).flatten(2).flatten(0, 1)


def cross_seen(rows: Axis, columns: Axis) -> torch.Tensor | None:
    """bool [G * F, t * s, u * r], or None where every query sees all keys of its group."""
    if rows.seen is None and columns.seen is None:
        return None
    first, second = (
        axis.seen if axis.seen is not None else axis.offset.new_ones((), dtype=torch.bool).expand(*_shape(axis))
        for axis in (rows, columns)
    )
    both = first[:, None, :, None, :, None] & second[None, :, None, :, None, :]
    return both.flatten(4).flatten(2, 3).flatten(0, 1)


def cross_bias(table: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Biases [H, G * F, t * s, u * r] from a table [H, 2 m + 1, 2 n + 1] whose middle is offset zero, and the offsets
    [G, t, u] of rows and [F, s, r] of columns."""
    rows, columns = (x + (size - 1) // 2 for x, size in zip((rows, columns), table.shape[1:], strict=True))
    bias = table[:, rows[:, None, :, None, :, None], columns[None, :, None, :, None, :]]
    return bias.flatten(5).flatten(3, 4).flatten(1, 2)


def _shape(axis: Axis) -> tuple[int, int, int]:
    return axis.queries.shape[0], axis.queries.shape[1], axis.keys.shape[1]
