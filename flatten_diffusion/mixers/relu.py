"""ReLU linear attention: what Sana puts in place of softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .base import Calibration, Context, LayerShape, MixerConfig
from .calibration import CalibratedLayer
from .parts.linear import LinearMixer, fit_shifts
from .registry import register_mixer


@dataclass(frozen=True)
class ReluConfig(MixerConfig):
    """`ReluAttention` has no settings."""


@register_mixer("relu")
class ReluAttention(LinearMixer):
    """With phi(x) = relu(x + shift), per head

        out_i = phi(q_i) [sum_j phi(k_j)^T v_j] / (phi(q_i) . sum_j phi(k_j)),

    and zero where no feature of the query is above zero. Sana's own locality lies in its feed-forward layers: without
    them, `FocusedLinearConfig(focusing_factor=1)` is much the same beside a convolution.

    Parameters: query_shift, key_shift: [heads, D], zeros, which is Sana's; calibration chooses them, so that the relu
    cuts less of what the layer has learned.

    Source: Xie et al., "SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers", ICLR 2025.
    """

    Config = ReluConfig
    examples = (ReluConfig(),)
    summary = "relu features of query and key"
    source = "Xie et al., SANA, ICLR 2025"
    supports = frozenset({"mask", "frames", "images", "text", "window", "compile"})
    eps = 1e-15

    def __init__(self, config: ReluConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        self.query_shift, self.key_shift = (nn.Parameter(torch.zeros(layer.heads, layer.head_dim)) for _ in range(2))

    def features(self, query: torch.Tensor, key: torch.Tensor, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """relu of both, shifted."""
        return (query + self.query_shift.to(query.dtype)).relu(), (key + self.key_shift.to(key.dtype)).relu()

    def calibrate(self, layer: CalibratedLayer, settings: None) -> Calibration:
        """Each head's shift, by what its output leaves of the softmax. Returns the shares of the root mean square."""
        return (yield from fit_shifts(self, self.query_shift, self.key_shift, layer))
