"""PolaFormer: linear attention that keeps signs apart, sharpened by learned powers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .base import Context, LayerShape
from .grid import images_of
from .parts.gated import GatedConfig, GatedMixer, grid_of
from .parts.linear import hide, linear_product, quadratic_product, wide
from .registry import register_mixer


@dataclass(frozen=True)
class PolarityConfig(GatedConfig):
    """Settings of `PolarityAttention`.

    Args:
        kernel_size: side of the depthwise convolution of the values, odd, at most 31; 0 leaves it out.
        gate: whether the output is multiplied with a linear map of the layer's input.
        alpha: powers lie between 1 and 1 + alpha, positive, at most 8.
        position_size: side of the table of positions that is added to keys, resized to the grid, at most 64; 0 leaves
            it out.

    Raises:
        ValueError: a value out of range.
    """

    alpha: float = 4.0
    position_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        alpha, size = self.alpha, self.position_size
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha <= 8:
            raise ValueError(f"alpha is {alpha!r:.60}: pass a positive number up to 8.")
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= 64:
            raise ValueError(f"position_size is {size!r:.60}: pass a whole number up to 64.")
        object.__setattr__(self, "alpha", float(alpha))


@register_mixer("polarity")
class PolarityAttention(GatedMixer):
    """With tau = softplus(scale), e = 1 + alpha sigmoid(power), P+(x) = relu(x / tau) ** e, P-(x) = P+(-x), and keys to
    which their position is added, the first half of a head's value channels is weighed by products of equal signs, the
    second half by those of opposite signs:

        y_i = [ lin([P+(q), P-(q)], [P+(k), P-(k)], v_1),  lin([P-(q), P+(q)], [P+(k), P-(k)], v_2) ],

    where lin(Q, K, v)_i = Q_i mean_j(K_j^T v_j) / (Q_i . mean(K) + 1e-6); the output is (y + conv(v)) * (W_g x + b_g).
    The paper's kernel is one for all heads, here each head has its own.

    Parameters: those of `GatedMixer`, and, all zeros as in the paper, scale: [heads * D], power: [heads, D], position:
    [heads * D, S, S] (absent when `position_size` is 0).

    Source: Meng et al., "PolaFormer: Polarity-aware Linear Attention for Vision Transformers", ICLR 2025.
    """

    Config = PolarityConfig
    examples = (PolarityConfig(), PolarityConfig(0, False, 2.0, 0), PolarityConfig(3, True, 4.0, 3))
    summary = "powers of positive and negative parts, equal signs for half of the values, opposite for the other"
    source = "Meng et al., PolaFormer, ICLR 2025"
    supports = frozenset({"mask", "frames", "text", "window", "compile"})

    def __init__(self, config: PolarityConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        channels, size = layer.heads * layer.head_dim, config.position_size
        self.scale = nn.Parameter(torch.zeros(channels))
        self.power = nn.Parameter(torch.zeros(layer.heads, layer.head_dim))
        self.position = nn.Parameter(torch.zeros(channels, size, size)) if size else None
        self.needs = self.needs | {"grid"} if size else self.needs

    def _mapped(
        self, query: torch.Tensor, key: torch.Tensor, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries of equal signs, of opposite signs, and keys, [B, N, H, 2 D], at least float32: powers overflow."""
        query, key = wide(query), wide(hide(key, context.key_mask))
        if self.position is not None:
            key = key + self._positions(context, key)
        tau = F.softplus(wide(self.scale)).unflatten(0, query.shape[2:])
        power = 1 + self.config.alpha * wide(self.power).sigmoid()
        (above, below), keys = (((x / tau).relu().pow(power), (-x / tau).relu().pow(power)) for x in (query, key))
        return torch.cat([above, below], -1), torch.cat([below, above], -1), torch.cat(keys, -1)

    def _positions(self, context: Context, key: torch.Tensor) -> torch.Tensor:
        """[N, H, D]: the table resized to each image's frames."""
        assert self.position is not None
        table, parts = wide(self.position)[None], []
        for frames, height, width in images_of(grid_of(context, key.shape[1])):
            fits = table.shape[-2:] == (height, width)
            sized = table if fits else F.interpolate(table, size=(height, width), mode="bilinear", align_corners=False)
            parts.append(sized[0].flatten(1).T.repeat(frames, 1))
        return torch.cat(parts).unflatten(1, key.shape[2:])

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        """y, [B, N, H, D]."""
        mask, half = context.key_mask, value.shape[-1] // 2
        with torch.autocast(query.device.type, enabled=False):
            equal, opposite, keys = self._mapped(query, key, context)
            parts = ((equal, value[..., :half]), (opposite, value[..., half:]))
            return torch.cat([linear_product(q, keys, hide(v, mask), mask) for q, v in parts], dim=-1)

    def attend_by_pairs(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context
    ) -> torch.Tensor:
        """y from both matrices of weights."""
        mask, half = context.key_mask, value.shape[-1] // 2
        equal, opposite, keys = self._mapped(query, key, context)
        parts = ((equal, wide(value[..., :half])), (opposite, wide(value[..., half:])))
        return torch.cat([quadratic_product(q, keys, v, mask) for q, v in parts], dim=-1)
