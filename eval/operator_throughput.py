"""The operator alone against SDPA, and how close it comes to moving its bytes at copy speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel

from flatten_diffusion import focused_linear_attention
from flatten_diffusion.ops import available_backends

from .architectures import free_memory
from .softmax import sdpa_backends
from .timing import Candidate, measure

_COPY_BYTES = 256 * 2**20


def copy_bandwidth(device: torch.device, rounds: int = 5) -> float:
    """Bytes per second that a large copy reads plus writes."""
    source = torch.empty(_COPY_BYTES // 4, device=device, dtype=torch.float32).normal_()
    target = torch.empty_like(source)
    result = measure(
        {"copy": Candidate(lambda: target.copy_(source))}, device, rounds=rounds, warmup=2, seconds=30, label="copy"
    )["copy"]
    return 2 * _COPY_BYTES / result.median if result.median else math.nan


def measure_operator(
    tokens: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    batch: int,
    heads: int,
    head_dim: int,
    kernel_size: int,
    rounds: int,
    warmup: int,
    seconds: float,
    compiled: bool,
    seed: int,
) -> dict[str, Any]:
    """Times query, key, value [batch, N, heads, head_dim] at every N.

    Returns:
        JSON-ready: `copy_bytes_per_second`, and per N the variants with `bytes_moved` (query, key, value read once
        and the output written once) and `of_copy_bandwidth`, the share of the copy bandwidth that reaches.
    """
    bandwidth = copy_bandwidth(device)
    rows: list[dict[str, Any]] = []
    for count in tokens:
        generator = torch.Generator("cpu").manual_seed(seed)
        query, key, value = (
            torch.randn(batch, count, heads, head_dim, generator=generator).to(device, dtype) for _ in range(3)
        )
        candidates = _candidates(query, key, value, kernel_size, device, compiled)
        if device.type == "cpu":
            needed, free = 3 * 4 * batch * heads * count**2, free_memory(device)
            if free is not None and needed > free:
                del candidates["sdpa:math"]
        measured = measure(candidates, device, rounds=rounds, warmup=warmup, seconds=seconds, label=f"{count} tokens")
        moved = 4 * query.numel() * dtype.itemsize
        baseline = measured["sdpa"].median
        variants: dict[str, Any] = {}
        for name, measurement in measured.items():
            median = measurement.median
            variants[name] = measurement.as_dict() | {
                "speedup_over_sdpa": baseline / median if baseline and median else None,
                "of_copy_bandwidth": moved / median / bandwidth if median else None,
            }
        if device.type == "cpu" and "sdpa:math" not in candidates:
            variants["sdpa:math"] = {"failure": "out of memory"}
        rows.append({"tokens": count, "bytes_moved": moved, "variants": variants})
    return {"copy_bytes_per_second": bandwidth, "tokens": rows}


def _candidates(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel_size: int, device: torch.device, compiled: bool
) -> dict[str, Candidate]:
    # What the processors do: heads forward for SDPA, as the projections leave them for the linear operator.
    query_first, key_first, value_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    parameters = _convolution(query, kernel_size)

    def softmax() -> torch.Tensor:
        return F.scaled_dot_product_attention(query_first, key_first, value_first)

    def linear(backend: str) -> Callable[[], torch.Tensor]:
        return lambda: focused_linear_attention(query, key, value, backend=backend, **parameters)

    found = {"sdpa": Candidate(softmax, torch.inference_mode)}
    for name, backend in sdpa_backends(device).items():
        found[f"sdpa:{name}"] = Candidate(softmax, lambda backend=backend: sdpa_kernel(backend))  # type: ignore[misc]
    for backend_name in available_backends(device):
        found[f"linear:{backend_name}"] = Candidate(linear(backend_name), torch.inference_mode)
    if compiled:
        found["linear (compiled)"] = Candidate(torch.compile(linear("auto"), dynamic=False), torch.inference_mode)
    return found


def _convolution(query: torch.Tensor, kernel_size: int) -> dict[str, Any]:
    if kernel_size == 0:
        return {}
    tokens, channels = query.shape[1], query.shape[2] * query.shape[3]
    height = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    weight = torch.randn(channels, 1, kernel_size, kernel_size, device=query.device, dtype=query.dtype)
    return {"conv_weight": weight, "grid": (height, tokens // height)}
