"""Focused linear attention in plain torch with the fewest passes over memory.

Tokens go through in blocks small enough for every intermediate to stay in cache, so that main memory only sees query,
key, value and the output. No float32 copy of a whole activation exists, whatever the input's dtype. The backward pass
is written out for the same reason: it recomputes each block from the inputs instead of storing the maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .arguments import FocusedArguments, HeadMap
from .reference import FEATURE_EPS, NORMALIZER_EPS, compute_dtype, positive_power

OptionalPair = tuple[torch.Tensor | None, torch.Tensor | None]
"""Gradients of two parameters that may be absent."""
AddUp = Callable[..., Sequence[torch.Tensor]]
"""Each of its tensors, summed over the processes that hold the tokens of one image."""

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
    call: FocusedArguments, add_up: AddUp | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output [B, N, H, D], state mean(f(k)^T v) [B, H, D, D], mean key [B, H, D] and number of keys [B], the last
    three in the compute dtype and over the keys of all processes that `add_up` reaches.
    """
    count = key_count(call.key, call.key_mask)
    if add_up is None:
        state, mean_key = _key_state(call, count)
    else:
        state, mean_key, count = add_up(*_key_state(call, torch.ones_like(count)), count)
        divisor = count.clamp(min=1)[:, None, None]
        state, mean_key = state / divisor[..., None], mean_key / divisor
    return _query_output(call, count, state, mean_key), state, mean_key, count


def backward(
    call: FocusedArguments,
    grad_output: torch.Tensor,
    state: torch.Tensor,
    mean_key: torch.Tensor,
    count: torch.Tensor | None = None,
    add_up: AddUp | None = None,
    weight_needs_grad: bool = True,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the flat arguments before the mask, from them and what `forward` returned; those of parameters are
    this process's share.
    """
    count = key_count(call.key, call.key_mask) if count is None else count
    grad_scale = None if call.scale is None else torch.zeros_like(call.scale, dtype=state.dtype)
    grad_query, grad_query_map, *grads = _query_backward(call, grad_output, state, mean_key, grad_scale)
    grad_state, grad_mean = grads if add_up is None else add_up(*grads)
    grad_key, grad_key_map, grad_value = _key_backward(call, count, grad_state, grad_mean, grad_scale)
    grad_weight = grad_bias = None
    if call.conv_weight is not None:
        grad_weight, grad_bias = _convolution_backward(call, grad_output, count, grad_value, weight_needs_grad)
    if call.scale is not None and grad_scale is not None:
        grad_scale = grad_scale.to(call.scale.dtype)
    return (
        grad_query, grad_key, grad_value, grad_scale, *grad_query_map, *grad_key_map, grad_weight, grad_bias
    )  # fmt: skip


def key_count(key: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """[B]: the keys of each sample that count, in the compute dtype."""
    dtype = compute_dtype(key.dtype)
    if key_mask is None:
        return key.new_full((key.shape[0],), key.shape[1], dtype=dtype)
    return key_mask.sum(dim=1, dtype=dtype)


def _key_state(call: FocusedArguments, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of f(k)^T v [B, H, D, D] and f(k) [B, H, D] over the keys given, divided by `count` [B]."""
    key, key_mask = call.key, call.key_mask
    batch, _, heads, head_dim = key.shape
    entry = _entry(call.scale, call.key_map, count.dtype)
    state = key.new_zeros((batch, heads, head_dim, head_dim), dtype=count.dtype)
    mean_key = key.new_zeros((batch, heads, head_dim), dtype=count.dtype)
    for sample in range(batch):
        weights = _key_weights(key, key_mask, count, sample)
        for start, stop in token_blocks(key):
            keep = _keep(key_mask, sample, start, stop)
            mapped = _map(key[sample, start:stop], entry, call.focusing_factor, keep)
            weighted = mapped.powered.mul_(mapped.ratio * weights[start:stop])
            values = kept_tokens(call.value, key_mask, sample, start, stop)
            state[sample].baddbmm_(_by_head(weighted, heads).transpose(1, 2), values.transpose(0, 1))
            mean_key[sample] += weighted.sum(dim=0).view(heads, head_dim)
    return state, mean_key


def _query_output(
    call: FocusedArguments, count: torch.Tensor, state: torch.Tensor, mean_key: torch.Tensor
) -> torch.Tensor:
    """Output [B, N, H, D] of queries against a finished state; samples whose `count` is 0 get no bias."""
    query = call.query
    heads, head_dim = query.shape[2:]
    dtype = state.dtype
    entry = _entry(call.scale, call.query_map, dtype)
    kernel = None if call.conv_weight is None else call.conv_weight.to(dtype)
    bias = None if call.conv_bias is None else call.conv_bias.to(dtype)
    output = query.new_empty(query.shape)
    row = 1 if call.grid is None else call.grid[1]
    for sample in range(len(query)):
        sample_bias = bias
        if bias is not None and call.key_mask is not None:
            sample_bias = bias * (count[sample] > 0)
        for start, stop in token_blocks(query, row):
            mapped = _map(query[sample, start:stop], entry, call.focusing_factor)
            # The normaliser divides the features, not the product, which then needs no pass of its own.
            features = mapped.powered.view(-1, heads, head_dim)
            features.mul_(_normalizer(mapped, mean_key[sample]).reciprocal_())
            block = output[sample, start:stop]
            if kernel is not None:
                rows = _stripe(call.value, call, sample, start // row, stop // row)
                attended = _convolve(rows, kernel, sample_bias).view(block.shape)
                attended.transpose(0, 1).baddbmm_(features.transpose(0, 1), state[sample])
            else:
                attended = mapped.unit.view(block.shape)  # its memory is free by now, and still in cache
                torch.bmm(features.transpose(0, 1), state[sample], out=attended.transpose(0, 1))
            block.copy_(attended)
    return output


def _query_backward(
    call: FocusedArguments,
    grad_output: torch.Tensor,
    state: torch.Tensor,
    mean_key: torch.Tensor,
    grad_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, OptionalPair, torch.Tensor, torch.Tensor]:
    """Gradients of query [B, N, H, D], its map, state and mean key from these queries; adds into `grad_scale` [C]."""
    query, dtype = call.query, state.dtype
    entry = _entry(call.scale, call.query_map, dtype)
    grads = _zero_gradients(entry, grad_scale)
    grad_query = query.new_empty(query.shape)
    grad_state = torch.zeros_like(state)
    grad_mean = torch.zeros_like(mean_key)
    for sample in range(len(query)):
        for start, stop in token_blocks(query):
            rows = query[sample, start:stop]
            mapped = _map(rows, entry, call.focusing_factor)
            by_head = _by_head(mapped.powered, query.shape[2])
            product, normalizer = torch.bmm(by_head, state[sample]), _normalizer(mapped, mean_key[sample])
            # Both were divided by the query's ratio, so the ratio cancels in everything but the query's own gradient.
            grad = grad_output[sample, start:stop].to(dtype) / normalizer  # [n, H, D]
            along = (grad * product.transpose(0, 1)).sum(dim=-1, keepdim=True).div_(normalizer)  # [n, H, 1]
            grad_state[sample].baddbmm_(by_head.transpose(1, 2), grad.transpose(0, 1))
            grad_mean[sample].unsqueeze(-1).baddbmm_(by_head.transpose(1, 2), along.transpose(0, 1), alpha=-1)
            grad_map = _to_tokens(torch.bmm(grad.transpose(0, 1), state[sample].transpose(1, 2)))
            grad_map.view_as(grad).addcmul_(along, mean_key[sample], value=-1)
            grad_map.div_(mapped.ratio)
            grad_query[sample, start:stop] = _map_backward(mapped, grad_map, rows, entry, grads, call.focusing_factor)
    return grad_query, _map_gradients(entry, grads, call.query_map), grad_state, grad_mean


def _key_backward(
    call: FocusedArguments,
    count: torch.Tensor,
    grad_state: torch.Tensor,
    grad_mean: torch.Tensor,
    grad_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, OptionalPair, torch.Tensor]:
    """Gradients of key, its map and value [B, M, H, D], the convolution left out; adds into `grad_scale` [C]."""
    key, value, key_mask, power = call.key, call.value, call.key_mask, call.focusing_factor
    entry = _entry(call.scale, call.key_map, count.dtype)
    grads = _zero_gradients(entry, grad_scale)
    grad_key = key.new_empty(key.shape)
    grad_value = value.new_empty(value.shape)
    for sample in range(len(key)):
        weights = _key_weights(key, key_mask, count, sample)
        for start, stop in token_blocks(key):
            rows, keep = key[sample, start:stop], _keep(key_mask, sample, start, stop)
            mapped = _map(rows, entry, power, keep)
            values = kept_tokens(value, key_mask, sample, start, stop)
            grad_map = _to_tokens(torch.bmm(values.transpose(0, 1), grad_state[sample].transpose(1, 2)))
            grad_map.view_as(values).add_(grad_mean[sample])
            grad_map.mul_(weights[start:stop])
            by_head = _by_head(mapped.powered * (mapped.ratio * weights[start:stop]), key.shape[2])
            grad_value[sample, start:stop] = torch.bmm(by_head, grad_state[sample]).transpose(0, 1)
            grad_key[sample, start:stop] = _map_backward(mapped, grad_map, rows, entry, grads, power, keep)
    return grad_key, _map_gradients(entry, grads, call.key_map), grad_value


def _convolution_backward(
    call: FocusedArguments,
    grad_output: torch.Tensor,
    count: torch.Tensor,
    grad_value: torch.Tensor,
    weight_needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Adds the convolution's part to `grad_value` in place; returns the gradients of its weight and bias."""
    assert call.conv_weight is not None and call.grid is not None
    value, key_mask, row = call.value, call.key_mask, call.grid[1]
    heads, head_dim = value.shape[2:]
    dtype = compute_dtype(value.dtype)
    kernel = call.conv_weight.to(dtype)
    flipped = kernel.flip(-2, -1)
    unmasked = call._replace(key_mask=None)  # queries never are, so neither is the output's gradient
    grad_kernel = torch.zeros_like(kernel)
    grad_bias = value.new_zeros((heads, head_dim), dtype=dtype)
    for sample in range(len(value)):
        for start, stop in token_blocks(value, row):
            first, last = start // row, stop // row
            backed = _convolve(_stripe(grad_output, unmasked, sample, first, last), flipped, None)
            backed = _kept(backed.view(stop - start, heads, head_dim), _keep(key_mask, sample, start, stop))
            grad_value[sample, start:stop] += backed
            own = grad_output[sample, start:stop].to(dtype)
            if weight_needs_grad:
                rows = _stripe(value, call, sample, first, last)
                grad_kernel += torch.ops.aten.convolution_backward(
                    own.reshape(1, last - first, row, -1).permute(0, 3, 1, 2), rows, kernel, None, [1, 1],
                    [0, kernel.shape[-1] // 2], [1, 1], False, [0, 0], kernel.shape[0], [False, True, False],
                )[1]  # fmt: skip
            part = own.sum(dim=0)
            grad_bias += part if key_mask is None else part * (count[sample] > 0)
    grad_weight, bias = grad_kernel.to(call.conv_weight.dtype), call.conv_bias
    return grad_weight, None if bias is None else grad_bias.flatten().to(bias.dtype)


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


def _stripe(x: torch.Tensor, call: FocusedArguments, sample: int, first: int, last: int) -> torch.Tensor:
    """Grid rows first..last of x [B, N, H, D] with their neighbours above and below, zero outside: [1, C, rows, w] in
    channels-last."""
    assert call.grid is not None and call.conv_weight is not None
    height, width = call.grid
    pad = call.conv_weight.shape[-1] // 2
    top, bottom = max(first - pad, 0), min(last + pad, height)
    rows = kept_tokens(x, call.key_mask, sample, top * width, bottom * width).reshape(1, bottom - top, width, -1)
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
