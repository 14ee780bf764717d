"""Bi-level routing attention: each region of the picture picks a few regions, whose tokens its own attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..ops import call_dtype
from ..ops.focused_linear.reference import compute_dtype
from .base import Calibration, Context, LayerShape, Mixed, Mixer, MixerConfig
from .calibration import CalibratedLayer, LayerCall, Statistic
from .parts.convolution import convolve, patch_moments, solve_convolution
from .parts.partition import cross, groups
from .parts.sparse import NO_MASS, picture_of, softmax_in_groups, ungroup, whole
from .registry import register_mixer


@dataclass(frozen=True)
class RoutingConfig(MixerConfig):
    """Settings of `RoutingAttention`.

    Args:
        regions: along each side of the picture, 1 to 32.
        topk: how many regions each region attends to, 1 to 256; all there are where there are fewer.
        kernel_size: side of the depthwise convolution of the values, odd, at most 31; 0 leaves it out.
        soft: whether keys and values of a region are weighted by the softmax of its routing score, which then has a
            gradient.
        pool: keys and values of a region are averaged over cells of so many tokens a side, 1 to 16.

    Raises:
        ValueError: a value out of range.
    """

    regions: int = 7
    topk: int = 8
    kernel_size: int = 5
    soft: bool = False
    pool: int = 1

    def __post_init__(self) -> None:
        for name, least, most in (("regions", 1, 32), ("topk", 1, 256), ("kernel_size", 0, 31), ("pool", 1, 16)):
            whole(name, getattr(self, name), least, most)
        if self.kernel_size and self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}: pass an odd number, or 0 for no convolution.")
        if not isinstance(self.soft, bool):
            raise ValueError(f"soft is {self.soft!r:.60}: pass true or false.")


@register_mixer("routing")
class RoutingAttention(Mixer):
    """The picture is cut into S x S regions of ceil(H / S) x ceil(W / S) tokens (smaller ones at its right and lower
    edge). With the means q_r and k_r of a region's queries and keys, over all heads together,

        regions(r) = the topk largest of s q_r.k_r',    out_i = softmax over their tokens (s q_i.k_j) v_j + conv(v).

    The choice has no gradient, unless `soft`. Where topk is all regions and the convolution zero, this is softmax.

    Parameters (zeros): conv_weight: [heads * head_dim, 1, K, K], conv_bias: [heads * head_dim]. Absent when
    `kernel_size` is 0.

    Source: Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", CVPR 2023.
    """

    Config = RoutingConfig
    examples = (
        RoutingConfig(),
        RoutingConfig(regions=3, topk=2, kernel_size=3, soft=True),
        RoutingConfig(regions=2, topk=2, kernel_size=3, pool=2),
    )
    summary = "each region of the picture attends to the tokens of the few regions it matches best"
    cost = "O(N topk N / S^2)"
    source = "Zhu et al., BiFormer, CVPR 2023"
    needs = frozenset({"grid"})
    supports = frozenset({"mask", "text", "compile"})
    exact_partition = True

    def __init__(self, config: RoutingConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        channels, size = layer.heads * layer.head_dim, config.kernel_size
        self.conv_weight = nn.Parameter(torch.zeros(channels, 1, size, size)) if size else None
        self.conv_bias = nn.Parameter(torch.zeros(channels)) if size else None

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """See `Mixer.forward`. Raises ValueError unless the grid is of one frame that the tokens fill."""
        query, key, value = (x.to(call_dtype(query)) for x in (query, key, value))
        with torch.autocast(query.device.type, enabled=False):
            mixed = self.attend(query, key, value, context)
        return mixed if self.conv_weight is None else Mixed(mixed[0] + self._convolved(value, context), mixed[1])

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """`forward` without the convolution."""
        dtype, (tokens, sides) = compute_dtype(query.dtype), self._regions(query, context)
        absent = tokens < 0
        index = tokens.clamp(min=0)
        kept = ~absent[None] if context.key_mask is None else context.key_mask[:, index] & ~absent
        q, k, v = (x[:, index].to(dtype) for x in (query, key, value))  # [B, R, t, H, D]
        k, v = (x.masked_fill(~kept[..., None, None], 0.0) for x in (k, v))
        q = q.masked_fill(absent[..., None, None], 0.0)
        scores, chosen = self._route(_mean(q, ~absent[None]), _mean(k, kept), kept, context.softmax_scale(query))
        if self.config.pool > 1:
            k, v, kept = self._pooled(k, v, kept, sides)
        batch = torch.arange(len(q), device=q.device)[:, None, None]
        k, v = (x[batch, chosen] for x in (k, v))  # [B, R, topk, t, H, D]
        kept = kept.expand(len(q), -1, -1)[batch, chosen].flatten(2)
        if self.config.soft:
            k, v = (x * scores.softmax(dim=-1)[..., None, None, None] for x in (k, v))
        k, v = (x.flatten(2, 3).permute(0, 3, 1, 2, 4) for x in (k, v))
        q = q.permute(0, 3, 1, 2, 4) * context.softmax_scale(query)
        output, mass = softmax_in_groups(q, k, v, kept[:, None, :, None], None)
        return Mixed(ungroup(output, tokens, query.shape[1]).to(query.dtype), ungroup(mass, tokens, query.shape[1]))

    def _regions(self, query: torch.Tensor, context: Context) -> tuple[torch.Tensor, tuple[int, int]]:
        """Tokens of each region, [R, t], -1 where it has fewer; and (rows, columns) of a region."""
        frames, height, width = picture_of(context, query)
        if frames > 1:
            raise ValueError(f"Routing attention needs the grid of one image of one frame, not of {frames}.")
        sides = (-(-height // self.config.regions), -(-width // self.config.regions))
        rows, columns = (groups(n, side, device=query.device) for n, side in zip((height, width), sides, strict=True))
        return cross(rows.queries, columns.queries, width), sides

    def _route(
        self, query: torch.Tensor, key: torch.Tensor, kept: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and indices [B, R, topk] of the regions that each region attends to, from the means [B, R, C]; never
        one without keys where another has some."""
        scores = query @ key.transpose(1, 2) * scale
        scores = scores.masked_fill(~kept.any(dim=-1)[:, None], -1e30)
        scores = scores if self.config.soft else scores.detach()
        return scores.topk(min(self.config.topk, scores.shape[-1]), dim=-1)

    def _pooled(
        self, key: torch.Tensor, value: torch.Tensor, kept: torch.Tensor, sides: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Means over cells of each region, of the tokens that count, and whether a cell has any."""
        tall, wide = (groups(n, self.config.pool, device=key.device).queries for n in sides)
        index = cross(tall, wide, sides[1])  # [cells, tokens of a cell] within a region
        inside = kept[..., index.clamp(min=0)] & (index >= 0)
        count = inside.sum(dim=-1).clamp(min=1)[..., None, None]
        key, value = ((x[:, :, index.clamp(min=0)] * inside[..., None, None]).sum(dim=3) / count for x in (key, value))
        return key, value, inside.any(dim=-1)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """Region by region."""
        tokens, sides = self._regions(query, context)
        scale, pool = context.softmax_scale(query), self.config.pool
        mask = key.new_ones(key.shape[:2], dtype=torch.bool) if context.key_mask is None else context.key_mask
        output, mass = torch.zeros_like(query), query.new_full(query.shape[:3], NO_MASS)
        for b in range(len(query)):
            members = [region[region >= 0] for region in tokens]
            kept = [region[mask[b, region]] for region in members]
            nothing = key.new_zeros(key.shape[2:]).flatten()
            means = torch.stack([key[b, r].mean(dim=0).flatten() if len(r) else nothing for r in kept])
            empty = torch.tensor([not len(r) for r in kept], device=key.device)
            cells = [
                self._cells(region, mask[b], sides) if pool > 1 else list(r[:, None])
                for region, r in zip(tokens, kept, strict=True)
            ]
            for region in members:
                scores = means @ query[b, region].mean(dim=0).flatten() * scale
                scores = scores.masked_fill(empty, -torch.inf)
                found, chosen = scores.topk(min(self.config.topk, len(members)))
                weights = found.softmax(dim=0) if self.config.soft else torch.ones_like(found)
                picked = [(cell, w) for r, w in zip(chosen.tolist(), weights, strict=True) for cell in cells[r]]
                if not picked:
                    continue
                keys, values = (torch.stack([x[b, cell].mean(dim=0) * w for cell, w in picked]) for x in (key, value))
                inner = torch.einsum("nhd,mhd->nhm", query[b, region], keys) * scale
                output[b, region] = torch.einsum("nhm,mhd->nhd", inner.softmax(dim=-1), values)
                mass[b, region] = inner.logsumexp(dim=-1)
        return Mixed(output if self.conv_weight is None else output + self._convolved(value, context), mass)

    def _cells(self, region: torch.Tensor, mask: torch.Tensor, sides: tuple[int, int]) -> list[torch.Tensor]:
        """The tokens that count of each cell of a region, for the reference."""
        place = torch.arange(len(region), device=region.device)
        row, column = place // sides[1] // self.config.pool, place % sides[1] // self.config.pool
        kept = (region >= 0) & mask[region.clamp(min=0)]
        cells = [region[kept & (row == y) & (column == x)] for y in row.unique() for x in column.unique()]
        return [cell for cell in cells if len(cell)]

    def refine(self, layer: CalibratedLayer, settings: None) -> Calibration:
        """The depthwise kernel and bias: least squares on what the regions miss of the softmax."""
        if self.conv_weight is None or self.conv_bias is None:
            return

        def measure(call: LayerCall) -> torch.Tensor:
            inputs = call.inputs
            with torch.no_grad():
                plain = self.attend(inputs.query, inputs.key, inputs.value, inputs.context).output
            missing = call.target() - inputs.join(plain).float()
            return patch_moments(inputs, missing, self.config.kernel_size, call.weights)

        (moments,) = yield Statistic(measure)
        solve_convolution(layer.name, moments, self.conv_weight, self.conv_bias, 1e-4)

    def _convolved(self, value: torch.Tensor, context: Context) -> torch.Tensor:
        assert self.conv_weight is not None and context.grid is not None
        return convolve(value, self.conv_weight, self.conv_bias, context.grid, context.key_mask).to(value.dtype)


def _mean(tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Of each region, over its tokens that count: [B, R, t, H, D], zeros where not `kept` -> [B, R, H * D]."""
    return tokens.sum(dim=2).flatten(2) / kept.sum(dim=-1).clamp(min=1)[..., None]
