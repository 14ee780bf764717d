"""Linear attention with the features elu + 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .base import Calibration, Context, LayerShape, MixerConfig
from .calibration import CalibratedLayer
from .parts.linear import LinearMixer, elu_plus_one, fit_log_scale, sharpened
from .registry import register_mixer


@dataclass(frozen=True)
class EluConfig(MixerConfig):
    """`EluAttention` has no settings."""


@register_mixer("elu")
class EluAttention(LinearMixer):
    """With phi(x) = elu(t_h x) + 1, per head

        out_i = phi(q_i) mean_j(phi(k_j)^T v_j) / (phi(q_i) . mean_j(phi(k_j)) + 1e-4).

    Parameter: log_scale: [heads], zeros, t_h = exp(log_scale); calibration chooses it.

    Sources: Katharopoulos et al., "Transformers are RNNs", ICML 2020; the eps and the means are those of Liu et al.,
    "LinFusion: 1 GPU, 1 Minute, 16K Image", 2024.
    """

    Config = EluConfig
    examples = (EluConfig(),)
    summary = "positive features elu + 1 of query and key"
    source = "Katharopoulos et al., Transformers are RNNs, ICML 2020"
    supports = frozenset({"mask", "frames", "images", "text", "window", "compile"})
    eps = 1e-4

    def __init__(self, config: EluConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        self.log_scale = nn.Parameter(torch.zeros(layer.heads))

    def features(self, query: torch.Tensor, key: torch.Tensor, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """elu + 1 of both, sharpened."""
        return elu_plus_one(sharpened(query, self.log_scale)), elu_plus_one(sharpened(key, self.log_scale))

    def calibrate(self, layer: CalibratedLayer, settings: None) -> Calibration:
        """Each head's scale, by what its output leaves of the softmax. Returns the factors."""
        return (yield from fit_log_scale(self, self.log_scale, layer))
