"""Linear Taylor attention of ViTALiTy: the first-order expansion of softmax around keys of equal weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .base import Calibration, Context, LayerShape, Mixed, Mixer, MixerConfig
from .calibration import CalibratedLayer, MixerInputs
from .parts.linear import centred_product, fit_gain, hide, mean_of, wide
from .registry import register_mixer


@dataclass(frozen=True)
class TaylorConfig(MixerConfig):
    """`TaylorAttention` has no settings."""


@register_mixer("taylor")
class TaylorAttention(Mixer):
    """With k'_j = k_j - mean(k), which leaves softmax as it is, and s = D ** -0.5 (or the layer's own scale), per head

        w_ij = 1 + c_h s q_i.k'_j,    out_i = sum_j w_ij v_j / sum_j w_ij = mean(v) + c_h s q_i mean_j(k'_j^T v_j),

    since the k'_j sum to zero. Weights may be negative. Close to softmax only while scores are well below 1: beyond,
    the expansion overshoots, and calibration finds c_h < 1.

    Parameter: contrast: [heads], c_h, ones, which is the paper's.

    Source: Dass et al., "ViTALiTy: Unifying Low-rank and Sparse Approximation for Vision Transformer Acceleration with
    a Linear Taylor Attention", HPCA 2023.
    """

    Config = TaylorConfig
    examples = (TaylorConfig(),)
    summary = "first-order expansion of softmax around the mean of the values"
    source = "Dass et al., ViTALiTy, HPCA 2023"
    supports = frozenset({"mask", "frames", "images", "text", "window", "compile"})

    def __init__(self, config: TaylorConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        self.contrast = nn.Parameter(torch.ones(layer.heads))

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """See `Mixer.forward`."""
        mean, expansion = self._parts(query, key, value, context)
        return Mixed((mean + wide(self.contrast)[:, None] * expansion).to(query.dtype))

    def _parts(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """mean(v) [B, 1, H, D] and s q_i mean_j(k'_j^T v_j) [B, N, H, D]."""
        mean, expansion = centred_product(query, key, value, context.key_mask)
        return mean, context.softmax_scale(query) * expansion

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """The weights of all pairs as a matrix."""
        mask = context.key_mask
        key, value = hide(key, mask), hide(value, mask)
        scores = torch.einsum("bnhd,bmhd->bnhm", query, key - mean_of(key, mask)[:, None])
        weights = 1 + self.contrast[:, None].to(query.dtype) * context.softmax_scale(query) * scores
        if mask is not None:
            weights = weights * mask[:, None, None, :]
        total = weights.sum(dim=-1, keepdim=True)
        if mask is not None:
            total = total + ~mask.any(dim=1)[:, None, None, None]  # without any key, zero
        return Mixed(torch.einsum("bnhm,bmhd->bnhd", weights / total, value))

    def calibrate(self, layer: CalibratedLayer, settings: None) -> Calibration:
        """Each head's contrast, by least squares. Returns them."""

        def parts(inputs: MixerInputs) -> tuple[torch.Tensor, torch.Tensor]:
            return self._parts(inputs.query, inputs.key, inputs.value, inputs.context)

        return (yield from fit_gain(self.contrast, parts, layer))
