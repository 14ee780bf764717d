"""Softmax within windows of an image, joined with attention to all that lies beyond them.

The tokens go through in blocks of whole windows, small enough for scores and copies to stay in cache: main memory sees
query, key, value, what is joined, and the output; the backward pass recomputes each block.
`flatten_diffusion.mixers.WindowAttention` has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..focused_linear.dispatch import resolve_backend
from ..focused_linear.reference import compute_dtype
from ..transforms import backward_needs_plain_torch, differentiable_gradients, needs_plain_torch
from . import reference
from .moments import key_moments, moments_of_rows, score_moments
from .partition import Block, ImageSize, JoinArguments, blocks

NO_KEY = 1e-4
"""What counts as the number of keys beyond a window that leaves none out: next to nothing, yet its logarithm is finite
and of the size of scores."""


def join_windows(
    mixed: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pictures: Sequence[ImageSize],
    size: int,
    key_mask: torch.Tensor | None,
    scale: float,
    gain: torch.Tensor,
    bias: torch.Tensor,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `WindowAttention` gives for the mixer's output `mixed`: [B, N, H, D], and log masses [B, N, H]; without
    gradients, but with forward-mode derivatives and within torch.func.

    query, key, value and mixed are [B, N, H, D] with any strides; gain [H, 2]; bias [H]; key_mask bool [B, N] or None;
    backend as for `focused_linear_attention`. Finite wherever the exact result fits the dtype with a factor of two to
    spare, for entries up to 1e8 in magnitude (all of float16); `join_far` and its gradients too.
    """
    call = JoinArguments(mixed, query, key, value, tuple(pictures), size, key_mask, scale)
    dtype = compute_dtype(query.dtype)
    gain, bias = 1 + gain.to(dtype), bias.to(dtype)
    if needs_plain_torch():
        moments = key_moments(key, key_mask)
        _, average, spread = score_moments(query, moments, scale)
        beyond = moments.number[:, None] - reference.keys_of_windows(key, key_mask, pictures, size)
        log_far = gain[:, 0] * average + gain[:, 1] * spread + bias + beyond.clamp(min=NO_KEY).log()[..., None]
        return reference.join(call, log_far)
    with torch.no_grad():
        moments = key_moments(key, key_mask)
        if resolve_backend(backend, query.device, query.dtype, query.shape[3]) == "triton":
            from . import triton  # a machine without triton never needs it

            if triton.fits_kernel(query, size):
                return triton.join(call, gain, bias, moments, NO_KEY)
        log_count = moments.number.log()

        def estimate(sample: int, block: Block, rows: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
            own = (part[sample] for part in (moments.mean, moments.covariance, log_count))
            average, spread = moments_of_rows(rows.flatten(1, 2), *own)
            log_far = average.mul_(gain[:, :1]).addcmul_(spread, gain[:, 1:]).add_(bias[:, None]).view(rows.shape[:3])
            near = rows.shape[2] if keep is None else keep.sum(dim=1, keepdim=True)
            return log_far.add_((moments.number[sample] - near).clamp(min=NO_KEY).log())

        output, largest, total = _join(call, estimate)
        return output, total.log_().add_(largest)


def _join(
    call: JoinArguments, log_far: Callable[[int, Block, torch.Tensor, torch.Tensor | None], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, and what makes up a query's log mass: its largest score and the sum of the exponentials below it, [B, N,
    H] each. Block by block; `log_far` of a sample's block, given its scaled queries [H, W, t, D] and the mask of its
    keys, is [H, W, t]."""
    query, dtype = call.query, compute_dtype(call.query.dtype)
    output = query.new_empty(query.shape)
    largest, total = (query.new_empty(query.shape[:3], dtype=dtype) for _ in range(2))
    for sample in range(query.shape[0]):
        for block in blocks(call.pictures, call.size, query):
            queries = block.take(query, sample, dtype).mul_(call.scale)
            keys, values = (block.take(x, sample, dtype) for x in (call.key, call.value))
            keep = _mask(block, call.key_mask, sample, keys, values)
            far = log_far(sample, block, queries, keep)
            scores = _scores(queries, keys, keep)
            peak = torch.maximum(scores.amax(dim=-1), far)
            weights = scores.sub_(peak.unsqueeze(-1)).exp_()
            far = (far - peak).exp_()
            mass = weights.sum(dim=-1).add_(far)
            weights.div_(mass.unsqueeze(-1))
            attended = block.take(call.mixed, sample, dtype).mul_(far.div_(mass).unsqueeze(-1)).flatten(0, 1)
            attended.baddbmm_(weights.flatten(0, 1), values.flatten(0, 1))
            block.put(output, sample, attended.view(queries.shape))
            block.put(largest.unsqueeze(-1), sample, peak.unsqueeze(-1))
            block.put(total.unsqueeze(-1), sample, mass.unsqueeze(-1))
    return output, largest, total


def _scores(query: torch.Tensor, key: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """Scaled query and key [H, W, t, D], keep [W, t] -> [H, W, t, t]: the same bits forward and backward, since large
    scores differ by more than an exponential bears if they are not."""
    heads, windows, tokens, _ = query.shape
    scores = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)).view(heads, windows, tokens, tokens)
    return scores if keep is None else scores.masked_fill_(~keep[:, None], -torch.inf)


def join_far(
    mixed: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_far: torch.Tensor,
    pictures: Sequence[ImageSize],
    size: int,
    key_mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `join_windows` from an estimate of the mass beyond each query's window, log_far [B, N, H]; differentiable in
    all five tensors."""
    call = JoinArguments(mixed, query, key, value, tuple(pictures), size, key_mask, scale)
    if needs_plain_torch():
        return reference.join(call, log_far)
    joined: tuple[torch.Tensor, torch.Tensor] = _JoinFar.apply(*call[:4], log_far, call[4:])
    return joined


class _JoinFar(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *tensors, log_far, settings = arguments

        def given(sample: int, block: Block, rows: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
            return block.take(log_far.unsqueeze(-1), sample, rows.dtype).squeeze(-1)

        output, largest, total = _join(JoinArguments(*tensors, *settings), given)
        ctx.save_for_backward(*tensors, log_far, output, largest, total)
        ctx.settings = settings
        return output, largest + total.log()

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor, grad_mass: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """With P the weights of a window's keys, f that of what lies beyond, and delta = grad . out, the gradient of
        the scores is P (grad v^T - delta + grad_mass), that of log_far f (grad . mixed - delta + grad_mass)."""
        *tensors, output, largest, total = ctx.saved_tensors
        if backward_needs_plain_torch():

            def plain(*views: Any) -> tuple[torch.Tensor, torch.Tensor]:
                return reference.join(JoinArguments(*views[:4], *ctx.settings), views[4])

            needed, given = ctx.needs_input_grad[:5], (grad_output, grad_mass)
            return *differentiable_gradients(plain, tensors, needed, given), None
        mixed, query, key, value, log_far = tensors
        pictures, size, key_mask, scale = ctx.settings
        dtype = total.dtype
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (mixed, query, key, value, log_far)]
        grad_mixed, grad_query, grad_key, grad_value, grad_far = grads
        with torch.autocast(query.device.type, enabled=False):
            for sample in range(query.shape[0]):
                for block in blocks(pictures, size, query):
                    queries, keys, values, beyond, grad, attended = (
                        block.take(x, sample, dtype) for x in (query, key, value, mixed, grad_output, output)
                    )
                    far, peak, moved, mass = (
                        block.take(x.unsqueeze(-1), sample, dtype) for x in (log_far, largest, grad_mass, total)
                    )
                    keep = _mask(block, key_mask, sample, keys, values)
                    moved = moved.sub_((grad * attended).sum(dim=-1, keepdim=True)).div_(mass)
                    grad.div_(mass)  # and so every weight below, which is one pass less over all of them
                    weights = _scores(queries.mul_(scale), keys, keep).sub_(peak).exp_()
                    far = far.sub_(peak).exp_()
                    block.put(grad_value, sample, weights.transpose(-1, -2) @ grad)
                    along = (grad * beyond).sum(dim=-1, keepdim=True).add_(moved)
                    block.put(grad_far.unsqueeze(-1), sample, along.mul_(far))
                    weights.mul_((grad @ values.transpose(-1, -2)).add_(moved))
                    block.put(grad_key, sample, weights.transpose(-1, -2) @ queries)
                    block.put(grad_query, sample, (weights @ keys).mul_(scale))
                    block.put(grad_mixed, sample, grad.mul_(far))
        return *grads, None


def _mask(
    block: Block, key_mask: torch.Tensor | None, sample: int, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor | None:
    """bool [W, t] of a block's keys; zeroes masked ones, whatever they hold, in place."""
    if key_mask is None:
        return None
    keep: torch.Tensor = block.take(key_mask[..., None, None], sample, torch.bool)[0, ..., 0]
    keys.masked_fill_(~keep[..., None], 0.0)
    values.masked_fill_(~keep[..., None], 0.0)
    return keep
