"""Calibration of joint layers: the share of attention that goes to the picture, fitted to the softmax's own share.

Per head, the form's parameters (see `flatten_diffusion.mixers.joint`) by least squares on the true share g, which some
of the picture's queries are asked for. With P and T the softmax over the picture and over the rest, an error e in g
moves the product by (P - T) e, one in its log-odds by g (1 - g) (P - T) e: queries count as the square of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from ..adapter import Adapter
from ..mixers import JointAttention, SharedNormalizer
from ..mixers.joint import estimate_log_mass, log_odds_of_counts, softmax_with_sink
from .measure import Batch, Reduce, check_finite, in_full_precision, second_moments, solve_ridge, watch
from .record import JointInputs, LayerCall

_QUERIES = 256
"""Queries per picture that are asked for their true share, which takes all their scores at once."""
_RIDGE = 1e-3


def fit_shares(adapter: Adapter, batches: Sequence[Batch], reduce: Reduce) -> None:
    """Fit every joint layer of `adapter`, in place; layers over the picture alone have no share."""
    sums: dict[str, torch.Tensor] = {}

    def consume(call: LayerCall, batch: Batch) -> None:
        joint, parts = call.mixer.joint, call.joint_inputs()
        for inputs, weights in zip(parts, batch.weights.chunk(max(len(parts), 1)), strict=False):
            assert joint is not None  # it had inputs
            sums[call.name] = sums.get(call.name, 0) + _moments(joint, inputs, Batch(batch.run, weights))

    if all(mixer.joint is None for _, mixer in adapter.mixers()):
        return  # without a pass of the teacher
    watch(adapter, batches, consume)
    for name, mixer in adapter.mixers():
        if name in sums and mixer.joint is not None:
            moments = reduce(sums[name])
            check_finite(name, moments)
            _assign(mixer.joint, moments)


@in_full_precision
def _moments(joint: JointAttention, inputs: JointInputs, batch: Batch) -> torch.Tensor:
    """[H, F + 1 + T, F + 1 + T], see `second_moments`."""
    inputs = _thinned(inputs)
    equations = _masses if isinstance(joint, SharedNormalizer) else _gates
    features, targets, effect = equations(inputs, *_branches(inputs))
    features, targets, roots = (
        x.permute(2, 0, 1, 3).flatten(1, 2) for x in (features, targets, (effect * batch.roots(effect))[..., None])
    )
    return second_moments(features, targets, roots)


def _thinned(inputs: JointInputs) -> JointInputs:
    """With some of the queries, in float32."""
    step = -(-inputs.query.shape[1] // _QUERIES)
    query, key, value, text_key, text_value = (
        x.float() for x in (inputs.query[:, ::step], inputs.key, inputs.value, inputs.text_key, inputs.text_value)
    )
    return replace(inputs, query=query, key=key, value=value, text_key=text_key, text_value=text_value)


def _branches(inputs: JointInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log Z of the picture and the picture's share, [B, N, H], and P - T, [B, N, H, D]."""
    scores = torch.einsum("bnhd,bmhd->bnhm", inputs.query, inputs.key) * inputs.scale
    if inputs.key_mask is not None:
        scores = scores.masked_fill(~inputs.key_mask[:, None, None], -torch.inf)
    log_mass = scores.logsumexp(dim=-1)
    picture = torch.einsum("bnhm,bmhd->bnhd", scores.softmax(dim=-1), inputs.value)
    text = partial(softmax_with_sink, inputs.query, inputs.text_key, inputs.text_value, inputs.text_mask, inputs.scale)
    _, share = text(log_mass)
    alone, _ = text(torch.full_like(log_mass, -1e4))  # so far down that the picture gets nothing
    return log_mass, share[..., 0], picture - alone


def _masses(
    inputs: JointInputs, log_mass: torch.Tensor, share: torch.Tensor, difference: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `SharedNormalizer` can learn [B, N, H, 2], what it misses of log Z [B, N, H, 1], and what that moves."""
    log_count, average, spread = estimate_log_mass(inputs.query, inputs.key, inputs.key_mask, inputs.scale)
    missing = log_mass - (log_count + average + spread)
    effect = share * (1 - share) * difference.norm(dim=-1)
    return torch.stack([average, spread], dim=-1), missing[..., None], effect


def _gates(
    inputs: JointInputs, log_mass: torch.Tensor, share: torch.Tensor, difference: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For `GatedBranches`, which has one share for all queries of a head: nothing [B, N, H, 0]; the true share and the
    log-odds at zero bias [B, N, H, 2], whose means are wanted; and what an error in the share moves."""
    odds = log_odds_of_counts(inputs.key, inputs.key_mask, inputs.text_key, inputs.text_mask)
    targets = torch.stack([share, odds[:, None, None].expand(share.shape)], dim=-1)
    return share.new_zeros(*share.shape, 0), targets, difference.norm(dim=-1)


@torch.no_grad()
def _assign(joint: JointAttention, moments: torch.Tensor) -> None:
    if isinstance(joint, SharedNormalizer):
        solution = solve_ridge(moments, 2, _RIDGE)[:, 0]
        joint.gain.copy_(solution[:, :2])
        joint.bias.copy_(solution[:, 2])
    else:
        share, odds = solve_ridge(moments, 0, _RIDGE)[..., 0].unbind(-1)
        joint.bias.copy_(share.logit(eps=1e-6) - odds)
