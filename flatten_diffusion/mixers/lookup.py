"""LookupViT: a small grid of compressed tokens looks all tokens up, and hands back along the same scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .base import Calibration, Context, LayerShape, Mixed, Mixer, MixerConfig
from .calibration import CalibratedLayer, LayerCall, Statistic
from .parts.least_squares import check_finite, in_full_precision
from .parts.pooling import at_least_float, one_image, without_masked
from .registry import register_mixer


@dataclass(frozen=True)
class LookupConfig(MixerConfig):
    """Settings of `LookupAttention`.

    Args:
        side: of the grid of compressed tokens, 1 to 32.

    Raises:
        ValueError: a value out of range.
    """

    side: int = 8

    def __post_init__(self) -> None:
        if isinstance(self.side, bool) or not isinstance(self.side, int) or not 1 <= self.side <= 32:
            raise ValueError(f"side is {self.side!r:.60}: pass 1 to 32.")


@register_mixer("lookup")
class LookupAttention(Mixer):
    """With q' and k' the maps of queries and keys resized (bilinear) to side x side compressed tokens, per head

        S = s q' k^T,    c = softmax_tokens(S) v,    c' = c + g softmax(s q' k'^T) c,
        out = softmax_compressed(S^T) c'.

    The scores S serve both ways. This is what one layer with one set of projections holds of the paper's block, which
    keeps the compressed tokens as a second stream through the network, with projections of its own for each step.

    Parameters:
        gate: [heads], g of the compressed tokens' own attention, zeros, which leaves it out.

    Source: Koner et al., "LookupViT: Compressing visual information to a limited number of tokens", ECCV 2024; the
    authors' code is not public, and how scores are normalised on the way back is as third parties have it.
    """

    Config = LookupConfig
    examples = (LookupConfig(), LookupConfig(side=3))
    summary = "softmax from all keys to a small grid of tokens, and back along the same scores"
    source = "Koner et al., LookupViT, ECCV 2024"
    needs = frozenset({"grid"})
    supports = frozenset({"mask", "text", "window", "compile"})

    def __init__(self, config: LookupConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        self.gate = nn.Parameter(torch.zeros(layer.heads))

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """See `Mixer.forward`. Raises ValueError unless the grid is of one image that the tokens fill."""
        keys, scale = without_masked(key, context.key_mask).transpose(1, 2), context.softmax_scale(query)
        queries, seen, among = self.compressed(query, key, value, context)
        seen = seen + self.gate.to(seen.dtype)[:, None, None] * among
        return Mixed(self.hand_back(keys, queries, seen, scale).transpose(1, 2))

    def compressed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q', c and softmax(s q' k'^T) c, [B, H, side side, D] each."""
        mask, scale = context.key_mask, context.softmax_scale(query)
        grid = one_image(context, query.shape[1], "LookupViT")
        keys, values = (without_masked(x, mask).transpose(1, 2) for x in (key, value))
        queries, few = self._resized(query.transpose(1, 2), grid), self._resized(keys, grid)
        seen = self.look_up(queries, keys, values, mask, scale)
        return queries, seen, F.scaled_dot_product_attention(queries, few, seen, scale=scale)

    @staticmethod
    def look_up(
        queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """softmax(s q' k^T) v, [B, H, n, D], over the tokens that the mask [B, N] leaves; all where it leaves none."""
        keep = None if mask is None else (mask | ~mask.any(dim=1, keepdim=True))[:, None, None]
        return F.scaled_dot_product_attention(queries, keys, values, keep, scale=scale)

    @staticmethod
    def hand_back(keys: torch.Tensor, queries: torch.Tensor, seen: torch.Tensor, scale: float) -> torch.Tensor:
        """softmax(s k q'^T) c, [B, H, N, D]: the scores of `look_up`, over the compressed tokens."""
        return F.scaled_dot_product_attention(keys, queries, seen, scale=scale)

    def _resized(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """[B, H, N, D] -> [B, H, side side, D]."""
        images = tokens.transpose(2, 3).flatten(1, 2).unflatten(2, grid).to(at_least_float(tokens.dtype))
        size = (self.config.side, self.config.side)
        images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        return images.flatten(2).unflatten(1, (tokens.shape[1], -1)).transpose(2, 3).to(tokens.dtype)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """With the scores as one matrix that is normalised both ways."""
        grid, mask, scale = (
            one_image(context, query.shape[1], "LookupViT"),
            context.key_mask,
            context.softmax_scale(query),
        )
        key, value = (without_masked(x, mask) for x in (key, value))
        few_queries, few_keys = (self._resized(x.transpose(1, 2), grid) for x in (query, key))
        scores = torch.einsum("bhmd,bnhd->bhmn", few_queries, key) * scale
        seen = scores
        if mask is not None:
            seen = scores.masked_fill(~(mask | ~mask.any(dim=1, keepdim=True))[:, None, None], -torch.inf)
        seen = torch.einsum("bhmn,bnhd->bhmd", seen.softmax(-1), value)
        among = (few_queries @ few_keys.transpose(2, 3) * scale).softmax(-1) @ seen
        seen = seen + self.gate.to(seen.dtype)[:, None, None] * among
        return Mixed(torch.einsum("bhmn,bhmd->bnhd", scores.softmax(2), seen))

    def calibrate(self, layer: CalibratedLayer, settings: None) -> Calibration:
        """The gates, by least squares on what handing back leaves of the softmax. Returns them."""

        @in_full_precision
        def measure(call: LayerCall) -> torch.Tensor:
            inputs = call.inputs
            mask, scale = inputs.context.key_mask, inputs.context.softmax_scale(inputs.query)
            keys = without_masked(inputs.key, mask).transpose(1, 2)
            queries, *parts = self.compressed(inputs.query, inputs.key, inputs.value, inputs.context)
            plain, among = (self.hand_back(keys, queries, part, scale).transpose(1, 2).float() for part in parts)
            missing, among = call.product - inputs.join(plain), inputs.shared(among)
            roots = call.weights.roots(missing)[..., None]
            pairs = torch.stack([missing, among]) * among * roots.square()
            return pairs.sum((1, 2, 4)).double().cpu()

        (sums,) = yield Statistic(measure)
        check_finite(layer.name, sums)
        gates = sums[0] / sums[1].clamp(min=1e-30)
        with torch.no_grad():
            self.gate.copy_(gates)
        return tuple(gates.tolist())
