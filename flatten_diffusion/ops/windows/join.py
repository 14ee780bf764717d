"""Softmax within windows of a picture, joined with attention to all that lies beyond them.

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
from .partition import Block, JoinArguments, Picture, blocks

NO_KEY = 1e-4
"""What counts as the number of keys beyond a window that leaves none out: next to nothing, yet its logarithm is finite
and of the size of scores."""


def join_windows(
    mixed: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pictures: Sequence[Picture],
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
    backend as for `focused_linear_attention`.
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

        return _join(call, estimate)


def _join(
    call: JoinArguments, log_far: Callable[[int, Block, torch.Tensor, torch.Tensor | None], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log mass, block by block; `log_far` of a sample's block, given its scaled queries [H, W, t, D] and the
    mask of its keys, is [H, W, t]."""
    query, dtype = call.query, compute_dtype(call.query.dtype)
    output = query.new_empty(query.shape)
    log_mass = query.new_empty(query.shape[:3], dtype=dtype)
    for sample in range(query.shape[0]):
        for block in blocks(call.pictures, call.size, query):
            queries = block.take(query, sample, dtype).mul_(call.scale)
            keys, values = (block.take(x, sample, dtype) for x in (call.key, call.value))
            keep = _mask(block, call.key_mask, sample, keys, values)
            far = log_far(sample, block, queries, keep)
            attended, mass = _attend(queries, keys, values, keep, far, block.take(call.mixed, sample, dtype))
            block.put(output, sample, attended)
            block.put(log_mass.unsqueeze(-1), sample, mass)
    return output, log_mass


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: torch.Tensor | None,
    log_far: torch.Tensor,
    mixed: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query, key, value, mixed [H, W, t, D], keep [W, t], log_far [H, W, t] -> output [H, W, t, D], its log mass."""
    shape = query.shape
    scores = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)).view(*shape[:3], shape[2])
    if keep is not None:
        scores.masked_fill_(~keep[:, None], -torch.inf)
    largest = torch.maximum(scores.amax(dim=-1), log_far)
    weights = scores.sub_(largest.unsqueeze(-1)).exp_()
    far = (log_far - largest).exp_()
    total = weights.sum(dim=-1).add_(far)
    far.div_(total)
    weights.div_(total.unsqueeze(-1))
    mixed = mixed.mul_(far.unsqueeze(-1)).flatten(0, 1)
    output = mixed.baddbmm_(weights.flatten(0, 1), value.flatten(0, 1)).view(shape)
    return output, largest.add_(total.log_()).unsqueeze(-1)


def join_far(
    mixed: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_far: torch.Tensor,
    pictures: Sequence[Picture],
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

        output, log_mass = _join(JoinArguments(*tensors, *settings), given)
        ctx.save_for_backward(*tensors, log_far, output, log_mass)
        ctx.settings = settings
        return output, log_mass

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor, grad_mass: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """With P the weights of a window's keys, f that of what lies beyond, and delta = grad . out, the gradient of
        the scores is P (grad v^T - delta + grad_mass), that of log_far f (grad . mixed - delta + grad_mass)."""
        *tensors, output, log_mass = ctx.saved_tensors
        if backward_needs_plain_torch():

            def plain(*views: Any) -> tuple[torch.Tensor, torch.Tensor]:
                return reference.join(JoinArguments(*views[:4], *ctx.settings), views[4])

            needed, given = ctx.needs_input_grad[:5], (grad_output, grad_mass)
            return *differentiable_gradients(plain, tensors, needed, given), None
        mixed, query, key, value, log_far = tensors
        pictures, size, key_mask, scale = ctx.settings
        dtype = log_mass.dtype
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (mixed, query, key, value, log_far)]
        grad_mixed, grad_query, grad_key, grad_value, grad_far = grads
        with torch.autocast(query.device.type, enabled=False):
            for sample in range(query.shape[0]):
                for block in blocks(pictures, size, query):
                    queries, keys, values, beyond, grad, attended = (
                        block.take(x, sample, dtype) for x in (query, key, value, mixed, grad_output, output)
                    )
                    far, mass, moved = (
                        block.take(x.unsqueeze(-1), sample, dtype).squeeze(-1) for x in (log_far, log_mass, grad_mass)
                    )
                    keep = _mask(block, key_mask, sample, keys, values)
                    moved -= (grad * attended).sum(dim=-1)
                    weights = (queries @ keys.transpose(-1, -2)).mul_(scale).sub_(mass.unsqueeze(-1)).exp_()
                    if keep is not None:
                        weights.masked_fill_(~keep[:, None], 0.0)
                    far = far.sub_(mass).exp_()
                    block.put(grad_value, sample, weights.transpose(-1, -2) @ grad)
                    block.put(grad_far.unsqueeze(-1), sample, (far * ((grad * beyond).sum(dim=-1) + moved))[..., None])
                    weights.mul_((grad @ values.transpose(-1, -2)).add_(moved.unsqueeze(-1))).mul_(scale)
                    block.put(grad_query, sample, weights @ keys)
                    block.put(grad_key, sample, weights.transpose(-1, -2) @ queries)
                    block.put(grad_mixed, sample, grad.mul_(far.unsqueeze(-1)))
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
