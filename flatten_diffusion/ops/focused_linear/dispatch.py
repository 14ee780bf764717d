"""The public operator: checks its arguments once, then hands them to a backend."""

from __future__ import annotations

import functools
import importlib.util
import math
import os

import torch

from .operator import focused_linear_attention_operator
from .reference import HeadMap, focused_linear_attention_reference, of_every_head

BACKENDS = ("auto", "reference", "eager", "triton")
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TRITON_MAX_HEAD_DIM = 256


def available_backends(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """The names `backend` may take for tensors on `device`, besides "auto"."""
    return ("reference", "eager", "triton") if _triton_runs_on(torch.device(device).type) else ("reference", "eager")


def resolve_backend(
    backend: str, device: torch.device | str, dtype: torch.dtype = torch.float32, head_dim: int = 64
) -> str:
    """The backend that `backend` ("auto" included) means for such tensors. ValueError for one that cannot run."""
    device_type = torch.device(device).type
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}.")
    fused = dtype in _TRITON_DTYPES and head_dim <= _TRITON_MAX_HEAD_DIM
    if backend == "auto":
        return "triton" if device_type == "cuda" and fused and _triton_runs_on(device_type) else "eager"
    if backend == "triton":
        if not _triton_runs_on(device_type):
            raise ValueError(
                f"backend 'triton' cannot run on {device_type}: use 'auto', or CUDA with triton installed."
            )
        if not fused:
            raise ValueError(
                f"backend 'triton' takes float16, bfloat16 and float32 and head_dim up to {_TRITON_MAX_HEAD_DIM}, "
                f"not {dtype} and {head_dim}: use 'auto'."
            )
    return backend


@functools.cache
def _triton_runs_on(device_type: str) -> bool:
    """CUDA where triton is installed; anywhere under triton's interpreter, which is how the kernels are tested."""
    if importlib.util.find_spec("triton") is None:
        return False
    return device_type == "cuda" or (device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def call_dtype(x: torch.Tensor) -> torch.dtype:
    """What a call on `x` computes with: its dtype, or autocast's, which leaves float64 alone."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def focused_linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    focusing_factor: float = 3.0,
    scale: torch.Tensor | None = None,
    query_map: HeadMap | None = None,
    key_map: HeadMap | None = None,
    conv_weight: torch.Tensor | None = None,
    conv_bias: torch.Tensor | None = None,
    grid: tuple[int, int] | None = None,
    key_mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Focused linear attention: time and memory grow linearly with the number of tokens.

    With `f` the focused map (`focused_feature_map`) and means over the keys of a sample, each head computes

        out_n = f(q_n) mean_m(f(k_m)^T v_m) / (f(q_n) . mean_m f(k_m) + 1e-6) + conv(v)_n

    Source: Han et al., "FLatten Transformer: Vision Transformer using Focused Linear Attention", ICCV 2023,
    equations 5 to 8; lengths over all heads together and the place of both epsilons follow the authors' module.

    Args:
        query: [B, N, H, D]. Any strides; the projections' output viewed as heads is the fast layout.
        key, value: [B, M, H, D], same dtype and device as the query. M may differ from N.
        focusing_factor: the power p > 0 of the map. Larger is sharper; whole numbers are fastest.
        scale: [H * D], positive, divides relu(x) + 1e-6 of query and key; None means ones.
        query_map, key_map: (weight [H, D, D], bias [H, D]): in each head of the query or key, x @ weight + bias takes
            the place of x before all else. Done on the way in, without a pass over memory of its own; None means none.
        conv_weight: [H * D, 1, K, K], K odd: depthwise convolution of the values on the grid; or [D, 1, K, K], one
            kernel for every head, as in the paper.
        conv_bias: as many, added by the convolution.
        grid: (height, width) of the tokens in row-major order; needed with `conv_weight`.
        key_mask: bool [B, M], True where a key counts. Masked keys and values weigh nothing, in the mean and in the
            convolution too, whatever they hold. A sample without any key gives zeros.
        backend: "auto" (fused kernels on CUDA where triton is installed, else "eager"), "reference", "eager" or
            "triton".

    Returns:
        [B, N, H, D] in the query's dtype. Accumulation is float32 (float64 for float64). Under autocast, query, key
        and value are first cast to the autocast dtype, as `scaled_dot_product_attention` does.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or a backend that cannot run.
    """
    check_arguments(
        query, key, value, focusing_factor, scale, query_map, key_map, conv_weight, conv_bias, grid, key_mask
    )
    channels = query.shape[2] * query.shape[3]
    conv_weight, conv_bias = of_every_head(conv_weight, channels), of_every_head(conv_bias, channels)
    device_type, dtype = query.device.type, call_dtype(query)
    name = resolve_backend(backend, query.device, dtype, query.shape[3])
    if torch.is_autocast_enabled(device_type) and query.dtype != torch.float64:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        # Inside, precision is chosen operation by operation: autocast would undo the float32 accumulation.
        with torch.autocast(device_type, enabled=False):
            return _run(
                name, query, key, value, focusing_factor, scale, query_map, key_map, conv_weight, conv_bias, grid,
                key_mask,
            )  # fmt: skip
    return _run(
        name, query, key, value, focusing_factor, scale, query_map, key_map, conv_weight, conv_bias, grid, key_mask
    )


def _run(
    name: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    focusing_factor: float,
    scale: torch.Tensor | None,
    query_map: HeadMap | None,
    key_map: HeadMap | None,
    conv_weight: torch.Tensor | None,
    conv_bias: torch.Tensor | None,
    grid: tuple[int, int] | None,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    if name == "reference":
        return focused_linear_attention_reference(
            query, key, value, focusing_factor, scale, query_map, key_map, conv_weight, conv_bias, grid, key_mask
        )
    return focused_linear_attention_operator(
        query, key, value, focusing_factor, scale, query_map, key_map, conv_weight, conv_bias, grid, key_mask, name
    )


def check_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    focusing_factor: float,
    scale: torch.Tensor | None,
    query_map: HeadMap | None,
    key_map: HeadMap | None,
    conv_weight: torch.Tensor | None,
    conv_bias: torch.Tensor | None,
    grid: tuple[int, int] | None,
    key_mask: torch.Tensor | None,
) -> None:
    """Raise ValueError, in one line, for arguments of `focused_linear_attention` that do not fit together."""
    _check_tensors(query, key, value)
    _check_map("query_map", query_map, query)
    _check_map("key_map", key_map, query)
    _check_parameters(query, key, focusing_factor, scale, conv_weight, conv_bias, grid, key_mask)


def _check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has {tensor.dim()} dimensions: pass [batch, tokens, heads, head_dim].")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}: pass a floating dtype.")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device} and query on {query.device}: move them together.")
        if 0 in tensor.shape:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} is empty: every size must be at least 1.")
    if key.shape != value.shape:
        raise ValueError(f"key {tuple(key.shape)} and value {tuple(value.shape)} differ: pass the same shape.")
    if (query.shape[0], query.shape[2], query.shape[3]) != (key.shape[0], key.shape[2], key.shape[3]):
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} differ in batch, heads or head_dim: "
            "only the number of tokens may differ."
        )
    if not torch.is_autocast_enabled(query.device.type) and not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}: cast them to one dtype."
        )


def _check_map(name: str, head_map: HeadMap | None, query: torch.Tensor) -> None:
    if head_map is None:
        return
    if not isinstance(head_map, (tuple, list)) or len(head_map) != 2:
        raise ValueError(f"{name} is no pair: pass (weight, bias), or None.")
    heads, head_dim = query.shape[2:]
    shapes = ([heads, head_dim, head_dim], [heads, head_dim])
    for part, tensor, shape in zip(("weight", "bias"), head_map, shapes, strict=True):
        _check_parameter(f"{name}'s {part}", tensor, query)
        if list(tensor.shape) != shape:
            raise ValueError(f"{name}'s {part} has shape {tuple(tensor.shape)}: pass {shape}.")


def _check_parameter(name: str, tensor: torch.Tensor, query: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}: pass a floating dtype.")
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device} and query on {query.device}: move them together.")


def _check_parameters(
    query: torch.Tensor,
    key: torch.Tensor,
    focusing_factor: float,
    scale: torch.Tensor | None,
    conv_weight: torch.Tensor | None,
    conv_bias: torch.Tensor | None,
    grid: tuple[int, int] | None,
    key_mask: torch.Tensor | None,
) -> None:
    _, tokens, heads, head_dim = query.shape
    if not 0 < focusing_factor < math.inf:
        raise ValueError(f"focusing_factor is {focusing_factor}: pass a positive, finite number.")
    for name, tensor in (("scale", scale), ("conv_weight", conv_weight), ("conv_bias", conv_bias)):
        if tensor is not None:
            _check_parameter(name, tensor, query)
    if scale is not None and tuple(scale.shape) != (heads * head_dim,):
        raise ValueError(f"scale has shape {tuple(scale.shape)}: pass [{heads * head_dim}], heads * head_dim.")
    if grid is not None:
        if len(grid) != 2 or grid[0] < 1 or grid[1] < 1:
            raise ValueError(f"grid is {tuple(grid)}: pass (height, width), both at least 1.")
        if grid[0] * grid[1] != tokens:
            raise ValueError(
                f"grid {tuple(grid)} holds {grid[0] * grid[1]} tokens and query {tokens}: make them equal."
            )
    if conv_weight is None:
        if conv_bias is not None:
            raise ValueError("conv_bias is given without conv_weight: pass both or neither.")
    else:
        rows, kernel = conv_weight.shape[0], conv_weight.shape[-1]
        whole = rows in (head_dim, heads * head_dim) and kernel % 2 == 1
        if tuple(conv_weight.shape) != (rows, 1, kernel, kernel) or not whole:
            raise ValueError(
                f"conv_weight has shape {tuple(conv_weight.shape)}: pass [{heads * head_dim}, 1, K, K] with K odd, or "
                f"[{head_dim}, 1, K, K], shared by the heads."
            )
        if conv_bias is not None and tuple(conv_bias.shape) != (rows,):
            raise ValueError(f"conv_bias has shape {tuple(conv_bias.shape)}: pass [{rows}], as many as kernels.")
        if grid is None:
            raise ValueError("conv_weight is given without grid: pass grid=(height, width) of the tokens.")
        if key.shape[1] != tokens:
            raise ValueError(
                f"conv_weight needs values on the query's grid: value has {key.shape[1]} tokens and query {tokens}."
            )
    if key_mask is not None:
        if key_mask.dtype != torch.bool or tuple(key_mask.shape) != tuple(key.shape[:2]):
            raise ValueError(
                f"key_mask is {key_mask.dtype} {tuple(key_mask.shape)}: pass bool [{key.shape[0]}, {key.shape[1]}], "
                "True where a key counts."
            )
        if key_mask.device != query.device:
            raise ValueError(f"key_mask is on {key_mask.device} and query on {query.device}: move them together.")
