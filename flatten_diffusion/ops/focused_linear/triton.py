"""Launches the Triton kernels of focused linear attention. Same two entry points as `eager`, no host synchronisation.

Forward: lengths of the keys, state by chunks, their sum, then one pass over the queries. Block sizes follow from shape
and dtype alone: nothing is timed at the first call, and a captured CUDA graph replays the same kernels.
"""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass

import torch
import triton

from . import triton_kernels as kernels
from .reference import HeadMap, OptionalPair

_CHUNKS_PER_PROCESSOR = 4
_INTERPRETER_PROCESSORS = 1
_TOKENS_PER_LENGTHS_PROGRAM = 16
_REDUCED_ROWS = 16


@dataclass(frozen=True)
class _Launch:
    """Sizes one call's kernels share."""

    batch: int
    heads: int
    head_dim: int
    power: float
    scale: torch.Tensor | None
    key_mask: torch.Tensor | None
    counts: torch.Tensor | None  # float32 [B]: keys left; None without a mask
    dtype: torch.dtype
    processors: int

    @property
    def block_d(self) -> int:
        return max(16, triton.next_power_of_2(self.head_dim))

    @property
    def block_e(self) -> int:
        """Columns of a [D, D] matrix held at once: all, unless they would not fit registers and shared memory."""
        if self.dtype == torch.float32:
            return {128: 32, 256: 16}.get(self.block_d, self.block_d)
        return self.block_d if self.block_d <= 128 else 64

    @property
    def block_n(self) -> int:
        if self.dtype == torch.float32:
            return {16: 64, 32: 64, 64: 32}.get(self.block_d, 16)
        return {16: 128, 32: 128, 64: 64}.get(self.block_d, 32)

    @property
    def columns(self) -> int:
        return triton.cdiv(self.head_dim, self.block_e)

    @property
    def warps(self) -> int:
        return 4 if self.block_d <= 64 and self.dtype != torch.float32 else 8

    @property
    def gradient_warps(self) -> dict[str, int]:
        """The backward holds about twice as many tiles: over eight warps they fit the registers."""
        return {"num_warps": 8}

    @property
    def stages(self) -> int:
        if self.dtype == torch.float32:
            return 2 if self.block_d <= 64 else 1
        return 3 if self.block_d <= 64 else 2

    @property
    def shared(self) -> dict[str, int | bool]:
        """Compile-time arguments every kernel takes."""
        return {"HEAD_DIM": self.head_dim, "BLOCK_D": self.block_d, "num_warps": self.warps}

    @property
    def mapping(self) -> dict[str, int | bool]:
        whole = int(self.power) if self.power in range(1, 9) else -1
        return {"WHOLE": whole, "HAS_SCALE": self.scale is not None}

    @property
    def product(self) -> dict[str, int | str]:
        return {"BLOCK_E": self.block_e, "PRECISION": precision(), "num_stages": self.stages}

    def chunks(self, tokens: int) -> tuple[int, int]:
        """(tokens per chunk, chunks): enough programs to fill the device, at least a few blocks each."""
        wanted = max(1, self.processors * _CHUNKS_PER_PROCESSOR // (self.batch * self.heads * self.columns))
        blocks = triton.cdiv(tokens, self.block_n)
        chunk = triton.cdiv(blocks, min(wanted, max(1, blocks // 4))) * self.block_n
        return chunk, triton.cdiv(tokens, chunk)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor | None,
    query_map: HeadMap | None,
    key_map: HeadMap | None,
    conv_weight: torch.Tensor | None,
    conv_bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    power: float,
    grid: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output [B, N, H, D], T [B, H, D, D] (the values' mean under each key feature) and the mean key [B, H, D]."""
    with _on(query.device):
        launch = _prepare(query, scale, key_mask, power)
        means, mean_key = _finish_state(launch, *_state_sums(launch, key, value, key_map), key.shape[1])
        output = _query_output(launch, query, value, query_map, conv_weight, conv_bias, means, mean_key, grid)
    return output, means, mean_key


def state_sums(
    key: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor | None,
    key_map: HeadMap | None,
    key_mask: torch.Tensor | None,
    power: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of f(k)^T v [B, H, D, D] and of f(k) [B, H, D] over the keys given, float32: they add up over processes."""
    with _on(key.device):
        sums, key_sums, _ = _state_sums(_prepare(key, scale, key_mask, power), key, value, key_map)
        return sums.sum(dim=0), key_sums.sum(dim=0)


def forward_from_sums(
    query: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor | None,
    query_map: HeadMap | None,
    conv_weight: torch.Tensor | None,
    conv_bias: torch.Tensor | None,
    key_mask: torch.Tensor,
    counts: torch.Tensor,
    sums: torch.Tensor,
    key_sums: torch.Tensor,
    power: float,
    grid: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `forward`, from the sums over all processes and the number of keys in them, `counts` [B]."""
    with _on(query.device):
        launch = _prepare(query, scale, key_mask, power, counts)
        means, mean_key = _finish_state(launch, sums[None], key_sums[None], 1, 0)
        output = _query_output(launch, query, value, query_map, conv_weight, conv_bias, means, mean_key, grid)
    return output, means, mean_key


def backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor | None,
    query_map: HeadMap | None,
    key_map: HeadMap | None,
    conv_weight: torch.Tensor | None,
    conv_bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    means: torch.Tensor,
    mean_key: torch.Tensor,
    power: float,
    grid: tuple[int, int],
    weight_needs_grad: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of query, key, value, scale, the maps' weights and biases, conv_weight and conv_bias."""
    with _on(query.device):
        launch = _prepare(query, scale, key_mask, power)
        grad_query, scale_sums_query, sums, vector_sums, splits = _query_backward(
            launch, grad_output, _mapped(query, query_map), means, mean_key
        )
        grad_query, grad_query_map = _map_backward(grad_query, query, query_map, None)
        grad_key, grad_value, scale_sums_key = _key_backward(
            launch, grad_output, _mapped(key, key_map), value, mean_key, sums, vector_sums, splits, conv_weight, grid
        )
        grad_key, grad_key_map = _map_backward(grad_key, key, key_map, key_mask)
        grad_scale = None
        if scale is not None:
            grad_scale = (scale_sums_query.sum(dim=(0, 1)) + scale_sums_key.sum(dim=(0, 1))).flatten().to(scale.dtype)
        grad_weight, grad_bias = _convolution_backward(
            launch, grad_output, value, conv_weight if weight_needs_grad else None, conv_bias, grid
        )
    return (
        grad_query, grad_key, grad_value, grad_scale, *grad_query_map, *grad_key_map, grad_weight, grad_bias
    )  # fmt: skip


def query_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    scale: torch.Tensor | None,
    query_map: HeadMap | None,
    means: torch.Tensor,
    mean_key: torch.Tensor,
    power: float,
) -> tuple[torch.Tensor, OptionalPair, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient of the query, this process's shares of the map's and of the scale's [H * D], and the sums that processes
    add up.
    """
    with _on(query.device):
        launch = _prepare(query, scale, None, power)
        grad_query, scale_sums, sums, vector_sums, _ = _query_backward(
            launch, grad_output, _mapped(query, query_map), means, mean_key
        )
        grad_query, grad_map = _map_backward(grad_query, query, query_map, None)
        shares = scale_sums.sum(dim=(0, 1)).flatten()
        return grad_query, grad_map, shares, sums.sum(dim=0), vector_sums.sum(dim=0)


def key_backward(
    grad_output: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor | None,
    key_map: HeadMap | None,
    conv_weight: torch.Tensor | None,
    conv_bias: torch.Tensor | None,
    key_mask: torch.Tensor,
    counts: torch.Tensor,
    mean_key: torch.Tensor,
    sums: torch.Tensor,
    vector_sums: torch.Tensor,
    power: float,
    grid: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, OptionalPair, OptionalPair]:
    """Gradients of key and value, and this process's shares of scale [H * D], of the map and of the convolution."""
    with _on(key.device):
        launch = _prepare(key, scale, key_mask, power, counts)
        grad_key, grad_value, scale_sums = _key_backward(
            launch, grad_output, _mapped(key, key_map), value, mean_key, sums[None], vector_sums[None], 1, conv_weight,
            grid,
        )  # fmt: skip
        grad_key, grad_map = _map_backward(grad_key, key, key_map, key_mask)
        grad_convolution = _convolution_backward(launch, grad_output, value, conv_weight, conv_bias, grid)
        shares = scale_sums.sum(dim=(0, 1)).flatten()
        return grad_key, grad_value, shares, grad_map, grad_convolution


def _query_backward(
    launch: _Launch, grad_output: torch.Tensor, query: torch.Tensor, means: torch.Tensor, mean_key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Gradient of the query, partial gradients of scale [.., B, H, D], and the state's: sums, vector sums, chunks."""
    batch, tokens, heads, head_dim = query.shape
    chunk, splits = launch.chunks(tokens)
    scale = _or(launch.scale, query)
    lengths = _lengths(launch, query, None)
    sums = _floats(query, splits, batch, heads, head_dim, head_dim)
    vector_sums = _floats(query, splits, batch, heads, head_dim)
    along, projected = _floats(query, 2, batch, heads, tokens)
    common = dict(
        BLOCK_N=launch.block_n, **_strides("Q", query), **_strides("G", grad_output),
        **launch.mapping, **(launch.shared | launch.gradient_warps), **launch.product,
    )  # fmt: skip
    strides = (query.stride(0), grad_output.stride(0))
    kernels.query_sums_kernel[(batch * heads, splits, launch.columns)](
        query, grad_output, scale, lengths, means, mean_key, sums, vector_sums, along, projected,
        tokens, heads, chunk, *strides, launch.power, **common,
    )  # fmt: skip
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    scale_sums = _floats(query, splits, batch, heads, head_dim)
    kernels.query_gradient_kernel[(batch * heads, splits)](
        query, grad_output, scale, lengths, means, mean_key, along, projected, grad_query, scale_sums,
        tokens, heads, chunk, *strides, launch.power, **common,
    )  # fmt: skip
    return grad_query, scale_sums, sums, vector_sums, splits


def _key_backward(
    launch: _Launch,
    grad_output: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mean_key: torch.Tensor,
    state_sums: torch.Tensor,
    vector_sums: torch.Tensor,
    state_splits: int,
    conv_weight: torch.Tensor | None,
    grid: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of key and value, and partial gradients of scale [.., B, H, D]."""
    batch, tokens, heads, head_dim = key.shape
    sums = torch.empty((batch, heads, head_dim, head_dim), dtype=key.dtype, device=key.device)
    row_scale, vector = _floats(key, 2, batch, heads, head_dim)
    _reduce(launch, state_sums, vector_sums, state_splits, tokens, sums, vector, row_scale)
    chunk, splits = launch.chunks(tokens)
    lengths = _lengths(launch, key, launch.key_mask)
    along = _floats(key, batch, heads, tokens)
    has_mask = launch.key_mask is not None
    mask, counts, scale = _or(launch.key_mask, key), _or(launch.counts, key), _or(launch.scale, key)
    common = dict(
        HAS_MASK=has_mask, BLOCK_N=launch.block_n, **_strides("K", key), **_strides("V", value),
        **launch.mapping, **(launch.shared | launch.gradient_warps), **launch.product,
    )  # fmt: skip
    kernels.key_along_kernel[(batch * heads, triton.cdiv(tokens, launch.block_n))](
        key, value, scale, mask, counts, lengths, mean_key, sums, row_scale, vector, along,
        tokens, heads, key.stride(0), value.stride(0), launch.power, **common,
    )  # fmt: skip
    grad_key = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    grad_value = torch.empty_like(grad_key)
    scale_sums = _floats(key, splits, batch, heads, head_dim)
    kernels.key_gradient_kernel[(batch * heads, splits)](
        key, value, grad_output, scale, mask, counts, lengths, mean_key, sums, row_scale, vector, along,
        _or(conv_weight, key), grad_key, grad_value, scale_sums,
        tokens, heads, chunk, *grid, key.stride(0), value.stride(0), grad_output.stride(0), launch.power,
        KERNEL=0 if conv_weight is None else conv_weight.shape[-1], **_strides("G", grad_output), **common,
    )  # fmt: skip
    return grad_key, grad_value, scale_sums


def _convolution_backward(
    launch: _Launch,
    grad_output: torch.Tensor,
    value: torch.Tensor,
    conv_weight: torch.Tensor | None,
    conv_bias: torch.Tensor | None,
    grid: tuple[int, int],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of conv_weight and conv_bias, None for what is None."""
    grad_weight = None if conv_weight is None else _weight_gradient(launch, grad_output, value, conv_weight, grid)
    if conv_bias is None:
        return grad_weight, None
    per_sample = grad_output.sum(dim=1, dtype=torch.float32).flatten(1)  # [B, H * D]
    if launch.counts is not None:
        per_sample = per_sample * (launch.counts > 0).unsqueeze(-1)
    return grad_weight, per_sample.sum(dim=0).to(conv_bias.dtype)


def _weight_gradient(
    launch: _Launch,
    grad_output: torch.Tensor,
    value: torch.Tensor,
    conv_weight: torch.Tensor,
    grid: tuple[int, int],
) -> torch.Tensor:
    batch, tokens, heads, head_dim = value.shape
    kernel = conv_weight.shape[-1]
    chunk, splits = launch.chunks(tokens)
    sums = _floats(value, splits, batch, heads, kernel, kernel, head_dim)
    kernels.weight_gradient_kernel[(batch * heads, splits, kernel)](
        value, grad_output, _or(launch.key_mask, value), sums,
        tokens, heads, chunk, *grid, value.stride(0), grad_output.stride(0),
        HAS_MASK=launch.key_mask is not None, KERNEL=kernel, BLOCK_K=triton.next_power_of_2(kernel),
        BLOCK_N=launch.block_n, **_strides("V", value), **_strides("G", grad_output), **launch.shared,
    )  # fmt: skip
    return sums.sum(dim=(0, 1)).permute(0, 3, 1, 2).reshape(conv_weight.shape).to(conv_weight.dtype)


def _state_sums(
    launch: _Launch, key: torch.Tensor, value: torch.Tensor, key_map: HeadMap | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    key, key_map = _unfused(launch, key, key_map)
    batch, tokens, heads, head_dim = key.shape
    chunk, splits = launch.chunks(tokens)
    sums = _floats(key, splits, batch, heads, head_dim, head_dim)
    key_sums = _floats(key, splits, batch, heads, head_dim)
    kernels.state_kernel[(batch * heads, splits, launch.columns)](
        key, value, _or(launch.scale, key), _or(launch.key_mask, key), _lengths(launch, key, launch.key_mask, key_map),
        sums, key_sums, tokens, heads, chunk, key.stride(0), value.stride(0), launch.power,
        HAS_MASK=launch.key_mask is not None, BLOCK_N=launch.block_n, **_map_arguments(key_map, key),
        **_strides("K", key), **_strides("V", value), **launch.mapping, **launch.shared, **launch.product,
    )  # fmt: skip
    return sums, key_sums, splits


def _finish_state(
    launch: _Launch, sums: torch.Tensor, key_sums: torch.Tensor, splits: int, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """T in the input's dtype and the mean key, from sums by chunks; `tokens` counts keys where there is no mask."""
    shape = (launch.batch, launch.heads, launch.head_dim)
    means = torch.empty((*shape, launch.head_dim), dtype=launch.dtype, device=sums.device)
    mean_key = _floats(sums, *shape)
    _reduce(launch, sums, key_sums, splits, tokens, means, mean_key, None)
    return means, mean_key


def _query_output(
    launch: _Launch,
    query: torch.Tensor,
    value: torch.Tensor,
    query_map: HeadMap | None,
    conv_weight: torch.Tensor | None,
    conv_bias: torch.Tensor | None,
    means: torch.Tensor,
    mean_key: torch.Tensor,
    grid: tuple[int, int],
) -> torch.Tensor:
    query, query_map = _unfused(launch, query, query_map)
    batch, tokens, heads, _ = query.shape
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    blocks = triton.cdiv(tokens, launch.block_n)
    # With blocks to spare, a program that takes every head reads the query from memory only once.
    all_heads = batch * blocks >= 4 * launch.processors
    lengths = query if all_heads else _lengths(launch, query, None, query_map)
    kernels.query_kernel[(batch if all_heads else batch * heads, blocks)](
        query, value, _or(launch.scale, query), lengths, means, mean_key, _or(conv_weight, query),
        _or(conv_bias, query), _or(launch.key_mask, query), _or(launch.counts, query), output,
        tokens, heads, *grid, query.stride(0), value.stride(0), launch.power,
        HAS_MASK=launch.key_mask is not None, HAS_BIAS=conv_bias is not None,
        KERNEL=0 if conv_weight is None else conv_weight.shape[-1], ALL_HEADS=all_heads, BLOCK_N=launch.block_n,
        **_map_arguments(query_map, query), **_strides("Q", query), **_strides("V", value),
        **launch.mapping, **launch.shared, **launch.product,
    )  # fmt: skip
    return output


def _unfused(launch: _Launch, x: torch.Tensor, head_map: HeadMap | None) -> tuple[torch.Tensor, HeadMap | None]:
    """x and the map that is left for the kernels, which hold a head's whole weight beside its tokens.

    Where that would not fit registers and shared memory, x comes back mapped: one more pass over memory.
    """
    return (x, head_map) if launch.block_e == launch.block_d else (_mapped(x, head_map), None)


def _mapped(x: torch.Tensor, head_map: HeadMap | None) -> torch.Tensor:
    """x [B, N, H, D] behind the map, in its dtype; strides as the product leaves them."""
    if head_map is None:
        return x
    weight, bias = (parameter.to(x.dtype) for parameter in head_map)
    by_head = torch.baddbmm(bias.unsqueeze(1), x.flatten(0, 1).transpose(0, 1), weight)
    return by_head.transpose(0, 1).unflatten(0, x.shape[:2])


def _map_backward(
    grad: torch.Tensor, x: torch.Tensor, head_map: HeadMap | None, key_mask: torch.Tensor | None
) -> tuple[torch.Tensor, OptionalPair]:
    """`grad` [B, N, H, D] of the mapped x -> gradients of x and of the map's weight and bias."""
    if head_map is None:
        return grad, (None, None)
    weight, bias = head_map
    if key_mask is not None:
        x = x.masked_fill(~key_mask[:, :, None, None], 0.0)  # its gradient is zero, but zero times NaN is NaN
    by_head = grad.flatten(0, 1).transpose(0, 1)  # [H, B * N, D]
    grad_weight = torch.bmm(x.flatten(0, 1).permute(1, 2, 0), by_head)
    grad_bias = grad.sum(dim=(0, 1), dtype=torch.float32)
    grad_x = torch.bmm(by_head, weight.to(x.dtype).transpose(1, 2)).transpose(0, 1).unflatten(0, x.shape[:2])
    return grad_x.contiguous(), (grad_weight.to(weight.dtype), grad_bias.to(bias.dtype))


def _map_arguments(head_map: HeadMap | None, unused: torch.Tensor) -> dict[str, torch.Tensor | bool]:
    weight, bias = head_map or (unused, unused)
    return {"map_weight_ptr": weight, "map_bias_ptr": bias, "HAS_MAP": head_map is not None}


def _lengths(
    launch: _Launch, x: torch.Tensor, key_mask: torch.Tensor | None, head_map: HeadMap | None = None
) -> torch.Tensor:
    """float32 [B, 3, N]: 1 / peak of every token and the lengths of its unit vector and of that vector's power."""
    batch, tokens, heads, _ = x.shape
    lengths = _floats(x, batch, 3, tokens)
    block_n, options = _TOKENS_PER_LENGTHS_PROGRAM, {}
    if head_map is not None:
        # Every program reads the maps of all heads: more tokens share them, and fewer stages leave room for programs.
        block_n, options = launch.block_n, {"num_stages": 2}
    kernels.statistics_kernel[(batch, triton.cdiv(tokens, block_n))](
        x, _or(launch.scale, x), _or(key_mask, x), lengths, tokens, heads, x.stride(0), launch.power,
        HAS_MASK=key_mask is not None, BLOCK_N=block_n, PRECISION=precision(), **_map_arguments(head_map, x),
        SN=x.stride(1), SH=x.stride(2), SD=x.stride(3), **launch.mapping, **launch.shared, **options,
    )  # fmt: skip
    return lengths


def _reduce(
    launch: _Launch,
    sums: torch.Tensor,
    vector_sums: torch.Tensor,
    splits: int,
    tokens: int,
    matrix: torch.Tensor,
    vector: torch.Tensor,
    row_scale: torch.Tensor | None,
) -> None:
    kernels.reduce_kernel[(launch.batch * launch.heads, triton.cdiv(launch.head_dim, _REDUCED_ROWS))](
        sums, vector_sums, _or(launch.counts, sums), matrix, vector, _or(row_scale, sums),
        launch.heads, tokens, splits, HAS_MASK=launch.counts is not None, BACKWARD=row_scale is not None,
        ROWS=_REDUCED_ROWS, **launch.shared,
    )  # fmt: skip


def _prepare(
    query: torch.Tensor,
    scale: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    power: float,
    counts: torch.Tensor | None = None,
) -> _Launch:
    """`counts` [B], float32, where the keys of other processes count too."""
    if key_mask is not None:
        key_mask = key_mask.contiguous()
        counts = key_mask.sum(dim=1, dtype=torch.float32) if counts is None else counts
    batch, _, heads, head_dim = query.shape
    return _Launch(batch, heads, head_dim, power, scale, key_mask, counts, query.dtype, _processors(query.device))


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def precision() -> str:
    """How the kernels multiply, see `_dot` there."""
    return "interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "ieee"


def _on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _strides(name: str, x: torch.Tensor) -> dict[str, int]:
    return {f"{name}N": x.stride(1), f"{name}H": x.stride(2), f"{name}D": x.stride(3)}


def _floats(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _or(tensor: torch.Tensor | None, unused: torch.Tensor) -> torch.Tensor:
    """A pointer for an argument its flag switches off."""
    return unused if tensor is None else tensor
