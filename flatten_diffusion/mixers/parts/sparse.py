"""Softmax over the keys of a partition: gathered group by group, never as a matrix over all pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...ops import call_dtype
from ...ops.focused_linear.reference import compute_dtype
from ..base import Context, LayerShape, Mixed, Mixer
from ..grid import images_of
from .partition import Axis, Pattern, cross, cross_bias, cross_seen

NO_MASS = -1e3
"""The log of the partition of a query that sees no key: next to nothing, and finite in float16 behind any scale."""
_BLOCK = 1 << 24
"""At most so many scores are held at once where no gradient is asked for."""


def pair(name: str, value: Any, least: int, most: int) -> tuple[int, int]:
    """A setting for rows and columns, from one whole number or two. Raises ValueError out of range."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(values) != 2 or any(isinstance(x, bool) or not isinstance(x, int) or not least <= x <= most for x in values):
        raise ValueError(f"{name} is {value!r:.60}: pass a whole number from {least} to {most}, or two.")
    return values


def whole(name: str, value: Any, least: int, most: int) -> None:
    """Raises ValueError unless a setting is a whole number in a range."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} is {value!r:.60}: pass a whole number from {least} to {most}.")


def picture_of(context: Context, query: torch.Tensor) -> tuple[int, int, int]:
    """(frames, height, width) of the one image. Raises ValueError for several, or when it does not hold the tokens."""
    pictures = [] if context.grid is None else images_of(context.grid)
    if len(pictures) != 1:
        raise ValueError(f"Local attention needs the grid of one image, not {context.grid}.")
    frames, height, width = pictures[0]
    if frames * height * width != query.shape[1]:
        raise ValueError(f"A grid of {frames}x{height}x{width} does not hold {query.shape[1]} tokens.")
    return frames, height, width


def softmax_in_groups(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keep: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax of scores [..., t, u] where `keep`, and the log of its partition [..., t].

    query [..., t, D] is scaled, key and value are [..., u, D]; keep bool and bias broadcast to the scores. A query
    without any key gives zeros and `NO_MASS`.
    """
    scores = query @ key.transpose(-1, -2)
    scores = (scores if bias is None else scores + bias).masked_fill(~keep, -torch.inf)
    peak = scores.detach().amax(dim=-1, keepdim=True)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    weights = (scores - peak).exp()
    mass = weights.sum(dim=-1, keepdim=True)
    empty = mass == 0
    mass = mass.masked_fill(empty, 1.0)
    return (weights @ value) / mass, (mass.log() + peak).masked_fill(empty, NO_MASS)[..., 0]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context: Context,
    axes: tuple[Axis, Axis],
    *,
    scale: float,
    table: torch.Tensor | None = None,
    zeros: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax over the keys that each query sees, in every frame: [B, N, H, D], and its log partition [B, N, H].

    query, key, value: [B, N, H, D]. table: [H, 2 m + 1, 2 n + 1], biases by offset. zeros: the places of a group
    outside the picture count as keys and values of zeros.
    """
    batch, tokens, heads, _ = query.shape
    frames, height, width = picture_of(context, query)
    mask, dtype = context.key_mask, compute_dtype(query.dtype)
    if mask is not None:  # whatever a masked slot holds, NaN included, is never read
        key, value = (x.masked_fill(~mask[:, :, None, None], 0.0) for x in (key, value))
    rows, columns = axes
    queries, keys = cross(rows.queries, columns.queries, width), cross(rows.keys, columns.keys, width)
    seen = cross_seen(rows, columns)
    bias = None if table is None else cross_bias(table.to(dtype), rows.offset, columns.offset)
    if frames > 1:  # each group reads its places in every frame
        queries, keys = (_over_frames(x, frames, height * width) for x in (queries, keys))
        seen = None if seen is None else seen.repeat(1, frames, frames)
        bias = None if bias is None else bias.repeat(1, 1, frames, frames)
    present = keys >= 0
    outputs, masses = [], []
    for part in _blocks(len(queries), batch * heads * queries.shape[1] * keys.shape[1]):
        taken, given = queries[part].clamp(min=0), keys[part].clamp(min=0)
        q, k, v = (
            x[:, index].to(dtype).permute(0, 3, 1, 2, 4) for x, index in ((query, taken), (key, given), (value, given))
        )
        keep = present[part][None, None, :, None]
        if zeros:
            k, v = (x * keep.transpose(-1, -2) for x in (k, v))
        if mask is not None:
            keep = keep & mask[:, None, given][..., None, :]
        if zeros:
            keep = keep | ~present[part][None, None, :, None]
        if seen is not None:
            keep = keep & seen[part][None, None]
        added = None if bias is None else bias if bias.shape[1] == 1 else bias[:, part]
        out, mass = softmax_in_groups(q * scale, k, v, keep, added)
        outputs.append(out)
        masses.append(mass)
    output, mass = torch.cat(outputs, dim=2), torch.cat(masses, dim=2)
    return ungroup(output, queries, tokens).to(query.dtype), ungroup(mass, queries, tokens)


def ungroup(grouped: torch.Tensor, queries: torch.Tensor, tokens: int) -> torch.Tensor:
    """[B, H, G, t, ...] of groups of queries [G, t] -> [B, N, H, ...]: every token is the query of one group."""
    place = torch.arange(queries.numel(), device=queries.device)
    slots = torch.where(queries < 0, tokens, queries).flatten()
    place = torch.zeros(tokens + 1, dtype=torch.long, device=queries.device).scatter(0, slots, place)[:tokens]
    return grouped.flatten(2, 3)[:, :, place].transpose(1, 2)


def attend_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context: Context,
    patterns: tuple[Pattern, Pattern],
    *,
    scale: float,
    table: torch.Tensor | None = None,
    zeros: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attend`, with the scores of all pairs and a mask."""
    frames, height, width = picture_of(context, query)
    rows, columns = patterns
    size = (height + 2 * rows.pad, width + 2 * columns.pad)
    around = (0, 0, 0, 0, columns.pad, columns.pad, rows.pad, rows.pad)
    mask = key.new_ones(key.shape[:2], dtype=torch.bool) if context.key_mask is None else context.key_mask
    key, value = (x.masked_fill(~mask[:, :, None, None], 0.0) for x in (key, value))
    key, value = (
        nn.functional.pad(x.unflatten(1, (frames, height, width)), around).flatten(1, 3) for x in (key, value)
    )
    kept = nn.functional.pad(mask.unflatten(1, (frames, height, width)), around[4:], value=zeros).flatten(1)
    seen = rows.seen[:, None, :, None] & columns.seen[None, :, None, :]
    seen = seen.reshape(height * width, size[0] * size[1]).repeat(frames, frames)
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * scale
    if table is not None:
        reach = [side // 2 for side in table.shape[1:]]
        down, right = (p.offset.clamp(-r, r) + r for p, r in zip(patterns, reach, strict=True))
        bias = table[:, down[:, None, :, None], right[None, :, None, :]].to(scores.dtype)
        scores = scores + bias.reshape(len(table), height * width, -1).repeat(1, frames, frames)
    keep = seen & kept[:, None, None, :]
    some = keep.any(dim=-1, keepdim=True)
    scores = scores.masked_fill(~keep & some, -torch.inf)
    output = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(dim=-1) * some, value)
    log_partition = scores.logsumexp(dim=-1).masked_fill(~some[..., 0], NO_MASS)
    return output, log_partition.transpose(1, 2)


class SparseAttention(Mixer):
    """Base of mixers that are softmax over a fixed set of keys for each query, a product of rows and columns.

    A mixer says which in `axes` and `patterns`. Over several frames a query sees its places in all of them. The
    log-sum-exp over what is seen is exact, so that text joins under the same normaliser.

    Attributes:
        bias: [heads, 2 m + 1, 2 n + 1], position biases by (key minus query), zero at the start; or None.
        zeros: whether places outside the picture count as keys and values of zeros.
    """

    needs = frozenset({"grid"})
    supports = frozenset({"mask", "frames", "text", "compile"})
    exact_partition = True
    bias: nn.Parameter | None
    zeros: bool = False

    def _biases(self, layer: LayerShape, reach: tuple[int, int]) -> nn.Parameter:
        return nn.Parameter(torch.zeros(layer.heads, 2 * reach[0] - 1, 2 * reach[1] - 1))

    def axes(self, size: tuple[int, int], kind: str, device: torch.device) -> tuple[Axis, Axis]:
        """Of a picture of (height, width)."""
        raise NotImplementedError

    def patterns(self, size: tuple[int, int], kind: str, device: torch.device) -> tuple[Pattern, Pattern]:
        """The same for the reference."""
        raise NotImplementedError

    def kinds(self) -> list[tuple[str, slice]]:
        """What which heads do."""
        return [("", slice(None))]

    def table(self) -> torch.Tensor | None:
        """The position biases."""
        return self.bias

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """See `Mixer.forward`. Raises ValueError unless the grid is of one image that the tokens fill."""
        query, key, value = (x.to(call_dtype(query)) for x in (query, key, value))
        with torch.autocast(query.device.type, enabled=False):
            return self._mix(attend, self.axes, query, key, value, context)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """With the scores of all pairs, and a mask made from the rule for one pair."""
        return self._mix(attend_reference, self.patterns, query, key, value, context)

    def _mix(
        self, compute: Any, parts: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context
    ) -> Mixed:
        _, *size = picture_of(context, query)
        table, scale, found = self.table(), context.softmax_scale(query), []
        for kind, heads in self.kinds():
            some = (x[:, :, heads] for x in (query, key, value))
            biases = None if table is None else table[heads]
            layout = parts(tuple(size), kind, query.device)
            found.append(compute(*some, context, layout, scale=scale, table=biases, zeros=self.zeros))
        outputs, masses = zip(*found, strict=True)
        return Mixed(torch.cat(outputs, dim=2), torch.cat(masses, dim=2))


def halves(heads: int, first: str, second: str) -> list[tuple[str, slice]]:
    """The first half of the heads (the larger one) does one thing, the second the other."""
    middle = (heads + 1) // 2
    return [(first, slice(0, middle)), (second, slice(middle, heads))][: 1 if heads == 1 else 2]


def _over_frames(tokens: torch.Tensor, frames: int, size: int) -> torch.Tensor:
    """[G, t] -> [G, frames * t]: the same places of every frame."""
    moved = tokens[:, None] + size * torch.arange(frames, device=tokens.device)[:, None]
    return torch.where(tokens[:, None] < 0, -1, moved).flatten(1)


def _blocks(number: int, scores: int) -> Iterator[slice]:
    """Slices of the groups, of `scores` scores each."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # a graph holds them all anyway
        yield slice(0, number)
        return
    step = max(1, _BLOCK // scores)
    for start in range(0, number, step):
        yield slice(start, start + step)
