"""EfficientViT's attention at several scales: relu linear attention of the tokens and of their neighbourhoods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .base import Context, LayerShape, Mixed, Mixer, MixerConfig
from .parts.convolution import convolve
from .parts.gated import grid_of
from .parts.linear import hide, linear_product, quadratic_product, wide
from .registry import register_mixer

_EPS = 1e-15


@dataclass(frozen=True)
class MultiScaleConfig(MixerConfig):
    """Settings of `MultiScaleAttention`.

    Args:
        scales: sides of the neighbourhoods, one to four odd numbers from 3 to 15.

    Raises:
        ValueError: other scales.
    """

    scales: Sequence[int] = (5,)

    def __post_init__(self) -> None:
        scales = self.scales
        if not isinstance(scales, (tuple, list)) or not 1 <= len(scales) <= 4:
            raise ValueError(f"scales is {scales!r:.60}: pass one to four odd numbers from 3 to 15.")
        for scale in scales:
            if isinstance(scale, bool) or not isinstance(scale, int) or scale not in range(3, 16, 2):
                raise ValueError(f"scales is {scales!r:.60}: pass one to four odd numbers from 3 to 15.")
        object.__setattr__(self, "scales", tuple(scales))


@register_mixer("multi-scale")
class MultiScaleAttention(Mixer):
    """With lin(q, k, v)_i = relu(q_i) sum_j relu(k_j)^T v_j / (relu(q_i) . sum_j relu(k_j)),

        out = lin(q, k, v) + sum_s J_s lin(A_s q, A_s k, A_s v),

    where A_s is a depthwise s x s convolution of the frame and then a D x D matrix per head, and J_s mixes the channels
    of all heads. The paper widens the output projection by the heads of every scale: the columns that it adds are those
    of the inherited projection times J_s.

    Parameters, a list over scales of each:
        depth_weight: [3 * heads * D, 1, s, s], the mean of the neighbourhood, and depth_bias: [3 * heads * D], zeros.
        mix_weight: [3, heads, D, D], the identity, and mix_bias: [3, heads, D], zeros; for query, key and value.
        join_weight: [heads * D, heads * D], a hundredth of usual weights: next to nothing, but all has a gradient.

    Source: Cai et al., "EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction", ICCV 2023.
    """

    Config = MultiScaleConfig
    examples = (MultiScaleConfig(), MultiScaleConfig((3, 5)))
    summary = "relu linear attention of the tokens and of means of their neighbourhoods"
    source = "Cai et al., EfficientViT, ICCV 2023"
    needs = frozenset({"grid"})
    supports = frozenset({"mask", "frames", "text", "window", "compile"})

    def __init__(self, config: MultiScaleConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        heads, dim, channels = layer.heads, layer.head_dim, layer.heads * layer.head_dim
        self.depth_weight = nn.ParameterList(torch.full((3 * channels, 1, s, s), s**-2) for s in config.scales)
        self.depth_bias = nn.ParameterList(torch.zeros(3 * channels) for _ in config.scales)
        self.mix_weight = nn.ParameterList(torch.eye(dim).repeat(3, heads, 1, 1) for _ in config.scales)
        self.mix_bias = nn.ParameterList(torch.zeros(3, heads, dim) for _ in config.scales)
        self.join_weight = nn.ParameterList(
            torch.empty(channels, channels).uniform_(-1, 1) * 0.01 * channels**-0.5 for _ in config.scales
        )

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """See `Mixer.forward`. Raises ValueError when the grid does not hold the tokens."""
        mask = context.key_mask
        key, value = hide(key, mask), hide(value, mask)
        mixed = linear_product(wide(query).relu(), wide(key).relu(), value, mask, _EPS)
        for index in range(len(self.config.scales)):
            q, k, v = self._aggregated(index, wide(query), wide(key), wide(value), context)
            mixed = mixed + self._joined(index, linear_product(q.relu(), k.relu(), v, mask, _EPS))
        return Mixed(mixed.to(query.dtype))

    def _aggregated(
        self, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context
    ) -> tuple[torch.Tensor, ...]:
        """A_s of query, key and value [B, N, H, D]; masked tokens are zeros to their neighbours."""
        grid, query = grid_of(context, query.shape[1]), hide(query, context.key_mask)
        with torch.autocast(query.device.type, enabled=False):
            tokens = torch.cat([query, key, value], dim=2)
            near = convolve(tokens, self.depth_weight[index], self.depth_bias[index], grid, None)
            near = near.unflatten(2, (3, -1))
            mixed = torch.einsum("bnphd,phed->bnphe", near, self.mix_weight[index].to(near.dtype))
            return (mixed + self.mix_bias[index].to(near.dtype)).unbind(2)

    def _joined(self, index: int, mixed: torch.Tensor) -> torch.Tensor:
        """J_s of [B, N, H, D]."""
        with torch.autocast(mixed.device.type, enabled=False):
            return (mixed.flatten(2) @ self.join_weight[index].to(mixed.dtype).T).unflatten(-1, mixed.shape[2:])

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """The weights of all pairs as matrices, scale by scale."""
        mask = context.key_mask
        key, value = hide(key, mask), hide(value, mask)
        mixed = quadratic_product(query.relu(), key.relu(), value, mask, _EPS)
        for index in range(len(self.config.scales)):
            q, k, v = self._aggregated(index, query, key, value, context)
            mixed = mixed + self._joined(index, quadratic_product(q.relu(), k.relu(), v, mask, _EPS))
        return Mixed(mixed)
