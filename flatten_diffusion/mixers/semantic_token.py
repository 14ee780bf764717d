"""Semantic tokens: a few cluster centres of the image, which stand for its keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .base import Context, LayerShape, Mixed, Mixer, MixerConfig
from .parts.pooling import at_least_float, one_image, without_masked
from .registry import register_mixer


@dataclass(frozen=True)
class SemanticTokenConfig(MixerConfig):
    """Settings of `SemanticTokenAttention`.

    Args:
        side: of the grid of semantic tokens, 1 to 32.

    Raises:
        ValueError: a value out of range.
    """

    side: int = 8

    def __post_init__(self) -> None:
        if isinstance(self.side, bool) or not isinstance(self.side, int) or not 1 <= self.side <= 32:
            raise ValueError(f"side is {self.side!r:.60}: pass 1 to 32.")


@register_mixer("semantic-token")
class SemanticTokenAttention(Mixer):
    """Semantic tokens start as queries averaged over side x side cells, and are recovered by attention: per head

        P = softmax_tokens(s (pool(q) + G) k^T),    out = softmax_centres(s q (P k)^T) P v.

    Each is a mean of the keys that its query finds and the mean of their values, and every token reads from them with
    its own query. The paper gathers so, works on semantic tokens alone for several layers, with projections of their
    own, and reads back at the end; one layer with one set of projections holds the gathering and the reading.

    Parameters:
        centres: [heads, side side, head_dim], G, the paper's learned centres, zeros.

    Source: Chang et al., "Making Vision Transformers Efficient from A Token Sparsification View", CVPR 2023; after the
    paper's description, not checked against its code.
    """

    Config = SemanticTokenConfig
    examples = (SemanticTokenConfig(), SemanticTokenConfig(side=3))
    summary = "softmax over a few cluster centres of keys, which pooled queries gather"
    source = "Chang et al., A Token Sparsification View, CVPR 2023 (after the paper's description)"
    needs = frozenset({"grid"})
    supports = frozenset({"mask", "text", "window", "compile"})

    def __init__(self, config: SemanticTokenConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        self.centres = nn.Parameter(torch.zeros(layer.heads, config.side**2, layer.head_dim))

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """See `Mixer.forward`. Raises ValueError unless the grid is of one image that the tokens fill."""
        mask, scale = context.key_mask, context.softmax_scale(query)
        asked = self._asked(query, one_image(context, query.shape[1], "Semantic tokens"))
        q, k, v = (x.transpose(1, 2) for x in (query, without_masked(key, mask), without_masked(value, mask)))
        keep = None if mask is None else (mask | ~mask.any(dim=1, keepdim=True))[:, None, None]
        pairs = torch.cat([k, v], dim=-1)  # gathered at once: the weights are the same
        keys, values = F.scaled_dot_product_attention(asked, k, pairs, keep, scale=scale).chunk(2, dim=-1)
        return Mixed(F.scaled_dot_product_attention(q, keys, values, scale=scale).transpose(1, 2))

    def _asked(self, query: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """pool(q) + G, [B, H, side side, D]; cells overlap where the grid is no multiple."""
        images = query.flatten(2).transpose(1, 2).unflatten(2, grid).to(at_least_float(query.dtype))
        pooled = F.adaptive_avg_pool2d(images, self.config.side).flatten(2).unflatten(1, query.shape[2:])
        return (pooled.transpose(2, 3) + self.centres.to(pooled.dtype)).to(query.dtype)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """Both softmaxes as matrices."""
        asked = self._asked(query, one_image(context, query.shape[1], "Semantic tokens"))
        mask, scale = context.key_mask, context.softmax_scale(query)
        key, value = (without_masked(x, mask) for x in (key, value))
        scores = torch.einsum("bhmd,bnhd->bhmn", asked, key) * scale
        if mask is not None:
            scores = scores.masked_fill(~(mask | ~mask.any(dim=1, keepdim=True))[:, None, None], -torch.inf)
        keys, values = (torch.einsum("bhmn,bnhd->bhmd", scores.softmax(-1), x) for x in (key, value))
        weights = (torch.einsum("bnhd,bhmd->bhnm", query, keys) * scale).softmax(-1)
        return Mixed(torch.einsum("bhnm,bhmd->bnhd", weights, values))
