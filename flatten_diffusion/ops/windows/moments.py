"""Number, mean and covariance of keys, and what they tell of a query's scores: in blocks, without gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..focused_linear.eager import kept_tokens, key_count, token_blocks
from ..focused_linear.reference import compute_dtype


class KeyMoments(NamedTuple):
    """Of a layer's keys, over those that count: number [B], mean [B, H, D] and covariance [B, H, D, D]."""

    number: torch.Tensor
    mean: torch.Tensor
    covariance: torch.Tensor


@torch.no_grad()
def key_moments(key: torch.Tensor, key_mask: torch.Tensor | None) -> KeyMoments:
    """`KeyMoments` of key [B, M, H, D], key_mask bool [B, M] or None; float32 (float64 for float64).

    Masked keys may hold anything. A sample without any key has zero moments and counts one.
    """
    batch, _, heads, head_dim = key.shape
    dtype = compute_dtype(key.dtype)
    mean = key.new_zeros((batch, heads, head_dim), dtype=dtype)
    covariance = key.new_zeros((batch, heads, head_dim, head_dim), dtype=dtype)
    count = key_count(key, key_mask).clamp(min=1)
    for sample in range(batch):
        for start, stop in token_blocks(key):
            mean[sample] += kept_tokens(key, key_mask, sample, start, stop).sum(dim=0)
        mean[sample] /= count[sample]
        for start, stop in token_blocks(key):
            # Centred before the product: nothing is lost beside a large mean.
            rows = (kept_tokens(key, key_mask, sample, start, stop) - mean[sample]).transpose(0, 1)
            if key_mask is not None:
                rows = rows * key_mask[sample, start:stop, None]
            covariance[sample].baddbmm_(rows.transpose(1, 2), rows)
        covariance[sample] /= count[sample]
    return KeyMoments(count, mean, covariance)


@torch.no_grad()
def score_moments(
    query: torch.Tensor, moments: KeyMoments, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log of the number of keys [B, 1, 1], mean and spread of each query's scores, [B, N, H] each: see
    `flatten_diffusion.mixers.joint.estimate_log_mass`."""
    batch, tokens, heads, _ = query.shape
    dtype = moments.mean.dtype
    log_count = moments.number.log()
    average, spread = (query.new_empty((batch, tokens, heads), dtype=dtype) for _ in range(2))
    for sample in range(batch):
        for start, stop in token_blocks(query):
            rows = query[sample, start:stop].to(dtype).transpose(0, 1) * scale
            parts = moments_of_rows(rows, moments.mean[sample], moments.covariance[sample], log_count[sample])
            for whole, part in zip((average, spread), parts, strict=True):
                whole[sample, start:stop] = part.T
    return log_count[:, None, None], average, spread


def moments_of_rows(
    query: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor, log_count: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and spread of the scores of scaled queries [H, n, D], [H, n] each."""
    variance = (torch.bmm(query, covariance) * query).sum(dim=-1).clamp_(min=1e-12)
    return torch.bmm(query, mean.unsqueeze(-1)).squeeze(-1), spread_of(variance, log_count)


def spread_of(variance: torch.Tensor, log_count: torch.Tensor) -> torch.Tensor:
    """b of `SharedNormalizer`: what scores of this variance add to the log of their mean exponential."""
    frozen = (2 * variance * log_count).clamp(min=1e-12).sqrt()
    return torch.where(variance < 2 * log_count, variance / 2, frozen - log_count)
