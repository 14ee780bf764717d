"""RALA: linear attention of augmented rank, keys weighed by the mean query and the output gated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .base import Calibration, Context, LayerShape
from .calibration import CalibratedLayer
from .parts.gated import GatedConfig, GatedMixer, grid_of, rotated
from .parts.linear import count_keys, elu_plus_one, fit_log_scale, hide, mean_of, sharpened, state_of, wide
from .registry import register_mixer

_EPS = 1e-6


@dataclass(frozen=True)
class RalaConfig(GatedConfig):
    """Settings of `RalaAttention`.

    Args:
        kernel_size: side of the depthwise convolution of the values, odd, at most 31; 0 leaves it out.
        gate: whether the output is multiplied with a linear map of the layer's input.
        rotary: whether query and key are turned by row and column, as the paper trains it; a layer that was trained
            without starts nearer to itself without.

    Raises:
        ValueError: a value out of range.
    """

    rotary: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.rotary, bool):
            raise ValueError(f"rotary is {self.rotary!r:.60}: pass True or False.")


@register_mixer("rala")
class RalaAttention(GatedMixer):
    """With q and k behind elu(t_h x) + 1, s = D ** -0.5 (or the layer's own scale), R a rotation by row and column (see
    `parts.gated.rotated`; none unless `rotary`), per head

        a_j = n softmax_j(s mean(q) . k_j),   k_j := a_j k_j,
        y_i = R q_i mean_j((R k_j)^T v_j) / (q_i . mean(k) + 1e-6),

    n the number of keys; the output is (y + conv(v)) * (W_g x + b_g).

    Parameters: those of `GatedMixer`, and log_scale: [heads], zeros, t_h = exp(log_scale); calibration chooses it.

    Source: Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", CVPR 2025.
    """

    Config = RalaConfig
    examples = (RalaConfig(), RalaConfig(0, False), RalaConfig(3, True, True))
    summary = "elu + 1 features, keys weighed by the mean query, a convolution and a gate"
    source = "Fan et al., Breaking the Low-Rank Dilemma of Linear Attention, CVPR 2025"
    supports = frozenset({"mask", "text", "window", "compile"})

    def __init__(self, config: RalaConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        self.log_scale = nn.Parameter(torch.zeros(layer.heads))
        self.needs = self.needs | {"grid"} if config.rotary else self.needs

    def _mapped(
        self, query: torch.Tensor, key: torch.Tensor, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, R q and R k; masked keys are zeros, and masked queries count in no mean."""
        mask = context.key_mask
        query = elu_plus_one(sharpened(query, self.log_scale))
        key = hide(elu_plus_one(sharpened(hide(key, mask), self.log_scale)), mask)
        mean = mean_of(query, mask if key.shape[1] == query.shape[1] else None)
        scores = context.softmax_scale(query) * torch.einsum("bhd,bmhd->bmh", mean, key)
        if mask is not None:  # without any key, zeros are averaged
            kept = mask | ~mask.any(dim=1, keepdim=True)
            scores = scores.masked_fill(~kept[..., None], -torch.inf)
        key = key * (scores.softmax(dim=1) * count_keys(key, mask))[..., None]
        if not self.config.rotary:
            return query, key, query, key
        grid = grid_of(context, query.shape[1])
        return query, key, rotated(query, grid), rotated(key, grid)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        """y, [B, N, H, D]."""
        mask, value = context.key_mask, wide(value)
        with torch.autocast(query.device.type, enabled=False):
            query, key, turned_query, turned_key = self._mapped(wide(query), wide(key), context)
            normalizer = torch.einsum("bnhd,bhd->bnh", query, mean_of(key, mask)) + _EPS
            product = torch.einsum("bnhd,bhde->bnhe", turned_query, state_of(turned_key, value, mask))
            return product / normalizer[..., None]

    def attend_by_pairs(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context
    ) -> torch.Tensor:
        """y from the weights R q_i . R k_j over the mean of q_i . k_j."""
        mask = context.key_mask
        query, key, turned_query, turned_key = self._mapped(query, key, context)
        count = count_keys(key, mask)[..., None]
        normalizer = torch.einsum("bnhd,bmhd->bnhm", query, key).sum(-1, keepdim=True) / count + _EPS
        weights = torch.einsum("bnhd,bmhd->bnhm", turned_query, turned_key) / normalizer
        return torch.einsum("bnhm,bmhd->bnhd", weights / count, hide(value, mask))

    def calibrate(self, layer: CalibratedLayer, settings: None) -> Calibration:
        """Each head's scale, by what its output leaves of the softmax. Returns the factors."""
        return (yield from fit_log_scale(self, self.log_scale, layer))
