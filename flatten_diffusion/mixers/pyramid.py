"""Pyramid attention: the keys of a query's window exactly, those farther away as means of cells, under one softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..ops.pyramid import Cells, pyramid_attention, pyramid_attention_reference
from .base import Calibration, Context, LayerShape, Mixed, Mixer, MixerConfig
from .calibration import CalibratedLayer, LayerCall, Statistic
from .grid import images_of
from .parts.convolution import convolve, patch_moments, solve_convolution
from .registry import register_mixer

_LARGEST_KERNEL = 31


@dataclass(frozen=True)
class PyramidConfig(Cells, MixerConfig):
    """Settings of `PyramidAttention`: window, ring, far, budget and opened of `flatten_diffusion.ops.pyramid.Cells`,
    where they are explained and checked, and one more.

    Args:
        kernel_size: side of a depthwise convolution of the values, odd, at most 31, which calibration and distillation
            fit to what the means lose; 0, the default, leaves it out.

    Raises:
        ValueError: a value out of range, or sides that do not fit each other.
    """

    kernel_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.kernel_size
        odd = isinstance(size, int) and not isinstance(size, bool) and (size == 0 or size % 2 == 1)
        if not odd or not 0 <= size <= _LARGEST_KERNEL:
            raise ValueError(
                f"kernel_size is {size!r:.60}: pass an odd number up to {_LARGEST_KERNEL}, or 0 for no convolution."
            )


@register_mixer("pyramid")
class PyramidAttention(Mixer):
    """Softmax over near keys as they are and far ones as means, each counting as often as it stands for tokens.

    It needs no training: with the layer's own query, key and value it is near the softmax, and is the softmax where the
    cells are single tokens or the window holds the image. Its partition is exact, so that text beside the image needs
    no estimate.

    Parameters (zeros, which change nothing):
        log_sharpness: [heads], queries times its exponential.
        conv_weight: [heads * head_dim, 1, K, K], conv_bias: [heads * head_dim]. Absent when `kernel_size` is 0.

    Related: Yang et al., "Focal Self-attention for Local-Global Interactions in Vision Transformers", NeurIPS 2021.
    """

    Config = PyramidConfig
    examples = (
        PyramidConfig(),
        PyramidConfig(window=4, budget=9, opened=(2, 3)),
        PyramidConfig(window=2, ring=1, far=2, budget=4, kernel_size=3),
    )
    summary = "exact softmax nearby, means of cells far away, one normaliser: near the original without training"
    source = "related: Yang et al., Focal Self-attention, NeurIPS 2021"
    needs = frozenset({"grid"})
    supports = frozenset({"mask", "frames", "images", "text", "compile"})
    exact_partition = True

    def __init__(self, config: PyramidConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        channels, size = layer.heads * layer.head_dim, config.kernel_size
        self.log_sharpness = nn.Parameter(torch.zeros(layer.heads))
        self.conv_weight = nn.Parameter(torch.zeros(channels, 1, size, size)) if size else None
        self.conv_bias = nn.Parameter(torch.zeros(channels)) if size else None

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """See `Mixer.forward`. Raises ValueError when the grid does not hold the tokens."""
        assert context.grid is not None, "its needs say so"
        attended, log_partition = pyramid_attention(
            self._sharpened(query),
            key,
            value,
            images_of(context.grid),
            self.config,
            key_mask=context.key_mask,
            scale=context.scale,
        )
        return Mixed(self._with_convolution(attended, value, context), log_partition)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """Window by window, in float64."""
        assert context.grid is not None, "its needs say so"
        attended, log_partition = pyramid_attention_reference(
            self._sharpened(query),
            key,
            value,
            images_of(context.grid),
            self.config,
            key_mask=context.key_mask,
            scale=context.scale,
        )
        return Mixed(self._with_convolution(attended.to(query.dtype), value, context), log_partition)

    def _sharpened(self, query: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(self.log_sharpness.dtype, torch.float32)
        return (query * self.log_sharpness.to(dtype).exp()[:, None]).to(query.dtype)

    def _with_convolution(self, attended: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        return attended if self.conv_weight is None else attended + self._convolved(value, context).to(attended.dtype)

    def refine(self, layer: CalibratedLayer, settings: None) -> Calibration:
        """The depthwise kernel and bias: least squares on what the means lose of the softmax."""
        if self.conv_weight is None or self.conv_bias is None:
            return

        def measure(call: LayerCall) -> torch.Tensor:
            inputs = call.inputs
            with torch.no_grad():
                plain = inputs.mix(self) - self._convolved(inputs.value, inputs.context).to(inputs.value.dtype)
            missing = call.target() - inputs.join(plain).float()
            return patch_moments(inputs, missing, self.config.kernel_size, call.weights)

        (moments,) = yield Statistic(measure)
        solve_convolution(layer.name, moments, self.conv_weight, self.conv_bias, 1e-4)

    def _convolved(self, value: torch.Tensor, context: Context) -> torch.Tensor:
        assert self.conv_weight is not None and context.grid is not None
        return convolve(value, self.conv_weight, self.conv_bias, context.grid, context.key_mask)
