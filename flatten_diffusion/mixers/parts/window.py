"""Softmax within windows of the image beside the linear part for what lies beyond, under one normaliser.

What a query looks at next to itself it often picks by content, which neither a linear map of few dimensions nor a
convolution can tell apart; within windows softmax is affordable, since its cost too grows linearly with the image.
"""

from __future__ import annotations

import torch
from torch import nn

from ...ops import call_dtype
from ...ops.windows import NO_KEY, fits, from_windows, join_far, join_windows, windows_of
from ..base import Context
from ..grid import Grid, images_of
from .text import OtherTokens, corrected_partition, estimate_log_partition, softmax_with_sink


class WindowAttention(nn.Module):
    """Joins the mixer's output with the softmax over each query's own window.

    The image is cut into windows of `size` x `size` tokens, from its upper left corner (smaller ones at its edges),
    frame by frame. With W the keys in the window of query i, S_i the softmax over them and L_i the mixer's output,

        out_i = (1 - g_i) S_i + g_i L_i,   g_i = Z_far / (Z_W + Z_far).

    Z_W = sum over W of exp(s q_i.k_m) is exact. Z_far, of the keys beyond, is estimated as `TextJoin` does it,
    from their number and from mean and covariance of all keys:

        log Z_far = bias_h + log n_far + (1 + gain_h0) a_i + (1 + gain_h1) b_i.

    Where one window holds the whole image, this is the softmax itself, but for rounding and a share below 1e-4.

    Parameters (zeros at the start): gain: [heads, 2], bias: [heads].
    """

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.backend = "auto"
        self.gain = nn.Parameter(torch.zeros(heads, 2))
        self.bias = nn.Parameter(torch.zeros(heads))

    def parts(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(1 - g) S [B, N, H, D] and g [B, N, H, 1] in the query's dtype, and log(Z_W + Z_far) [B, N, H].

        query, key, value: [B, N, H, D], of the image; the context's grid is that of the tokens.
        """
        log_far = self.log_far(query, key, context)
        rest, share = attend_within(query, key, value, context, self.size, log_far)
        return rest, share, log_far - share[..., 0].to(log_far.dtype).clamp(min=1e-30).log()

    def log_far(self, query: torch.Tensor, key: torch.Tensor, context: Context) -> torch.Tensor:
        """log Z_far, [B, N, H]."""
        log_far = corrected_partition(*self.far_features(query, key, context), self.gain)
        return log_far + self.bias.to(log_far.dtype)

    def far_features(
        self, query: torch.Tensor, key: torch.Tensor, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """log n_far [B or 1, N, 1], a and b [B, N, H], of which log Z_far is made."""
        mask, pictures = context.key_mask, images_of(_grid(context))
        _, average, spread = estimate_log_partition(query, key, mask, context.softmax_scale(query))
        keep = key.new_ones(1, key.shape[1]) if mask is None else mask
        keep = keep.to(average.dtype)
        near = [part.sum(dim=1, keepdim=True).expand(part.shape) for part in windows_of(keep, pictures, self.size)]
        far = keep.sum(dim=1, keepdim=True) - from_windows(near, pictures, self.size)
        return far.clamp(min=NO_KEY).log()[..., None], average, spread

    def forward(
        self, mixed: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """out [B, N, H, D] from the mixer's output `mixed` and the arguments of `parts`, and log(Z_W + Z_far)."""
        if torch.compiler.is_compiling():  # which would unroll the blocks
            rest, share, log_partition = self.parts(query, key, value, context)
            return rest + share * mixed, log_partition
        scale, pictures, mask = context.softmax_scale(query), images_of(_grid(context)), context.key_mask
        mixed, query, key, value = (x.to(call_dtype(query)) for x in (mixed, query, key, value))
        if torch.is_grad_enabled():
            log_far = self.log_far(query, key, context)
            with torch.autocast(query.device.type, enabled=False):
                return join_far(mixed, query, key, value, log_far, pictures, self.size, mask, scale)
        with torch.autocast(query.device.type, enabled=False):
            return join_windows(
                mixed, query, key, value, pictures, self.size, mask, scale, self.gain, self.bias, self.backend
            )

    def extra_repr(self) -> str:
        return f"size={self.size}"


def attend_within(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context: Context,
    size: int,
    log_partition: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `softmax_with_sink`, each query with the keys of its own window."""
    mask, pictures = context.key_mask, images_of(_grid(context))
    if mask is not None:  # whatever a masked slot holds, NaN included, is never read
        key, value = (x.masked_fill(~mask[:, :, None, None], 0.0) for x in (key, value))
    if mask is None and not all(fits(picture, size) for picture in pictures):
        mask = torch.ones(key.shape[:2], dtype=torch.bool, device=key.device)
    parts = [windows_of(x, pictures, size) for x in (query, key, value, log_partition)]
    masks = [None] * len(parts[0]) if mask is None else windows_of(mask, pictures, size)
    scale = context.softmax_scale(query)
    rests, shares = zip(
        *(softmax_with_sink(q, OtherTokens(k, v, m), scale, z) for q, k, v, z, m in zip(*parts, masks, strict=True)),
        strict=True,
    )
    return from_windows(rests, pictures, size), from_windows(shares, pictures, size)


def _grid(context: Context) -> Grid:
    if context.grid is None:
        raise ValueError("Windows need the grid of the tokens: call the whole model.")
    return context.grid
