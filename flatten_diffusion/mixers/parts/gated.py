"""What linear attention with a gate has: a convolution of the values beside it, both gated by the layer's input."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..base import Calibration, Context, LayerShape, Mixed, Mixer, MixerConfig
from ..calibration import CalibratedLayer, LayerCall, Statistic
from ..grid import Grid, count_tokens, images_of
from .convolution import convolve, patch_moments, solve_convolution
from .linear import hide


@dataclass(frozen=True)
class GatedConfig(MixerConfig):
    """Settings that gated mixers share.

    Args:
        kernel_size: side of the depthwise convolution of the values, odd, at most 31; 0 leaves it out.
        gate: whether the output is multiplied with a linear map of the layer's input.

    Raises:
        ValueError: a value out of range.
    """

    kernel_size: int = 5
    gate: bool = True

    def __post_init__(self) -> None:
        size = self.kernel_size
        odd = isinstance(size, int) and not isinstance(size, bool) and (size == 0 or size % 2 == 1)
        if not odd or not 0 <= size <= 31:
            raise ValueError(f"kernel_size is {size!r:.60}: pass an odd number up to 31, or 0 for no convolution.")
        if not isinstance(self.gate, bool):
            raise ValueError(f"gate is {self.gate!r:.60}: pass True or False.")


class GatedMixer(Mixer):
    """A mixer of the form (attend(q, k, v) + conv(v)) * (W_g x + b_g), x the layer's input.

    Parameters (all start where they change nothing):
        conv_weight: [heads * head_dim, 1, K, K], conv_bias: [heads * head_dim], zeros. Absent without convolution.
        gate_weight: [heads * head_dim, channels], zeros, gate_bias: [heads * head_dim], ones. Absent without gate.
    """

    def __init__(self, config: GatedConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        channels, size = layer.heads * layer.head_dim, config.kernel_size
        self.conv_weight = nn.Parameter(torch.zeros(channels, 1, size, size)) if size else None
        self.conv_bias = nn.Parameter(torch.zeros(channels)) if size else None
        self.gate_weight = nn.Parameter(torch.zeros(channels, layer.channels)) if config.gate else None
        self.gate_bias = nn.Parameter(torch.ones(channels)) if config.gate else None
        self.needs = frozenset((["grid"] if size else []) + (["hidden_states"] if config.gate else []))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        """The attention in linear time, [B, N, H, D], at least float32."""
        raise NotImplementedError

    def attend_by_pairs(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context
    ) -> torch.Tensor:
        """`attend` with the weights of all pairs as a matrix."""
        raise NotImplementedError

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """See `Mixer.forward`. Raises ValueError when the grid does not hold the tokens."""
        return self._finished(self.attend(query, key, value, context).to(query.dtype), value, context)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """The weights of all pairs as a matrix."""
        return self._finished(self.attend_by_pairs(query, key, value, context).to(query.dtype), value, context)

    def _finished(self, attended: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        if self.conv_weight is not None:
            grid = grid_of(context, value.shape[1])
            local = convolve(value, self.conv_weight, self.conv_bias, grid, context.key_mask)
            attended = attended + local.to(attended.dtype)
        if self.gate_weight is not None:
            assert context.hidden_states is not None, "its needs say so"
            hidden = hide(context.hidden_states, context.key_mask)  # padding has no part in the gate's gradient
            gate = F.linear(hidden, self.gate_weight, self.gate_bias)
            attended = attended * gate.unflatten(-1, attended.shape[2:]).to(attended.dtype)
        return Mixed(attended)

    def refine(self, layer: CalibratedLayer, settings: None) -> Calibration:
        """The depthwise kernel and bias: least squares on what the attention misses of the softmax, while the gate is
        what it starts as."""
        if self.conv_weight is None or self.conv_bias is None:
            return
        gate, offset = self.gate_weight, self.gate_bias
        if gate is not None and offset is not None and (gate.any() or (offset != 1).any()):
            return

        def measure(call: LayerCall) -> torch.Tensor:
            inputs = call.inputs
            attended = self.attend(inputs.query, inputs.key, inputs.value, inputs.context)
            missing = call.target() - inputs.join(attended).float()
            return patch_moments(inputs, missing, self.config.kernel_size, call.weights)

        (moments,) = yield Statistic(measure)
        solve_convolution(layer.name, moments, self.conv_weight, self.conv_bias, 1e-4)


def grid_of(context: Context, tokens: int) -> Grid:
    """Of the call. Raises ValueError unless it holds the tokens."""
    if context.grid is None or count_tokens(context.grid) != tokens:
        raise ValueError(f"This mixer needs a grid that holds {tokens} tokens, not {context.grid}.")
    return context.grid


def rotated(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """x [B, N, H, D] turned by the place of each token in its frame.

    Of the first 4 n channels (n = D // 4; the others stay) the first 2 n turn with the row, the last 2 n with the
    column: pair m of each (channels 2 m, 2 m + 1) by its number times 10000 ** (-m / (n - 1)), or times 1 for n = 1.
    """
    count = x.shape[-1] // 4
    angles = _angles(grid, count, x)  # [N, 1, 2 n]
    cos, sin = angles.cos(), angles.sin()
    even, odd = x[..., 0 : 4 * count : 2], x[..., 1 : 4 * count : 2]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., 4 * count :]], dim=-1)


def _angles(grid: Grid, count: int, like: torch.Tensor) -> torch.Tensor:
    """[N, 1, 2 n], in the dtype of `like`: by row, then by column."""
    steps = torch.arange(count, device=like.device, dtype=like.dtype)
    speeds = (steps * (-math.log(10000.0) / max(count - 1, 1))).exp()
    parts = []
    for frames, height, width in images_of(grid):
        rows = torch.arange(height, device=like.device, dtype=like.dtype).repeat_interleave(width)
        columns = torch.arange(width, device=like.device, dtype=like.dtype).repeat(height)
        turns = torch.cat([rows[:, None] * speeds, columns[:, None] * speeds], dim=-1)
        parts.append(turns.repeat(frames, 1))
    return torch.cat(parts)[:, None]
