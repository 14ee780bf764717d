"""Triton kernels of focused linear attention. `triton.py` launches them; `eager.py` is the same operator in torch.

Notation, per head: w = (u / peak)^p with u = (relu(x) + 1e-6) / scale, x mapped before where there is a map; f(x) =
ratio * w; n1, n2 the lengths of u / peak and w over all heads; kappa_d = mean_m f(k)_d. Everything the matrix products
see is kept within the range of its dtype:

    T_de = mean_m f(k)_d v_e / kappa_d          a weighted mean of the values
    a_nd = w_d kappa_d / Z,  Z = sum_d w_d kappa_d + 1e-6 / ratio          weights, at most 1
    out  = a T

so that fp16 cannot overflow, whatever the magnitude of query and key. Strides within a sample are compile-time
constants: the compiler then proves the alignment of 16-byte loads for head sizes such as 40, of which 16 is no divisor.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

FEATURE_EPS = tl.constexpr(1e-6)
NORMALIZER_EPS = tl.constexpr(1e-6)
SMALLEST = tl.constexpr(1e-37)


@triton.jit
def _power(x, power, WHOLE: tl.constexpr):
    """x^power for x >= 0; WHOLE is the power where it is a small whole number, -1 elsewhere."""
    if WHOLE == 0:
        return tl.full(x.shape, 1.0, tl.float32)
    if WHOLE > 0:
        result = x
        for _ in tl.static_range(WHOLE - 1):
            result *= x
        return result
    return tl.where(x > 0, tl.exp2(power * tl.log2(tl.maximum(x, SMALLEST))), 0.0)


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b. "interpreted": the interpreter multiplies bfloat16's bits; it gets the same numbers in float32."""
    if PRECISION == "interpreted":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _rectified(x, scale_ptr, head, HAS_SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """u of x [n, D] in float32; 0 in the padding of D, so that it weighs nothing."""
    channels = tl.arange(0, BLOCK_D)
    inside = channels < HEAD_DIM
    u = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + FEATURE_EPS
    if HAS_SCALE:
        scale = tl.load(scale_ptr + head * HEAD_DIM + channels, mask=inside, other=1.0).to(tl.float32)
        u /= scale[None, :]
    return tl.where(inside[None, :], u, 0.0)


@triton.jit
def _load_map(
    weight_ptr, bias_ptr, head, like_ptr, HAS_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Weight [D, D] and bias [D] of a head's map, as `_mapped_features` takes them."""
    if HAS_MAP:
        weight = _load_matrix(weight_ptr + head * HEAD_DIM * HEAD_DIM, 0, HEAD_DIM, BLOCK_D, BLOCK_D)
        weight = weight.to(like_ptr.dtype.element_ty)
        bias = _load_vector(bias_ptr, head, HEAD_DIM, BLOCK_D)
    else:
        weight = 0
        bias = 0
    return weight, bias


@triton.jit
def _mapped_features(
    x_ptr, scale_ptr,
    weight, bias, tokens, live, head,
    HAS_MAP: tl.constexpr, HAS_SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, SN: tl.constexpr, SH: tl.constexpr, SD: tl.constexpr,
):  # fmt: skip
    """u [n, D] of one head's tokens behind its map, where there is one."""
    x = _load_tile(x_ptr, tokens, live, head, 0, HEAD_DIM, BLOCK_D, SN, SH, SD)
    if HAS_MAP:
        x = _dot(x, weight, tl.zeros([BLOCK_N, BLOCK_D], tl.float32), PRECISION) + bias[None, :]
    return _rectified(x.to(tl.float32), scale_ptr, head, HAS_SCALE, HEAD_DIM, BLOCK_D)


@triton.jit
def _features(
    x_ptr, scale_ptr,
    tokens, live, head,
    HAS_SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SN: tl.constexpr, SH: tl.constexpr,
    SD: tl.constexpr,
):  # fmt: skip
    """(u [n, D], x > 0) of one head's tokens."""
    x = _load_tile(x_ptr, tokens, live, head, 0, HEAD_DIM, BLOCK_D, SN, SH, SD).to(tl.float32)
    return _rectified(x, scale_ptr, head, HAS_SCALE, HEAD_DIM, BLOCK_D), x > 0


@triton.jit
def _token_lengths(
    x_ptr, scale_ptr, map_weight_ptr, map_bias_ptr,
    tokens, live, heads, power,
    WHOLE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, SN: tl.constexpr, SH: tl.constexpr, SD: tl.constexpr,
):  # fmt: skip
    """(1 / peak, n1, n2) of tokens over all their heads, in one pass: sums shrink whenever the peak grows."""
    peak = tl.zeros([BLOCK_N], tl.float32)
    sum_1 = tl.zeros([BLOCK_N], tl.float32)
    sum_2 = tl.zeros([BLOCK_N], tl.float32)
    for head in range(heads):
        weight, bias = _load_map(map_weight_ptr, map_bias_ptr, head, x_ptr, HAS_MAP, HEAD_DIM, BLOCK_D)
        u = _mapped_features(
            x_ptr, scale_ptr, weight, bias, tokens, live, head,
            HAS_MAP, HAS_SCALE, HEAD_DIM, BLOCK_N, BLOCK_D, PRECISION, SN, SH, SD,
        )  # fmt: skip
        grown = tl.maximum(peak, tl.max(u, axis=1))
        shrink = peak / grown
        unit = u / grown[:, None]
        w = _power(unit, power, WHOLE)
        shrink_2 = _power(shrink, power, WHOLE)
        sum_1 = sum_1 * shrink * shrink + tl.sum(unit * unit, axis=1)
        sum_2 = sum_2 * shrink_2 * shrink_2 + tl.sum(w * w, axis=1)
        peak = grown
    return 1.0 / peak, tl.sqrt(sum_1), tl.sqrt(sum_2)


@triton.jit
def _load_lengths(lengths_ptr, batch, length, tokens, live):
    """(1 / peak, n1, n2) that `statistics_kernel` stored as [B, 3, N]; 1 beyond the end."""
    base = lengths_ptr + batch.to(tl.int64) * 3 * length + tokens
    return (
        tl.load(base, mask=live, other=1.0),
        tl.load(base + length, mask=live, other=1.0),
        tl.load(base + 2 * length, mask=live, other=1.0),
    )


@triton.jit
def _key_is_live(key_mask_ptr, batch, length, tokens, end, HAS_MASK: tl.constexpr):
    live = tokens < end
    if HAS_MASK:
        live = live & (tl.load(key_mask_ptr + batch.to(tl.int64) * length + tokens, mask=live, other=0) != 0)
    return live


@triton.jit
def _load_tile(
    x_ptr,
    tokens, live, head, first,
    HEAD_DIM: tl.constexpr, BLOCK_E: tl.constexpr, SN: tl.constexpr, SH: tl.constexpr, SD: tl.constexpr,
):  # fmt: skip
    """Channels first .. first + BLOCK_E of one head's tokens, [n, BLOCK_E]; 0 where not live."""
    channels = first + tl.arange(0, BLOCK_E)
    offsets = tokens[:, None].to(tl.int64) * SN + head * SH + channels[None, :] * SD
    return tl.load(x_ptr + offsets, mask=live[:, None] & (channels < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _load_square(ptr, batch_head, first, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):
    """Columns first .. first + BLOCK_E of a head's [D, D] matrix, zero in the padding."""
    return _load_matrix(ptr + batch_head.to(tl.int64) * HEAD_DIM * HEAD_DIM, first, HEAD_DIM, BLOCK_D, BLOCK_E)


@triton.jit
def _load_matrix(ptr, first, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):
    rows = tl.arange(0, BLOCK_D)
    columns = first + tl.arange(0, BLOCK_E)
    offsets = rows[:, None] * HEAD_DIM + columns[None, :]
    mask = (rows < HEAD_DIM)[:, None] & (columns < HEAD_DIM)[None, :]
    return tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit
def _load_vector(ptr, batch_head, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    channels = tl.arange(0, BLOCK_D)
    return tl.load(ptr + batch_head * HEAD_DIM + channels, mask=channels < HEAD_DIM, other=0.0).to(tl.float32)


@triton.jit
def _convolve(
    x_ptr, weight_ptr, key_mask_ptr,
    batch, tokens, length, head, height, width,
    first: tl.constexpr, FLIP: tl.constexpr, HAS_MASK: tl.constexpr, KERNEL: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, SN: tl.constexpr, SH: tl.constexpr, SD: tl.constexpr,
):  # fmt: skip
    """Depthwise convolution around `tokens`, [n, BLOCK_E] in float32; FLIP gives its transpose."""
    reach: tl.constexpr = KERNEL // 2
    channels = first + tl.arange(0, BLOCK_E)
    inside = channels < HEAD_DIM
    weight_ptr += head * HEAD_DIM * KERNEL * KERNEL
    row = tokens // width
    column = tokens % width
    total = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for i in range(KERNEL):  # a loop at run time: unrolled as well, a 7 x 7 kernel takes a minute to compile
        for j in tl.static_range(KERNEL):
            y = row + (i - reach)
            x = column + (j - reach)
            source = tokens + (i - reach) * width + (j - reach)
            live = (tokens < length) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            if HAS_MASK:
                live = live & (tl.load(key_mask_ptr + batch.to(tl.int64) * length + source, mask=live, other=0) != 0)
            tile = _load_tile(x_ptr, source, live, head, first, HEAD_DIM, BLOCK_E, SN, SH, SD)
            tap = KERNEL * KERNEL - 1 - i * KERNEL - j if FLIP else i * KERNEL + j
            weight = tl.load(weight_ptr + channels * (KERNEL * KERNEL) + tap, mask=inside, other=0.0)
            total += tile.to(tl.float32) * weight.to(tl.float32)[None, :]
    return total


@triton.jit
def statistics_kernel(
    x_ptr, scale_ptr, key_mask_ptr, lengths_ptr,
    length, heads, batch_stride, power,
    map_weight_ptr, map_bias_ptr,
    WHOLE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_MAP: tl.constexpr, HAS_MASK: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, SN: tl.constexpr, SH: tl.constexpr,
    SD: tl.constexpr,
):  # fmt: skip
    """Per token 1 / peak, n1 and n2, stored as [B, 3, N]."""
    batch = tl.program_id(0)
    tokens = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = _key_is_live(key_mask_ptr, batch, length, tokens, length, HAS_MASK)
    inverse_peak, n1, n2 = _token_lengths(
        x_ptr + batch.to(tl.int64) * batch_stride, scale_ptr, map_weight_ptr, map_bias_ptr, tokens, live, heads, power,
        WHOLE, HAS_SCALE, HAS_MAP, HEAD_DIM, BLOCK_N, BLOCK_D, PRECISION, SN, SH, SD,
    )  # fmt: skip
    base = lengths_ptr + batch.to(tl.int64) * 3 * length + tokens
    tl.store(base, inverse_peak, mask=tokens < length)
    tl.store(base + length, n1, mask=tokens < length)
    tl.store(base + 2 * length, n2, mask=tokens < length)


@triton.jit
def state_kernel(
    key_ptr, value_ptr, scale_ptr, key_mask_ptr, lengths_ptr, sums_ptr, key_sums_ptr,
    length, heads, chunk, key_batch_stride, value_batch_stride, power,
    map_weight_ptr, map_bias_ptr,
    WHOLE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_MAP: tl.constexpr, HAS_MASK: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr, KN: tl.constexpr,
    KH: tl.constexpr, KD: tl.constexpr, VN: tl.constexpr, VH: tl.constexpr, VD: tl.constexpr,
):  # fmt: skip
    """One chunk of the tokens of one head: sum_m f(k)_d v_e and sum_m f(k)_d, in float32."""
    batch_head = tl.program_id(0)
    split = tl.program_id(1)
    first = tl.program_id(2) * BLOCK_E
    batch, head = batch_head // heads, batch_head % heads
    key_ptr += batch.to(tl.int64) * key_batch_stride
    value_ptr += batch.to(tl.int64) * value_batch_stride
    dtype = value_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    key_total = tl.zeros([BLOCK_D], tl.float32)
    weight, bias = _load_map(map_weight_ptr, map_bias_ptr, head, key_ptr, HAS_MAP, HEAD_DIM, BLOCK_D)
    end = tl.minimum(split * chunk + chunk, length)
    for start in range(split * chunk, end, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        live = _key_is_live(key_mask_ptr, batch, length, tokens, end, HAS_MASK)
        u = _mapped_features(
            key_ptr, scale_ptr, weight, bias, tokens, live, head,
            HAS_MAP, HAS_SCALE, HEAD_DIM, BLOCK_N, BLOCK_D, PRECISION, KN, KH, KD,
        )  # fmt: skip
        inverse_peak, n1, n2 = _load_lengths(lengths_ptr, batch, length, tokens, live)
        ratio = tl.where(live, n1 / (n2 * inverse_peak), 0.0)
        mapped = _power(u * inverse_peak[:, None], power, WHOLE) * ratio[:, None]
        values = _load_tile(value_ptr, tokens, live, head, first, HEAD_DIM, BLOCK_E, VN, VH, VD)
        if dtype == tl.float16:
            # Each feature by its own largest entry: fp16 has no range for f(k), nor for a weak head beside a strong.
            largest = tl.maximum(tl.max(mapped, axis=0), SMALLEST)
            rounded = (mapped / largest[None, :]).to(dtype)
            product = _dot(tl.trans(rounded), values, tl.zeros([BLOCK_D, BLOCK_E], tl.float32), PRECISION)
            total += product * largest[:, None]
            key_total += tl.sum(rounded.to(tl.float32), axis=0) * largest
        else:
            rounded = mapped.to(dtype)
            total = _dot(tl.trans(rounded), values, total, PRECISION)
            # Rounded alike, T stays an exact weighted mean.
            key_total += tl.sum(rounded.to(tl.float32), axis=0)
    rows = tl.arange(0, BLOCK_D)
    columns = first + tl.arange(0, BLOCK_E)
    slot = (split * tl.num_programs(0) + batch_head).to(tl.int64)
    mask = (rows < HEAD_DIM)[:, None] & (columns < HEAD_DIM)[None, :]
    offsets = rows[:, None] * HEAD_DIM + columns[None, :]
    tl.store(sums_ptr + slot * HEAD_DIM * HEAD_DIM + offsets, total, mask=mask)
    if tl.program_id(2) == 0:
        tl.store(key_sums_ptr + slot * HEAD_DIM + rows, key_total, mask=rows < HEAD_DIM)


@triton.jit
def reduce_kernel(
    sums_ptr, vector_sums_ptr, counts_ptr, matrix_ptr, vector_ptr, row_scale_ptr,
    heads, length, splits,
    HAS_MASK: tl.constexpr, BACKWARD: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds the chunks up in a fixed order.

    Forward: T (rows divided by the key sum) and kappa. BACKWARD: the sum with each row divided by its largest entry,
    those entries, and the vector's sum.
    """
    batch_head = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    row_mask = rows < HEAD_DIM
    mask = row_mask[:, None] & (columns < HEAD_DIM)[None, :]
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    vector = tl.zeros([ROWS], tl.float32)
    for split in range(splits):
        slot = (split * tl.num_programs(0) + batch_head).to(tl.int64)
        offsets = slot * HEAD_DIM * HEAD_DIM + rows[:, None] * HEAD_DIM + columns[None, :]
        total += tl.load(sums_ptr + offsets, mask=mask, other=0.0)
        vector += tl.load(vector_sums_ptr + slot * HEAD_DIM + rows, mask=row_mask, other=0.0)
    if BACKWARD:
        divisor = tl.maximum(tl.max(tl.abs(total), axis=1), SMALLEST)
        tl.store(row_scale_ptr + batch_head * HEAD_DIM + rows, divisor, mask=row_mask)
    else:
        divisor = tl.maximum(vector, SMALLEST)
        if HAS_MASK:
            vector /= tl.maximum(tl.load(counts_ptr + batch_head // heads), 1.0)
        else:
            vector /= length
    tl.store(vector_ptr + batch_head * HEAD_DIM + rows, vector, mask=row_mask)
    offsets = batch_head.to(tl.int64) * HEAD_DIM * HEAD_DIM + rows[:, None] * HEAD_DIM + columns[None, :]
    tl.store(matrix_ptr + offsets, (total / divisor[:, None]).to(matrix_ptr.dtype.element_ty), mask=mask)


@triton.jit
def query_kernel(
    query_ptr, value_ptr, scale_ptr, lengths_ptr, means_ptr, kappa_ptr, weight_ptr, bias_ptr, key_mask_ptr, counts_ptr,
    output_ptr,
    length, heads, height, width, query_batch_stride, value_batch_stride, power,
    map_weight_ptr, map_bias_ptr,
    WHOLE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_MAP: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    KERNEL: tl.constexpr, ALL_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, PRECISION: tl.constexpr, QN: tl.constexpr, QH: tl.constexpr, QD: tl.constexpr,
    VN: tl.constexpr, VH: tl.constexpr, VD: tl.constexpr,
):  # fmt: skip
    """a T and the convolution. ALL_HEADS: one program takes every head of its tokens and finds their lengths itself."""
    tokens = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = tokens < length
    if ALL_HEADS:
        batch = tl.program_id(0)
        first_head = 0
        last_head = heads
    else:
        batch = tl.program_id(0) // heads
        first_head = tl.program_id(0) % heads
        last_head = first_head + 1
    query_ptr += batch.to(tl.int64) * query_batch_stride
    value_ptr += batch.to(tl.int64) * value_batch_stride
    if ALL_HEADS:
        inverse_peak, n1, n2 = _token_lengths(
            query_ptr, scale_ptr, map_weight_ptr, map_bias_ptr, tokens, live, heads, power,
            WHOLE, HAS_SCALE, HAS_MAP, HEAD_DIM, BLOCK_N, BLOCK_D, PRECISION, QN, QH, QD,
        )  # fmt: skip
    else:
        inverse_peak, n1, n2 = _load_lengths(lengths_ptr, batch, length, tokens, live)
    epsilon = NORMALIZER_EPS * n2 * inverse_peak / n1
    for head in range(first_head, last_head):
        batch_head = batch * heads + head
        weight, bias = _load_map(map_weight_ptr, map_bias_ptr, head, query_ptr, HAS_MAP, HEAD_DIM, BLOCK_D)
        u = _mapped_features(
            query_ptr, scale_ptr, weight, bias, tokens, live, head,
            HAS_MAP, HAS_SCALE, HEAD_DIM, BLOCK_N, BLOCK_D, PRECISION, QN, QH, QD,
        )  # fmt: skip
        kappa = _load_vector(kappa_ptr, batch_head, HEAD_DIM, BLOCK_D)
        weights = _power(u * inverse_peak[:, None], power, WHOLE) * kappa[None, :]
        normalizer = tl.maximum(tl.sum(weights, axis=1) + epsilon, SMALLEST)
        weights = (weights / normalizer[:, None]).to(query_ptr.dtype.element_ty)
        for first in tl.static_range(0, HEAD_DIM, BLOCK_E):
            means = _load_square(means_ptr, batch_head, first, HEAD_DIM, BLOCK_D, BLOCK_E)
            out = _dot(weights, means, tl.zeros([BLOCK_N, BLOCK_E], tl.float32), PRECISION)
            channels = first + tl.arange(0, BLOCK_E)
            if KERNEL > 0:
                out += _convolve(
                    value_ptr, weight_ptr, key_mask_ptr, batch, tokens, length, head, height, width, first,
                    False, HAS_MASK, KERNEL, HEAD_DIM, BLOCK_N, BLOCK_E, VN, VH, VD,
                )  # fmt: skip
                if HAS_BIAS:
                    own = bias_ptr + head * HEAD_DIM + channels
                    bias = tl.load(own, mask=channels < HEAD_DIM, other=0.0).to(tl.float32)
                    if HAS_MASK:
                        bias *= (tl.load(counts_ptr + batch) > 0).to(tl.float32)
                    out += bias[None, :]
            row = batch.to(tl.int64) * length + tokens
            offsets = (row[:, None] * heads + head) * HEAD_DIM + channels[None, :]
            mask = live[:, None] & (channels < HEAD_DIM)[None, :]
            tl.store(output_ptr + offsets, out.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def query_sums_kernel(
    query_ptr, grad_ptr, scale_ptr, lengths_ptr, means_ptr, kappa_ptr, sums_ptr, vector_sums_ptr, along_ptr,
    projected_ptr,
    length, heads, chunk, query_batch_stride, grad_batch_stride, power,
    WHOLE: tl.constexpr, HAS_SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, PRECISION: tl.constexpr, QN: tl.constexpr, QH: tl.constexpr, QD: tl.constexpr,
    GN: tl.constexpr, GH: tl.constexpr, GD: tl.constexpr,
):  # fmt: skip
    """Backward over a chunk of queries with y = a T and g its gradient: P_de = sum_n a_d g_e, p_d = sum_n a_d (g . y).

    Also per token and head g . y, and what the head adds to grad f(q) . f(q), which is (g . y) (1 - sum_d a_d).
    """
    batch_head = tl.program_id(0)
    split = tl.program_id(1)
    own = tl.program_id(2) * BLOCK_E
    batch, head = batch_head // heads, batch_head % heads
    query_ptr += batch.to(tl.int64) * query_batch_stride
    grad_ptr += batch.to(tl.int64) * grad_batch_stride
    dtype = query_ptr.dtype.element_ty
    kappa = _load_vector(kappa_ptr, batch_head, HEAD_DIM, BLOCK_D)
    total = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    vector = tl.zeros([BLOCK_D], tl.float32)
    end = tl.minimum(split * chunk + chunk, length)
    for start in range(split * chunk, end, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        live = tokens < end
        u, _ = _features(query_ptr, scale_ptr, tokens, live, head, HAS_SCALE, HEAD_DIM, BLOCK_D, QN, QH, QD)
        inverse_peak, n1, n2 = _load_lengths(lengths_ptr, batch, length, tokens, live)
        epsilon = NORMALIZER_EPS * n2 * inverse_peak / n1
        weights = _power(u * inverse_peak[:, None], power, WHOLE) * kappa[None, :]
        normalizer = tl.maximum(tl.sum(weights, axis=1) + epsilon, SMALLEST)
        weights = tl.where(live[:, None], weights / normalizer[:, None], 0.0)
        rounded = weights.to(dtype)
        projected = tl.zeros([BLOCK_N], tl.float32)
        for first in tl.static_range(0, HEAD_DIM, BLOCK_E):
            means = _load_square(means_ptr, batch_head, first, HEAD_DIM, BLOCK_D, BLOCK_E)
            grad = _load_tile(grad_ptr, tokens, live, head, first, HEAD_DIM, BLOCK_E, GN, GH, GD)
            attended = _dot(rounded, means, tl.zeros([BLOCK_N, BLOCK_E], tl.float32), PRECISION)
            projected += tl.sum(attended * grad.to(tl.float32), axis=1)
        channels = own + tl.arange(0, BLOCK_E)
        offsets = tokens[:, None].to(tl.int64) * GN + head * GH + channels[None, :] * GD
        grad = tl.load(grad_ptr + offsets, mask=live[:, None] & (channels < HEAD_DIM)[None, :], other=0.0)
        total = _dot(tl.trans(rounded), grad, total, PRECISION)
        vector += tl.sum(weights * projected[:, None], axis=0)
        if tl.program_id(2) == 0:
            place = batch_head.to(tl.int64) * length + tokens
            tl.store(projected_ptr + place, projected, mask=live)
            tl.store(along_ptr + place, projected * epsilon / normalizer, mask=live)
    rows = tl.arange(0, BLOCK_D)
    columns = own + tl.arange(0, BLOCK_E)
    slot = (split * tl.num_programs(0) + batch_head).to(tl.int64)
    mask = (rows < HEAD_DIM)[:, None] & (columns < HEAD_DIM)[None, :]
    offsets = rows[:, None] * HEAD_DIM + columns[None, :]
    tl.store(sums_ptr + slot * HEAD_DIM * HEAD_DIM + offsets, total, mask=mask)
    if tl.program_id(2) == 0:
        tl.store(vector_sums_ptr + slot * HEAD_DIM + rows, vector, mask=rows < HEAD_DIM)


@triton.jit
def _map_gradient(grad, unit, along, n1, n2, inverse_peak, power, WHOLE: tl.constexpr):
    """Gradient of f(x) = ratio * (u / peak)^p with respect to u; `along` is grad . f(x) over all heads."""
    along_w = along * n2 * inverse_peak / n1
    w = _power(unit, power, WHOLE)
    slope = power * _power(unit, power - 1.0, WHOLE - 1 if WHOLE > 0 else -1)
    shaped = slope * (n1 / n2)[:, None] * (grad - w * (along_w / (n2 * n2))[:, None])
    return shaped + unit * (along_w / (n1 * n2))[:, None]


@triton.jit
def _sum_over_heads(ptr, batch, heads, length, tokens, live, BLOCK_N: tl.constexpr):
    total = tl.zeros([BLOCK_N], tl.float32)
    for head in range(heads):
        total += tl.load(ptr + (batch * heads + head).to(tl.int64) * length + tokens, mask=live, other=0.0)
    return total


@triton.jit
def _store_input_gradient(
    grad_u, u, positive,
    scale_ptr, output_ptr,
    batch, length, heads, head, tokens, live, written,
    HAS_SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of x (zero where not live) and returns that of scale, summed over the tokens."""
    channels = tl.arange(0, BLOCK_D)
    inside = channels < HEAD_DIM
    scale_grad = tl.zeros([BLOCK_D], tl.float32)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + head * HEAD_DIM + channels, mask=inside, other=1.0).to(tl.float32)
        grad_u /= scale[None, :]
        scale_grad -= tl.sum(tl.where(live[:, None] & inside[None, :], grad_u * u, 0.0), axis=0)
    row = batch.to(tl.int64) * length + tokens
    offsets = (row[:, None] * heads + head) * HEAD_DIM + channels[None, :]
    grad_x = tl.where(positive & live[:, None], grad_u, 0.0).to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + offsets, grad_x, mask=written[:, None] & inside[None, :])
    return scale_grad


@triton.jit
def query_gradient_kernel(
    query_ptr, grad_ptr, scale_ptr, lengths_ptr, means_ptr, kappa_ptr, along_ptr, projected_ptr, output_ptr,
    scale_sums_ptr,
    length, heads, chunk, query_batch_stride, grad_batch_stride, power,
    WHOLE: tl.constexpr, HAS_SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, PRECISION: tl.constexpr, QN: tl.constexpr, QH: tl.constexpr, QD: tl.constexpr,
    GN: tl.constexpr, GH: tl.constexpr, GD: tl.constexpr,
):  # fmt: skip
    """Gradient of the query: grad f(q)_d = kappa_d (sum_e T_de g_e - g . y) / (ratio Z), then back through the map."""
    batch_head = tl.program_id(0)
    split = tl.program_id(1)
    batch, head = batch_head // heads, batch_head % heads
    query_ptr += batch.to(tl.int64) * query_batch_stride
    grad_ptr += batch.to(tl.int64) * grad_batch_stride
    kappa = _load_vector(kappa_ptr, batch_head, HEAD_DIM, BLOCK_D)
    scale_total = tl.zeros([BLOCK_D], tl.float32)
    end = tl.minimum(split * chunk + chunk, length)
    for start in range(split * chunk, end, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        live = tokens < end
        u, positive = _features(query_ptr, scale_ptr, tokens, live, head, HAS_SCALE, HEAD_DIM, BLOCK_D, QN, QH, QD)
        inverse_peak, n1, n2 = _load_lengths(lengths_ptr, batch, length, tokens, live)
        inverse_ratio = n2 * inverse_peak / n1
        unit = u * inverse_peak[:, None]
        weights = _power(unit, power, WHOLE) * kappa[None, :]
        normalizer = tl.maximum(tl.sum(weights, axis=1) + NORMALIZER_EPS * inverse_ratio, SMALLEST)
        turned = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for first in tl.static_range(0, HEAD_DIM, BLOCK_E):
            means = _load_square(means_ptr, batch_head, first, HEAD_DIM, BLOCK_D, BLOCK_E)
            grad = _load_tile(grad_ptr, tokens, live, head, first, HEAD_DIM, BLOCK_E, GN, GH, GD)
            turned = _dot(grad, tl.trans(means), turned, PRECISION)
        projected = tl.load(projected_ptr + batch_head.to(tl.int64) * length + tokens, mask=live, other=0.0)
        along = _sum_over_heads(along_ptr, batch, heads, length, tokens, live, BLOCK_N)
        grad_map = kappa[None, :] * (turned - projected[:, None]) * (inverse_ratio / normalizer)[:, None]
        grad_u = _map_gradient(grad_map, unit, along, n1, n2, inverse_peak, power, WHOLE)
        scale_total += _store_input_gradient(
            grad_u, u, positive, scale_ptr, output_ptr, batch, length, heads, head, tokens, live, live,
            HAS_SCALE, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    if HAS_SCALE:
        channels = tl.arange(0, BLOCK_D)
        slot = (split * tl.num_programs(0) + batch_head).to(tl.int64)
        tl.store(scale_sums_ptr + slot * HEAD_DIM + channels, scale_total, mask=channels < HEAD_DIM)


@triton.jit
def _key_map_gradient(
    value_ptr, sums_ptr,
    batch_head, head, tokens, live, row_scale, vector, inverse_kappa,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr, VN: tl.constexpr, VH: tl.constexpr, VD: tl.constexpr,
):  # fmt: skip
    """grad f(k)_d = (sum_e P_de v_e - p_d) / (kappa_d count)."""
    turned = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in tl.static_range(0, HEAD_DIM, BLOCK_E):
        sums = _load_square(sums_ptr, batch_head, first, HEAD_DIM, BLOCK_D, BLOCK_E)
        values = _load_tile(value_ptr, tokens, live, head, first, HEAD_DIM, BLOCK_E, VN, VH, VD)
        turned = _dot(values, tl.trans(sums), turned, PRECISION)
    return (turned * row_scale[None, :] - vector[None, :]) * inverse_kappa[None, :]


@triton.jit
def _inverse_kappa(
    kappa_ptr, counts_ptr, batch, batch_head, length,
    HAS_MASK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """1 / (kappa_d count); 0 where no key is left, and in the padding."""
    kappa = _load_vector(kappa_ptr, batch_head, HEAD_DIM, BLOCK_D)
    if HAS_MASK:
        kappa *= tl.load(counts_ptr + batch)
    else:
        kappa *= length
    return tl.where(kappa > SMALLEST, 1.0 / tl.maximum(kappa, SMALLEST), 0.0)


@triton.jit
def key_along_kernel(
    key_ptr, value_ptr, scale_ptr, key_mask_ptr, counts_ptr, lengths_ptr, kappa_ptr, sums_ptr, row_scale_ptr,
    vector_ptr, along_ptr,
    length, heads, key_batch_stride, value_batch_stride, power,
    WHOLE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_MASK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr, KN: tl.constexpr, KH: tl.constexpr,
    KD: tl.constexpr, VN: tl.constexpr, VH: tl.constexpr, VD: tl.constexpr,
):  # fmt: skip
    """Per key and head what it adds to grad f(k) . f(k): the map's lengths run over all heads."""
    tokens = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    batch_head = tl.program_id(0)
    batch, head = batch_head // heads, batch_head % heads
    live = _key_is_live(key_mask_ptr, batch, length, tokens, length, HAS_MASK)
    key_ptr += batch.to(tl.int64) * key_batch_stride
    value_ptr += batch.to(tl.int64) * value_batch_stride
    u, _ = _features(key_ptr, scale_ptr, tokens, live, head, HAS_SCALE, HEAD_DIM, BLOCK_D, KN, KH, KD)
    inverse_peak, n1, n2 = _load_lengths(lengths_ptr, batch, length, tokens, live)
    grad_map = _key_map_gradient(
        value_ptr, sums_ptr, batch_head, head, tokens, live,
        _load_vector(row_scale_ptr, batch_head, HEAD_DIM, BLOCK_D),
        _load_vector(vector_ptr, batch_head, HEAD_DIM, BLOCK_D),
        _inverse_kappa(kappa_ptr, counts_ptr, batch, batch_head, length, HAS_MASK, HEAD_DIM, BLOCK_D),
        HEAD_DIM, BLOCK_N, BLOCK_D, BLOCK_E, PRECISION, VN, VH, VD,
    )  # fmt: skip
    w = _power(u * inverse_peak[:, None], power, WHOLE)
    along = tl.sum(grad_map * w, axis=1) * n1 / (n2 * inverse_peak)
    place = batch_head.to(tl.int64) * length + tokens
    tl.store(along_ptr + place, tl.where(live, along, 0.0), mask=tokens < length)


@triton.jit
def key_gradient_kernel(
    key_ptr, value_ptr, grad_ptr, scale_ptr, key_mask_ptr, counts_ptr, lengths_ptr, kappa_ptr, sums_ptr, row_scale_ptr,
    vector_ptr, along_ptr, weight_ptr, grad_key_ptr, grad_value_ptr, scale_sums_ptr,
    length, heads, chunk, height, width, key_batch_stride, value_batch_stride, grad_batch_stride, power,
    WHOLE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_MASK: tl.constexpr, KERNEL: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr, KN: tl.constexpr,
    KH: tl.constexpr, KD: tl.constexpr, VN: tl.constexpr, VH: tl.constexpr, VD: tl.constexpr, GN: tl.constexpr,
    GH: tl.constexpr, GD: tl.constexpr,
):  # fmt: skip
    """Gradients of key and value: grad v_e = sum_d b_d P_de, b_d = f(k)_d / (kappa_d count), plus the convolution's."""
    batch_head = tl.program_id(0)
    split = tl.program_id(1)
    batch, head = batch_head // heads, batch_head % heads
    key_ptr += batch.to(tl.int64) * key_batch_stride
    value_ptr += batch.to(tl.int64) * value_batch_stride
    grad_ptr += batch.to(tl.int64) * grad_batch_stride
    dtype = value_ptr.dtype.element_ty
    row_scale = _load_vector(row_scale_ptr, batch_head, HEAD_DIM, BLOCK_D)
    vector = _load_vector(vector_ptr, batch_head, HEAD_DIM, BLOCK_D)
    inverse_kappa = _inverse_kappa(kappa_ptr, counts_ptr, batch, batch_head, length, HAS_MASK, HEAD_DIM, BLOCK_D)
    scale_total = tl.zeros([BLOCK_D], tl.float32)
    end = tl.minimum(split * chunk + chunk, length)
    for start in range(split * chunk, end, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        written = tokens < end
        live = _key_is_live(key_mask_ptr, batch, length, tokens, end, HAS_MASK)
        u, positive = _features(key_ptr, scale_ptr, tokens, live, head, HAS_SCALE, HEAD_DIM, BLOCK_D, KN, KH, KD)
        inverse_peak, n1, n2 = _load_lengths(lengths_ptr, batch, length, tokens, live)
        unit = u * inverse_peak[:, None]
        grad_map = _key_map_gradient(
            value_ptr, sums_ptr, batch_head, head, tokens, live, row_scale, vector, inverse_kappa,
            HEAD_DIM, BLOCK_N, BLOCK_D, BLOCK_E, PRECISION, VN, VH, VD,
        )  # fmt: skip
        along = _sum_over_heads(along_ptr, batch, heads, length, tokens, live, BLOCK_N)
        grad_u = _map_gradient(grad_map, unit, along, n1, n2, inverse_peak, power, WHOLE)
        scale_total += _store_input_gradient(
            grad_u, u, positive, scale_ptr, grad_key_ptr, batch, length, heads, head, tokens, live, written,
            HAS_SCALE, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        ratio = n1 / (n2 * inverse_peak)
        shares = _power(unit, power, WHOLE) * ratio[:, None] * (inverse_kappa * row_scale)[None, :]
        # P is kept by rows in [-1, 1]; what its rows were divided by may leave fp16, so tokens are scaled down too.
        largest = tl.maximum(tl.max(shares, axis=1), SMALLEST)
        shares = (shares / largest[:, None]).to(dtype)
        for first in tl.static_range(0, HEAD_DIM, BLOCK_E):
            sums = _load_square(sums_ptr, batch_head, first, HEAD_DIM, BLOCK_D, BLOCK_E)
            grad_value = _dot(shares, sums, tl.zeros([BLOCK_N, BLOCK_E], tl.float32), PRECISION) * largest[:, None]
            if KERNEL > 0:
                # Queries are never masked, so neither is the output's gradient.
                grad_value += _convolve(
                    grad_ptr, weight_ptr, key_mask_ptr, batch, tokens, length, head, height, width, first,
                    True, False, KERNEL, HEAD_DIM, BLOCK_N, BLOCK_E, GN, GH, GD,
                )  # fmt: skip
            channels = first + tl.arange(0, BLOCK_E)
            row = batch.to(tl.int64) * length + tokens
            offsets = (row[:, None] * heads + head) * HEAD_DIM + channels[None, :]
            grad_value = tl.where(live[:, None], grad_value, 0.0).to(grad_value_ptr.dtype.element_ty)
            tl.store(grad_value_ptr + offsets, grad_value, mask=written[:, None] & (channels < HEAD_DIM)[None, :])
    if HAS_SCALE:
        channels = tl.arange(0, BLOCK_D)
        slot = (split * tl.num_programs(0) + batch_head).to(tl.int64)
        tl.store(scale_sums_ptr + slot * HEAD_DIM + channels, scale_total, mask=channels < HEAD_DIM)


@triton.jit
def weight_gradient_kernel(
    value_ptr, grad_ptr, key_mask_ptr, sums_ptr,
    length, heads, chunk, height, width, value_batch_stride, grad_batch_stride,
    HAS_MASK: tl.constexpr, KERNEL: tl.constexpr, BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, VN: tl.constexpr, VH: tl.constexpr, VD: tl.constexpr, GN: tl.constexpr, GH: tl.constexpr,
    GD: tl.constexpr,
):  # fmt: skip
    """One row of the convolution's taps over one chunk of one head: sum_n g_n v_(n + tap), stored as [.., K, K, D]."""
    batch_head = tl.program_id(0)
    split = tl.program_id(1)
    tap_row = tl.program_id(2)
    batch, head = batch_head // heads, batch_head % heads
    value_ptr += batch.to(tl.int64) * value_batch_stride
    grad_ptr += batch.to(tl.int64) * grad_batch_stride
    reach: tl.constexpr = KERNEL // 2
    taps = tl.arange(0, BLOCK_K)
    channels = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    end = tl.minimum(split * chunk + chunk, length)
    for start in range(split * chunk, end, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        inside = tokens < end
        grad = _load_tile(grad_ptr, tokens, inside, head, 0, HEAD_DIM, BLOCK_D, GN, GH, GD).to(tl.float32)
        y = tokens // width + (tap_row - reach)
        for j in tl.static_range(KERNEL):
            x = tokens % width + (j - reach)
            source = tokens + (tap_row - reach) * width + (j - reach)
            live = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            if HAS_MASK:
                live = live & (tl.load(key_mask_ptr + batch.to(tl.int64) * length + source, mask=live, other=0) != 0)
            values = _load_tile(value_ptr, source, live, head, 0, HEAD_DIM, BLOCK_D, VN, VH, VD).to(tl.float32)
            total += tl.where((taps == j)[:, None], tl.sum(values * grad, axis=0)[None, :], 0.0)
    slot = ((split * tl.num_programs(0) + batch_head).to(tl.int64) * KERNEL + tap_row) * KERNEL
    offsets = (slot + taps[:, None]) * HEAD_DIM + channels[None, :]
    tl.store(sums_ptr + offsets, total, mask=(taps < KERNEL)[:, None] & (channels < HEAD_DIM)[None, :])
