"""Hedgehog: feature maps of query and key that learn to mimic softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .base import Calibration, Context, LayerShape, MixerConfig
from .calibration import CalibratedLayer
from .parts.linear import LinearMixer, fit_log_scale, sharpened
from .registry import register_mixer

_FLOOR = 1e-12


@dataclass(frozen=True)
class HedgehogConfig(MixerConfig):
    """Settings of `HedgehogAttention`.

    Args:
        feature_dim: width of each head's map, 1 to 512; 0, the default, for the head's own. The features are twice it.
        activation: "softmax" over the features, or "exp" (of the distance to the largest).
        skip: whether query and key are added to their maps; feature_dim must be 0.

    Raises:
        ValueError: a value out of range.
    """

    feature_dim: int = 0
    activation: str = "softmax"
    skip: bool = False

    def __post_init__(self) -> None:
        width = self.feature_dim
        if isinstance(width, bool) or not isinstance(width, int) or not 0 <= width <= 512:
            raise ValueError(f"feature_dim is {width!r:.60}: pass a whole number up to 512, 0 for that of the head.")
        if self.activation not in ("softmax", "exp"):
            raise ValueError(f'activation is {self.activation!r:.60}: pass "softmax" or "exp".')
        if not isinstance(self.skip, bool) or (self.skip and width):
            raise ValueError(f"skip is {self.skip!r:.60}: pass True or False, and True only with feature_dim 0.")


@register_mixer("hedgehog")
class HedgehogAttention(LinearMixer):
    """With u = t_h x W (plus t_h x with `skip`) of a query or key x, per head and of each a W of its own,

        phi(x) = [softmax(u), softmax(-u)]   or   [exp(u - max u), exp(min u - u)],   not below 1e-12,
        out_i = sum_j (phi(q_i) . phi(k_j)) v_j / sum_j phi(q_i) . phi(k_j).

    Parameters:
        log_scale: [heads], zeros, t_h = exp(log_scale); calibration chooses it.
        query_map, key_map: [heads, D, F], W: the identity, zeros with `skip`, and drawn uniformly, as in the authors'
            code, where `feature_dim` is given.

    Source: Zhang et al., "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry", ICLR 2024.
    """

    Config = HedgehogConfig
    examples = (HedgehogConfig(), HedgehogConfig(5, "exp"), HedgehogConfig(skip=True))
    summary = "learned maps of query and key under a softmax over features, which mimic softmax"
    source = "Zhang et al., The Hedgehog & the Porcupine, ICLR 2024"
    supports = frozenset({"mask", "frames", "images", "text", "window", "compile"})
    eps = 1e-12

    def __init__(self, config: HedgehogConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        self.log_scale = nn.Parameter(torch.zeros(layer.heads))
        self.query_map, self.key_map = (nn.Parameter(_start(config, layer)) for _ in range(2))

    def features(self, query: torch.Tensor, key: torch.Tensor, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """phi of both, [B, N, H, 2 F]."""
        return self._map(query, self.query_map), self._map(key, self.key_map)

    def _map(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = sharpened(x, self.log_scale)
        with torch.autocast(x.device.type, enabled=False):
            mapped = torch.einsum("bnhd,hdf->bnhf", x, weight.to(x.dtype))
        mapped = mapped + x if self.config.skip else mapped
        if self.config.activation == "softmax":
            halves = [mapped.softmax(-1), (-mapped).softmax(-1)]
        else:
            halves = [(mapped - mapped.amax(-1, True)).exp(), (mapped.amin(-1, True) - mapped).exp()]
        return torch.cat(halves, dim=-1).clamp(min=_FLOOR)

    def calibrate(self, layer: CalibratedLayer, settings: None) -> Calibration:
        """Each head's scale, by what its output leaves of the softmax. Returns the factors."""
        return (yield from fit_log_scale(self, self.log_scale, layer))


def _start(config: HedgehogConfig, layer: LayerShape) -> torch.Tensor:
    """W of one map, [heads, D, F]."""
    heads, dim = layer.heads, layer.head_dim
    if config.feature_dim:
        return torch.empty(heads, dim, config.feature_dim).uniform_(-1, 1) * dim**-0.5
    return torch.zeros(heads, dim, dim) if config.skip else torch.eye(dim).repeat(heads, 1, 1)
