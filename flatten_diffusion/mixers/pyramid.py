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


@dataclass(frozen=True)
class PyramidConfig(MixerConfig):
    """Settings of `PyramidAttention`; those of the cells are explained in `flatten_diffusion.ops.pyramid.Cells`.

    Args:
        window: side of the windows, in tokens, within which keys are exact; at most 32.
        ring: side of the cells in the eight windows around; divides the window.
        far: least side of the cells beyond.
        budget: at most so many far cells, so that cost is linear in the tokens; at most 4096, 0 for no bound.
        opened: far cells of the largest mass that each window and head reads more finely; at most 256.
        opened_cell: side of the cells they are read as; 1 for token by token.
        kernel_size: side of a depthwise convolution of the values, odd, at most 31, which calibration and distillation
            fit to what the means lose; 0, the default, leaves it out.

    Raises:
        ValueError: a value out of range, or sides that do not fit each other.
    """

    window: int = 8
    ring: int = 2
    far: int = 1
    budget: int = 256
    opened: int = 0
    opened_cell: int = 1
    kernel_size: int = 0

    def __post_init__(self) -> None:
        bounds = {"window": 32, "ring": 32, "far": 1024, "budget": 4096, "opened": 256, "opened_cell": 1024}
        for name, most in {**bounds, "kernel_size": 31}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
                raise ValueError(f"{name} is {value!r:.60}: pass a whole number up to {most}.")
        if self.kernel_size and self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}: pass an odd number, or 0 for no convolution.")
        _ = self.cells

    @property
    def cells(self) -> Cells:
        """As the operator takes them. Raises ValueError for sides that do not fit."""
        return Cells(self.window, self.ring, self.far, self.budget, self.opened, self.opened_cell)


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
        PyramidConfig(window=4, budget=9, opened=2),
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
            self.config.cells,
            key_mask=context.key_mask,
            scale=context.scale,
        )
        return Mixed(self._with_convolution(attended, value, context), log_partition)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """Window by window, in float64."""
        assert context.grid is not None, "its needs say so"
        pictures, mask = images_of(context.grid), context.key_mask
        attended, log_partition = pyramid_attention_reference(
            self._sharpened(query), key, value, pictures, self.config.cells, key_mask=mask, scale=context.scale
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
