"""Calibration of what joins the linear part with softmax: over windows, over text, or both.

Per head, the parameters of `WindowAttention` and of the joint forms by least squares on the true share g of what they
weigh, which some of the picture's queries are asked for. With P the softmax over what g is the share of and R the one
over all else, an error e in g moves the product by (P - R) e, one in its log-odds by g (1 - g) (P - R) e: queries count
as the square of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ..adapter import Adapter
from ..mixers import GatedBranches, Mixer, SharedNormalizer, WindowAttention, pictures_of
from ..mixers.joint import estimate_log_mass, log_odds_of_counts, softmax_with_sink
from ..ops.windows import window_indices
from .measure import Batch, Reduce, check_finite, in_full_precision, second_moments, solve_ridge, watch
from .record import JointInputs, LayerCall

_QUERIES = 256
"""Queries per picture that are asked for their true share, which takes all their scores at once."""
_RIDGE = 1e-3


def fit_shares(adapter: Adapter, batches: Sequence[Batch], reduce: Reduce) -> None:
    """Fit every layer of `adapter` that has windows or other tokens, in place; others have no share."""
    sums: dict[tuple[str, str], torch.Tensor] = {}

    def consume(call: LayerCall, batch: Batch) -> None:
        parts = call.joint_inputs()
        for inputs, weights in zip(parts, batch.weights.chunk(max(len(parts), 1)), strict=False):
            for part, moments in _moments(call.mixer, _thinned(inputs), Batch(batch.run, weights)).items():
                sums[call.name, part] = sums.get((call.name, part), 0) + moments

    if all(mixer.joint is None and mixer.window is None for _, mixer in adapter.mixers()):
        return  # without a pass of the teacher
    watch(adapter, batches, consume)
    mixers = dict(adapter.mixers())
    for name, part in sorted(sums):
        moments = reduce(sums[name, part])
        check_finite(name, moments)
        _assign(getattr(mixers[name], part), moments)


@in_full_precision
def _moments(mixer: Mixer, inputs: JointInputs, batch: Batch) -> dict[str, torch.Tensor]:
    """For each part of the mixer that learns, [H, F + 1 + T, F + 1 + T], see `second_moments`."""
    near = None if mixer.window is None else _near(inputs, mixer.window.size)
    equations = {}
    if mixer.window is not None or isinstance(mixer.joint, SharedNormalizer):
        equations["joint" if mixer.window is None else "window"] = _masses(inputs, *_branches(inputs, near))
    if isinstance(mixer.joint, GatedBranches):
        equations["joint"] = _gates(inputs, *_branches(inputs, None))
    return {part: _weighted(*equation, batch) for part, equation in equations.items()}


def _weighted(features: torch.Tensor, targets: torch.Tensor, effect: torch.Tensor, batch: Batch) -> torch.Tensor:
    features, targets, roots = (
        x.permute(2, 0, 1, 3).flatten(1, 2) for x in (features, targets, (effect * batch.roots(effect))[..., None])
    )
    return second_moments(features, targets, roots)


def _thinned(inputs: JointInputs) -> JointInputs:
    """With some of the queries, in float32."""
    changed = {
        name: tensor.float()
        for name in ("query", "key", "value", "text_key", "text_value")
        if (tensor := getattr(inputs, name)) is not None
    }
    changed["query"] = changed["query"][:, :: _step(inputs.key.shape[1])]
    return replace(inputs, **changed)


def _step(tokens: int) -> int:
    return -(-tokens // _QUERIES)


def _near(inputs: JointInputs, size: int) -> torch.Tensor:
    """bool [N, 1, M]: whether a key is in the window of a query of `_thinned`."""
    assert inputs.grid is not None, "a mixer with windows is given the grid"
    window = window_indices(pictures_of(inputs.grid), size, inputs.key.device)
    return (window[:: _step(len(window)), None] == window)[:, None]


def _branches(
    inputs: JointInputs, near: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the picture's keys that are not `near`: log of their number, log Z and their share, [B, N, H] each; and P - R,
    [B, N, H, D]."""
    scores = torch.einsum("bnhd,bmhd->bnhm", inputs.query, inputs.key) * inputs.scale
    if inputs.key_mask is not None:
        scores = scores.masked_fill(~inputs.key_mask[:, None, None], -torch.inf)
    far = scores if near is None else scores.masked_fill(near, -torch.inf)
    log_count = far.isfinite().sum(dim=-1).clamp(min=1).log()
    log_far, beyond = _attend(far, inputs.value)
    log_near, rest = _attend(scores.masked_fill(far.isfinite(), -torch.inf), inputs.value)
    log_picture = torch.logaddexp(log_far, log_near)
    share = (log_far - log_picture).exp()
    if inputs.text_key is not None and inputs.text_value is not None:
        text = partial(
            softmax_with_sink, inputs.query, inputs.text_key, inputs.text_value, inputs.text_mask, inputs.scale
        )
        picture = text(log_picture)[1][..., 0]
        alone, _ = text(torch.full_like(log_picture, -1e4))  # so far down that the picture gets nothing
        others = torch.stack([1 - picture, picture * (1 - share)], dim=-1)
        weight = (others / others.sum(-1, keepdim=True).clamp(min=1e-12))[..., None]
        rest = weight[..., 0, :] * alone + weight[..., 1, :] * rest
        share = picture * share
    return log_count, log_far, share, beyond - rest


def _attend(scores: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log Z [B, N, H] and the softmax's product [B, N, H, D]; where no key counts, next to nothing, and zero."""
    log_mass = scores.logsumexp(dim=-1).clamp(min=-1e4)
    weights = (scores - log_mass[..., None]).exp()
    return log_mass, torch.einsum("bnhm,bmhd->bnhd", weights, value)


def _masses(
    inputs: JointInputs, log_count: torch.Tensor, log_mass: torch.Tensor, share: torch.Tensor, difference: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What an estimate can learn [B, N, H, 2], what it misses of log Z [B, N, H, 1], and what that moves."""
    _, average, spread = estimate_log_mass(inputs.query, inputs.key, inputs.key_mask, inputs.scale)
    missing = log_mass - (log_count + average + spread)
    effect = share * (1 - share) * difference.norm(dim=-1)
    return torch.stack([average, spread], dim=-1), missing[..., None], effect


def _gates(
    inputs: JointInputs, log_count: torch.Tensor, log_mass: torch.Tensor, share: torch.Tensor, difference: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For `GatedBranches`, which has one share for all queries of a head: nothing [B, N, H, 0]; the true share and the
    log-odds at zero bias [B, N, H, 2], whose means are wanted; and what an error in the share moves."""
    assert inputs.text_key is not None, "a joint layer has other tokens"
    odds = log_odds_of_counts(inputs.key, inputs.key_mask, inputs.text_key, inputs.text_mask)
    targets = torch.stack([share, odds[:, None, None].expand(share.shape)], dim=-1)
    return share.new_zeros(*share.shape, 0), targets, difference.norm(dim=-1)


@torch.no_grad()
def _assign(part: nn.Module, moments: torch.Tensor) -> None:
    if isinstance(part, GatedBranches):
        share, odds = solve_ridge(moments, 0, _RIDGE)[..., 0].unbind(-1)
        part.bias.copy_(share.logit(eps=1e-6) - odds)
        return
    assert isinstance(part, (SharedNormalizer, WindowAttention)) and part.gain is not None
    solution = solve_ridge(moments, 2, _RIDGE)[:, 0]
    part.gain.copy_(solution[:, :2])
    part.bias.copy_(solution[:, 2])
