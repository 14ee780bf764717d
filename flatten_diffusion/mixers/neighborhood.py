"""Neighbourhood attention: softmax over the places around each query."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import LayerShape, MixerConfig
from .parts.partition import Axis, Pattern, neighbourhoods, neighbourhoods_pattern
from .parts.sparse import SparseAttention, pair
from .registry import register_mixer


@dataclass(frozen=True)
class NeighborhoodConfig(MixerConfig):
    """Settings of `NeighborhoodAttention`; each is one number, or one for rows and one for columns.

    Args:
        kernel_size: side of the neighbourhood, 1 to 63.
        dilation: its places are so many tokens apart, 1 to 64. DiNAT's layers alternate 1 and a large one: `overrides`.
        stride: so many neighbours share one neighbourhood, 1 to the kernel size; the kernel size makes it windows.
        bias: whether it learns position biases.

    Raises:
        ValueError: a value out of range.
    """

    kernel_size: int | tuple[int, int] = 7
    dilation: int | tuple[int, int] = 1
    stride: int | tuple[int, int] = 1
    bias: bool = True

    def __post_init__(self) -> None:
        for name, most in (("kernel_size", 63), ("dilation", 64), ("stride", 63)):
            object.__setattr__(self, name, pair(name, getattr(self, name), 1, most))
        if any(stride > size for stride, size in zip(*self._pairs("stride", "kernel_size"), strict=True)):
            raise ValueError(f"stride is {self.stride}: pass at most the kernel size, {self.kernel_size}.")
        if not isinstance(self.bias, bool):
            raise ValueError(f"bias is {self.bias!r:.60}: pass true or false.")

    def _pairs(self, *names: str) -> list[tuple[int, int]]:
        return [getattr(self, name) for name in names]

    def axis_settings(self) -> list[tuple[int, dict[str, int]]]:
        """Size, dilation and stride of rows and of columns."""
        sizes, dilations, strides = self._pairs("kernel_size", "dilation", "stride")
        return [(k, {"dilation": e, "stride": s}) for k, e, s in zip(sizes, dilations, strides, strict=True)]


@register_mixer("neighborhood")
class NeighborhoodAttention(SparseAttention):
    """Each query sees the k x k places around it, moved inwards at a border so that there are always k x k (or all that
    the picture has): with n(i) these places,

        out_i = sum over j in n(i) of softmax_j(s q_i.k_j + R[(y_j - y_i) / e, (x_j - x_i) / e]) v_j.

    With dilation e, the places are those whose row and column differ from the query's by multiples of e. Where the
    kernel is as large as the picture this is softmax. Queries go in tiles, so that keys are gathered once for many.

    Parameters (zeros): bias: [heads, 2k - 1, 2k - 1], R.

    Source: Hassani et al., "Neighborhood Attention Transformer", CVPR 2023; Hassani and Shi, "Dilated Neighborhood
    Attention Transformer", 2022.
    """

    Config = NeighborhoodConfig
    examples = (
        NeighborhoodConfig(),
        NeighborhoodConfig(kernel_size=(3, 4), dilation=2),
        NeighborhoodConfig(kernel_size=4, stride=(2, 4)),
    )
    summary = "softmax over the k x k places around each query, also dilated"
    cost = "O(N k^2)"
    source = "Hassani et al., Neighborhood Attention Transformer, CVPR 2023"

    def __init__(self, config: NeighborhoodConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        self.bias = self._biases(layer, pair("kernel_size", config.kernel_size, 1, 63)) if config.bias else None

    def axes(self, size: tuple[int, int], kind: str, device: torch.device) -> tuple[Axis, Axis]:
        """See `SparseAttention.axes`."""
        rows, columns = self.config.axis_settings()
        return (
            neighbourhoods(size[0], rows[0], **rows[1], device=device),
            neighbourhoods(size[1], columns[0], **columns[1], device=device),
        )

    def patterns(self, size: tuple[int, int], kind: str, device: torch.device) -> tuple[Pattern, Pattern]:
        """See `SparseAttention.patterns`."""
        rows, columns = self.config.axis_settings()
        return (
            neighbourhoods_pattern(size[0], rows[0], **rows[1], device=device),
            neighbourhoods_pattern(size[1], columns[0], **columns[1], device=device),
        )
