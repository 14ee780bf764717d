"""`pyramid_attention` as its formulas say it: one window after the other, in float64. The judge of the operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..windows import ImageSize
from .layout import Cells, cell_sides

Box = tuple[int, int, int, int, int]
"""(frame, top, left, height, width) of tokens; frames counted over all images."""


class _Key(NamedTuple):
    tokens: list[int]
    box: Box
    side: int  # of a cell, 1 for a token


def pyramid_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    images: Sequence[ImageSize],
    cells: Cells,
    *,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `pyramid_attention`; results in float64."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (x.double() for x in (query, key, value))
    keep = torch.ones(key.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
    frames = _frames_of(images)
    output, mass = torch.zeros_like(query), torch.full(query.shape[:3], -math.inf, dtype=torch.float64)
    for frame, (_, height, width) in enumerate(frames):
        for top in range(0, height, cells.window):
            for left in range(0, width, cells.window):
                own = _tokens(frames, (frame, top, left, cells.window, cells.window))
                seen = _seen(frames, images, cells, (frame, top, left, cells.window, cells.window))
                for sample in range(len(query)):
                    for head in range(query.shape[2]):
                        queries = query[sample, own, head]
                        parts = (key[sample, :, head], value[sample, :, head], keep[sample], scale)
                        opened = _open(queries, seen, frames, images, cells, parts)
                        answers = _softmax(queries, [one.tokens for one in opened], parts)
                        if answers is not None:
                            output[sample, own, head], mass[sample, own, head] = answers
    return output, mass


def _seen(frames: list[tuple[int, int, int]], images: Sequence[ImageSize], cells: Cells, window: Box) -> list[_Key]:
    """What a window's queries see: each key's tokens."""
    sides = cell_sides(images, cells)
    frame, top, left, size, _ = window
    ring = (frame, top - size, left - size, 3 * size, 3 * size)
    keys = [_Key([token], window, 1) for token in _tokens(frames, window)]
    for box in _grid(frames, frame, sides.ring):
        if _inside(box, ring) and not _inside(box, window):
            keys.append(_Key(_tokens(frames, box), box, sides.ring))
    waiting = [box for other in range(len(frames)) for box in _grid(frames, other, sides.far[0])]
    while waiting:
        box = waiting.pop(0)
        if not _meets(box, ring):
            keys.append(_Key(_tokens(frames, box), box, box[3]))
        elif not _inside(box, ring):
            waiting += _split(box, box[3] // 2)
    return [one for one in keys if one.tokens]


def _open(
    queries: torch.Tensor,
    seen: list[_Key],
    frames: list[tuple[int, int, int]],
    images: Sequence[ImageSize],
    cells: Cells,
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor, float],
) -> list[_Key]:
    """With the cells of which pooling loses most cut into four, stage after stage."""
    key, value, keep, _ = parts
    mean = queries.mean(dim=0, keepdim=True)

    def loss(one: _Key) -> float:
        answer = _softmax(mean, [one.tokens], parts)
        if answer is None:
            return -math.inf
        tokens = [token for token in one.tokens if keep[token]]
        spreads = [(x[tokens] - x[tokens].mean(dim=0)).square().sum(dim=-1).mean() for x in (key, value)]
        return answer[1].item() + sum(spread.clamp(min=1e-12).log().item() / 2 for spread in spreads)

    for count, side in zip(cells.opened, cell_sides(images, cells).opened, strict=False):
        chosen = sorted((one for one in seen if one.side == side), key=loss, reverse=True)[:count]
        boxes = [box for one in chosen for box in _split(one.box, side // 2)]
        cut = [_Key(_tokens(frames, box), box, side // 2) for box in boxes]
        seen = [one for one in seen if one not in chosen] + [one for one in cut if one.tokens]
    return seen


def _softmax(
    queries: torch.Tensor, keys: list[list[int]], parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Output and log-sum-exp of queries [t, D] over the means of lists of tokens; None without any key."""
    key, value, keep, scale = parts
    lists = [[token for token in tokens if keep[token]] for tokens in keys]
    lists = [tokens for tokens in lists if tokens]
    if not lists:
        return None
    means = torch.stack([key[tokens].mean(dim=0) for tokens in lists])
    counts = torch.tensor([len(tokens) for tokens in lists], dtype=torch.float64)
    scores = scale * queries @ means.T + counts.log()
    values = torch.stack([value[tokens].mean(dim=0) for tokens in lists])
    return scores.softmax(dim=-1) @ values, scores.logsumexp(dim=-1)


def _frames_of(images: Sequence[ImageSize]) -> list[tuple[int, int, int]]:
    """(first token, height, width) of every frame."""
    frames, first = [], 0
    for count, height, width in images:
        for _ in range(count):
            frames.append((first, height, width))
            first += height * width
    return frames


def _grid(frames: list[tuple[int, int, int]], frame: int, side: int) -> list[Box]:
    _, height, width = frames[frame]
    return [(frame, top, left, side, side) for top in range(0, height, side) for left in range(0, width, side)]


def _split(box: Box, side: int) -> list[Box]:
    frame, top, left, height, width = box
    return [
        (frame, row, column, side, side)
        for row in range(top, top + height, side)
        for column in range(left, left + width, side)
    ]


def _tokens(frames: list[tuple[int, int, int]], box: Box) -> list[int]:
    """Numbers of the tokens of a box, those outside of the frame left out."""
    frame, top, left, down, across = box
    first, height, width = frames[frame]
    rows, columns = range(top, min(top + down, height)), range(left, min(left + across, width))
    return [first + row * width + column for row in rows for column in columns]


def _meets(box: Box, other: Box) -> bool:
    down = box[1] < other[1] + other[3] and other[1] < box[1] + box[3]
    return box[0] == other[0] and down and box[2] < other[2] + other[4] and other[2] < box[2] + box[4]


def _inside(box: Box, other: Box) -> bool:
    down = other[1] <= box[1] and box[1] + box[3] <= other[1] + other[3]
    return box[0] == other[0] and down and other[2] <= box[2] and box[2] + box[4] <= other[2] + other[4]
