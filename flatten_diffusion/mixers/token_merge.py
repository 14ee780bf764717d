"""Token merging: tokens that are alike become one before softmax, and all get its answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .base import Context, LayerShape, Mixed, Mixer, MixerConfig
from .parts.merging import destinations, match
from .parts.pooling import group_counts, group_means, one_image, to_members, without_masked
from .registry import register_mixer


@dataclass(frozen=True)
class TokenMergeConfig(MixerConfig):
    """Settings of `TokenMergeAttention`.

    Args:
        ratio: share of the tokens that is merged away, 0 to below 1; at most all but one token of each cell are.
        rows, columns: of the cells that have one destination each, 1 to 64.

    Raises:
        ValueError: a value out of range.
    """

    ratio: float = 0.5
    rows: int = 2
    columns: int = 2

    def __post_init__(self) -> None:
        ratio = self.ratio
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
            raise ValueError(f"ratio is {ratio!r:.60}: pass a number from 0 to below 1.")
        object.__setattr__(self, "ratio", float(ratio))
        for name in ("rows", "columns"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 64:
                raise ValueError(f"{name} is {value!r:.60}: pass 1 to 64.")


@register_mixer("token-merge")
class TokenMergeAttention(Mixer):
    """Softmax over merged tokens. One token of every cell of the grid is a destination, all others are sources; the
    floor(ratio N) sources whose layer inputs are most like a destination's (cosine) are merged into it. With G(n) the
    group of token n and a bar for means over groups, per head,

        out_n = sum_g softmax_g(s qbar_G(n) . kbar_g) vbar_g.

    Means of projections are projections of means, as the paper has them, wherever nothing (a norm, a rotation) is
    between. Groups count once each, whatever their size. It is the softmax where nothing is merged.

    Attributes:
        choice: int64 [height // rows, width // columns], the destination's number within each cell. None, the default:
            the upper left token, so that calls repeat (the paper draws one anew in every step).

    Nothing is learned. The matching's time is quadratic: N^2 / (rows columns) similarities, once for all heads.

    Source: Bolya and Hoffman, "Token Merging for Fast Stable Diffusion", CVPR Workshops 2023.
    """

    Config = TokenMergeConfig
    examples = (TokenMergeConfig(), TokenMergeConfig(ratio=0.75, rows=3), TokenMergeConfig(ratio=0.2, columns=3))
    summary = "softmax over fewer tokens, of which those that are alike were merged; nothing is learned"
    cost = "O(N^2), times (1 - ratio)^2"
    source = "Bolya and Hoffman, Token Merging for Fast Stable Diffusion, CVPR Workshops 2023"
    needs = frozenset({"grid", "hidden_states"})
    supports = frozenset({"mask", "text", "window", "compile"})

    def __init__(self, config: TokenMergeConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        self.choice: torch.Tensor | None = None

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """See `Mixer.forward`. Raises ValueError unless the grid is of one image that the tokens fill."""
        mask, hidden, count = context.key_mask, context.hidden_states, int(self.config.ratio * query.shape[1])
        grid = one_image(context, query.shape[1], "Token merging")
        assert hidden is not None, "its needs say so"
        group, groups = match(hidden, grid, (self.config.rows, self.config.columns), count, mask, self.choice)
        bias = None
        if mask is not None:
            empty = group_counts(group, groups, mask, torch.float32) == 0
            empty = empty & mask.any(dim=1, keepdim=True)  # without any key, the zeros are averaged
            bias = torch.zeros(empty.shape, dtype=query.dtype, device=query.device).masked_fill(empty, -torch.inf)
            bias = bias[:, None, None]
        queries = group_means(query, group, groups, None)
        keys, values = (group_means(x, group, groups, mask) for x in (key, value))
        queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
        out = F.scaled_dot_product_attention(queries, keys, values, bias, scale=context.softmax_scale(query))
        return Mixed(to_members(out.transpose(1, 2), group))

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """Sample by sample, with the matrix of who belongs where."""
        grid, hidden = one_image(context, query.shape[1], "Token merging"), context.hidden_states
        assert hidden is not None, "its needs say so"
        chosen, sources = destinations(*grid, (self.config.rows, self.config.columns), self.choice, query.device)
        hidden, key, value = (without_masked(x, context.key_mask) for x in (hidden, key, value))
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        outputs = []
        for b, x in enumerate(hidden.detach()):
            member = torch.eye(len(x), dtype=x.dtype, device=x.device)  # [groups, N]
            if len(chosen):
                cosines = F.cosine_similarity(x[sources][:, None], x[chosen][None], dim=-1)
                best = cosines.max(dim=1)
                order = best.values.argsort(descending=True, stable=True)[: int(self.config.ratio * len(x))]
                gone = sources[order]
                member[chosen[best.indices[order]], gone] = 1.0
                member = member[[n for n in range(len(x)) if n not in set(gone.tolist())]]
            counted = member if context.key_mask is None else member * context.key_mask[b].to(x.dtype)
            mean_of_all, mean = (m / m.sum(1, keepdim=True).clamp(min=1.0) for m in (member, counted))
            q = torch.einsum("gn,nhd->hgd", mean_of_all.to(query.dtype), query[b])
            k, v = (torch.einsum("gn,nhd->hgd", mean.to(query.dtype), y[b]) for y in (key, value))
            scores = q @ k.transpose(1, 2) * context.softmax_scale(query)
            if counted.any():
                scores = scores.masked_fill(~counted.any(dim=1), -torch.inf)
            outputs.append(torch.einsum("gn,hgd->nhd", member.to(query.dtype), scores.softmax(-1) @ v))
        return Mixed(torch.stack(outputs))
