"""The public operator: checks its arguments once, then hands them to a backend."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from . import operator
from .arguments import FocusedArguments, HeadMap

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
            "triton". Forward-mode derivatives, the transforms of torch.func, second derivatives and torch.jit.trace
            go through "reference" whichever it is: only that one has them. What leaves Python by torch.export (ONNX)
            holds the operator itself as a node of its own, but for "reference", whose nodes are torch's.

    Returns:
        [B, N, H, D] in the query's dtype. Accumulation is float32 (float64 for float64). Under autocast, query, key
        and value are first cast to the autocast dtype, as `scaled_dot_product_attention` does.

        Promised: output and gradients are finite wherever the exact ones fit their dtype with a factor of two to spare,
        for entries of query, key and value up to 1e8 in magnitude (all of float16) and a scale between 0.01 and 100.
        Beyond, products of the three may leave float32. NaN and infinity in tokens that count come out again.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or a backend that cannot run.
    """
    if grid is not None and torch.jit.is_tracing():  # which makes tensors of a tensor's sizes
        grid = int(grid[0]), int(grid[1])
    call = FocusedArguments(
        query, key, value, scale, query_map, key_map, conv_weight, conv_bias, key_mask, focusing_factor, grid
    )
    call.check()
    device, dtype = query.device, call_dtype(query)
    name = resolve_backend(backend, device, dtype, query.shape[3])
    call = call.per_channel()
    if dtype == query.dtype and not torch.is_autocast_enabled(device.type):
        return operator.run(call, name)
    # Inside, precision is chosen operation by operation: autocast would undo the float32 accumulation.
    with torch.autocast(device.type, enabled=False):
        return operator.run(call.cast(dtype), name)
