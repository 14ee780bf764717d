"""Joint attention over a picture and other tokens (text, registers): linear and softmax attention under one roof.

A query of the picture sees picture keys P through the mixer (linear) and the other keys T through softmax, which is
affordable because they are few. With L_i the mixer's output and S_i the softmax over T alone,

    out_i = g_i L_i + (1 - g_i) S_i,

and the forms below differ in the share g_i of attention that goes to the picture. Queries outside the picture keep
the native softmax over everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import call_dtype
from ..ops.windows import key_moments, score_moments, spread_of

_SINK_VALUE = 1024.0
"""What the sink holds in its channel: float16 then tells its weight down to 6e-11."""


class JointAttention(nn.Module):
    """Base of the forms. `bias` [heads], zeros, is added to the log-odds of g_i.

    Args:
        heads: of the layer.
        estimates: whether the form estimates the picture's mass itself, or is given it (by `WindowAttention`).

    Source: the softmax's own partition, exp(q.k) over P and T, is what both forms approximate; with all their
    parameters at zero, where they start, neither needs training.
    """

    def __init__(self, heads: int, estimates: bool = True) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(heads))

    def parts(
        self,
        query: torch.Tensor,
        picture_key: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        picture_mask: torch.Tensor | None,
        mask: torch.Tensor | None,
        scale: float | None,
        log_mass: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(1 - g) S [B, N, H, D] and g [B, N, H, 1], in the query's dtype.

        Args:
            query: [B, N, H, D], of the picture.
            picture_key: [B, M, H, D].
            key, value: [B, T, H, D], of the other tokens.
            picture_mask, mask: bool [B, M] and [B, T], True where a key counts.
            scale: of the softmax; None means D ** -0.5.
            log_mass: [B, N, H], log Z_P where windows tell it.
        """
        raise NotImplementedError

    def forward(self, picture: torch.Tensor, *arguments: Any) -> torch.Tensor:
        """out [B, N, H, D], from the mixer's output `picture` and the arguments of `parts`."""
        text, share = self.parts(*arguments)
        return text + share * picture


class SharedNormalizer(JointAttention):
    """One normaliser: g_i = Z_P / (Z_P + Z_T), the softmax's own partition.

    Z_T = sum over T of exp(s q_i.k_m) is exact. Z_P is estimated without looking at the keys one by one, from their
    number n, mean m and covariance C: the scores of query i have mean a = s q_i.m and variance v = s^2 q_i^T C q_i, and

        log Z_P = bias_h + log n + (1 + gain_h0) a + (1 + gain_h1) b,
        b = v / 2   if v < 2 log n,   else   sqrt(2 v log n) - log n,

    exact at zero bias and gain for normal scores as n grows; beyond v = 2 log n the largest score dominates the sum.
    Scores of trained models are not normal: calibration fits the `gain` [heads, 2] and the bias to their own log Z_P.
    Beside windows, which tell Z_P, there is no gain, and the bias is added to what they tell.
    Source: Derrida, "Random-energy model", Phys. Rev. B 24, 1981 (the free energy and its freezing).
    """

    def __init__(self, heads: int, estimates: bool = True) -> None:
        super().__init__(heads)
        self.gain = nn.Parameter(torch.zeros(heads, 2)) if estimates else None

    def parts(
        self,
        query: torch.Tensor,
        picture_key: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        picture_mask: torch.Tensor | None,
        mask: torch.Tensor | None,
        scale: float | None,
        log_mass: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if self.gain is not None:
            log_mass = corrected_mass(*estimate_log_mass(query, picture_key, picture_mask, scale), self.gain)
        assert log_mass is not None, "a form that does not estimate is given the mass"
        return softmax_with_sink(query, key, value, mask, scale, log_mass + self.bias.to(log_mass.dtype))


class GatedBranches(JointAttention):
    """Two branches, each with its own normaliser, mixed per head: g = sigmoid(bias_h + log n_P - log n_T).

    n_P and n_T are the numbers of keys that count: at the start the mixture is that of equal scores.
    """

    def parts(
        self,
        query: torch.Tensor,
        picture_key: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        picture_mask: torch.Tensor | None,
        mask: torch.Tensor | None,
        scale: float | None,
        log_mass: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        odds = log_odds_of_counts(picture_key, picture_mask, key, mask)
        bias = self.bias.to(odds.dtype)
        if mask is not None:  # without any key the share is 1, but softmax would give NaN
            mask = mask | ~mask.any(dim=1, keepdim=True)
        share = torch.sigmoid(odds[:, None] + bias)[:, None, :, None]  # [B, 1, H, 1]
        text = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), _broadcast(mask), scale=scale
        ).transpose(1, 2)
        share = share.to(query.dtype)
        return (1 - share) * text, share.expand(*query.shape[:3], 1)


_FORMS: dict[str, type[JointAttention]] = {
    "shared_normalizer": SharedNormalizer,
    "gated_branches": GatedBranches,
}


def list_joints() -> list[str]:
    """Names that `AdapterConfig(joint=...)` accepts."""
    return list(_FORMS)


def create_joint(name: str, heads: int, estimates: bool = True) -> JointAttention:
    """A new form by its name, see `JointAttention`. Raises ValueError for an unknown one."""
    if name not in _FORMS:
        raise ValueError(f"Unknown joint {name!r}: choose one of {', '.join(_FORMS)}.")
    return _FORMS[name](heads, estimates)


def estimate_log_mass(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log n [B, 1, 1], a and b [B, N, H] of `SharedNormalizer`, whose sum estimates the log of the sum over keys of
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


def corrected_mass(
    log_count: torch.Tensor, average: torch.Tensor, spread: torch.Tensor, gain: torch.Tensor
) -> torch.Tensor:
    """log n + (1 + gain_h0) a + (1 + gain_h1) b of `SharedNormalizer` and `WindowAttention`, [B, N, H]."""
    gain = 1 + gain.to(average.dtype)
    return log_count + gain[:, 0] * average + gain[:, 1] * spread


def softmax_with_sink(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    log_mass: torch.Tensor,
    product: Callable[..., torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention with one more key before all, of score `log_mass` [B, N, H] and value zero; and its weight.

    Every fused kernel can do it: the score comes in by two more channels of the query (a value and what rounding left
    of it, so that half precision does not blur it), and one more channel of the values is the sink's own, which gives
    its weight. `product` is the attention that runs, None for `F.scaled_dot_product_attention`.
    """
    # Autocast would round the query after its score was split in two: cast before.
    query, key, value = (x.to(call_dtype(query)) for x in (query, key, value))
    batch, tokens, heads, head_dim = query.shape
    extra = 8 - head_dim % 8  # fused kernels want multiples of 8
    extra = extra if extra >= 2 else extra + 8
    score = log_mass / scale
    high = score.to(query.dtype)
    low = (score - high.to(score.dtype)).to(query.dtype)
    nothing = query.new_zeros(batch, tokens, heads, extra - 2)
    queries = torch.cat([query, high.unsqueeze(-1), low.unsqueeze(-1), nothing], dim=-1)
    sink = F.pad(key.new_ones(batch, 1, heads, 2), (head_dim, extra - 2))
    keys = torch.cat([sink, F.pad(key, (0, extra))], dim=1)
    sink = F.pad(value.new_full((batch, 1, heads, 1), _SINK_VALUE), (head_dim, extra - 1))
    values = torch.cat([sink, F.pad(value, (0, extra))], dim=1)
    keep = None if mask is None else F.pad(mask, (1, 0), value=True)
    product = F.scaled_dot_product_attention if product is None else product
    output = product(
        queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), _broadcast(keep), scale=scale
    ).transpose(1, 2)
    return output[..., :head_dim], output[..., head_dim : head_dim + 1] / _SINK_VALUE


def log_odds_of_counts(
    picture_key: torch.Tensor, picture_mask: torch.Tensor | None, key: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """[B]: log n_P - log n_T of `GatedBranches`."""
    return _log_count(picture_key, picture_mask) - _log_count(key, mask)


def _log_count(key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[B], log of the number of keys that count, at least float32; a large negative number for none."""
    if mask is None:  # a sum, since a graph may not know this size
        mask = key.new_ones(key.shape[:2], dtype=torch.bool)
    return mask.sum(dim=1).to(torch.promote_types(key.dtype, torch.float32)).clamp(min=1e-30).log()


def _broadcast(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask[:, None, None, :]
