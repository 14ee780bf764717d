"""What one call of focused linear attention is given: one tuple, from the door to every backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

HeadMap = tuple[torch.Tensor, torch.Tensor]
"""weight [H, D, D] and bias [H, D] of an affine map of every head, x @ weight + bias."""

FLAT_SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? scale, Tensor? query_weight, Tensor? query_bias, "
    "Tensor? key_weight, Tensor? key_bias, Tensor? conv_weight, Tensor? conv_bias, Tensor? key_mask, "
    "float focusing_factor, int[] grid"
)
"""`FocusedArguments.flat` as torch's operators declare it."""
DIFFERENTIABLE = 10
"""The first so many of the flat arguments have gradients: all tensors before the mask."""


class FocusedArguments(NamedTuple):
    """Arguments of `focused_linear_attention`, which has their shapes and meaning."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: torch.Tensor | None
    query_map: HeadMap | None
    key_map: HeadMap | None
    conv_weight: torch.Tensor | None  # a row per channel of all heads behind `per_channel`, as `conv_bias`
    conv_bias: torch.Tensor | None
    key_mask: torch.Tensor | None
    focusing_factor: float
    grid: tuple[int, int] | None

    def flat(self) -> tuple[Any, ...]:
        """Every tensor an argument of its own, as `FLAT_SCHEMA` lists them; a grid that nothing reads is left out."""
        maps = (*(self.query_map or (None, None)), *(self.key_map or (None, None)))
        grid = [] if self.grid is None or self.conv_weight is None else list(self.grid)
        tensors = (*self[:4], *maps, self.conv_weight, self.conv_bias, self.key_mask)
        return (*tensors, float(self.focusing_factor), grid)

    @classmethod
    def from_flat(cls, flat: Sequence[Any]) -> FocusedArguments:
        """The inverse of `flat`; small parameters come out dense, as kernels index them."""
        query, key, value, *parameters, key_mask, focusing_factor, grid = flat
        scale, *maps, conv_weight, conv_bias = (None if p is None else p.contiguous() for p in parameters)
        pairs: list[Any] = [None if pair[0] is None else tuple(pair) for pair in (maps[:2], maps[2:])]
        learned = (scale, pairs[0], pairs[1], conv_weight, conv_bias)
        return cls(query, key, value, *learned, key_mask, focusing_factor, grid or None)

    def per_channel(self) -> FocusedArguments:
        """With a kernel of the convolution for each channel of all heads, [H * D, ...], where one served every head."""
        weight, bias, heads = self.conv_weight, self.conv_bias, self.query.shape[2]
        if weight is None or weight.shape[0] == heads * self.query.shape[3]:
            return self
        return self._replace(
            conv_weight=weight.repeat(heads, 1, 1, 1), conv_bias=None if bias is None else bias.repeat(heads)
        )

    def cast(self, dtype: torch.dtype) -> FocusedArguments:
        """With query, key and value in that dtype."""
        return self._replace(query=self.query.to(dtype), key=self.key.to(dtype), value=self.value.to(dtype))

    def check(self) -> None:
        """Raise ValueError, in one line, for arguments that do not fit together."""
        _check_tokens(self.query, self.key, self.value)
        heads, head_dim = self.query.shape[2:]
        channels = heads * head_dim
        if not 0 < self.focusing_factor < math.inf:
            raise ValueError(f"focusing_factor is {self.focusing_factor}: pass a positive, finite number.")
        for name, head_map in (("query_map", self.query_map), ("key_map", self.key_map)):
            if head_map is None:
                continue
            if not isinstance(head_map, (tuple, list)) or len(head_map) != 2:
                raise ValueError(f"{name} is no pair: pass (weight, bias), or None.")
            _check_parameter(f"{name}'s weight", head_map[0], self.query, [heads, head_dim, head_dim])
            _check_parameter(f"{name}'s bias", head_map[1], self.query, [heads, head_dim])
        if self.scale is not None:
            _check_parameter("scale", self.scale, self.query, [channels], ", heads * head_dim")
        if self.grid is not None:
            _check_grid(self.grid, self.query.shape[1])
        self._check_convolution(head_dim, channels)
        self._check_mask()

    def _check_convolution(self, head_dim: int, channels: int) -> None:
        weight, tokens = self.conv_weight, self.query.shape[1]
        if weight is None:
            if self.conv_bias is not None:
                raise ValueError("conv_bias is given without conv_weight: pass both or neither.")
            return
        rows, kernel = weight.shape[0], weight.shape[-1]
        whole = rows in (head_dim, channels) and kernel % 2 == 1
        _check_parameter("conv_weight", weight, self.query)
        if tuple(weight.shape) != (rows, 1, kernel, kernel) or not whole:
            raise ValueError(
                f"conv_weight has shape {tuple(weight.shape)}: pass [{channels}, 1, K, K] with K odd, or "
                f"[{head_dim}, 1, K, K], shared by the heads."
            )
        if self.conv_bias is not None:
            _check_parameter("conv_bias", self.conv_bias, self.query, [rows], ", as many as kernels")
        if self.grid is None:
            raise ValueError("conv_weight is given without grid: pass grid=(height, width) of the tokens.")
        if self.key.shape[1] != tokens:
            raise ValueError(
                f"conv_weight needs values on the query's grid: value has {self.key.shape[1]} tokens and query "
                f"{tokens}."
            )

    def _check_mask(self) -> None:
        mask, shape = self.key_mask, self.key.shape[:2]
        if mask is None:
            return
        if mask.dtype != torch.bool or mask.shape != shape:
            raise ValueError(
                f"key_mask is {mask.dtype} {tuple(mask.shape)}: pass bool {list(shape)}, True where a key counts."
            )
        _check_device("key_mask", mask, self.query)


def _check_tokens(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has {tensor.dim()} dimensions: pass [batch, tokens, heads, head_dim].")
        _check_parameter(name, tensor, query)
        if 0 in tensor.shape:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} is empty: every size must be at least 1.")
    if key.shape != value.shape:
        raise ValueError(f"key {tuple(key.shape)} and value {tuple(value.shape)} differ: pass the same shape.")
    if query.shape[0] != key.shape[0] or query.shape[2:] != key.shape[2:]:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} differ in batch, heads or head_dim: "
            "only the number of tokens may differ."
        )
    if not torch.is_autocast_enabled(query.device.type) and not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}: cast them to one dtype."
        )


def _check_grid(grid: tuple[int, int], tokens: int) -> None:
    if len(grid) != 2 or grid[0] < 1 or grid[1] < 1:
        raise ValueError(f"grid is {tuple(grid)}: pass (height, width), both at least 1.")
    if grid[0] * grid[1] != tokens:
        raise ValueError(f"grid {tuple(grid)} holds {grid[0] * grid[1]} tokens and query {tokens}: make them equal.")


def _check_parameter(
    name: str, tensor: torch.Tensor, query: torch.Tensor, shape: list[int] | None = None, meaning: str = ""
) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}: pass a floating dtype.")
    _check_device(name, tensor, query)
    if shape is not None and list(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: pass {shape}{meaning}.")


def _check_device(name: str, tensor: torch.Tensor, query: torch.Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device} and query on {query.device}: move them together.")
