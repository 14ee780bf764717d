"""Gated positional self-attention: each head weighs what it sees by content against what lies where."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from ..ops import call_dtype
from ..ops.focused_linear.reference import compute_dtype
from .base import Context, LayerShape, Mixed, Mixer, MixerConfig
from .parts.sparse import picture_of
from .registry import register_mixer


@dataclass(frozen=True)
class PositionalConfig(MixerConfig):
    """Settings of `PositionalAttention`.

    Args:
        locality: how sharply a head looks at its place at the start, above 0 up to 10 (the paper: 1).
        gate: the logit of what counts by place at the start, -20 to 20 (the paper, which trains from scratch: 1).

    Raises:
        ValueError: a value out of range.
    """

    locality: float = 1.0
    gate: float = -6.0

    def __post_init__(self) -> None:
        for name, least, most in (("locality", 1e-3, 10), ("gate", -20, 20)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
                raise ValueError(f"{name} is {value!r:.60}: pass a number from {least} to {most}.")
            object.__setattr__(self, name, float(value))


@register_mixer("positional")
class PositionalAttention(Mixer):
    """With P the softmax by content and R that by place, per head

        out_i = (1 - g) sum_j P_ij v_j + g sum_j R_ij v_j,    g = sigmoid(gate),
        R_ij = softmax_j(w . (dx, dy, dx^2 + dy^2)),    (dx, dy) = column and row of key j minus those of query i.

    R is the product of a softmax over rows and one over columns, so that it costs O(N (H + W)); P is softmax over all
    keys and costs O(N^2): nothing is saved, it is what a layer can learn from. As gate -> -inf this is softmax.

    Parameters: weight: [heads, 3], w; heads look at places around the query, on a square of them, as in the paper.
    gate: [heads], -6 at the start, which gives R a share of 0.25 %.

    Source: d'Ascoli et al., "ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases", ICML
    2021.
    """

    Config = PositionalConfig
    examples = (PositionalConfig(), PositionalConfig(locality=0.2, gate=1.0))
    summary = "softmax by content and softmax by place, weighed by a gate per head; as costly as softmax"
    cost = "O(N^2)"
    source = "d'Ascoli et al., ConViT, ICML 2021"
    needs = frozenset({"grid"})
    supports = frozenset({"mask", "frames", "text", "compile"})

    def __init__(self, config: PositionalConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        side = max(1, math.isqrt(layer.heads))
        middle = (side - 1) / 2
        places = [(head // side % side - middle, head % side - middle) for head in range(layer.heads)]
        weight = torch.tensor([[2 * x, 2 * y, -1.0] for x, y in places]) * config.locality
        self.weight = nn.Parameter(weight)
        self.gate = nn.Parameter(torch.full((layer.heads,), config.gate))

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """See `Mixer.forward`. Raises ValueError unless the grid is of one image that the tokens fill."""
        query, key, value = (x.to(call_dtype(query)) for x in (query, key, value))
        mask, dtype = context.key_mask, compute_dtype(query.dtype)
        if mask is not None:  # whatever a masked slot holds, NaN included, is never read
            key, value = (x.masked_fill(~mask[:, :, None, None], 0.0) for x in (key, value))
        kept = None if mask is None else (mask | ~mask.any(dim=1, keepdim=True))[:, None, None]
        with torch.autocast(query.device.type, enabled=False):
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            content = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=kept, scale=context.softmax_scale(query)
            ).transpose(1, 2)
            place = self._by_place(value.to(dtype), mask, context)
            share = self.gate.to(dtype).sigmoid()[:, None]
            return Mixed(((1 - share) * content.to(dtype) + share * place).to(query.dtype))

    def _by_place(self, value: torch.Tensor, mask: torch.Tensor | None, context: Context) -> torch.Tensor:
        """R v, [B, N, H, D]; every frame counts alike."""
        frames, height, width = picture_of(context, value)
        rows, columns = self._scores(height, 1, value.dtype), self._scores(width, 0, value.dtype)
        if mask is not None:  # what is left of a product of two softmaxes may be nothing: as one
            scores = (rows[:, :, None, :, None] + columns[:, None, :, None, :]).flatten(3).flatten(1, 2)
            kept = (mask | ~mask.any(dim=1, keepdim=True))[:, None, None]
            weights = scores.repeat(1, 1, frames).masked_fill(~kept, -torch.inf).softmax(dim=-1)
            place = torch.einsum("bhnm,bmhd->bnhd", weights, value)
        else:
            place = value.unflatten(1, (frames, height, width)).mean(dim=1)
            place = torch.einsum("hxu,bvuhd->bvxhd", columns.softmax(dim=-1), place)
            place = torch.einsum("hyv,bvxhd->byxhd", rows.softmax(dim=-1), place).flatten(1, 2)
        return place.repeat(1, frames, 1, 1)

    def _scores(self, length: int, which: int, dtype: torch.dtype) -> torch.Tensor:
        """[H, L, L] along one axis."""
        place = torch.arange(length, device=self.weight.device)
        apart = (place - place[:, None]).to(dtype)
        weight = self.weight.to(dtype)
        return weight[:, which, None, None] * apart + weight[:, 2, None, None] * apart.square()

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """Both softmaxes as matrices."""
        frames, height, width = picture_of(context, query)
        mask = key.new_ones(key.shape[:2], dtype=torch.bool) if context.key_mask is None else context.key_mask
        value, key = (x.masked_fill(~mask[:, :, None, None], 0.0) for x in (value, key))
        mask = mask | ~mask.any(dim=1, keepdim=True)
        token = torch.arange(height * width, device=query.device).repeat(frames)
        down, right = (x - x[:, None] for x in (token // width, token % width))
        features = torch.stack([right, down, right**2 + down**2]).to(query.dtype)
        by_place = torch.einsum("hf,fnm->hnm", self.weight.to(query.dtype), features)
        content = torch.einsum("bnhd,bmhd->bhnm", query, key) * context.softmax_scale(query)
        content, place = (
            x.masked_fill(~mask[:, None, None], -torch.inf).softmax(dim=-1) for x in (content, by_place[None])
        )
        share = self.gate.to(query.dtype).sigmoid()[:, None, None]
        return Mixed(torch.einsum("bhnm,bmhd->bnhd", (1 - share) * content + share * place, value))
