"""Focused linear attention with its learned scale and depthwise convolution."""

from __future__ import annotations

import torch
from torch import nn

from ..ops import focused_linear_attention
from .base import Mixer, MixerSpec, register_mixer


@register_mixer("focused_linear")
class FocusedLinearAttention(Mixer):
    """The learned part of focused linear attention for one layer.

    Parameters (all start where they change nothing):
        log_scale: [heads * head_dim], zeros. `exp(log_scale)` divides query and key inside the map: positive, and
            exactly 1 at the start in every dtype.
        conv_weight: [head_dim, 1, K, K], zeros, and conv_bias: [head_dim], zeros: the depthwise convolution of the
            values on the token grid, one kernel shared by the heads. Absent when `spec.kernel_size` is 0.

    Source: Han et al., "FLatten Transformer: Vision Transformer using Focused Linear Attention", ICCV 2023, eq. 5-8.
    """

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        self.uses_grid = spec.kernel_size > 0
        self.log_scale = nn.Parameter(torch.zeros(spec.heads * spec.head_dim))
        self.conv_weight: nn.Parameter | None = None
        self.conv_bias: nn.Parameter | None = None
        if self.uses_grid:
            self.conv_weight = nn.Parameter(torch.zeros(spec.head_dim, 1, spec.kernel_size, spec.kernel_size))
            self.conv_bias = nn.Parameter(torch.zeros(spec.head_dim))

    @property
    def scale(self) -> torch.Tensor:
        """[heads * head_dim], positive, at least float32."""
        log_scale = self.log_scale
        # exp in half precision would quantise the scale far coarser than its logarithm.
        return log_scale.to(torch.promote_types(log_scale.dtype, torch.float32)).exp()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Mixer.forward`. Raises ValueError when the convolution has no grid or the grid does not fit."""
        return focused_linear_attention(
            query,
            key,
            value,
            focusing_factor=self.spec.focusing_factor,
            scale=self.scale,
            conv_weight=self.conv_weight,
            conv_bias=self.conv_bias,
            grid=grid if self.uses_grid else None,
            key_mask=key_mask,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        spec = self.spec
        return (
            f"heads={spec.heads}, head_dim={spec.head_dim}, focusing_factor={spec.focusing_factor}, "
            f"kernel_size={spec.kernel_size}"
        )
