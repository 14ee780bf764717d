"""Calibration of what joins a mixer with softmax: over windows, over other tokens ("text"), or both.

Per head, gain and bias of `WindowAttention` or `TextJoin` by least squares on the true log Z of the keys whose mass
they estimate, which some of the image's queries are asked for. With g their true share, P the softmax over those keys
and R the one over all else, an error e in log Z moves the product by g (1 - g) (P - R) e: queries count as the square
of that.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from ...ops.windows import window_indices
from ..base import Calibration, Context
from ..calibration import Statistic, Weights
from ..grid import images_of
from .least_squares import check_finite, in_full_precision, second_moments, solve_ridge
from .text import OtherTokens, TextJoin, estimate_log_partition, softmax_with_sink
from .window import WindowAttention

_QUERIES = 256
"""Queries per image that are asked for their true share, which takes all their scores at once."""
_RIDGE = 1e-3


class JoinInputs(NamedTuple):
    """What is joined in one call: the image's query, key, value [B, N, H, D], its context, and the other tokens."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    context: Context
    others: OtherTokens | None


def fit_shares(window: WindowAttention | None, text: TextJoin | None, name: str, selection: slice) -> Calibration:
    """Fit what estimates in a layer, in place: the windows where there are any, else the text join."""
    part = window if window is not None else text
    if part is None or part.gain is None:
        return
    size = None if window is None else window.size

    def measure(call: JoinedCall) -> torch.Tensor:
        pieces = zip(call.joins, call.weights.samples.chunk(max(len(call.joins), 1)), strict=False)
        moments = [_moments(_thinned(inputs), inputs, size, Weights(weights)) for inputs, weights in pieces]
        return torch.stack(moments).sum(0) if len(moments) > 1 else moments[0]

    (moments,) = yield Statistic(measure, selection)
    check_finite(name, moments)
    solution = solve_ridge(moments, 2, _RIDGE)[:, 0]
    with torch.no_grad():
        part.gain.copy_(solution[:, :2])
        part.bias.copy_(solution[:, 2])


class JoinedCall(NamedTuple):
    """What the fit reads of a `LayerCall`: its joins, sample by sample where the layer runs so (Mochi)."""

    joins: list[JoinInputs]
    weights: Weights


@in_full_precision
def _moments(inputs: JoinInputs, whole: JoinInputs, size: int | None, weights: Weights) -> torch.Tensor:
    """[H, 4, 4], see `second_moments`: mean and spread of the scores against what they miss of log Z."""
    near = None if size is None else _near(whole, size)
    log_count, log_partition, share, difference = _branches(inputs, near)
    scale = inputs.context.softmax_scale(inputs.query)
    _, average, spread = estimate_log_partition(inputs.query, inputs.key, inputs.context.key_mask, scale)
    missing = (log_partition - (log_count + average + spread))[..., None]
    effect = share * (1 - share) * difference.norm(dim=-1)
    features, targets, roots = (
        x.permute(2, 0, 1, 3).flatten(1, 2)
        for x in (torch.stack([average, spread], dim=-1), missing, (effect * weights.roots(effect))[..., None])
    )
    return second_moments(features, targets, roots)


def _thinned(inputs: JoinInputs) -> JoinInputs:
    """With some of the queries, in float32."""
    query = inputs.query.float()[:, :: _step(inputs.key.shape[1])]
    others = inputs.others
    if others is not None:
        others = others._replace(key=others.key.float(), value=others.value.float())
    return inputs._replace(query=query, key=inputs.key.float(), value=inputs.value.float(), others=others)


def _step(tokens: int) -> int:
    return -(-tokens // _QUERIES)


def _near(inputs: JoinInputs, size: int) -> torch.Tensor:
    """bool [N, 1, M]: whether a key is in the window of a query of `_thinned`."""
    assert inputs.context.grid is not None, "a layer with windows is given the grid"
    window = window_indices(images_of(inputs.context.grid), size, inputs.key.device)
    return (window[:: _step(len(window)), None] == window)[:, None]


def _branches(
    inputs: JoinInputs, near: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the image's keys that are not `near`: log of their number, log Z and their share, [B, N, H] each; and P - R,
    [B, N, H, D]."""
    scale, mask = inputs.context.softmax_scale(inputs.query), inputs.context.key_mask
    scores = torch.einsum("bnhd,bmhd->bnhm", inputs.query, inputs.key) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    far = scores if near is None else scores.masked_fill(near, -torch.inf)
    log_count = far.isfinite().sum(dim=-1).clamp(min=1).log()
    log_far, beyond = _attend(far, inputs.value)
    log_near, rest = _attend(scores.masked_fill(far.isfinite(), -torch.inf), inputs.value)
    log_image = torch.logaddexp(log_far, log_near)
    share = (log_far - log_image).exp()
    if inputs.others is not None:
        text = partial(softmax_with_sink, inputs.query, inputs.others, scale)
        image = text(log_image)[1][..., 0]
        alone, _ = text(torch.full_like(log_image, -1e4))  # so far down that the image gets nothing
        others = torch.stack([1 - image, image * (1 - share)], dim=-1)
        weight = (others / others.sum(-1, keepdim=True).clamp(min=1e-12))[..., None]
        rest = weight[..., 0, :] * alone + weight[..., 1, :] * rest
        share = image * share
    return log_count, log_far, share, beyond - rest


def _attend(scores: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log Z [B, N, H] and the softmax's product [B, N, H, D]; where no key counts, next to nothing, and zero."""
    log_partition = scores.logsumexp(dim=-1).clamp(min=-1e4)
    weights = (scores - log_partition[..., None]).exp()
    return log_partition, torch.einsum("bnhm,bmhd->bnhd", weights, value)
