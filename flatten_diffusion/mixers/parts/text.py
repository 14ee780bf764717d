"""Joint attention over an image and other tokens (text, registers): a mixer and softmax under one normaliser.

A query of the image sees image keys P through the mixer and the other keys T through softmax, which is affordable
because they are few. With L_i the mixer's output and S_i the softmax over T alone,

    out_i = g_i L_i + (1 - g_i) S_i,    g_i = Z_P / (Z_P + Z_T),

the softmax's own partition. Queries outside the image keep the native softmax over everything.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ...ops import call_dtype
from ...ops.windows import key_moments, score_moments, spread_of
from ..base import Context

_SINK_VALUE = 1024.0
"""What the sink holds in its channel: float16 then tells its weight down to 6e-11."""


class OtherTokens(NamedTuple):
    """Keys and values beside the image's: key, value [B, T, H, D]; mask bool [B, T], True where one counts, or None;
    bias [B, T], added to the scores of each (the log of how many equal tokens it stands for), or None."""

    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None


class TextJoin(nn.Module):
    """Joins a mixer's output over the image with the softmax over other tokens.

    Z_T = sum over T of exp(s q_i.k_m) is exact. Z_P is what the mixer or the windows beside it tell, times exp(bias_h);
    where nobody knows it, it is estimated without looking at the keys one by one, from their number n, mean m and
    covariance C: the scores of query i have mean a = s q_i.m and variance v = s^2 q_i^T C q_i, and

        log Z_P = bias_h + log n + (1 + gain_h0) a + (1 + gain_h1) b,
        b = v / 2   if v < 2 log n,   else   sqrt(2 v log n) - log n,

    exact at zero bias and gain for normal scores as n grows; beyond v = 2 log n the largest score dominates the sum.
    Scores of trained models are not normal: calibration fits `gain` [heads, 2] and `bias` [heads] (zeros at the start)
    to their own log Z_P.

    Args:
        heads: of the layer.
        estimates: whether Z_P is estimated; without, there is no gain.

    Source: Derrida, "Random-energy model", Phys. Rev. B 24, 1981 (the free energy and its freezing).
    """

    def __init__(self, heads: int, estimates: bool = True) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(heads))
        self.gain = nn.Parameter(torch.zeros(heads, 2)) if estimates else None

    def parts(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        context: Context,
        others: OtherTokens,
        log_partition: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(1 - g) S [B, N, H, D] and g [B, N, H, 1], in the query's dtype.

        Args:
            query, key: [B, N, H, D] and [B, M, H, D], of the image.
            context: of the call over the image.
            others: the other tokens.
            log_partition: [B, N, H], log Z_P where it is known.
        """
        scale = context.softmax_scale(query)
        if self.gain is not None:
            estimate = estimate_log_partition(query, key, context.key_mask, scale)
            log_partition = corrected_partition(*estimate, self.gain)
        assert log_partition is not None, "a join that does not estimate is given the partition"
        return softmax_with_sink(query, others, scale, log_partition + self.bias.to(log_partition.dtype))

    def forward(
        self,
        mixed: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        context: Context,
        others: OtherTokens,
        log_partition: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """out [B, N, H, D], from the mixer's output `mixed` and the arguments of `parts`."""
        rest, share = self.parts(query, key, context, others, log_partition)
        return rest + share * mixed


def estimate_log_partition(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log n [B, 1, 1], a and b [B, N, H] of `TextJoin`, whose sum estimates the log of the sum over keys of
    exp(scale q.k); in float32 (float64 for float64).

    query [B, N, H, D], key [B, M, H, D], mask bool [B, M] or None.
    """
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        with torch.autocast(query.device.type, enabled=False):
            return score_moments(query, key_moments(key, mask), scale)
    dtype = torch.promote_types(query.dtype, torch.float32)
    if mask is None:
        log_count = torch.full((key.shape[0],), math.log(key.shape[1]), dtype=dtype, device=key.device)
        weight = torch.full((), key.shape[1] ** -0.5, dtype=dtype, device=key.device)
        mean = key.to(dtype).mean(dim=1)
    else:
        count = mask.sum(dim=1).clamp(min=1).to(dtype)
        log_count = count.log()
        keep = mask[:, :, None, None]
        weight = keep * count.rsqrt()[:, None, None, None]
        key = key.masked_fill(~keep, 0.0)
        mean = key.to(dtype).sum(dim=1) / count[:, None, None]
    # Centred before the product, so that half precision does not lose the spread beside a large mean.
    centred = ((key.to(dtype) - mean[:, None]) * weight).to(key.dtype).transpose(1, 2)  # [B, H, M, D]
    covariance = centred.transpose(-1, -2) @ centred  # [B, H, D, D]
    queries = query.transpose(1, 2)  # [B, H, N, D]
    variance = ((queries @ covariance) * queries).to(dtype).sum(dim=-1).clamp(min=1e-12) * scale * scale
    average = (queries.to(dtype) @ mean.unsqueeze(-1)).squeeze(-1) * scale
    log_count = log_count[:, None, None]
    return log_count, average.transpose(1, 2), spread_of(variance, log_count).transpose(1, 2)


def corrected_partition(
    log_count: torch.Tensor, average: torch.Tensor, spread: torch.Tensor, gain: torch.Tensor
) -> torch.Tensor:
    """log n + (1 + gain_h0) a + (1 + gain_h1) b of `TextJoin` and `WindowAttention`, [B, N, H]."""
    gain = 1 + gain.to(average.dtype)
    return log_count + gain[:, 0] * average + gain[:, 1] * spread


def softmax_with_sink(
    query: torch.Tensor, others: OtherTokens, scale: float, log_partition: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention with one more key before all, of score `log_partition` [B, N, H] and value 0; and its weight.

    Every fused kernel can do it: the score comes in by two more channels of the query (a value and what rounding left
    of it, so that half precision does not blur it), and one more channel of the values is the sink's own, which gives
    its weight.
    """
    # Autocast would round the query after its score was split in two: cast before.
    query, key, value = (x.to(call_dtype(query)) for x in (query, others.key, others.value))
    batch, tokens, heads, head_dim = query.shape
    extra = 8 - head_dim % 8  # fused kernels want multiples of 8
    extra = extra if extra >= 2 else extra + 8
    score = log_partition / scale
    high = score.to(query.dtype)
    low = (score - high.to(score.dtype)).to(query.dtype)
    nothing = query.new_zeros(batch, tokens, heads, extra - 2)
    queries = torch.cat([query, high.unsqueeze(-1), low.unsqueeze(-1), nothing], dim=-1)
    sink = F.pad(key.new_ones(batch, 1, heads, 2), (head_dim, extra - 2))
    keys = torch.cat([sink, F.pad(key, (0, extra))], dim=1)
    sink = F.pad(value.new_full((batch, 1, heads, 1), _SINK_VALUE), (head_dim, extra - 1))
    values = torch.cat([sink, F.pad(value, (0, extra))], dim=1)
    output = F.scaled_dot_product_attention(
        queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), _with_sink(others, query), scale=scale
    ).transpose(1, 2)
    return output[..., :head_dim], output[..., head_dim : head_dim + 1] / _SINK_VALUE


def _with_sink(others: OtherTokens, query: torch.Tensor) -> torch.Tensor | None:
    """The mask of the other tokens with the sink before them, as the product takes it."""
    keep = None if others.mask is None else F.pad(others.mask, (1, 0), value=True)[:, None, None, :]
    if others.bias is None:
        return keep
    bias = F.pad(others.bias.to(query.dtype), (1, 0))[:, None, None, :]
    bias = bias if keep is None else bias.masked_fill(~keep, -torch.inf)
    return bias.expand(-1, -1, query.shape[1], -1)
