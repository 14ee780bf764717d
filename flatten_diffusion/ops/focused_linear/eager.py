"""Focused linear attention in plain torch with the fewest passes over memory.

Tokens go through in blocks small enough for every intermediate to stay in cache, so that main memory only sees query,
key, value and the output. No float32 copy of a whole activation exists, whatever the input's dtype. The backward pass
is written out for the same reason: it recomputes each block from the inputs instead of storing the maps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .reference import FEATURE_EPS, NORMALIZER_EPS, compute_dtype, positive_power

CPU_BLOCK_ELEMENTS = 1 << 18
"""Entries of [tokens, heads * head_dim] per thread and block: 1 MiB of float32, about a core's second-level cache."""
ACCELERATOR_BLOCK_ELEMENTS = 1 << 25
"""On an accelerator launches cost more than cache misses; the block only bounds the scratch memory (128 MiB each)."""


class _Map(NamedTuple):
    """The focused map of a block, kept as factors: `f(x) = ratio * powered` with every entry of `powered` in [0, 1]."""

    unit: torch.Tensor  # [n, C]: u / peak
    powered: torch.Tensor  # [n, C]: unit ** power
    peak: torch.Tensor  # [n, 1]: the token's largest entry
    unit_length: torch.Tensor  # [n, 1]
    powered_length: torch.Tensor  # [n, 1]

    @property
    def ratio(self) -> torch.Tensor:
        return self.peak * self.unit_length / self.powered_length


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor | None,
    conv_weight: torch.Tensor | None,
    conv_bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    power: float,
    grid: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output [B, N, H, D], state mean(f(k)^T v) [B, H, D, D] and mean key [B, H, D] in the compute dtype."""
    count = key_count(key, key_mask)
    state, mean_key = key_state(key, value, scale, key_mask, count, power)
    output = query_output(query, value, scale, conv_weight, conv_bias, key_mask, count, state, mean_key, power, grid)
    return output, state, mean_key


def backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor | None,
    conv_weight: torch.Tensor | None,
    conv_bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    state: torch.Tensor,
    mean_key: torch.Tensor,
    power: float,
    grid: tuple[int, int],
    weight_needs_grad: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of query, key, value, scale, conv_weight and conv_bias, from the inputs and what `forward` returned."""
    count = key_count(key, key_mask)
    grad_scale = None if scale is None else torch.zeros_like(scale, dtype=state.dtype)
    grad_query, grad_state, grad_mean = query_backward(grad_output, query, scale, state, mean_key, grad_scale, power)
    grad_key, grad_value = key_backward(key, value, scale, key_mask, count, grad_state, grad_mean, grad_scale, power)
    grad_weight = grad_bias = None
    if conv_weight is not None:
        grad_weight, grad_bias = convolution_backward(
            grad_output, value, conv_weight, conv_bias, key_mask, count, grid, grad_value, weight_needs_grad
        )
    if scale is not None and grad_scale is not None:
        grad_scale = grad_scale.to(scale.dtype)
    return grad_query, grad_key, grad_value, grad_scale, grad_weight, grad_bias


def key_count(key: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """[B]: the keys of each sample that count, in the compute dtype."""
    dtype = compute_dtype(key.dtype)
    if key_mask is None:
        return key.new_full((key.shape[0],), key.shape[1], dtype=dtype)
    return key_mask.sum(dim=1, dtype=dtype)


def key_state(
    key: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    count: torch.Tensor,
    power: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of f(k)^T v [B, H, D, D] and f(k) [B, H, D] over the keys given, divided by `count` [B]."""
    batch, _, heads, head_dim = key.shape
    inverse_scale = _inverse(scale, count.dtype)
    state = key.new_zeros((batch, heads, head_dim, head_dim), dtype=count.dtype)
    mean_key = key.new_zeros((batch, heads, head_dim), dtype=count.dtype)
    for sample in range(batch):
        weights = _key_weights(key, key_mask, count, sample)
        for start, stop in _blocks(key):
            mapped = _map_key(key, key_mask, sample, start, stop, inverse_scale, power)
            weighted = mapped.powered.mul_(mapped.ratio * weights[start:stop])
            values = _values(value, key_mask, sample, start, stop)
            state[sample].baddbmm_(_by_head(weighted, heads).transpose(1, 2), values.transpose(0, 1))
            mean_key[sample] += weighted.sum(dim=0).view(heads, head_dim)
    return state, mean_key


def query_output(
    query: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor | None,
    conv_weight: torch.Tensor | None,
    conv_bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    count: torch.Tensor,
    state: torch.Tensor,
    mean_key: torch.Tensor,
    power: float,
    grid: tuple[int, int],
) -> torch.Tensor:
    """Output [B, N, H, D] of queries against a finished state; samples whose `count` is 0 get no bias."""
    batch, tokens, heads, head_dim = query.shape
    dtype = state.dtype
    inverse_scale = _inverse(scale, dtype)
    kernel = None if conv_weight is None else conv_weight.to(dtype)
    bias = None if conv_bias is None else conv_bias.to(dtype)
    output = query.new_empty((batch, tokens, heads, head_dim))
    row = 1 if kernel is None else grid[1]
    for sample in range(batch):
        sample_bias = bias
        if bias is not None and key_mask is not None:
            sample_bias = bias * (count[sample] > 0)
        for start, stop in _blocks(query, row):
            mapped = _map(query[sample, start:stop], inverse_scale, power)
            # The normaliser divides the features, not the product, which then needs no pass of its own.
            features = mapped.powered.view(-1, heads, head_dim)
            features.mul_(_normalizer(mapped, mean_key[sample]).reciprocal_())
            block = output[sample, start:stop]
            if kernel is not None:
                rows = _stripe(value, key_mask, sample, start // row, stop // row, grid, kernel.shape[-1])
                attended = _convolve(rows, kernel, sample_bias).view(block.shape)
                attended.transpose(0, 1).baddbmm_(features.transpose(0, 1), state[sample])
            else:
                attended = mapped.unit.view(block.shape)  # its memory is free by now, and still in cache
                torch.bmm(features.transpose(0, 1), state[sample], out=attended.transpose(0, 1))
            block.copy_(attended)
    return output


def query_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    scale: torch.Tensor | None,
    state: torch.Tensor,
    mean_key: torch.Tensor,
    grad_scale: torch.Tensor | None,
    power: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query [B, N, H, D], state and mean key from the queries given; adds into `grad_scale` [C]."""
    batch, _, heads, _ = query.shape
    dtype = state.dtype
    inverse_scale = _inverse(scale, dtype)
    grad_query = query.new_empty(query.shape)
    grad_state = torch.zeros_like(state)
    grad_mean = torch.zeros_like(mean_key)
    for sample in range(batch):
        for start, stop in _blocks(query):
            mapped = _map(query[sample, start:stop], inverse_scale, power)
            product, normalizer = _attend(mapped, state[sample], mean_key[sample])
            # Both were divided by the query's ratio, so the ratio cancels in everything but the query's own gradient.
            grad = grad_output[sample, start:stop].to(dtype) / normalizer  # [n, H, D]
            along = (grad * product.transpose(0, 1)).sum(dim=-1, keepdim=True).div_(normalizer)  # [n, H, 1]
            by_head = _by_head(mapped.powered, heads)
            grad_state[sample].baddbmm_(by_head.transpose(1, 2), grad.transpose(0, 1))
            grad_mean[sample].unsqueeze(-1).baddbmm_(by_head.transpose(1, 2), along.transpose(0, 1), alpha=-1)
            grad_map = _to_tokens(torch.bmm(grad.transpose(0, 1), state[sample].transpose(1, 2)))
            grad_map.view_as(grad).addcmul_(along, mean_key[sample], value=-1)
            grad_map.div_(mapped.ratio)
            grad_query[sample, start:stop] = _map_backward(
                mapped, grad_map, query[sample, start:stop], inverse_scale, grad_scale, power
            )
    return grad_query, grad_state, grad_mean


def key_backward(
    key: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    count: torch.Tensor,
    grad_state: torch.Tensor,
    grad_mean: torch.Tensor,
    grad_scale: torch.Tensor | None,
    power: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of key and value [B, M, H, D], the convolution left out; adds into `grad_scale` [C]."""
    batch, _, heads, _ = key.shape
    inverse_scale = _inverse(scale, count.dtype)
    grad_key = key.new_empty(key.shape)
    grad_value = value.new_empty(value.shape)
    for sample in range(batch):
        weights = _key_weights(key, key_mask, count, sample)
        for start, stop in _blocks(key):
            mapped = _map_key(key, key_mask, sample, start, stop, inverse_scale, power)
            values = _values(value, key_mask, sample, start, stop)
            grad_map = _to_tokens(torch.bmm(values.transpose(0, 1), grad_state[sample].transpose(1, 2)))
            grad_map.view_as(values).add_(grad_mean[sample])
            grad_map.mul_(weights[start:stop])
            by_head = _by_head(mapped.powered * (mapped.ratio * weights[start:stop]), heads)
            grad_value[sample, start:stop] = torch.bmm(by_head, grad_state[sample]).transpose(0, 1)
            grad_key[sample, start:stop] = _map_backward(
                mapped, grad_map, key[sample, start:stop], inverse_scale, grad_scale, power
            )
    return grad_key, grad_value


def convolution_backward(
    grad_output: torch.Tensor,
    value: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    count: torch.Tensor,
    grid: tuple[int, int],
    grad_value: torch.Tensor,
    weight_needs_grad: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Adds the convolution's part to `grad_value` in place; returns the gradients of its weight and bias."""
    heads, head_dim = value.shape[2:]
    dtype = compute_dtype(value.dtype)
    row = grid[1]
    kernel = conv_weight.to(dtype)
    flipped = kernel.flip(-2, -1)
    grad_kernel = torch.zeros_like(kernel)
    grad_bias = value.new_zeros((heads, head_dim), dtype=dtype)
    for sample in range(value.shape[0]):
        for start, stop in _blocks(value, row):
            first, last = start // row, stop // row
            grads = _stripe(grad_output, None, sample, first, last, grid, kernel.shape[-1])
            backed = _convolve(grads, flipped, None).view(stop - start, heads, head_dim)
            if key_mask is not None:
                backed.masked_fill_(~key_mask[sample, start:stop, None, None], 0.0)
            grad_value[sample, start:stop] += backed
            own = grad_output[sample, start:stop].to(dtype)
            if weight_needs_grad:
                rows = _stripe(value, key_mask, sample, first, last, grid, kernel.shape[-1])
                grad_kernel += torch.ops.aten.convolution_backward(
                    own.reshape(1, last - first, row, -1).permute(0, 3, 1, 2), rows, kernel, None, [1, 1],
                    [0, kernel.shape[-1] // 2], [1, 1], False, [0, 0], kernel.shape[0], [False, True, False],
                )[1]  # fmt: skip
            part = own.sum(dim=0)
            grad_bias += part if key_mask is None else part * (count[sample] > 0)
    grad_weight = grad_kernel.to(conv_weight.dtype)
    return grad_weight, None if conv_bias is None else grad_bias.flatten().to(conv_bias.dtype)


def _map(x: torch.Tensor, inverse_scale: torch.Tensor | None, power: float) -> _Map:
    """x [n, H, D] -> its focused map, [n, C]. Normalised by the peak first: no power of it leaves the dtype's range."""
    return _map_positive(_positive(x), inverse_scale, power)


def _map_key(
    key: torch.Tensor,
    key_mask: torch.Tensor | None,
    sample: int,
    start: int,
    stop: int,
    inverse_scale: torch.Tensor | None,
    power: float,
) -> _Map:
    positive = _positive(key[sample, start:stop])
    if key_mask is not None:
        positive.masked_fill_(~key_mask[sample, start:stop, None], 0.0)  # whatever a masked slot holds, NaN included
    return _map_positive(positive, inverse_scale, power)


def _positive(x: torch.Tensor) -> torch.Tensor:
    """relu of [n, H, D] as a new [n, C] in the compute dtype."""
    dtype = compute_dtype(x.dtype)
    positive = F.relu(x) if x.dtype == dtype else F.relu_(x.to(dtype))
    return positive.reshape(x.shape[0], -1)


def _map_positive(u: torch.Tensor, inverse_scale: torch.Tensor | None, power: float) -> _Map:
    u.add_(FEATURE_EPS)
    if inverse_scale is not None:
        u.mul_(inverse_scale)
    peak = u.amax(dim=-1, keepdim=True)
    u.mul_(peak.reciprocal())
    powered = positive_power(u, power) if power > 3 else u.pow(power)  # torch's own fast cases end at 3
    lengths = [torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (u, powered)]
    return _Map(u, powered, peak, *lengths)


def _map_backward(
    mapped: _Map,
    grad: torch.Tensor,
    x: torch.Tensor,
    inverse_scale: torch.Tensor | None,
    grad_scale: torch.Tensor | None,
    power: float,
) -> torch.Tensor:
    """`grad` [n, C] of the map -> gradient of its input x [n, H, D]; overwrites `grad`, adds into `grad_scale`.

    With w = u^p: df/du is the scaled power's slope, less the part along w that the length takes back, plus the part
    along u by which the length grows.
    """
    along = (grad * mapped.powered).sum(dim=-1, keepdim=True)
    grad.addcmul_(mapped.powered, along / mapped.powered_length.square(), value=-1)
    grad.mul_(mapped.unit.pow(power - 1)).mul_(mapped.unit_length * power / mapped.powered_length)
    grad.addcmul_(mapped.unit, along / (mapped.unit_length * mapped.powered_length))
    if inverse_scale is not None and grad_scale is not None:
        grad.mul_(inverse_scale)
        grad_scale.sub_((grad * mapped.unit).mul_(mapped.peak).sum(dim=0))
    return grad.view(x.shape).masked_fill_(x <= 0, 0.0)


def _attend(mapped: _Map, state: torch.Tensor, mean_key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Products with the state [H, n, D] and normalisers [n, H, 1], both divided by the query's ratio.

    The ratio of a query cancels between the two, all but its share of the normaliser's epsilon.
    """
    return torch.bmm(_by_head(mapped.powered, mean_key.shape[0]), state), _normalizer(mapped, mean_key)


def _normalizer(mapped: _Map, mean_key: torch.Tensor) -> torch.Tensor:
    """[n, H, 1], divided by the query's ratio."""
    normalizer = (mapped.powered.view(-1, *mean_key.shape) * mean_key).sum(dim=-1, keepdim=True)
    normalizer += (NORMALIZER_EPS / mapped.ratio).unsqueeze(-1)
    return normalizer


def _inverse(scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if scale is None else scale.to(dtype).reciprocal()


def _key_weights(key: torch.Tensor, key_mask: torch.Tensor | None, count: torch.Tensor, sample: int) -> torch.Tensor:
    """[M, 1]: 1 / number of keys where a key counts, 0 elsewhere."""
    inverse = count[sample].clamp(min=1).reciprocal()
    if key_mask is None:
        return inverse.expand(key.shape[1], 1)
    return (key_mask[sample] * inverse).unsqueeze(-1)


def _values(value: torch.Tensor, key_mask: torch.Tensor | None, sample: int, start: int, stop: int) -> torch.Tensor:
    """Tokens start..stop of a sample, [n, H, D] in the compute dtype, masked ones zero; a view where that is enough."""
    values = value[sample, start:stop].to(compute_dtype(value.dtype))
    return values if key_mask is None else values.masked_fill(~key_mask[sample, start:stop, None, None], 0.0)


def _stripe(
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    sample: int,
    first: int,
    last: int,
    grid: tuple[int, int],
    kernel_size: int,
) -> torch.Tensor:
    """Grid rows first..last with their neighbours above and below, zero outside: [1, C, rows, w] in channels-last."""
    height, width = grid
    pad = kernel_size // 2
    top, bottom = max(first - pad, 0), min(last + pad, height)
    rows = _values(value, key_mask, sample, top * width, bottom * width).reshape(1, bottom - top, width, -1)
    above, below = top - (first - pad), last + pad - bottom
    if above or below:
        rows = F.pad(rows, (0, 0, 0, 0, above, below))
    return rows.permute(0, 3, 1, 2)


def _convolve(rows: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A stripe [1, C, rows + K - 1, w] -> its own tokens [n, C]."""
    convolved = F.conv2d(rows, kernel, bias, padding=(0, kernel.shape[-1] // 2), groups=rows.shape[1])
    return convolved.permute(0, 2, 3, 1).reshape(-1, rows.shape[1])


def _blocks(x: torch.Tensor, row: int = 1) -> list[tuple[int, int]]:
    """Ranges that cover the tokens of x [B, N, H, D]: whole rows, at least one, of about a block's entries."""
    tokens, channels = x.shape[1], x.shape[2] * x.shape[3]
    limit = CPU_BLOCK_ELEMENTS * torch.get_num_threads() if x.device.type == "cpu" else ACCELERATOR_BLOCK_ELEMENTS
    step = max(limit // channels // row, 1) * row
    return [(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[n, C] -> [H, n, D], a view."""
    return x.view(x.shape[0], heads, -1).transpose(0, 1)


def _to_tokens(x: torch.Tensor) -> torch.Tensor:
    """[H, n, D] -> [n, C], contiguous."""
    return x.transpose(0, 1).reshape(x.shape[1], -1)
