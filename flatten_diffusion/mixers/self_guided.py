"""SG-Former: keys merged finely where the image's attention goes, coarsely elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .base import Context, LayerShape, Mixed, Mixer, MixerConfig
from .parts.pooling import at_least_float, cells_of, one_image, tokens_of, without_masked
from .registry import register_mixer


@dataclass(frozen=True)
class SelfGuidedConfig(MixerConfig):
    """Settings of `SelfGuidedAttention`.

    Args:
        low, middle, high: how many tokens become one in the least significant quarter, the half between, and the most
            significant quarter, 1 to 1024 each. With middle = 0 there are two halves.
        cell: side of the cells and windows that significance is told by, 1 to 32.

    Raises:
        ValueError: a value out of range.
    """

    low: int = 49
    middle: int = 14
    high: int = 7
    cell: int = 7

    def __post_init__(self) -> None:
        for name, least, most in (("low", 1, 1024), ("middle", 0, 1024), ("high", 1, 1024), ("cell", 1, 32)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"{name} is {value!r:.60}: pass {least} to {most}.")


@register_mixer("self-guided")
class SelfGuidedAttention(Mixer):
    """A token's significance is the attention that its cell (by its mean key) gets from all queries, plus what the
    token gets within its cell, both averaged over heads and queries; no gradient passes through it. Tokens are sorted
    by it, cut into parts, and every `low`, `middle` or `high` consecutive ones become one key and one value,

        kbar = sum_i w_i k_i,    vbar = sum_i w_i v_i,    out = softmax(s q kbar^T) vbar.

    Of the paper's pair of blocks (one that finds significance, one that is guided by it) this is both in one, with the
    layer's own query and key in place of further projections. A group with fewer tokens than its length, at the end of
    a part or with masked ones, is scaled up. It is the softmax where all lengths are one.

    Parameters:
        low_weight, middle_weight, high_weight: [length] each, w, means at the start. The middle is absent without it.

    Source: Ren et al., "SG-Former: Self-guided Transformer with Evolving Token Reallocation", ICCV 2023.
    """

    Config = SelfGuidedConfig
    examples = (SelfGuidedConfig(), SelfGuidedConfig(low=4, middle=0, high=1, cell=2), SelfGuidedConfig(4, 3, 2, 3))
    summary = "softmax over keys merged finely where attention goes, coarsely elsewhere"
    cost = "O(N^2 / cell^2 + N^2 / group)"
    source = "Ren et al., SG-Former, ICCV 2023"
    needs = frozenset({"grid"})
    supports = frozenset({"mask", "text", "window", "compile"})

    def __init__(self, config: SelfGuidedConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        low, middle, high = (
            nn.Parameter(torch.full((n,), 1 / n)) if n else None for n in (config.low, config.middle, config.high)
        )
        self.low_weight, self.middle_weight, self.high_weight = low, middle, high

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """See `Mixer.forward`. Raises ValueError unless the grid is of one image that the tokens fill."""
        grid, mask = one_image(context, query.shape[1], "Self-guided attention"), context.key_mask
        key, value = (without_masked(x, mask) for x in (key, value))
        significance = self.significance(query, key, grid, context)
        pairs, kept = self.aggregate(torch.cat([key, value], dim=-1), significance, mask)
        q, k, v = (x.transpose(1, 2) for x in (query, *pairs.chunk(2, dim=-1)))
        keep = None if mask is None else (kept | ~kept.any(dim=1, keepdim=True))[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, keep, scale=context.softmax_scale(query))
        return Mixed(out.transpose(1, 2))

    @torch.no_grad()
    def significance(
        self, query: torch.Tensor, key: torch.Tensor, grid: tuple[int, int], context: Context
    ) -> torch.Tensor:
        """[B, N], at least float32, of keys [B, N, H, D] whose masked slots hold zeros; lowest, -1, where masked."""
        cell, dtype = (self.config.cell, self.config.cell), at_least_float(query.dtype)
        ones = torch.ones(query.shape[:2], dtype=torch.bool, device=query.device)
        there = cells_of(ones, grid, cell)  # [B, S, T]
        kept = there if context.key_mask is None else cells_of(context.key_mask, grid, cell)
        query, key = query.to(dtype) * context.softmax_scale(query), key.to(dtype)
        keys, queries = cells_of(key, grid, cell), cells_of(query, grid, cell)  # [B, S, T, H, D]
        means = keys.sum(2) / kept.sum(2).clamp(min=1)[..., None, None]
        cells = self.received(query, means, kept.any(2), ones)  # [B, S]
        own = self.received(*(x.flatten(0, 1) for x in (queries, keys, kept, there)))
        total = tokens_of(cells[..., None] + own.reshape(kept.shape), grid, cell)
        return total if context.key_mask is None else total.masked_fill(~context.key_mask, -1.0)

    @staticmethod
    def received(query: torch.Tensor, key: torch.Tensor, kept: torch.Tensor, asks: torch.Tensor) -> torch.Tensor:
        """[B, M], the softmax weight that keys [B, M, H, D] get from scaled queries [B, N, H, D], averaged over heads
        and those that ask, bool [B, N]; kept: bool [B, M], the keys that there are."""
        total = torch.zeros_like(kept, dtype=query.dtype)
        kept = kept | ~kept.any(dim=1, keepdim=True)
        for head in range(query.shape[2]):  # bounds the matrix
            scores = query[:, :, head] @ key[:, :, head].transpose(1, 2)
            weights = scores.masked_fill(~kept[:, None], -torch.inf).softmax(-1)
            total = total + (weights * asks[..., None]).sum(1)
        return total / query.shape[2] / asks.sum(1).clamp(min=1)[:, None]

    def aggregate(
        self, tokens: torch.Tensor, significance: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Groups' weighted sums [B, G, ...] of tokens [B, N, ...], and whether any of their tokens counts, [B, G]."""
        order = significance.argsort(dim=1, stable=True)
        count = order.shape[1]
        first, last = (count // 4, count - count // 4) if self.config.middle else (count // 2, count // 2)
        sorted_tokens = tokens.flatten(2).gather(1, order[..., None].expand(-1, -1, tokens[0, 0].numel()))
        ones = torch.ones_like(order, dtype=torch.bool) if mask is None else mask.gather(1, order)
        sums, kept = [], []
        weights = (self.low_weight, self.middle_weight, self.high_weight)
        for start, end, weight in zip((0, first, last), (first, last, count), weights, strict=True):
            if weight is None or start == end:
                continue
            length, dtype = len(weight), at_least_float(tokens.dtype)
            groups = F.pad(sorted_tokens[:, start:end], (0, 0, 0, (start - end) % length)).unflatten(1, (-1, length))
            counts = F.pad(ones[:, start:end], (0, (start - end) % length)).unflatten(1, (-1, length)).sum(2)
            summed = torch.einsum("bglf,l->bgf", groups.to(dtype), weight.to(dtype))
            sums.append(summed * (length / counts.clamp(min=1).to(dtype))[..., None])
            kept.append(counts > 0)
        return torch.cat(sums, dim=1).to(tokens.dtype).unflatten(2, tokens.shape[2:]), torch.cat(kept, dim=1)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """Sample by sample and group by group."""
        grid, mask = one_image(context, query.shape[1], "Self-guided attention"), context.key_mask
        key, value = (without_masked(x, mask) for x in (key, value))
        order = self.significance(query, key, grid, context).argsort(dim=1, stable=True)
        count, dtype = order.shape[1], at_least_float(query.dtype)
        parts = (
            (count // 4, count - 2 * (count // 4), count // 4)
            if self.config.middle
            else (count // 2, 0, -(-count // 2))
        )
        outputs = []
        for b, ranked in enumerate(order):
            start = 0
            keys: list[torch.Tensor] = []
            values: list[torch.Tensor] = []
            for size, weight in zip(parts, (self.low_weight, self.middle_weight, self.high_weight), strict=True):
                for first in range(start, start + size, 1 if weight is None else len(weight)):
                    assert weight is not None, "a part without tokens"
                    members = ranked[first : min(first + len(weight), start + size)]
                    number = len(members) if mask is None else int(mask[b, members].sum())
                    if number or (mask is not None and not mask[b].any()):
                        w = weight[: len(members)].to(dtype) * len(weight) / max(number, 1)
                        for x, means in ((key, keys), (value, values)):
                            means.append(torch.einsum("l,lhd->hd", w, x[b, members].to(dtype)).to(query.dtype))
                start += size
            k, v = torch.stack(keys), torch.stack(values)
            scores = torch.einsum("nhd,ghd->hng", query[b], k) * context.softmax_scale(query)
            outputs.append(torch.einsum("hng,ghd->nhd", scores.softmax(-1), v))
        return Mixed(torch.stack(outputs))
