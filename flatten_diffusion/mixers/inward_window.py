"""Inward sliding windows: every query sees a window as large as training was, in all frames."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .base import Context, LayerShape, Mixed, MixerConfig
from .parts.partition import Axis, Pattern, neighbourhoods, neighbourhoods_pattern
from .parts.sparse import SparseAttention, pair
from .registry import register_mixer


@dataclass(frozen=True)
class InwardWindowConfig(MixerConfig):
    """Settings of `InwardWindowAttention`.

    Args:
        half_window: rows and columns to either side, or one number for both, 0 to 64. FreeSwim takes half of the grid
            that the model was trained on: (15, 26) for Wan at 480 x 832.
        sharpness: factor on the scale of the softmax, 0.5 to 2. FreeSwim's is sqrt(log(seen) / log(trained)) in numbers
            of keys, 1.046 for twice the keys of Wan's 1560.

    Raises:
        ValueError: a value out of range.
    """

    half_window: int | tuple[int, int] = 3
    sharpness: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "half_window", pair("half_window", self.half_window, 0, 64))
        value = self.sharpness
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.5 <= value <= 2:
            raise ValueError(f"sharpness is {value!r:.60}: pass a number from 0.5 to 2.")
        object.__setattr__(self, "sharpness", float(value))


@register_mixer("inward-window")
class InwardWindowAttention(SparseAttention):
    """A query at (t, y, x) sees, in all frames, the keys with |y' - c_y| <= a and |x' - c_x| <= b, where its window's
    middle (c_y, c_x) is moved inwards until the window lies within the picture:

        c_y = clamp(y, a, H - 1 - a),   c_x = clamp(x, b, W - 1 - b);   softmax has scale sharpness_h * s.

    A large picture is then seen as the model saw its small ones. Where 2a + 1 >= H and 2b + 1 >= W this is softmax.

    Parameters (zeros): log_sharpness: [heads], of which sharpness_h is the exponential times the setting.

    Source: "FreeSwim", training-free high-resolution video generation with inward sliding windows, 2025.
    """

    Config = InwardWindowConfig
    examples = (InwardWindowConfig(), InwardWindowConfig(half_window=(1, 2), sharpness=1.046))
    summary = "windows of the size of training, moved inwards, over all frames; works untrained"
    cost = "O(N a b)"
    source = "FreeSwim, 2025"

    def __init__(self, config: InwardWindowConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        self.bias = None
        self.log_sharpness = nn.Parameter(torch.zeros(layer.heads))
        down, right = pair("half_window", config.half_window, 0, 64)
        self.sides = 2 * down + 1, 2 * right + 1

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """See `SparseAttention.forward`."""
        return super().forward(self._sharpened(query), key, value, context)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """See `SparseAttention.reference`."""
        return super().reference(self._sharpened(query), key, value, context)

    def _sharpened(self, query: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(self.log_sharpness.dtype, torch.float32)
        factor = self.log_sharpness.to(dtype).exp() * self.config.sharpness
        return (query * factor[:, None]).to(query.dtype)

    def axes(self, size: tuple[int, int], kind: str, device: torch.device) -> tuple[Axis, Axis]:
        """See `SparseAttention.axes`."""
        rows, columns = (neighbourhoods(n, side, device=device) for n, side in zip(size, self.sides, strict=True))
        return rows, columns

    def patterns(self, size: tuple[int, int], kind: str, device: torch.device) -> tuple[Pattern, Pattern]:
        """See `SparseAttention.patterns`."""
        rows, columns = (
            neighbourhoods_pattern(n, side, device=device) for n, side in zip(size, self.sides, strict=True)
        )
        return rows, columns
