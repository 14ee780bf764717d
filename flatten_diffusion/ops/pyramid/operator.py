"""Softmax over each window's own list of keys: one node for torch, computed in blocks of windows that stay in cache.

All queries of a window share their keys, so that a block is one fused attention of torch with a bias per key. The
backward pass is written out: it recomputes each block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from ..focused_linear.eager import block_elements
from ..focused_linear.reference import compute_dtype
from ..transforms import backward_needs_plain_torch, differentiable_gradients
from ..windows import ImageSize, from_windows, windows_of
from .layout import Cells, Layout, layout


def no_key(dtype: torch.dtype) -> float:
    """Score of a row that is no key. Finite: a query without any key gets the mean of zeros, not of nothing."""
    return -3e4 if dtype.itemsize == 2 else -1e30


def attend_in_blocks(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    spread: torch.Tensor,
    images: list[int],
    cells: list[int],
    scale: float,
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, N, H, D] and log-sum-exp [B, N, H] of query [B, N, H, D] over tables of keys and values [B, H, R, D],
    bias [B or 1, R]. `spread` [B, H, n] is added to the log mass of a cell, of the last n rows, where it is asked which
    to open; `images` and `cells` as plain numbers. With `attend_plainly`, torch differentiates all of it."""
    triples, setting = _triples(images), _setting(cells)
    outputs, masses = [], []
    for at, windows in enumerate(_by_sample(query, triples, setting.window)):
        plan = layout(triples, setting, at, query.device)
        output = torch.empty_like(windows)
        mass = windows.new_empty(windows.shape[:-1], dtype=compute_dtype(query.dtype))
        for block in _blocks(plan, windows, keys, bias, spread, setting.opened, scale):
            key, value = block.rows(keys, values)
            part, logs = attend(block.of(windows), key, value, block.bias, scale)
            block.put(output, part)
            block.put(mass[..., None], logs[..., None])
        outputs.append(output.flatten(0, 1))
        masses.append(mass.flatten(0, 1))
    return from_windows(outputs, triples, setting.window), from_windows(masses, triples, setting.window)


@torch.library.custom_op("flatten_diffusion::pyramid", mutates_args=())
def pyramid(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    spread: torch.Tensor,
    images: list[int],
    cells: list[int],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_in_blocks` as one node, for a gradient and nothing else."""
    if forward_ad._current_level >= 0:
        raise RuntimeError("flatten_diffusion::pyramid has no forward-mode derivative: call pyramid_attention.")
    return attend_in_blocks(query, keys, values, bias, spread, images, cells, scale, _attend)


@pyramid.register_fake
def _(query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=compute_dtype(query.dtype))


@torch.library.custom_op("flatten_diffusion::pyramid_backward", mutates_args=())
def pyramid_backward(
    grad_output: torch.Tensor,
    grad_mass: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    spread: torch.Tensor,
    output: torch.Tensor,
    mass: torch.Tensor,
    images: list[int],
    cells: list[int],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, keys and values. With P the weights and delta = grad . out, the gradient of the scores is
    P (grad v^T - delta + grad_mass)."""
    triples, setting = _triples(images), _setting(cells)
    dtype = mass.dtype
    moved = grad_mass.to(dtype) - (grad_output.to(dtype) * output.to(dtype)).sum(dim=-1)
    grad_keys, grad_values = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (keys, values))
    parts = zip(
        *(_by_sample(x, triples, setting.window) for x in (query, grad_output, mass[..., None], moved[..., None])),
        strict=True,
    )
    grads = []
    for at, (windows, upstream, masses, moves) in enumerate(parts):
        plan = layout(triples, setting, at, query.device)
        grad = torch.empty_like(windows)
        for block in _blocks(plan, windows, keys, bias, spread, setting.opened, scale):
            queries, come, logs, shift = (block.of(x).to(dtype) for x in (windows, upstream, masses, moves))
            key, value = (x.to(dtype) for x in block.rows(keys, values))
            weights = (queries @ key.transpose(-1, -2)).mul_(scale).add_(block.bias[:, :, None].to(dtype))
            weights.sub_(logs).exp_()
            block.add(grad_values, weights.transpose(-1, -2) @ come)
            weights.mul_((come @ value.transpose(-1, -2)).add_(shift)).mul_(scale)
            block.put(grad, weights @ key)
            block.add(grad_keys, weights.transpose(-1, -2) @ queries)
        grads.append(grad.flatten(0, 1))
    grad_query = from_windows(grads, triples, setting.window)
    return grad_query, grad_keys.to(keys.dtype), grad_values.to(values.dtype)


@pyramid_backward.register_fake
def _(
    grad_output: torch.Tensor,
    grad_mass: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), torch.empty_like(keys), torch.empty_like(values)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.images, ctx.cells, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_output: torch.Tensor, grad_mass: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    if backward_needs_plain_torch():
        *tensors, bias, spread = ctx.saved_tensors[:5]

        def plain(query: Any, keys: Any, values: Any) -> tuple[torch.Tensor, torch.Tensor]:
            fixed = bias, spread, ctx.images, ctx.cells, ctx.scale
            return attend_in_blocks(query, keys, values, *fixed, attend_plainly)

        needed = ctx.needs_input_grad[:3]
        return (*differentiable_gradients(plain, tensors, needed, (grad_output, grad_mass)), *[None] * 5)
    # Called under autocast too, which would undo the float32 accumulation.
    with torch.autocast(grad_output.device.type, enabled=False):
        grads = pyramid_backward(grad_output, grad_mass, *ctx.saved_tensors, ctx.images, ctx.cells, ctx.scale)
    return (*grads, *[None] * 5)


pyramid.register_autograd(_backward, setup_context=_setup_context)


class _Block(NamedTuple):
    """Some windows of some heads of one sample, and the rows of the tables that their queries see."""

    sample: int
    heads: slice
    windows: slice
    listed: torch.Tensor  # [h, w, K]
    bias: torch.Tensor  # [h or 1, w, K]

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """[B, W, t, H, ...] -> [h, w, t, ...], a view."""
        return x[self.sample, self.windows, :, self.heads].movedim(2, 0)

    def put(self, x: torch.Tensor, part: torch.Tensor) -> None:
        """The inverse of `of`, into x."""
        self.of(x).copy_(part)

    def rows(self, *tables: torch.Tensor) -> list[torch.Tensor]:
        """[B, H, R, D] -> copies of the rows, [h, w, K, D]."""
        flat, shape = self._flat(tables[0]), self.listed.shape
        return [table[self.sample, self.heads].flatten(0, 1).index_select(0, flat).view(*shape, -1) for table in tables]

    def add(self, table: torch.Tensor, part: torch.Tensor) -> None:
        """Adds a part like those of `rows` to the table they came from."""
        whole = table[self.sample, self.heads].flatten(0, 1)
        whole.index_add_(0, self._flat(table), part.flatten(0, 2))

    def _flat(self, table: torch.Tensor) -> torch.Tensor:
        if len(self.listed) == 1:
            return self.listed.flatten()
        first = torch.arange(len(self.listed), device=table.device)[:, None, None] * table.shape[2]
        return (self.listed + first).flatten()


def _blocks(
    plan: Layout,
    windows: torch.Tensor,
    keys: torch.Tensor,
    bias: torch.Tensor,
    spread: torch.Tensor,
    counts: tuple[int, ...],
    scale: float,
) -> Iterator[_Block]:
    """All windows [B, W, t, H, D] of all heads, in blocks whose keys, values and scores fit the cache."""
    batch, count, tokens, heads, head_dim = windows.shape
    length = plan.rows.shape[1] + 4 * sum(counts[: len(plan.candidates)])
    limit = block_elements(windows) // (length * max(2 * head_dim, tokens))
    wide, high = max(min(limit, count), 1), max(limit // count, 1)
    for sample in range(batch):
        weigh = bias[sample % len(bias)]
        opened = None
        if plan.candidates:
            with torch.no_grad():
                opened = _opened(plan, windows[sample], keys[sample], weigh, spread[sample], counts, scale)
        for head in range(0, heads, high):
            those = slice(head, min(head + high, heads))
            for first in range(0, count, wide):
                some = slice(first, first + wide)
                index = plan.rows[some][None]
                if opened is not None:
                    cut, slots = (x[those, some] for x in opened)
                    index = torch.cat([index.expand(len(cut), -1, -1), cut], dim=-1)
                scores = weigh.index_select(0, index.flatten()).view(index.shape)
                if opened is not None:
                    scores = scores.scatter(-1, slots, no_key(scores.dtype))
                yield _Block(sample, those, some, index.expand(those.stop - head, -1, -1), scores)


def _opened(
    plan: Layout,
    windows: torch.Tensor,
    keys: torch.Tensor,
    weigh: torch.Tensor,
    spread: torch.Tensor,
    counts: tuple[int, ...],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """In a sample, the cells that each window opens: the rows of what they are cut into, [H, W, n], and where among the
    window's keys they were themselves, [H, W, m]."""
    mean = (windows.sum(dim=1, dtype=keys.dtype) / plan.tokens[:, None, None]).transpose(0, 1)
    # Out of place: under vmap any of these may be without the dimension of another.
    loss = scale * (mean @ keys[:, plan.first :].transpose(-1, -2)) + weigh[plan.first :] + spread[:, None]
    shape, length = loss.shape[:2], plan.rows.shape[1]
    rows, slots = [], []
    cut = places = plan.rows.new_empty((*shape, 0))
    for (seen, where), count in zip(plan.candidates, counts, strict=False):
        cells, places = (torch.cat([a.expand(*shape, -1), b], dim=-1) for a, b in ((seen, cut), (where, places)))
        top = loss.gather(-1, cells - plan.first).topk(min(count, cells.shape[-1])).indices
        slots.append(places.gather(-1, top))
        cut = plan.quarters[cells.gather(-1, top) - plan.first].flatten(-2)
        places = torch.arange(length, length + cut.shape[-1], device=cut.device).expand(cut.shape)
        length += cut.shape[-1]
        rows.append(cut)
    # The fused kernels' 8 again, with rows that are no key.
    return F.pad(torch.cat(rows, dim=-1), (0, -length % 8), value=keys.shape[1] - 1), torch.cat(slots, dim=-1)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [h, w, t, D], key and value [h, w, K, D], bias [h or 1, w, K] -> output [h, w, t, D], its log-sum-exp
    [h, w, t]."""
    shape = (*query.shape[:3], key.shape[2])
    mask = bias[:, :, None].expand(shape)
    # Not by its name in F: whoever watches that for the model's own attention shall not see windows.
    if query.device.type == "cpu":
        output, mass = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query.to(key.dtype), key, value, 0.0, False, attn_mask=mask, scale=scale
        )
    elif query.device.type == "cuda" and query.dtype != torch.float64 and query.shape[-1] % 8 == 0:
        output, mass, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, True, scale=scale
        )
        mass = mass[..., : query.shape[2]]  # the kernel rounds up
    else:
        return attend_plainly(query, key, value, bias, scale)
    return output, mass


def attend_plainly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = (query @ key.transpose(-1, -2)).to(compute_dtype(query.dtype)).mul_(scale).add_(bias[:, :, None])
    mass = scores.logsumexp(dim=-1)
    return (scores - mass[..., None]).exp().to(value.dtype) @ value, mass


def _by_sample(x: torch.Tensor, images: Sequence[ImageSize], size: int) -> list[torch.Tensor]:
    """Of each image [B, W, t, ...]."""
    return [windows.unflatten(0, (len(x), -1)) for windows in windows_of(x, images, size)]


def _setting(cells: list[int]) -> Cells:
    window, ring, far, budget, *opened = cells
    return Cells(window, ring, far, budget, tuple(opened))


def _triples(images: list[int]) -> tuple[ImageSize, ...]:
    return tuple((images[at], images[at + 1], images[at + 2]) for at in range(0, len(images), 3))
