"""Outlook attention: what a neighbourhood's values become is read from the layer's input at its centre."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import call_dtype
from ..ops.focused_linear.reference import compute_dtype
from .base import Context, LayerShape, Mixed, Mixer, MixerConfig
from .parts.sparse import picture_of, whole
from .registry import register_mixer


@dataclass(frozen=True)
class OutlookConfig(MixerConfig):
    """Settings of `OutlookAttention`.

    Args:
        kernel_size: side of the neighbourhoods, odd, 1 to 7: weights grow with its fourth power.
        stride: of their centres, at most half of the kernel size, rounded up, so that every token is reached (VOLO: 2).

    Raises:
        ValueError: a value out of range.
    """

    kernel_size: int = 3
    stride: int = 1

    def __post_init__(self) -> None:
        whole("kernel_size", self.kernel_size, 1, 7)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}: pass 1, 3, 5 or 7.")
        whole("stride", self.stride, 1, (self.kernel_size + 1) // 2)


@register_mixer("outlook")
class OutlookAttention(Mixer):
    """For each centre c, with x_c the layer's input averaged over the stride's cell, per head

        A_c = softmax over inputs of D ** -0.5 (W x_c + b), K^2 x K^2,    out = fold(A_c patch_c(v)):

    the K x K values around the centre (zeros outside the picture, which do count) are mixed, and what the patches make
    of a token is summed. Queries and keys are not read: of a pretrained layer it inherits values and output only, and
    it is softmax in no limit.

    Parameters (zeros, with which it is a smoothing filter): weight: [heads * K^4, channels], W; bias: [heads * K^4], b.

    Source: Yuan et al., "VOLO: Vision Outlooker for Visual Recognition", TPAMI 2022.
    """

    Config = OutlookConfig
    examples = (OutlookConfig(), OutlookConfig(stride=2), OutlookConfig(kernel_size=5, stride=3))
    summary = "mixes the values of each neighbourhood by weights read from its centre; reads no query or key"
    cost = "O(N K^4)"
    source = "Yuan et al., VOLO, TPAMI 2022"
    needs = frozenset({"grid", "hidden_states"})
    supports = frozenset({"text", "compile"})

    def __init__(self, config: OutlookConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        rows = layer.heads * config.kernel_size**4
        self.weight = nn.Parameter(torch.zeros(rows, layer.channels))
        self.bias = nn.Parameter(torch.zeros(rows))

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """See `Mixer.forward`. Raises ValueError unless the grid is of one image that the tokens fill, and the layer's
        input is of as many samples as the values."""
        value = value.to(call_dtype(query))
        dtype = compute_dtype(value.dtype)
        _, height, width = picture_of(context, value)
        if context.hidden_states is not None and len(context.hidden_states) != len(value):
            given = len(context.hidden_states)
            raise ValueError(f"The layer's input is of {given} samples, its values of {len(value)}: exclude the layer.")
        size, pad = self.config.kernel_size, self.config.kernel_size // 2
        with torch.autocast(value.device.type, enabled=False):
            weights = self._weights(context, dtype)  # [B * T, L, H, K^2, K^2]
            heads, head_dim = value.shape[2:]
            picture = value.to(dtype).reshape(-1, height, width, heads * head_dim).permute(0, 3, 1, 2)
            grown = self._grown(height), self._grown(width)
            picture = F.pad(picture, (pad, grown[1] - width - pad, pad, grown[0] - height - pad))
            patches = F.unfold(picture, size, stride=self.config.stride).unflatten(1, (heads, head_dim, size**2))
            mixed = torch.einsum("blhij,bhdjl->bhdil", weights, patches).flatten(1, 3)
            out = F.fold(mixed, grown, size, stride=self.config.stride)[..., pad : pad + height, pad : pad + width]
            out = out.permute(0, 2, 3, 1).reshape(value.shape)
        return Mixed(out.to(value.dtype))

    def _grown(self, length: int) -> int:
        """The padded side that the patches of all centres fill."""
        return (-(-length // self.config.stride) - 1) * self.config.stride + self.config.kernel_size

    def _weights(self, context: Context, dtype: torch.dtype) -> torch.Tensor:
        hidden, size, heads = context.hidden_states, self.config.kernel_size, self.layer.heads
        assert hidden is not None, "its needs say so"
        _, height, width = picture_of(context, hidden)
        cells = hidden.to(dtype).reshape(-1, height, width, hidden.shape[-1]).permute(0, 3, 1, 2)
        cells = F.avg_pool2d(cells, self.config.stride, ceil_mode=True).flatten(2).transpose(1, 2)
        logits = F.linear(cells, self.weight.to(dtype), self.bias.to(dtype)) * self.layer.head_dim**-0.5
        return logits.unflatten(-1, (heads, size**2, size**2)).softmax(dim=-1)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """Centre by centre."""
        frames, height, width = picture_of(context, value)
        assert context.hidden_states is not None, "its needs say so"
        size, stride, reach = self.config.kernel_size, self.config.stride, self.config.kernel_size // 2
        values = value.unflatten(1, (frames, height, width))
        hidden = context.hidden_states.unflatten(1, (frames, height, width))
        out = torch.zeros_like(values)
        for top in range(0, height, stride):
            for left in range(0, width, stride):
                centre = hidden[:, :, top : top + stride, left : left + stride].mean(dim=(2, 3))
                logits = (centre @ self.weight.T + self.bias) * self.layer.head_dim**-0.5
                weights = logits.unflatten(-1, (self.layer.heads, size**2, size**2)).softmax(dim=-1)
                places = [(top - reach + n // size, left - reach + n % size) for n in range(size**2)]
                inside = [n for n, (y, x) in enumerate(places) if 0 <= y < height and 0 <= x < width]
                patch = torch.stack([values[:, :, y, x] for y, x in (places[n] for n in inside)], dim=3)
                mixed = weights[..., inside, :][..., inside] @ patch
                for row, n in enumerate(inside):
                    out[:, :, places[n][0], places[n][1]] += mixed[:, :, :, row]
        return Mixed(out.flatten(1, 3))
