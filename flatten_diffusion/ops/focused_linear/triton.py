"""Launches the Triton kernels of focused linear attention. Same two entry points as `eager`, no host synchronisation.

Forward: lengths of the keys, state by chunks, their sum, then one pass over the queries. Block sizes follow from shape
and dtype alone: nothing is timed at the first call, and a captured CUDA graph replays the same kernels.
"""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass, replace

import torch
import triton

from . import triton_kernels as kernels
from .arguments import FocusedArguments, HeadMap
from .eager import AddUp, OptionalPair, key_count

_CHUNKS_PER_PROCESSOR = 4
_INTERPRETER_PROCESSORS = 1
_TOKENS_PER_LENGTHS_PROGRAM = 16
_REDUCED_ROWS = 16


@dataclass(frozen=True)
class _Launch:
    """One call and the sizes its kernels share."""

    call: FocusedArguments
    counts: torch.Tensor | None  # float32 [B]: keys left; None without a mask
    processors: int

    @property
    def dtype(self) -> torch.dtype:
        return self.call.query.dtype

    @property
    def head_dim(self) -> int:
        return self.call.query.shape[3]

    @property
    def pairs(self) -> int:
        """Of a sample and a head."""
        return self.call.query.shape[0] * self.call.query.shape[2]

    @property
    def grid(self) -> tuple[int, int]:
        """(0, 0) where nothing reads it."""
        return self.call.grid or (0, 0)

    @property
    def kernel(self) -> int:
        """The convolution's size, 0 where there is none."""
        return 0 if self.call.conv_weight is None else self.call.conv_weight.shape[-1]

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
        power = self.call.focusing_factor
        return {"WHOLE": int(power) if power in range(1, 9) else -1, "HAS_SCALE": self.call.scale is not None}

    @property
    def product(self) -> dict[str, int | str]:
        return {"BLOCK_E": self.block_e, "PRECISION": precision(), "num_stages": self.stages}

    def chunks(self, tokens: int) -> tuple[int, int]:
        """(tokens per chunk, chunks): enough programs to fill the device, at least a few blocks each."""
        wanted = max(1, self.processors * _CHUNKS_PER_PROCESSOR // (self.pairs * self.columns))
        blocks = triton.cdiv(tokens, self.block_n)
        chunk = triton.cdiv(blocks, min(wanted, max(1, blocks // 4))) * self.block_n
        return chunk, triton.cdiv(tokens, chunk)


def forward(
    call: FocusedArguments, add_up: AddUp | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Output [B, N, H, D], T [B, H, D, D] (the values' mean under each key feature), the mean key [B, H, D] and the
    number of keys [B], None without a mask; over the keys of all processes that `add_up` reaches.
    """
    with _on(call.query.device):
        launch = _prepare(call, None, add_up)
        sums, key_sums, splits = _state_sums(launch)
        if add_up is not None:
            sums, key_sums, counts = add_up(sums.sum(dim=0), key_sums.sum(dim=0), launch.counts)
            launch, splits = replace(launch, counts=counts), 1
        means = torch.empty(sums.shape[-4:], dtype=launch.dtype, device=sums.device)
        mean_key = _floats(sums, *key_sums.shape[-3:])
        _reduce(launch, sums, key_sums, splits, call.key.shape[1], means, mean_key, None)
        return _query_output(launch, means, mean_key), means, mean_key, launch.counts


def backward(
    call: FocusedArguments,
    grad_output: torch.Tensor,
    means: torch.Tensor,
    mean_key: torch.Tensor,
    counts: torch.Tensor | None = None,
    add_up: AddUp | None = None,
    weight_needs_grad: bool = True,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the flat arguments before the mask, from them and what `forward` returned; those of parameters are
    this process's share.
    """
    with _on(call.query.device):
        launch = _prepare(call, counts, add_up)
        grad_query, query_share, sums, vector_sums, splits = _query_backward(
            launch, _mapped(call.query, call.query_map), grad_output, means, mean_key
        )
        grad_query, grad_query_map = _map_backward(grad_query, call.query, call.query_map, None)
        if add_up is not None:
            sums, vector_sums = add_up(sums.sum(dim=0), vector_sums.sum(dim=0))
            splits = 1
        grad_key, grad_value, key_share = _key_backward(
            launch, _mapped(call.key, call.key_map), grad_output, mean_key, sums, vector_sums, splits
        )
        grad_key, grad_key_map = _map_backward(grad_key, call.key, call.key_map, launch.call.key_mask)
        grad_scale = None
        if call.scale is not None:
            grad_scale = (query_share.sum(dim=(0, 1)) + key_share.sum(dim=(0, 1))).flatten().to(call.scale.dtype)
        grad_weight = _weight_gradient(launch, grad_output) if launch.kernel and weight_needs_grad else None
        grad_bias = _bias_gradient(launch, grad_output)
    return (
        grad_query, grad_key, grad_value, grad_scale, *grad_query_map, *grad_key_map, grad_weight, grad_bias
    )  # fmt: skip


def _prepare(call: FocusedArguments, counts: torch.Tensor | None, add_up: AddUp | None) -> _Launch:
    """`counts` [B], where they are known already; a split call always has a mask, since its length is not theirs."""
    if add_up is not None and call.key_mask is None:
        call = call._replace(key_mask=torch.ones(call.key.shape[:2], dtype=torch.bool, device=call.key.device))
    if call.key_mask is not None:
        call = call._replace(key_mask=call.key_mask.contiguous())
        counts = key_count(call.key, call.key_mask) if counts is None else counts
    return _Launch(call, counts, _processors(call.query.device))


def _state_sums(launch: _Launch) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Of f(k)^T v [.., B, H, D, D] and of f(k) [.., B, H, D] over chunks of the keys, float32, and how many chunks."""
    call = launch.call
    value, key_mask = call.value, call.key_mask
    key, key_map = _unfused(launch, call.key, call.key_map)
    batch, tokens, heads, head_dim = key.shape
    chunk, splits = launch.chunks(tokens)
    sums = _floats(key, splits, batch, heads, head_dim, head_dim)
    key_sums = _floats(key, splits, batch, heads, head_dim)
    kernels.state_kernel[(batch * heads, splits, launch.columns)](
        key, value, _or(call.scale, key), _or(key_mask, key), _lengths(launch, key, key_mask, key_map),
        sums, key_sums, tokens, heads, chunk, key.stride(0), value.stride(0), call.focusing_factor,
        HAS_MASK=key_mask is not None, BLOCK_N=launch.block_n, **_map_arguments(key_map, key),
        **_strides("K", key), **_strides("V", value), **launch.mapping, **launch.shared, **launch.product,
    )  # fmt: skip
    return sums, key_sums, splits


def _query_output(launch: _Launch, means: torch.Tensor, mean_key: torch.Tensor) -> torch.Tensor:
    call, value = launch.call, launch.call.value
    query, query_map = _unfused(launch, call.query, call.query_map)
    batch, tokens, heads, _ = query.shape
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    blocks = triton.cdiv(tokens, launch.block_n)
    # With blocks to spare, a program that takes every head reads the query from memory only once.
    all_heads = batch * blocks >= 4 * launch.processors
    lengths = query if all_heads else _lengths(launch, query, None, query_map)
    kernels.query_kernel[(batch if all_heads else batch * heads, blocks)](
        query, value, _or(call.scale, query), lengths, means, mean_key, _or(call.conv_weight, query),
        _or(call.conv_bias, query), _or(call.key_mask, query), _or(launch.counts, query), output,
        tokens, heads, *launch.grid, query.stride(0), value.stride(0), call.focusing_factor,
        HAS_MASK=call.key_mask is not None, HAS_BIAS=call.conv_bias is not None, KERNEL=launch.kernel,
        ALL_HEADS=all_heads, BLOCK_N=launch.block_n, **_map_arguments(query_map, query),
        **_strides("Q", query), **_strides("V", value), **launch.mapping, **launch.shared, **launch.product,
    )  # fmt: skip
    return output


def _query_backward(
    launch: _Launch, query: torch.Tensor, grad_output: torch.Tensor, means: torch.Tensor, mean_key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Gradient of the mapped query, partial gradients of scale [.., B, H, D], and the state's: sums, vector sums,
    chunks."""
    batch, tokens, heads, head_dim = query.shape
    chunk, splits = launch.chunks(tokens)
    scale, power = _or(launch.call.scale, query), launch.call.focusing_factor
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
        tokens, heads, chunk, *strides, power, **common,
    )  # fmt: skip
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    scale_sums = _floats(query, splits, batch, heads, head_dim)
    kernels.query_gradient_kernel[(batch * heads, splits)](
        query, grad_output, scale, lengths, means, mean_key, along, projected, grad_query, scale_sums,
        tokens, heads, chunk, *strides, power, **common,
    )  # fmt: skip
    return grad_query, scale_sums, sums, vector_sums, splits


def _key_backward(
    launch: _Launch,
    key: torch.Tensor,
    grad_output: torch.Tensor,
    mean_key: torch.Tensor,
    state_sums: torch.Tensor,
    vector_sums: torch.Tensor,
    state_splits: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the mapped key and of value, and partial gradients of scale [.., B, H, D]."""
    call, value = launch.call, launch.call.value
    batch, tokens, heads, head_dim = key.shape
    sums = torch.empty((batch, heads, head_dim, head_dim), dtype=key.dtype, device=key.device)
    row_scale, vector = _floats(key, 2, batch, heads, head_dim)
    _reduce(launch, state_sums, vector_sums, state_splits, tokens, sums, vector, row_scale)
    chunk, splits = launch.chunks(tokens)
    lengths = _lengths(launch, key, call.key_mask)
    along = _floats(key, batch, heads, tokens)
    mask, counts, scale = _or(call.key_mask, key), _or(launch.counts, key), _or(call.scale, key)
    common = dict(
        HAS_MASK=call.key_mask is not None, BLOCK_N=launch.block_n, **_strides("K", key), **_strides("V", value),
        **launch.mapping, **(launch.shared | launch.gradient_warps), **launch.product,
    )  # fmt: skip
    kernels.key_along_kernel[(batch * heads, triton.cdiv(tokens, launch.block_n))](
        key, value, scale, mask, counts, lengths, mean_key, sums, row_scale, vector, along,
        tokens, heads, key.stride(0), value.stride(0), call.focusing_factor, **common,
    )  # fmt: skip
    grad_key = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    grad_value = torch.empty_like(grad_key)
    scale_sums = _floats(key, splits, batch, heads, head_dim)
    kernels.key_gradient_kernel[(batch * heads, splits)](
        key, value, grad_output, scale, mask, counts, lengths, mean_key, sums, row_scale, vector, along,
        _or(call.conv_weight, key), grad_key, grad_value, scale_sums,
        tokens, heads, chunk, *launch.grid, key.stride(0), value.stride(0), grad_output.stride(0),
        call.focusing_factor, KERNEL=launch.kernel, **_strides("G", grad_output), **common,
    )  # fmt: skip
    return grad_key, grad_value, scale_sums


def _bias_gradient(launch: _Launch, grad_output: torch.Tensor) -> torch.Tensor | None:
    if launch.call.conv_bias is None:
        return None
    per_sample = grad_output.sum(dim=1, dtype=torch.float32).flatten(1)  # [B, H * D]
    if launch.counts is not None:
        per_sample = per_sample * (launch.counts > 0).unsqueeze(-1)
    return per_sample.sum(dim=0).to(launch.call.conv_bias.dtype)


def _weight_gradient(launch: _Launch, grad_output: torch.Tensor) -> torch.Tensor:
    weight, value, mask = launch.call.conv_weight, launch.call.value, launch.call.key_mask
    assert weight is not None
    batch, tokens, heads, head_dim = value.shape
    chunk, splits = launch.chunks(tokens)
    sums = _floats(value, splits, batch, heads, launch.kernel, launch.kernel, head_dim)
    kernels.weight_gradient_kernel[(batch * heads, splits, launch.kernel)](
        value, grad_output, _or(mask, value), sums,
        tokens, heads, chunk, *launch.grid, value.stride(0), grad_output.stride(0),
        HAS_MASK=mask is not None, KERNEL=launch.kernel, BLOCK_K=triton.next_power_of_2(launch.kernel),
        BLOCK_N=launch.block_n, **_strides("V", value), **_strides("G", grad_output), **launch.shared,
    )  # fmt: skip
    return sums.sum(dim=(0, 1)).permute(0, 3, 1, 2).reshape(weight.shape).to(weight.dtype)


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
        x, _or(launch.call.scale, x), _or(key_mask, x), lengths, tokens, heads, x.stride(0),
        launch.call.focusing_factor, HAS_MASK=key_mask is not None, BLOCK_N=block_n, PRECISION=precision(),
        **_map_arguments(head_map, x), SN=x.stride(1), SH=x.stride(2), SD=x.stride(3),
        **launch.mapping, **launch.shared, **options,
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
    """Adds chunks up; `tokens` counts the keys where there is no mask."""
    kernels.reduce_kernel[(launch.pairs, triton.cdiv(launch.head_dim, _REDUCED_ROWS))](
        sums, vector_sums, _or(launch.counts, sums), matrix, vector, _or(row_scale, sums),
        launch.call.query.shape[2], tokens, splits, HAS_MASK=launch.counts is not None,
        BACKWARD=row_scale is not None, ROWS=_REDUCED_ROWS, **launch.shared,
    )  # fmt: skip


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
