"""Focused linear attention with the tokens of one image split over the processes of a group.

All a process needs of the others is the [D, D] state, the key sum and the number of keys of each head, added up in one
all-reduce, and for the convolution the grid rows next to its own. Every process then holds its own tokens' output,
equal to what one process would compute up to rounding. Backward: one all-reduce of the state's gradient, and the rows'
gradients travel back.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..transforms import backward_needs_plain_torch, needs_plain_torch
from .arguments import FocusedArguments, HeadMap
from .dispatch import call_dtype, resolve_backend
from .operator import kernels_of
from .reference import compute_dtype


def even_rows(height: int, processes: int) -> tuple[int, ...]:
    """Rows of the grid for each process, in rank order: as even as they get, the first ones take the remainder.

    Raises:
        ValueError: fewer rows than processes.
    """
    if not 0 < processes <= height:
        raise ValueError(f"{height} rows cannot be split over {processes} processes: every one needs a row.")
    share, left = divmod(height, processes)
    return tuple(share + (rank < left) for rank in range(processes))


def split_focused_linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    rows: Sequence[int] | None = None,
    focusing_factor: float = 3.0,
    scale: torch.Tensor | None = None,
    query_map: HeadMap | None = None,
    key_map: HeadMap | None = None,
    conv_weight: torch.Tensor | None = None,
    conv_bias: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`focused_linear_attention` over the tokens of all processes of a group; each passes and gets its own.

    With grid rows split over processes, a process computes

        out_n = f(q_n) sum_r S_r / (f(q_n) . sum_r z_r) + conv(v)_n,   S_r, z_r: the sums over the keys of process r

    so one small all-reduce and the rows next to a cut are all that travels. For a latent [B, C, height, width] too
    large for one device, in a self-attention layer with `height * width` tokens:

        rows = even_rows(height, dist.get_world_size())
        own = hidden.unflatten(1, (height, width)).split(rows, dim=1)[dist.get_rank()].flatten(1, 2)
        query, key, value = (project(own).unflatten(-1, (heads, -1)) for project in (to_q, to_k, to_v))
        out = split_focused_linear_attention(query, key, value, rows=rows, conv_weight=weight)

    Every process of the group must call it, with the same `rows`, settings and kinds of arguments. Gradients of
    query, key and value are complete; those of scale, the maps, conv_weight and conv_bias are this process's share: sum
    them over the group, as for any data split. Not for torch.compile.

    Args:
        query, key, value: [B, N, H, D], the tokens of this process: whole rows of the grid, in rank order.
        group: the processes; None means the default group.
        rows: grid rows of every process, in rank order, each at least 1; needed with `conv_weight`.
        focusing_factor, scale, query_map, key_map, conv_weight, conv_bias: as for `focused_linear_attention`, the same
            everywhere.
        key_mask: bool [B, N], of this process's keys, on every process or on none.
        backend: "auto", "eager" or "triton", the same everywhere.

    Returns:
        [B, N, H, D] in the query's dtype.

    Raises:
        ValueError: tensors that do not fit together, rows that do not fit the group or the tokens, or a backend that
            cannot run.
        RuntimeError: forward-mode or second derivatives, torch.func transforms, torch.jit.trace.
    """
    _refuse(needs_plain_torch())
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    tokens = query.shape[1] if query.dim() == 4 else 0
    grid = _own_grid(tokens, rows, rank, size) if rows is not None else None
    if conv_weight is not None and rows is None:
        raise ValueError("conv_weight is given without rows: pass the grid rows of every process.")
    call = FocusedArguments(
        query, key, value, scale, query_map, key_map, conv_weight, conv_bias, key_mask, focusing_factor, grid
    )
    call.check()
    if backend == "reference":
        raise ValueError("backend 'reference' runs in one process: choose 'auto', 'eager' or 'triton'.")
    call = call.per_channel().cast(call_dtype(query))
    name = resolve_backend(backend, query.device, call.query.dtype, query.shape[3])
    with torch.autocast(query.device.type, enabled=False):
        output: torch.Tensor = _SplitAttention.apply(*call.flat(), name, group)
        if rows is None or call.conv_weight is None or call.conv_weight.shape[-1] == 1 or size == 1:
            return output
        return _add_across_cuts(output, call, tuple(rows), rank, group)


def _refuse(more_than_a_gradient: bool) -> None:
    """What torch transforms, or differentiates twice, does not cross processes."""
    if more_than_a_gradient:
        raise RuntimeError(
            "split_focused_linear_attention has gradients, once, and nothing else: for forward-mode or second "
            "derivatives, torch.func and torch.jit pass whole images to focused_linear_attention."
        )


class _SplitAttention(torch.autograd.Function):
    """Everything but what the convolution reads beyond this process's rows."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> torch.Tensor:
        *arguments, backend, group = flat
        call = FocusedArguments.from_flat(arguments)
        output, *state = kernels_of(backend).forward(call, partial(_sum_over_processes, group))
        *tensors, focusing_factor, grid = call.flat()
        ctx.save_for_backward(*tensors, *state)
        ctx.settings, ctx.backend, ctx.group = (focusing_factor, grid), backend, group
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _refuse(backward_needs_plain_torch())
        *tensors, state, mean_key, count = ctx.saved_tensors
        call = FocusedArguments.from_flat((*tensors, *ctx.settings))
        # Called under autocast too, which would undo the float32 accumulation.
        with torch.autocast(grad_output.device.type, enabled=False):
            grads: tuple[torch.Tensor | None, ...] = kernels_of(ctx.backend).backward(
                call, grad_output, state, mean_key, count, partial(_sum_over_processes, ctx.group)
            )
        return (*grads, *[None] * 5)


def _sum_over_processes(group: dist.ProcessGroup | None, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Each tensor summed over the group, in one all-reduce."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _add_across_cuts(
    output: torch.Tensor,
    call: FocusedArguments,
    rows: tuple[int, ...],
    rank: int,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Adds to the outermost rows what the convolution gives them from other processes' rows.

    The convolution is linear in the values, so the local one, with zeros beyond the cuts, lacks exactly this.
    """
    assert call.grid is not None and call.conv_weight is not None
    (height, width), value, conv_weight, key_mask = call.grid, call.value, call.conv_weight, call.key_mask
    reach = conv_weight.shape[-1] // 2
    edges = _edges(value.unflatten(1, call.grid), reach)
    if key_mask is not None:
        edges = edges.masked_fill(~_edges(key_mask.unflatten(1, call.grid), reach)[..., None, None], 0.0)
    received: torch.Tensor = _Halo.apply(edges, rows, reach, rank, group)
    above = min(sum(rows[:rank]), reach)
    near = min(height, reach)
    dtype = compute_dtype(value.dtype)
    kernel = conv_weight.to(dtype)
    lacking: list[tuple[int, torch.Tensor]] = []
    for first, neighbours, upper in ((0, received[:, :above], True), (height - near, received[:, above:], False)):
        count = neighbours.shape[1]
        if count == 0:
            continue
        # Other rows stand beside `near` rows of zeros in the place of our own; those are the ones to read off.
        frame = neighbours.to(dtype).flatten(3).permute(0, 3, 1, 2)
        frame = F.pad(frame, (0, 0, 0, near) if upper else (0, 0, near, 0))
        part = F.conv2d(frame, kernel, padding=reach, groups=kernel.shape[0])
        part = part[:, :, count:] if upper else part[:, :, :near]
        lacking.append((first, part.permute(0, 2, 3, 1).unflatten(-1, value.shape[2:]).flatten(1, 2)))
    for first, part in lacking:
        touched = slice(first * width, (first + near) * width)
        output[:, touched] = (output[:, touched] + part).to(output.dtype)
    return output


def _edges(x: torch.Tensor, reach: int) -> torch.Tensor:
    """[B, h, ...] -> its first and last `reach` rows, every row once: all that other processes may want."""
    return x if x.shape[1] <= 2 * reach else torch.cat([x[:, :reach], x[:, -reach:]], dim=1)


class _Halo(torch.autograd.Function):
    """`_edges` of this process -> the rows next to its own, [B, above + below, w, H, D], as far as the grid goes."""

    @staticmethod
    def forward(
        ctx: Any, edges: torch.Tensor, rows: tuple[int, ...], reach: int, rank: int, group: dist.ProcessGroup | None
    ) -> torch.Tensor:
        ctx.plan, ctx.shape, ctx.group = _plan(rows, reach, rank), edges.shape, group
        sends, receives, total = ctx.plan
        received = edges.new_empty((edges.shape[0], total, *edges.shape[2:]))
        outgoing = [(peer, edges[:, start:stop].contiguous()) for peer, start, stop in sends]
        incoming = _exchange(outgoing, [(peer, received[:, start:stop]) for peer, start, stop in receives], group)
        for (_, start, stop), tensor in zip(receives, incoming, strict=True):
            received[:, start:stop] = tensor
        return received

    @staticmethod
    def backward(ctx: Any, grad_received: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _refuse(backward_needs_plain_torch())
        sends, receives, _ = ctx.plan
        grad = grad_received.new_zeros(ctx.shape)
        outgoing = [(peer, grad_received[:, start:stop].contiguous()) for peer, start, stop in receives]
        incoming = _exchange(outgoing, [(peer, grad[:, start:stop]) for peer, start, stop in sends], ctx.group)
        for (_, start, stop), tensor in zip(sends, incoming, strict=True):
            grad[:, start:stop] += tensor
        return grad, None, None, None, None


_Segments = list[tuple[int, int, int]]


def _plan(rows: tuple[int, ...], reach: int, rank: int) -> tuple[_Segments, _Segments, int]:
    """What a process sends (peer, rows of its `_edges`) and receives (peer, rows of its halo), and the halo's height.

    A process of few rows does not fill its neighbours' reach: then the one behind it sends too.
    """
    starts = [sum(rows[:index]) for index in range(len(rows))]
    stops = [start + count for start, count in zip(starts, rows, strict=True)]

    def wanted(index: int) -> tuple[range, range]:
        top, bottom = max(starts[index] - reach, 0), min(stops[index] + reach, stops[-1])
        return range(top, starts[index]), range(stops[index], bottom)

    sends: _Segments = []
    receives: _Segments = []
    above, below = wanted(rank)
    inner = max(rows[rank] - 2 * reach, 0)  # rows that `_edges` leaves out
    for peer in range(len(rows)):
        if peer == rank:
            continue
        for part in wanted(peer):
            first, last = max(part.start, starts[rank]), min(part.stop, stops[rank])
            if first < last:
                origin = starts[rank] if peer < rank else starts[rank] + inner
                sends.append((peer, first - origin, last - origin))
        for part, offset in ((above, 0), (below, len(above))):
            first, last = max(part.start, starts[peer]), min(part.stop, stops[peer])
            if first < last:
                receives.append((peer, first - part.start + offset, last - part.start + offset))
    return sends, receives, len(above) + len(below)


def _exchange(
    outgoing: list[tuple[int, torch.Tensor]],
    templates: list[tuple[int, torch.Tensor]],
    group: dist.ProcessGroup | None,
) -> list[torch.Tensor]:
    """Sends every tensor to its peer; returns what came, shaped as `templates`."""
    whole: Any = dist.group.WORLD if group is None else group
    incoming = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for _, t in templates]
    operations = [
        dist.P2POp(dist.isend, tensor, dist.get_global_rank(whole, peer), group) for peer, tensor in outgoing
    ] + [
        dist.P2POp(dist.irecv, tensor, dist.get_global_rank(whole, peer), group)
        for (peer, _), tensor in zip(templates, incoming, strict=True)
    ]
    for request in dist.batch_isend_irecv(operations) if operations else []:
        request.wait()
    return incoming


def _own_grid(tokens: int, rows: Sequence[int], rank: int, size: int) -> tuple[int, int]:
    if len(rows) != size or not all(isinstance(count, int) and count > 0 for count in rows):
        raise ValueError(f"rows is {list(rows)}: pass {size} whole numbers from 1, one for each process.")
    if tokens % rows[rank]:
        raise ValueError(f"Process {rank} has {tokens} tokens and {rows[rank]} rows: pass whole rows of the grid.")
    return rows[rank], tokens // rows[rank]
