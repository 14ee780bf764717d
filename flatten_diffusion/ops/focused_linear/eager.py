"""Focused linear attention in plain torch with the fewest passes over memory.

Tokens go through in blocks small enough for every intermediate to stay in cache, so that main memory only sees query,
key, value and the output. No float32 copy of a whole activation exists, whatever the input's dtype. The backward pass
is written out for the same reason: it recomputes each block from the inputs instead of storing the maps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .reference import FEATURE_EPS, NORMALIZER_EPS, HeadMap, OptionalPair, compute_dtype, positive_power

CPU_BLOCK_ELEMENTS = 1 << 18
"""Entries of [tokens, heads * head_dim] per thread and block: 1 MiB of float32, about a core's second-level cache."""
ACCELERATOR_BLOCK_ELEMENTS = 1 << 25
"""On an accelerator launches cost more than cache misses; the block only bounds the scratch memory (128 MiB each)."""


class _Entry(NamedTuple):
    """What leads from x [n, H, D] to u [n, C], in the compute dtype.

    Per head u = max(x @ weight + shift, floor), the scale already in all three; without a map, u = (relu(x) + 1e-6) *
    inverse_scale.
    """

    inverse_scale: torch.Tensor | None  # [C]
    weight: torch.Tensor | None = None  # [H, D, D]
    shift: torch.Tensor | None = None  # [H, D]: (bias + 1e-6) / scale
    floor: torch.Tensor | None = None  # [H, D] or [1, 1]: 1e-6 / scale


class _Gradients(NamedTuple):
    """Sums over the blocks of the gradients of scale [C] and of an entry's weight [H, D, D] and shift [H, D]."""

    scale: torch.Tensor | None
    weight: torch.Tensor | None
    shift: torch.Tensor | None


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
    query_map: HeadMap | None,
    key_map: HeadMap | None,
    conv_weight: torch.Tensor | None,
    conv_bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    power: float,
    grid: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output [B, N, H, D], state mean(f(k)^T v) [B, H, D, D] and mean key [B, H, D] in the compute dtype."""
    count = key_count(key, key_mask)
    state, mean_key = key_state(key, value, scale, key_map, key_mask, count, power)
    output = query_output(
        query, value, scale, query_map, conv_weight, conv_bias, key_mask, count, state, mean_key, power, grid
    )
    return output, state, mean_key


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
    state: torch.Tensor,
    mean_key: torch.Tensor,
    power: float,
    grid: tuple[int, int],
    weight_needs_grad: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of query, key, value, scale, the maps' weights and biases, conv_weight and conv_bias, from the inputs
    and what `forward` returned.
    """
    count = key_count(key, key_mask)
    grad_scale = None if scale is None else torch.zeros_like(scale, dtype=state.dtype)
    grad_query, grad_query_map, grad_state, grad_mean = query_backward(
        grad_output, query, scale, query_map, state, mean_key, grad_scale, power
    )
    grad_key, grad_key_map, grad_value = key_backward(
        key, value, scale, key_map, key_mask, count, grad_state, grad_mean, grad_scale, power
    )
    grad_weight = grad_bias = None
    if conv_weight is not None:
        grad_weight, grad_bias = convolution_backward(
            grad_output, value, conv_weight, conv_bias, key_mask, count, grid, grad_value, weight_needs_grad
        )
    if scale is not None and grad_scale is not None:
        grad_scale = grad_scale.to(scale.dtype)
    return (
        grad_query, grad_key, grad_value, grad_scale, *grad_query_map, *grad_key_map, grad_weight, grad_bias
    )  # fmt: skip


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
    key_map: HeadMap | None,
    key_mask: torch.Tensor | None,
    count: torch.Tensor,
    power: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of f(k)^T v [B, H, D, D] and f(k) [B, H, D] over the keys given, divided by `count` [B]."""
    batch, _, heads, head_dim = key.shape
    entry = _entry(scale, key_map, count.dtype)
    state = key.new_zeros((batch, heads, head_dim, head_dim), dtype=count.dtype)
    mean_key = key.new_zeros((batch, heads, head_dim), dtype=count.dtype)
    for sample in range(batch):
        weights = _key_weights(key, key_mask, count, sample)
        for start, stop in token_blocks(key):
            mapped = _map(key[sample, start:stop], entry, power, _keep(key_mask, sample, start, stop))
            weighted = mapped.powered.mul_(mapped.ratio * weights[start:stop])
            values = kept_tokens(value, key_mask, sample, start, stop)
            state[sample].baddbmm_(_by_head(weighted, heads).transpose(1, 2), values.transpose(0, 1))
            mean_key[sample] += weighted.sum(dim=0).view(heads, head_dim)
    return state, mean_key


def query_output(
    query: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor | None,
    query_map: HeadMap | None,
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
    entry = _entry(scale, query_map, dtype)
    kernel = None if conv_weight is None else conv_weight.to(dtype)
    bias = None if conv_bias is None else conv_bias.to(dtype)
    output = query.new_empty((batch, tokens, heads, head_dim))
    row = 1 if kernel is None else grid[1]
    for sample in range(batch):
        sample_bias = bias
        if bias is not None and key_mask is not None:
            sample_bias = bias * (count[sample] > 0)
        for start, stop in token_blocks(query, row):
            mapped = _map(query[sample, start:stop], entry, power)
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
    query_map: HeadMap | None,
    state: torch.Tensor,
    mean_key: torch.Tensor,
    grad_scale: torch.Tensor | None,
    power: float,
) -> tuple[torch.Tensor, OptionalPair, torch.Tensor, torch.Tensor]:
    """Gradients of query [B, N, H, D], its map, state and mean key from these queries; adds into `grad_scale` [C]."""
    batch, _, heads, _ = query.shape
    dtype = state.dtype
    entry = _entry(scale, query_map, dtype)
    grads = _zero_gradients(entry, grad_scale)
    grad_query = query.new_empty(query.shape)
    grad_state = torch.zeros_like(state)
    grad_mean = torch.zeros_like(mean_key)
    for sample in range(batch):
        for start, stop in token_blocks(query):
            mapped = _map(query[sample, start:stop], entry, power)
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
                mapped, grad_map, query[sample, start:stop], entry, grads, power
            )
    return grad_query, _map_gradients(entry, grads, query_map), grad_state, grad_mean


def key_backward(
    key: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor | None,
    key_map: HeadMap | None,
    key_mask: torch.Tensor | None,
    count: torch.Tensor,
    grad_state: torch.Tensor,
    grad_mean: torch.Tensor,
    grad_scale: torch.Tensor | None,
    power: float,
) -> tuple[torch.Tensor, OptionalPair, torch.Tensor]:
    """Gradients of key, its map and value [B, M, H, D], the convolution left out; adds into `grad_scale` [C]."""
    batch, _, heads, _ = key.shape
    entry = _entry(scale, key_map, count.dtype)
    grads = _zero_gradients(entry, grad_scale)
    grad_key = key.new_empty(key.shape)
    grad_value = value.new_empty(value.shape)
    for sample in range(batch):
        weights = _key_weights(key, key_mask, count, sample)
        for start, stop in token_blocks(key):
            keep = _keep(key_mask, sample, start, stop)
            mapped = _map(key[sample, start:stop], entry, power, keep)
            values = kept_tokens(value, key_mask, sample, start, stop)
            grad_map = _to_tokens(torch.bmm(values.transpose(0, 1), grad_state[sample].transpose(1, 2)))
            grad_map.view_as(values).add_(grad_mean[sample])
            grad_map.mul_(weights[start:stop])
            by_head = _by_head(mapped.powered * (mapped.ratio * weights[start:stop]), heads)
            grad_value[sample, start:stop] = torch.bmm(by_head, grad_state[sample]).transpose(0, 1)
            grad_key[sample, start:stop] = _map_backward(
                mapped, grad_map, key[sample, start:stop], entry, grads, power, keep
            )
    return grad_key, _map_gradients(entry, grads, key_map), grad_value


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
        for start, stop in token_blocks(value, row):
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


def _entry(scale: torch.Tensor | None, head_map: HeadMap | None, dtype: torch.dtype) -> _Entry:
    inverse_scale = None if scale is None else scale.to(dtype).reciprocal()
    if head_map is None:
        return _Entry(inverse_scale)
    weight, bias = (parameter.to(dtype) for parameter in head_map)
    shift, floor = bias + FEATURE_EPS, bias.new_full((1, 1), FEATURE_EPS)
    if inverse_scale is not None:
        by_head = inverse_scale.view_as(bias)
        weight, shift, floor = weight * by_head.unsqueeze(1), shift * by_head, floor * by_head
    return _Entry(inverse_scale, weight, shift, floor)


def _zero_gradients(entry: _Entry, scale: torch.Tensor | None) -> _Gradients:
    if entry.weight is None or entry.shift is None:
        return _Gradients(scale, None, None)
    return _Gradients(scale, torch.zeros_like(entry.weight), torch.zeros_like(entry.shift))


def _map_gradients(entry: _Entry, grads: _Gradients, head_map: HeadMap | None) -> OptionalPair:
    """Of a map's weight and bias, in their dtypes: the scale that the entry took in comes out again."""
    if head_map is None or grads.weight is None or grads.shift is None:
        return None, None
    weight, bias = grads.weight, grads.shift
    if entry.inverse_scale is not None:
        inverse_scale = entry.inverse_scale.view_as(bias)
        weight, bias = weight * inverse_scale.unsqueeze(1), bias * inverse_scale
    return weight.to(head_map[0].dtype), bias.to(head_map[1].dtype)


def _map(x: torch.Tensor, entry: _Entry, power: float, keep: torch.Tensor | None = None) -> _Map:
    """x [n, H, D] -> its focused map, [n, C]; tokens that `keep` leaves out as if they were zero.

    Normalised by the peak first: no power of it leaves the dtype's range.
    """
    u = _entered(x, entry, keep)
    peak = u.amax(dim=-1, keepdim=True)
    u.mul_(peak.reciprocal())
    powered = positive_power(u, power) if power > 3 else u.pow(power)  # torch's own fast cases end at 3
    lengths = [torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (u, powered)]
    return _Map(u, powered, peak, *lengths)


def _entered(x: torch.Tensor, entry: _Entry, keep: torch.Tensor | None) -> torch.Tensor:
    """x [n, H, D] -> u as a new [n, C] in the compute dtype."""
    dtype = compute_dtype(x.dtype)
    if entry.weight is not None and entry.shift is not None and entry.floor is not None:
        # Copied first, since a product that reads by head would wait for memory; its own result is fastest packed.
        u = torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)
        if keep is not None:
            u.masked_fill_(~keep[:, None, None], 0.0)
        by_head = torch.baddbmm(entry.shift.unsqueeze(1), u.transpose(0, 1), entry.weight)
        return torch.maximum(by_head.transpose(0, 1), entry.floor, out=u).view(x.shape[0], -1)
    u = (F.relu(x) if x.dtype == dtype else F.relu_(x.to(dtype))).reshape(x.shape[0], -1)
    if keep is not None:
        u.masked_fill_(~keep.unsqueeze(-1), 0.0)  # whatever a masked slot holds, NaN included
    u.add_(FEATURE_EPS)
    return u if entry.inverse_scale is None else u.mul_(entry.inverse_scale)


def _map_backward(
    mapped: _Map,
    grad: torch.Tensor,
    x: torch.Tensor,
    entry: _Entry,
    grads: _Gradients,
    power: float,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """`grad` [n, C] of the map -> gradient of its input x [n, H, D]; overwrites `grad`, adds into `grads`.

    With w = u^p: df/du is the scaled power's slope, less the part along w that the length takes back, plus the part
    along u by which the length grows.
    """
    along = (grad * mapped.powered).sum(dim=-1, keepdim=True)
    grad.addcmul_(mapped.powered, along / mapped.powered_length.square(), value=-1)
    grad.mul_(mapped.unit.pow(power - 1)).mul_(mapped.unit_length * power / mapped.powered_length)
    grad.addcmul_(mapped.unit, along / (mapped.unit_length * mapped.powered_length))
    if entry.weight is not None:
        return _entry_backward(mapped, grad, x, entry, grads, keep)
    if entry.inverse_scale is not None and grads.scale is not None:
        grad.mul_(entry.inverse_scale)
        grads.scale.sub_((grad * mapped.unit).mul_(mapped.peak).sum(dim=0))
    return grad.view(x.shape).masked_fill_(x <= 0, 0.0)


def _entry_backward(
    mapped: _Map, grad: torch.Tensor, x: torch.Tensor, entry: _Entry, grads: _Gradients, keep: torch.Tensor | None
) -> torch.Tensor:
    """`grad` [n, C] of u -> gradient of x [n, H, D], for an entry with a map."""
    assert entry.weight is not None and entry.floor is not None
    assert grads.weight is not None and grads.shift is not None
    if entry.inverse_scale is not None and grads.scale is not None:
        grads.scale.sub_((grad * mapped.unit).mul_(mapped.peak).sum(dim=0).mul_(entry.inverse_scale))
    # Divided by the peak as u was, the floor is what u became wherever it was the larger.
    grad.masked_fill_(mapped.unit <= entry.floor.flatten() * mapped.peak.reciprocal(), 0.0)
    by_head = grad.view(x.shape).transpose(0, 1)
    grads.weight.baddbmm_(_kept(x.to(grad.dtype), keep).permute(1, 2, 0), by_head)
    grads.shift.add_(grad.sum(dim=0).view_as(grads.shift))
    return torch.bmm(by_head, entry.weight.transpose(1, 2)).transpose(0, 1)


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


def _key_weights(key: torch.Tensor, key_mask: torch.Tensor | None, count: torch.Tensor, sample: int) -> torch.Tensor:
    """[M, 1]: 1 / number of keys where a key counts, 0 elsewhere."""
    inverse = count[sample].clamp(min=1).reciprocal()
    if key_mask is None:
        return inverse.expand(key.shape[1], 1)
    return (key_mask[sample] * inverse).unsqueeze(-1)


def kept_tokens(value: torch.Tensor, key_mask: torch.Tensor | None, sample: int, start: int, stop: int) -> torch.Tensor:
    """Tokens start..stop of a sample, [n, H, D] in the compute dtype, masked ones zero; a view where that is enough."""
    return _kept(value[sample, start:stop].to(compute_dtype(value.dtype)), _keep(key_mask, sample, start, stop))


def _keep(key_mask: torch.Tensor | None, sample: int, start: int, stop: int) -> torch.Tensor | None:
    return None if key_mask is None else key_mask[sample, start:stop]


def _kept(x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """x [n, H, D], zero where `keep` [n] is not, whatever stood there; x itself where all is kept."""
    return x if keep is None else x.masked_fill(~keep[:, None, None], 0.0)


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
    rows = kept_tokens(value, key_mask, sample, top * width, bottom * width).reshape(1, bottom - top, width, -1)
    above, below = top - (first - pad), last + pad - bottom
    if above or below:
        rows = F.pad(rows, (0, 0, 0, 0, above, below))
    return rows.permute(0, 3, 1, 2)


def _convolve(rows: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A stripe [1, C, rows + K - 1, w] -> its own tokens [n, C]."""
    convolved = F.conv2d(rows, kernel, bias, padding=(0, kernel.shape[-1] // 2), groups=rows.shape[1])
    return convolved.permute(0, 2, 3, 1).reshape(-1, rows.shape[1])


def block_elements(x: torch.Tensor) -> int:
    """Entries of a block on the device of x."""
    return CPU_BLOCK_ELEMENTS * torch.get_num_threads() if x.device.type == "cpu" else ACCELERATOR_BLOCK_ELEMENTS


def token_blocks(x: torch.Tensor, row: int = 1) -> list[tuple[int, int]]:
    """Ranges that cover the tokens of x [B, N, H, D]: whole rows, at least one, of about a block's entries."""
    tokens, channels = x.shape[1], x.shape[2] * x.shape[3]
    step = max(block_elements(x) // channels // row, 1) * row
    return [(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[n, C] -> [H, n, D], a view."""
    return x.view(x.shape[0], heads, -1).transpose(0, 1)


def _to_tokens(x: torch.Tensor) -> torch.Tensor:
    """[H, n, D] -> [n, C], contiguous."""
    return x.transpose(0, 1).reshape(x.shape[1], -1)
