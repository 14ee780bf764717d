"""Focused linear attention with its learned scale and depthwise convolution."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from ..ops import even_rows, focused_linear_attention, split_focused_linear_attention
from ..ops.focused_linear.reference import HeadMap, depthwise_convolution, map_heads
from .base import Mixer, MixerSpec, register_mixer
from .grid import Grid, pictures_of


class FeatureMap(nn.Module):
    """Adds an affine map of each head to queries or keys, behind norms and rotary embeddings.

    Parameters: weight: [heads, head_dim, head_dim], and bias: [heads, head_dim], zeros, which change nothing.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, head_dim, head_dim))
        self.bias = nn.Parameter(torch.zeros(heads, head_dim))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, N, H, D] -> x + x @ weight + bias, in the input's dtype."""
        return map_heads(tokens, self.affine)

    @property
    def affine(self) -> HeadMap:
        """(eye + weight, bias): the map as the operator takes it, at least float32 beside the ones."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return torch.eye(self.weight.shape[-1], device=self.weight.device, dtype=dtype) + self.weight, self.bias


@register_mixer("focused_linear")
class FocusedLinearAttention(Mixer):
    """The learned part of focused linear attention for one layer.

    Parameters (all start where they change nothing):
        log_scale: [heads * head_dim], zeros. `exp(log_scale)` divides query and key inside the map: positive, and
            exactly 1 at the start in every dtype.
        conv_weight: [heads * head_dim, 1, K, K], zeros, and conv_bias: [heads * head_dim], zeros: the depthwise
            convolution of the values on the token grid. The paper's one kernel for all heads costs as much, and heads
            differ in how far they look. Absent when `spec.kernel_size` is 0.
        query_map, key_map: see `FeatureMap`. Absent without `spec.feature_maps`.

    Source: Han et al., "FLatten Transformer: Vision Transformer using Focused Linear Attention", ICCV 2023, eq. 5-8.
    """

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        self.uses_grid = spec.kernel_size > 0 or spec.window > 0
        self.log_scale = nn.Parameter(torch.zeros(spec.heads * spec.head_dim))
        self.conv_weight: nn.Parameter | None = None
        self.conv_bias: nn.Parameter | None = None
        if spec.kernel_size > 0:
            channels = spec.heads * spec.head_dim
            self.conv_weight = nn.Parameter(torch.zeros(channels, 1, spec.kernel_size, spec.kernel_size))
            self.conv_bias = nn.Parameter(torch.zeros(channels))
        self.query_map: FeatureMap | None = None
        self.key_map: FeatureMap | None = None
        if spec.feature_maps:
            self.add_feature_maps()

    def add_feature_maps(self) -> None:
        """Let query and key learn a map of their own here, which changes nothing yet; kept where there is one."""
        if self.query_map is None:
            device, dtype = self.log_scale.device, self.log_scale.dtype
            self.query_map = FeatureMap(self.spec.heads, self.spec.head_dim).to(device, dtype)
            self.key_map = FeatureMap(self.spec.heads, self.spec.head_dim).to(device, dtype)
            self.spec = replace(self.spec, feature_maps=True)

    def map_features(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Query and key [B, N, H, D] behind the maps, where there are any."""
        if self.query_map is None or self.key_map is None:
            return query, key
        return self.query_map(query), self.key_map(key)

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
        grid: Grid | None = None,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Mixer.forward`. Attention is over all tokens; the convolution stays within each frame.

        Raises ValueError when the convolution has no grid or the grid does not fit.
        """
        pictures = pictures_of(grid) if self.conv_weight is not None and grid is not None else []
        one_frame = len(pictures) < 2 and all(frames == 1 for frames, _, _ in pictures)
        if self.group is not None:
            if not one_frame:
                raise ValueError("Tokens of several frames or pictures cannot be split over processes: pass one image.")
            return self._split(query, key, value, pictures, key_mask)
        mixed = focused_linear_attention(
            query,
            key,
            value,
            focusing_factor=self.spec.focusing_factor,
            scale=self.scale,
            query_map=None if self.query_map is None else self.query_map.affine,
            key_map=None if self.key_map is None else self.key_map.affine,
            conv_weight=self.conv_weight if one_frame else None,
            conv_bias=self.conv_bias if one_frame else None,
            grid=pictures[0][1:] if one_frame and pictures else None,
            key_mask=key_mask,
            backend=self.backend,
        )
        return mixed if one_frame else mixed + self._convolve(value, pictures, key_mask).to(mixed.dtype)

    def _split(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pictures: list[tuple[int, int, int]],
        key_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """This process's rows of one picture, [B, N, H, D]: the `even_rows` share of the whole grid."""
        rows = even_rows(pictures[0][1], dist.get_world_size(self.group)) if pictures else None
        return split_focused_linear_attention(
            query,
            key,
            value,
            group=self.group,
            rows=rows,
            focusing_factor=self.spec.focusing_factor,
            scale=self.scale,
            query_map=None if self.query_map is None else self.query_map.affine,
            key_map=None if self.key_map is None else self.key_map.affine,
            conv_weight=self.conv_weight,
            conv_bias=self.conv_bias,
            key_mask=key_mask,
            backend=self.backend,
        )

    def _convolve(
        self, value: torch.Tensor, pictures: list[tuple[int, int, int]], key_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The convolution of every frame of every picture by itself, [B, N, H, D]."""
        assert self.conv_weight is not None
        batch, _, heads, head_dim = value.shape
        if key_mask is not None:
            value = value.masked_fill(~key_mask[:, :, None, None], 0.0)
        parts = []
        sizes = [frames * height * width for frames, height, width in pictures]
        for part, (frames, height, width) in zip(value.split(sizes, dim=1), pictures, strict=True):
            folded = part.reshape(batch * frames, height * width, heads, head_dim)
            local = depthwise_convolution(folded, self.conv_weight, self.conv_bias, (height, width))
            parts.append(local.reshape(part.shape))
        local = torch.cat(parts, dim=1)
        return local if key_mask is None else local * key_mask.any(dim=1)[:, None, None, None]

    def extra_repr(self) -> str:
        spec = self.spec
        return (
            f"heads={spec.heads}, head_dim={spec.head_dim}, focusing_factor={spec.focusing_factor}, "
            f"kernel_size={spec.kernel_size}"
        )
