"""What linear maps share: the product of features in linear time, its N x N judge, and scalars solved head by head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ...ops.focused_linear.reference import compute_dtype
from ..base import Calibration, Context, Mixed, Mixer
from ..calibration import CalibratedLayer, LayerCall, MixerInputs, Statistic
from .least_squares import check_finite, in_full_precision, second_moments, solve_ridge, squared_errors

FACTORS = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
"""On query and key, which calibration tries head by head."""
SHARES = (0.0, 0.25, 0.5, 1.0)
"""Of the root mean square of query and key, which calibration adds head by head."""
_RIDGE = 1e-4


def wide(x: torch.Tensor) -> torch.Tensor:
    """In what sums are taken: float64 as it is, all else as float32."""
    return x.to(compute_dtype(x.dtype))


def hide(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """x [B, M, ...] with zeros in masked slots, whatever they hold; mask bool [B, M] or None."""
    return x if mask is None else x.masked_fill(~mask.reshape(*mask.shape, *(1,) * (x.dim() - 2)), 0.0)


def count_keys(key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """How many keys [B, M, H, D] count, at least 1: [B, 1, 1], or [1, 1, 1] without a mask."""
    if mask is None:
        return key.new_full((1, 1, 1), key.shape[1])
    return mask.sum(dim=1).clamp(min=1).to(key.dtype)[:, None, None]


def mean_of(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[B, H, D], the mean over keys [B, M, H, D] that count; zero where none does."""
    return hide(x, mask).sum(dim=1) / count_keys(x, mask)


def state_of(key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[B, H, F, D], the mean over keys that count of the outer products of key [B, M, H, F] and value [B, M, H, D]."""
    return torch.einsum("bmhf,bmhd->bhfd", hide(key, mask), hide(value, mask)) / count_keys(key, mask)[..., None]


def linear_product(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None, eps: float = 1e-6
) -> torch.Tensor:
    """q_i mean(k^T v) / (q_i . mean(k) + eps), in linear time and memory, at least float32.

    query [B, N, H, F] and key [B, M, H, F] are features, value [B, M, H, D], mask bool [B, M]; -> [B, N, H, D].
    """
    query, key, value = wide(query), wide(key), wide(value)
    with torch.autocast(query.device.type, enabled=False):
        normalizer = torch.einsum("bnhf,bhf->bnh", query, mean_of(key, mask)) + eps
        return torch.einsum("bnhf,bhfd->bnhd", query, state_of(key, value, mask)) / normalizer[..., None]


def quadratic_product(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None, eps: float = 1e-6
) -> torch.Tensor:
    """`linear_product` with the weight of every pair written out: its judge, in the dtype of its arguments."""
    weights = torch.einsum("bnhf,bmhf->bnhm", query, hide(key, mask))
    normalizer = weights.sum(dim=-1, keepdim=True) + eps * count_keys(key, mask)[..., None]
    return torch.einsum("bnhm,bmhd->bnhd", weights / normalizer, hide(value, mask))


def centred_product(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """mean(v) [B, 1, H, D], and q_i mean((k - mean(k))^T v) [B, N, H, D]; arguments as in `linear_product`."""
    query, key, value = wide(query), wide(key), wide(value)
    with torch.autocast(query.device.type, enabled=False):
        centred = key - mean_of(key, mask)[:, None]
        return mean_of(value, mask)[:, None], torch.einsum("bnhf,bhfd->bnhd", query, state_of(centred, value, mask))


def elu_plus_one(x: torch.Tensor) -> torch.Tensor:
    """x + 1 above zero and exp(x) below: positive features."""
    return F.elu(x) + 1


class LinearMixer(Mixer):
    """A mixer that is `linear_product` behind a map of query and key: what differs is `features`.

    Class attributes: eps, added to the query's product with the mean key.
    """

    eps: ClassVar[float] = 1e-6

    def features(self, query: torch.Tensor, key: torch.Tensor, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """The maps of query [B, N, H, D] and key [B, M, H, D], [..., F] each; masked keys are zeros."""
        raise NotImplementedError

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """See `Mixer.forward`."""
        mask = context.key_mask
        queries, keys = self.features(wide(query), wide(hide(key, mask)), context)
        return Mixed(linear_product(queries, keys, hide(value, mask), mask, self.eps).to(query.dtype))

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """The weights of all pairs as a matrix."""
        mask = context.key_mask
        queries, keys = self.features(query, hide(key, mask), context)
        return Mixed(quadratic_product(queries.to(query.dtype), keys.to(query.dtype), value, mask, self.eps))


def sharpened(x: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """x [B, N, H, D] times exp(log_scale) [H], in the dtype of x."""
    return (x * wide(log_scale).exp()[:, None]).to(x.dtype)


def choose(
    mixer: Mixer,
    assign: Callable[[torch.Tensor], None],
    candidates: Sequence[float],
    start: float,
    layer: CalibratedLayer,
) -> Calibration:
    """The best candidate of each head, by what a regression on the mixer's output leaves of the softmax.

    assign: puts one value per head, [H], into the mixer; start: the value that it has now. Returns the choices.
    """
    heads = mixer.layer.heads

    def measure(call: LayerCall) -> torch.Tensor:
        rows = []
        try:
            for candidate in candidates:
                assign(torch.full((heads,), candidate))
                rows.append(_moments(call, mixer))
        finally:
            assign(torch.full((heads,), start))
        return torch.stack(rows)

    (second,) = yield Statistic(measure, layer.selection)
    check_finite(layer.name, second)
    left = squared_errors(second, solve_ridge(second, second.shape[-1] - 1 - mixer.layer.head_dim, _RIDGE))
    best = torch.tensor(candidates)[left.argmin(0)]
    assign(best)
    return tuple(best.tolist())


def fit_log_scale(mixer: Mixer, log_scale: nn.Parameter, layer: CalibratedLayer) -> Calibration:
    """The factor of each head, whose logarithm is added to `log_scale` [H]; see `choose`. Returns the factors."""
    first = log_scale.detach().clone()

    def assign(factors: torch.Tensor) -> None:
        with torch.no_grad():
            log_scale.copy_(first + factors.log().to(first.device, first.dtype))

    return (yield from choose(mixer, assign, FACTORS, 1.0, layer))


def fit_shifts(mixer: Mixer, query_shift: nn.Parameter, key_shift: nn.Parameter, layer: CalibratedLayer) -> Calibration:
    """What is added to each head's query and key, [H, D], so that a relu cuts less: a share of the channels' root mean
    square; see `choose`. Returns the shares."""

    @in_full_precision
    def measure(call: LayerCall) -> torch.Tensor:
        inputs = call.inputs
        key = hide(inputs.key, inputs.context.key_mask)
        squares = [x.float().square().sum((0, 1)).double().cpu() for x in (inputs.query, key)]
        return torch.stack([*squares, torch.full_like(squares[0], inputs.query.shape[0] * inputs.query.shape[1])])

    first = [shift.detach().clone() for shift in (query_shift, key_shift)]
    (squares,) = yield Statistic(measure, layer.selection)
    check_finite(layer.name, squares)
    roots = (squares[:2] / squares[2]).sqrt()

    def assign(shares: torch.Tensor) -> None:
        with torch.no_grad():
            for shift, begin, root in zip((query_shift, key_shift), first, roots, strict=True):
                shift.copy_(begin + (shares[:, None] * root).to(begin.device, begin.dtype))

    return (yield from choose(mixer, assign, SHARES, 0.0, layer))


@in_full_precision
def _moments(call: LayerCall, mixer: Mixer) -> torch.Tensor:
    """[H, F + 1 + D, F + 1 + D], see `second_moments`: the mixer's output against the softmax's."""
    inputs = call.inputs
    wanted = call.product if inputs.rest is None else call.product - inputs.rest
    features = inputs.shared(inputs.mix(mixer).float())
    rows, targets = (x.permute(2, 0, 1, 3).flatten(1, 2) for x in (features, wanted))
    return second_moments(rows, targets, call.weights.token_roots(wanted))


def fit_gain(
    gain: nn.Parameter, parts: Callable[[MixerInputs], tuple[torch.Tensor, torch.Tensor]], layer: CalibratedLayer
) -> Calibration:
    """Each head's factor `gain` [H] by least squares, where `parts` of a call are [B, N, H, D] tensors a and b of the
    mixer's output a + gain b. Returns the factors; a head whose b is zero keeps its own."""

    def measure(call: LayerCall) -> torch.Tensor:
        return _gain_moments(call, *parts(call.inputs))

    (sums,) = yield Statistic(measure)
    check_finite(layer.name, sums)
    cross, square = sums
    with torch.no_grad():
        kept = gain.double().cpu()
        solved = torch.where(square > 0, cross / square.clamp(min=1e-30), kept)
        gain.copy_(solved)
    return tuple(solved.tolist())


@in_full_precision
def _gain_moments(call: LayerCall, fixed: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
    """[2, H]: scaled . wanted, and scaled . scaled."""
    inputs = call.inputs
    scaled, wanted = inputs.shared(scaled.float()), call.product - inputs.join(fixed.float()).float()
    weights = call.weights.roots(wanted)[..., None].square()
    return torch.stack([(weights * scaled * x).sum((0, 1, 3)).double().cpu() for x in (wanted, scaled)])
