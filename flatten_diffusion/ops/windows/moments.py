"""Number, mean and covariance of keys, and what they tell of a query's scores: in blocks, without gradients."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..focused_linear.eager import kept_tokens, key_count, token_blocks


class KeyMoments(NamedTuple):
    """Of a layer's keys, over those that count: number [B], mean [B, H, D] and covariance [B, H, D, D]."""

    number: torch.Tensor
    mean: torch.Tensor
    covariance: torch.Tensor


def key_moments(key: torch.Tensor, key_mask: torch.Tensor | None) -> KeyMoments:
    """`KeyMoments` of key [B, M, H, D], key_mask bool [B, M] or None; float32 (float64 for float64).

    Masked keys may hold anything. A sample without any key has zero moments and counts one.
    """
    count = key_count(key, key_mask).clamp(min=1)
    means, covariances = [], []
    for sample, number in enumerate(count):
        blocks = token_blocks(key)
        parts = [kept_tokens(key, key_mask, sample, *block).sum(dim=0) for block in blocks]
        mean = functools.reduce(torch.add, parts) / number
        covariance = mean.new_zeros(*mean.shape, mean.shape[1])
        for start, stop in blocks:
            # Centred before the product: nothing is lost beside a large mean.
            rows = (kept_tokens(key, key_mask, sample, start, stop) - mean).transpose(0, 1)
            if key_mask is not None:
                rows = rows * key_mask[sample, start:stop, None]
            covariance = torch.baddbmm(covariance, rows.transpose(1, 2), rows)
        means.append(mean)
        covariances.append(covariance / number)
    return KeyMoments(count, torch.stack(means), torch.stack(covariances))


def score_moments(
    query: torch.Tensor, moments: KeyMoments, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log of the number of keys [B, 1, 1], mean and spread of each query's scores, [B, N, H] each: see
    `flatten_diffusion.mixers.joint.estimate_log_mass`."""
    dtype = moments.mean.dtype
    log_count = moments.number.log()
    samples = []
    for sample, own in enumerate(zip(moments.mean, moments.covariance, log_count, strict=True)):
        rows = (query[sample, start:stop].to(dtype).transpose(0, 1) * scale for start, stop in token_blocks(query))
        samples.append(torch.cat([torch.stack(moments_of_rows(part, *own)).transpose(1, 2) for part in rows], dim=1))
    average, spread = torch.stack(samples, dim=1)  # [B, N, H] each
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
