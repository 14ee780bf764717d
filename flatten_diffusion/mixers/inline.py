"""InLine attention: linear attention normalised by subtraction, with a convolution predicted from the input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .base import Calibration, Context, LayerShape, Mixed, Mixer, MixerConfig
from .calibration import CalibratedLayer, LayerCall, MixerInputs, Statistic
from .grid import Grid, count_tokens
from .parts.convolution import convolve, patch_moments, solve_convolution
from .parts.linear import centred_product, fit_gain, hide, mean_of, wide
from .registry import register_mixer

_MAPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "exp": lambda x: (0.2 * x).exp(),
}


@dataclass(frozen=True)
class InLineConfig(MixerConfig):
    """Settings of `InLineAttention`.

    Args:
        feature_map: of query and key: "identity", "relu", "leaky_relu" or "exp" (of 0.2 x).
        kernel_size: side of the predicted convolution of the values, odd, at most 7; 3 is the paper's, 0 leaves it out,
            and with it the need for a grid and for the layer's input.

    Raises:
        ValueError: a value out of range.
    """

    feature_map: str = "identity"
    kernel_size: int = 3

    def __post_init__(self) -> None:
        if self.feature_map not in tuple(_MAPS):
            raise ValueError(f"feature_map is {self.feature_map!r:.60}: pass one of {', '.join(_MAPS)}.")
        size = self.kernel_size
        if isinstance(size, bool) or not isinstance(size, int) or size not in (0, 1, 3, 5, 7):
            raise ValueError(f"kernel_size is {size!r:.60}: pass 1, 3, 5 or 7, or 0 for no convolution.")


@register_mixer("inline")
class InLineAttention(Mixer):
    """With s = D ** -0.5 (or the layer's own scale), per head

        out_i = mean(v) + c_h s phi(q_i) mean_j((phi(k_j) - mean(phi(k)))^T v_j) + conv(v)_i.

    The weights of the keys sum to one and may be negative; nothing is divided. With phi = identity and no convolution
    this is `TaylorAttention`. The convolution's kernels, one per sample and channel, are W_2 gelu(W_1 g + b_1) + b_2 of
    g, the mean of the layer's input over its tokens; each head reads its share of the channels (all of them where they
    do not divide), and each frame is convolved by itself.

    Parameters:
        contrast: [heads], c_h, ones, which is the paper's.
        mix_weight: [heads, D, channels / heads], mix_bias: [heads, D], drawn as in the paper: W_1 and b_1.
        tap_weight: [heads, D K K, D], a hundredth of what the paper draws: W_2, which then adds next to nothing but has
            a gradient; tap_bias: [heads, D K K], zeros: b_2.

    Source: Han et al., "Bridging the Divide: Reconsidering Softmax and Linear Attention", NeurIPS 2024.
    """

    Config = InLineConfig
    examples = (InLineConfig(), InLineConfig("exp", 5), InLineConfig("leaky_relu", 0))
    summary = "linear attention normalised by subtraction, and a convolution predicted from the input"
    source = "Han et al., Bridging the Divide (InLine), NeurIPS 2024"
    supports = frozenset({"mask", "frames", "text", "window", "compile"})

    def __init__(self, config: InLineConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        heads, dim, taps = layer.heads, layer.head_dim, config.kernel_size**2
        self.contrast = nn.Parameter(torch.ones(heads))
        self.needs = frozenset({"grid", "hidden_states"}) if taps else frozenset()
        if not taps:
            return
        width = layer.channels if layer.channels % heads else layer.channels // heads
        self.mix_weight = nn.Parameter(torch.empty(heads, dim, width).uniform_(-1, 1) * width**-0.5)
        self.mix_bias = nn.Parameter(torch.empty(heads, dim).uniform_(-1, 1) * width**-0.5)
        self.tap_weight = nn.Parameter(torch.empty(heads, dim * taps, dim).uniform_(-1, 1) * dim**-0.5 * 0.01)
        self.tap_bias = nn.Parameter(torch.zeros(heads, dim * taps))

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """See `Mixer.forward`. Raises ValueError when the grid does not hold the tokens."""
        mean, centred = self._parts(query, key, value, context)
        mixed = (mean + wide(self.contrast)[:, None] * centred).to(query.dtype)
        return Mixed(mixed + self._local(value, context, self._kernels(context)) if self.config.kernel_size else mixed)

    def _parts(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """mean(v) [B, 1, H, D] and s phi(q_i) mean_j(...) [B, N, H, D]."""
        phi, mask = _MAPS[self.config.feature_map], context.key_mask
        mean, centred = centred_product(phi(wide(query)), phi(wide(hide(key, mask))), value, mask)
        return mean, context.softmax_scale(query) * centred

    def _kernels(self, context: Context) -> torch.Tensor:
        """[B, H, D K K], at least float32."""
        hidden, heads = context.hidden_states, self.layer.heads
        assert hidden is not None, "its needs say so"
        with torch.autocast(hidden.device.type, enabled=False):
            mean = mean_of(wide(hidden)[:, :, None], context.key_mask)  # [B, 1, C]
            groups = 1 if mean.shape[-1] % heads else heads
            mean = mean.reshape(len(mean), groups, -1).expand(-1, heads, -1)
            mid = torch.einsum("bhc,hdc->bhd", mean, self.mix_weight.to(mean.dtype)) + self.mix_bias
            return torch.einsum("bhd,hkd->bhk", F.gelu(mid), self.tap_weight.to(mean.dtype)) + self.tap_bias

    def _local(self, value: torch.Tensor, context: Context, kernels: torch.Tensor) -> torch.Tensor:
        """conv(v) [B, N, H, D], in the dtype of the values: samples stand beside one another as heads."""
        batch, tokens, heads, dim = value.shape
        side = self.config.kernel_size
        weight = kernels.expand(batch, -1, -1).reshape(-1, 1, side, side)
        values = hide(value, context.key_mask).transpose(0, 1).reshape(1, tokens, batch * heads, dim)
        local = convolve(values, weight, None, _grid(context, tokens), None)
        return local.reshape(tokens, batch, heads, dim).transpose(0, 1).to(value.dtype)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """The weights of all pairs as a matrix, and the convolution sample by sample."""
        phi, mask = _MAPS[self.config.feature_map], context.key_mask
        queries, keys, values = phi(query), phi(hide(key, mask)), hide(value, mask)
        scores = torch.einsum("bnhd,bmhd->bnhm", queries, keys - mean_of(keys, mask)[:, None])
        weights = 1 + self.contrast[:, None].to(query.dtype) * context.softmax_scale(query) * scores
        if mask is None:
            weights = weights / key.shape[1]
        else:
            weights = weights * mask[:, None, None, :] / mask.sum(dim=1).clamp(min=1)[:, None, None, None]
        mixed = torch.einsum("bnhm,bmhd->bnhd", weights.to(query.dtype), values)
        side = self.config.kernel_size
        if side:
            kernels = self._kernels(context).reshape(len(value), -1, 1, side, side)
            grid = _grid(context, value.shape[1])
            local = [convolve(values[i : i + 1], kernels[i], None, grid, None) for i in range(len(value))]
            mixed = mixed + torch.cat(local)
        return Mixed(mixed)

    def calibrate(self, layer: CalibratedLayer, settings: None) -> Calibration:
        """Each head's contrast, by least squares. Returns them."""

        def parts(inputs: MixerInputs) -> tuple[torch.Tensor, torch.Tensor]:
            return self._parts(inputs.query, inputs.key, inputs.value, inputs.context)

        return (yield from fit_gain(self.contrast, parts, layer))

    def refine(self, layer: CalibratedLayer, settings: None) -> Calibration:
        """b_2, the kernels that do not depend on the input: least squares on what the rest misses of the softmax."""
        side = self.config.kernel_size
        if not side:
            return

        def measure(call: LayerCall) -> torch.Tensor:
            inputs = call.inputs
            static = self._local(inputs.value, inputs.context, self.tap_bias[None])
            missing = call.target() - inputs.join(inputs.mix(self) - static).float()
            return patch_moments(inputs, missing, side, call.weights)

        (moments,) = yield Statistic(measure)
        moments[:, :, side * side] = 0.0  # no intercept, which the convolution lacks
        moments[:, :, :, side * side] = 0.0
        nothing = nn.Parameter(torch.zeros(self.layer.heads * self.layer.head_dim))
        solve_convolution(layer.name, moments, self.tap_bias, nothing, 1e-4)


def _grid(context: Context, tokens: int) -> Grid:
    """Of the call. Raises ValueError unless it holds the tokens."""
    if context.grid is None or count_tokens(context.grid) != tokens:
        raise ValueError(f"InLine attention needs a grid that holds {tokens} tokens, not {context.grid}.")
    return context.grid
