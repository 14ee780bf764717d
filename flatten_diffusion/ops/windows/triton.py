"""`join_windows` as one Triton kernel: a program per window and head, so that nothing but the output is written."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..focused_linear.triton import _on as on_device
from ..focused_linear.triton import _or, _strides, precision
from ..focused_linear.triton_kernels import _dot, _load_tile, _load_vector
from .moments import KeyMoments
from .partition import JoinArguments

MAX_WINDOW_TOKENS = 128
"""Beyond, the scores of a window would not fit the registers."""
MAX_HEAD_DIM = 128


@triton.jit
def window_kernel(
    mixed_ptr, query_ptr, key_ptr, value_ptr, key_mask_ptr, number_ptr, mean_ptr, covariance_ptr, peak_ptr, gain_ptr,
    bias_ptr, output_ptr, log_mass_ptr,
    length, heads, first, height, width, rows, columns, mixed_batch_stride, query_batch_stride, key_batch_stride,
    value_batch_stride, scale, no_key,
    HAS_MASK: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, MN: tl.constexpr, MH: tl.constexpr, MD: tl.constexpr, QN: tl.constexpr, QH: tl.constexpr,
    QD: tl.constexpr, KN: tl.constexpr, KH: tl.constexpr, KD: tl.constexpr, VN: tl.constexpr, VH: tl.constexpr,
    VD: tl.constexpr,
):  # fmt: skip
    """One window of one head, see `flatten_diffusion.mixers.WindowAttention`; windows of an image in row-major order,
    frame by frame, the image's tokens from `first` on."""
    window = tl.program_id(0)
    batch_head = tl.program_id(1)
    batch, head = batch_head // heads, batch_head % heads
    mixed_ptr += batch.to(tl.int64) * mixed_batch_stride
    query_ptr += batch.to(tl.int64) * query_batch_stride
    key_ptr += batch.to(tl.int64) * key_batch_stride
    value_ptr += batch.to(tl.int64) * value_batch_stride

    place = tl.arange(0, BLOCK_T)
    frame = window // (rows * columns)
    y = (window // columns) % rows * SIZE + place // SIZE
    x = window % columns * SIZE + place % SIZE
    inside = (place < SIZE * SIZE) & (y < height) & (x < width)
    tokens = first + (frame * height + y) * width + x
    live = inside
    if HAS_MASK:
        live = live & (tl.load(key_mask_ptr + batch.to(tl.int64) * length + tokens, mask=live, other=0) != 0)

    query = _load_tile(query_ptr, tokens, inside, head, 0, HEAD_DIM, BLOCK_D, QN, QH, QD)
    wide = query.to(tl.float32)
    channels = tl.arange(0, BLOCK_D)
    square = (channels < HEAD_DIM)[:, None] & (channels < HEAD_DIM)[None, :]
    offsets = batch_head.to(tl.int64) * HEAD_DIM * HEAD_DIM + channels[:, None] * HEAD_DIM + channels[None, :]
    covariance = tl.load(covariance_ptr + offsets, mask=square, other=0.0)
    turned = _dot(query, covariance, tl.zeros([BLOCK_T, BLOCK_D], tl.float32), PRECISION)
    peak = tl.load(peak_ptr + batch_head)
    variance = tl.maximum(tl.sum(turned * wide, axis=1) * peak * scale * scale, 1e-12)
    average = tl.sum(wide * _load_vector(mean_ptr, batch_head, HEAD_DIM, BLOCK_D)[None, :], axis=1) * scale
    number = tl.load(number_ptr + batch)
    log_count = tl.log(number)
    frozen = tl.sqrt(tl.maximum(2.0 * variance * log_count, 1e-12)) - log_count
    spread = tl.where(variance < 2.0 * log_count, variance * 0.5, frozen)
    near = tl.sum(live.to(tl.float32), axis=0)
    log_far = tl.load(gain_ptr + head * 2) * average + tl.load(gain_ptr + head * 2 + 1) * spread
    log_far += tl.load(bias_ptr + head) + tl.log(tl.maximum(number - near, no_key))

    key = _load_tile(key_ptr, tokens, live, head, 0, HEAD_DIM, BLOCK_D, KN, KH, KD)
    scores = _dot(query, tl.trans(key), tl.zeros([BLOCK_T, BLOCK_T], tl.float32), PRECISION) * scale
    scores = tl.where(live[None, :], scores, float("-inf"))
    largest = tl.maximum(tl.max(scores, axis=1), log_far)
    weights = tl.exp(scores - largest[:, None])
    far = tl.exp(log_far - largest)
    total = tl.sum(weights, axis=1) + far
    value = _load_tile(value_ptr, tokens, live, head, 0, HEAD_DIM, BLOCK_D, VN, VH, VD)
    mixed = _load_tile(mixed_ptr, tokens, inside, head, 0, HEAD_DIM, BLOCK_D, MN, MH, MD).to(tl.float32)
    weights = (weights / total[:, None]).to(value_ptr.dtype.element_ty)
    output = _dot(weights, value, mixed * (far / total)[:, None], PRECISION)

    row = batch.to(tl.int64) * length + tokens
    offsets = (row[:, None] * heads + head) * HEAD_DIM + channels[None, :]
    written = inside[:, None] & (channels < HEAD_DIM)[None, :]
    tl.store(output_ptr + offsets, output.to(output_ptr.dtype.element_ty), mask=written)
    tl.store(log_mass_ptr + row * heads + head, largest + tl.log(total), mask=inside)


def fits_kernel(query: torch.Tensor, size: int) -> bool:
    """Whether the kernel takes windows of this size and this head_dim."""
    return size * size <= MAX_WINDOW_TOKENS and query.shape[3] <= MAX_HEAD_DIM


def join(
    call: JoinArguments, gain: torch.Tensor, bias: torch.Tensor, moments: KeyMoments, no_key: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `join_windows`; gain is added to 1 already."""
    mixed, query, key, value, pictures, size, key_mask, scale = call
    batch, length, heads, head_dim = query.shape
    number, mean, covariance = moments
    # Its largest entry apart, so that it fits any dtype's range.
    peak = covariance.abs().amax(dim=(-2, -1)).clamp(min=1e-30)
    covariance = (covariance / peak[..., None, None]).to(query.dtype)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    log_mass = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    mask = _or(None if key_mask is None else key_mask.contiguous(), query)
    first = 0
    with on_device(query.device):
        for frames, height, width in pictures:
            rows, columns = triton.cdiv(height, size), triton.cdiv(width, size)
            window_kernel[(frames * rows * columns, batch * heads)](
                mixed, query, key, value, mask, number, mean, covariance, peak, gain, bias, output, log_mass,
                length, heads, first, height, width, rows, columns,
                mixed.stride(0), query.stride(0), key.stride(0), value.stride(0), scale, no_key,
                HAS_MASK=key_mask is not None, SIZE=size, HEAD_DIM=head_dim,
                BLOCK_T=max(16, triton.next_power_of_2(size * size)),
                BLOCK_D=max(16, triton.next_power_of_2(head_dim)), PRECISION=precision(),
                num_warps=4, num_stages=1, **_strides("M", mixed), **_strides("Q", query),
                **_strides("K", key), **_strides("V", value),
            )  # fmt: skip
            first += math.prod((frames, height, width))
    return output, log_mass
