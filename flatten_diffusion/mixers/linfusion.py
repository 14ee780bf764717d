"""LinFusion's generalised linear attention: elu features of query and key, each corrected by an MLP of the input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .base import Calibration, Context, LayerShape, MixerConfig
from .calibration import CalibratedLayer
from .parts.linear import LinearMixer, elu_plus_one, fit_log_scale, hide, sharpened
from .registry import register_mixer


@dataclass(frozen=True)
class LinFusionConfig(MixerConfig):
    """Settings of `LinFusionAttention`.

    Args:
        width: of the MLPs' middle, 1 to 8192; 0, the paper's choice, for as many as the layer's input has channels.

    Raises:
        ValueError: a value out of range.
    """

    width: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.width, bool) or not isinstance(self.width, int) or not 0 <= self.width <= 8192:
            raise ValueError(f"width is {self.width!r:.60}: pass a whole number up to 8192, 0 for that of the input.")


@register_mixer("linfusion")
class LinFusionAttention(LinearMixer):
    """As `EluAttention`, with q_i + f_q(x_i) and k_j + f_k(x_j) for q_i and k_j, where x is the layer's input and

        f(x) = A_2 leaky_relu(LayerNorm(A_1 x + a_1)) + a_2.

    The paper's correction W_q f(x) stands before the projection: A_2 and a_2 here are W_q times those of the paper.

    Parameters:
        log_scale: [heads], as in `EluAttention`.
        query_mlp, key_mlp: Linear [width, channels], LayerNorm, Linear [heads * head_dim, width]. The last layer starts
            at a hundredth of its usual weights and no bias: next to nothing, and all of it has a gradient.

    Source: Liu et al., "LinFusion: 1 GPU, 1 Minute, 16K Image", 2024.
    """

    Config = LinFusionConfig
    examples = (LinFusionConfig(), LinFusionConfig(width=8))
    summary = "elu + 1 features, query and key corrected by small MLPs of the layer's input"
    source = "Liu et al., LinFusion, 2024"
    needs = frozenset({"hidden_states"})
    supports = frozenset({"mask", "frames", "images", "text", "window", "compile"})
    eps = 1e-4

    def __init__(self, config: LinFusionConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        self.log_scale = nn.Parameter(torch.zeros(layer.heads))
        self.query_mlp, self.key_mlp = (_mlp(layer, config.width or layer.channels) for _ in range(2))

    def features(self, query: torch.Tensor, key: torch.Tensor, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """elu + 1 of both, corrected and sharpened."""
        assert context.hidden_states is not None, "its needs say so"
        hidden = hide(context.hidden_states, context.key_mask)  # padding's gradient is no part of the MLPs'
        query = query + self.query_mlp(hidden).unflatten(-1, query.shape[2:]).to(query.dtype)
        key = key + self.key_mlp(hidden).unflatten(-1, key.shape[2:]).to(key.dtype)
        return elu_plus_one(sharpened(query, self.log_scale)), elu_plus_one(sharpened(key, self.log_scale))

    def calibrate(self, layer: CalibratedLayer, settings: None) -> Calibration:
        """Each head's scale, by what its output leaves of the softmax. Returns the factors."""
        return (yield from fit_log_scale(self, self.log_scale, layer))


def _mlp(layer: LayerShape, width: int) -> nn.Sequential:
    last = nn.Linear(width, layer.heads * layer.head_dim)
    with torch.no_grad():
        last.weight.mul_(0.01)
        last.bias.zero_()
    return nn.Sequential(nn.Linear(layer.channels, width), nn.LayerNorm(width), nn.LeakyReLU(0.01), last)
