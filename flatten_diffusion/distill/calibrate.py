"""Calibration: what is linear in a converted layer, solved in closed form from the teacher's own activations.

Per layer, and without gradients: the focusing power, the scale and the query and key maps (see `maps`) by the residual
that they leave; the depthwise kernel by least squares on (softmax - linear); then the output projection by ridge
regression towards the teacher's output. Maps and output are kept as the adapter's projection deltas; the base weights
are only read. Of joint layers, the same for the picture's share of their product; how they share stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils import logging

from ..adapter import Adapter
from ..mixers import FocusedLinearAttention, Grid, ProjectionDelta, pictures_of
from ..models import MIXER, find_projection
from ..ops import focused_linear_attention
from .maps import MapChoice, QueryKeyMoments, apply_maps, can_shift, candidates, fold_map
from .record import LayerCall, MixerInputs, watch_teacher

logger = logging.get_logger(__name__)

Reduce = Callable[[torch.Tensor], torch.Tensor]
"""Sum of a tensor over all processes."""


@dataclass(frozen=True)
class CalibrationSettings:
    """What calibration chooses from.

    Attributes:
        powers: focusing factors; empty keeps each layer's maps as they are.
        scale_exponents: the scale is the channels' root mean square after the relu to this power.
        shifts: added to query and key, in units of their root mean square.
        pair_shifts: the same for paired directions; only where projection deltas are full matrices.
        ridge: weight of the penalty on the output delta, relative to the features' mean square.
        selection_batches: batches that the choice looks at; the solutions use all.
    """

    powers: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0)
    scale_exponents: tuple[float, ...] = (0.0, 0.5)
    shifts: tuple[float, ...] = (0.5,)
    pair_shifts: tuple[float, ...] = (0.25, 0.5, 1.0)
    ridge: float = 1e-4
    selection_batches: int = 2


@dataclass(frozen=True)
class LayerFit:
    """How much of the teacher's attention output one layer misses, as a share of its variance, before and after."""

    name: str
    choice: MapChoice | None
    before: float
    after: float


def calibrate(
    adapter: Adapter,
    run_teacher: Iterable[Callable[[], Any]] | Sequence[Callable[[], Any]],
    settings: CalibrationSettings | None = None,
    reduce: Reduce = lambda tensor: tensor,
) -> list[LayerFit]:
    """Solve for every converted layer of `adapter`, in place.

    Args:
        adapter: of the model to calibrate; it gets an "out" delta, and "q" and "k" deltas where they help, of the rank
            that its config says.
        run_teacher: forward passes of the model, one per batch, called several times: the teacher is watched in them.
        settings: see `CalibrationSettings`.
        reduce: sums over processes, each of which runs its own batches.

    Returns:
        One row per layer.

    Raises:
        ValueError: no batches, or activations that are not finite (named by layer).
    """
    settings = settings or CalibrationSettings()
    runs = list(run_teacher)
    if not runs:
        raise ValueError("Calibration needs at least one batch.")
    adapter.add_deltas(("out",), adapter.config.delta_rank)
    choices, before = _choose_maps(adapter, runs[: settings.selection_batches], settings, reduce)
    _solve_convolutions(adapter, runs, settings, reduce)
    after = _solve_outputs(adapter, runs, settings, reduce)
    return [LayerFit(name, choices.get(name), before[name], after[name]) for name in adapter.layers if name in before]


def _watch(adapter: Adapter, runs: Sequence[Callable[[], Any]], consume: Callable[[LayerCall], None]) -> None:
    for run in runs:
        with torch.no_grad(), watch_teacher(adapter, consume):
            run()


def _choose_maps(
    adapter: Adapter, runs: Sequence[Callable[[], Any]], settings: CalibrationSettings, reduce: Reduce
) -> tuple[dict[str, MapChoice], dict[str, float]]:
    """Give each layer the map that leaves least; returns the choices, and the residuals of the layers as they were."""
    scores: dict[str, dict[MapChoice, _Moments]] = {}
    moments: dict[str, QueryKeyMoments] = {}
    errors: dict[str, torch.Tensor] = {}

    def consume(call: LayerCall) -> None:
        inputs = call.mixer_inputs()
        if inputs is None:
            return
        rows = call.student_rows()
        assert rows is not None  # it had inputs
        errors[call.name] = errors.get(call.name, 0) + _output_error(call, call.rows, rows)
        if not isinstance(call.mixer, FocusedLinearAttention) or not settings.powers:
            return
        if call.name not in moments:
            moments[call.name] = QueryKeyMoments(inputs, reduce)
            _check_finite(call.name, torch.stack([moments[call.name].query, moments[call.name].key]))
            scores[call.name] = {choice: _Moments() for choice in _choices(adapter, call, settings)}
        local = [_shared(inputs, feature).flatten(2) for feature in _local_features(inputs)]
        wanted = _project(call, call.mixed if inputs.rest is None else call.mixed - inputs.rest.flatten(2))
        for choice, score in scores[call.name].items():
            query, key = apply_maps(inputs, moments[call.name].linear_maps(choice))
            mapped = replace(inputs, query=query, key=key)
            scale = moments[call.name].scale(choice.scale_exponent).to(query.device)
            linear = _shared(inputs, _linear(mapped, choice.power, scale)).flatten(2)
            score.add(torch.cat([linear, *local], dim=-1), wanted)

    _watch(adapter, runs, consume)
    chosen = {}
    for name, by_choice in scores.items():
        left = {choice: score.reduced(reduce).residual(settings.ridge) for choice, score in by_choice.items()}
        chosen[name] = min(left, key=lambda choice: left[choice])
    _install_maps(adapter, chosen, moments)
    return chosen, {name: _share(reduce(error)) for name, error in errors.items()}


def _choices(adapter: Adapter, call: LayerCall, settings: CalibrationSettings) -> list[MapChoice]:
    shiftable = can_shift(call.attn)
    return candidates(
        settings.powers,
        settings.scale_exponents,
        settings.shifts,
        settings.pair_shifts,
        shiftable=shiftable,
        pairable=shiftable and adapter.config.delta_rank is None,
    )


def _install_maps(adapter: Adapter, chosen: dict[str, MapChoice], moments: dict[str, QueryKeyMoments]) -> None:
    """Power and scale into the mixer; maps of query and key into their deltas, which only then are added."""
    if any(choice.shift for choice in chosen.values()):
        adapter.add_deltas(("q", "k"), adapter.config.delta_rank)
    for name, attn in adapter.attention_modules():
        mixer = getattr(attn, MIXER)
        if name not in chosen or not isinstance(mixer, FocusedLinearAttention):
            continue
        choice = chosen[name]
        adapter.set_focusing_factor(name, choice.power)
        with torch.no_grad():
            mixer.log_scale.copy_(moments[name].scale(choice.scale_exponent).log())
        if not choice.shift:
            continue
        query_matrix, query_shift, key_matrix, key_shift = moments[name].linear_maps(choice)
        for key, matrix, shift in (("q", query_matrix, query_shift), ("k", key_matrix, key_shift)):
            delta = mixer.deltas[key]
            assert isinstance(delta, ProjectionDelta)
            fold_map(attn, key, delta, matrix, shift)


def _solve_convolutions(
    adapter: Adapter, runs: Sequence[Callable[[], Any]], settings: CalibrationSettings, reduce: Reduce
) -> None:
    """The depthwise kernel and bias of every layer: least squares on what the linear part misses of the softmax."""
    sums: dict[str, torch.Tensor] = {}

    def consume(call: LayerCall) -> None:
        inputs, mixer = call.mixer_inputs(), call.mixer
        if inputs is None or not isinstance(mixer, FocusedLinearAttention) or mixer.conv_weight is None:
            return
        linear = inputs.join(_linear(inputs, mixer.spec.focusing_factor, mixer.scale))
        missing = call.mixed.float().reshape(linear.shape) - linear
        sums[call.name] = sums.get(call.name, 0) + _patch_moments(inputs, missing, mixer.spec.kernel_size)

    _watch(adapter, runs, consume)
    for name, mixer in adapter.mixers():
        if name not in sums or not isinstance(mixer, FocusedLinearAttention):
            continue
        assert mixer.conv_weight is not None and mixer.conv_bias is not None
        moments = reduce(sums[name])
        gram, cross = moments[..., :-1], moments[..., -1:]
        _check_finite(name, moments)
        penalty = settings.ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        solution = torch.linalg.solve(gram + penalty * torch.eye(gram.shape[-1], dtype=gram.dtype), cross)[..., 0]
        with torch.no_grad():
            mixer.conv_weight.copy_(solution[:, :-1].reshape(mixer.conv_weight.shape))
            mixer.conv_bias.copy_(solution[:, -1])


def _solve_outputs(
    adapter: Adapter, runs: Sequence[Callable[[], Any]], settings: CalibrationSettings, reduce: Reduce
) -> dict[str, float]:
    """The output delta of every layer: ridge regression from the mixer's output to what the projection still misses."""
    sums: dict[str, _Moments] = {}
    errors: dict[str, torch.Tensor] = {}

    def consume(call: LayerCall) -> None:
        rows = call.student_rows()
        if rows is None:
            return
        errors[call.name] = errors.get(call.name, 0) + _output_error(call, call.rows, rows)
        if "out" in call.mixer.deltas:
            missing = _project(call, call.rows.float() - rows.float())
            sums.setdefault(call.name, _Moments()).add(rows, missing)

    _watch(adapter, runs, consume)
    total = {name: reduce(error) for name, error in errors.items()}
    left = {name: _share(error) for name, error in total.items()}
    for name, mixer in adapter.mixers():
        if name not in sums:
            continue
        moments = sums[name].reduced(reduce)
        _check_finite(name, moments.second)
        solution = moments.solve(settings.ridge)  # [out, in + 1], the last column the bias
        delta = mixer.deltas["out"]
        assert isinstance(delta, ProjectionDelta)
        features = moments.second[: moments.features, : moments.features]
        delta.assign(solution[:, :-1].float(), solution[:, -1].float(), features)
        left[name] = float(moments.residual_of(solution) / total[name][1])
    return left


class _Moments:
    """Second moments of features and targets, summed over tokens, in float64 on CPU: all that a regression needs.

    The features get a constant 1 behind them, which the ridge does not penalise.
    """

    def __init__(self) -> None:
        self.features = 0
        self.second = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        """features [..., F], targets [..., T], float."""
        features, targets = features.flatten(0, -2).float(), targets.flatten(0, -2).float()
        rows = torch.cat([features, features.new_ones(len(features), 1), targets], dim=-1)
        second = (rows.T @ rows).double().cpu()
        self.features = features.shape[-1]
        self.second = second if not self.second.numel() else self.second + second

    def reduced(self, reduce: Reduce) -> _Moments:
        total = _Moments()
        total.features, total.second = self.features, reduce(self.second)
        return total

    def solve(self, ridge: float) -> torch.Tensor:
        """[T, F + 1]: the regression's matrix and, in the last column, its intercept."""
        size = self.features + 1
        gram, cross = self.second[:size, :size], self.second[:size, size:]
        penalty = torch.full((size,), ridge * float(gram.diagonal()[:-1].mean()) + 1e-30, dtype=torch.float64)
        penalty[-1] = 0
        return torch.linalg.solve(gram + penalty.diag(), cross).T

    def residual_of(self, solution: torch.Tensor) -> float:
        """Sum of squared errors of a solution."""
        rows = torch.cat([-solution, torch.eye(len(solution), dtype=torch.float64)], dim=-1)
        return float((rows @ self.second * rows).sum())

    def residual(self, ridge: float) -> float:
        return self.residual_of(self.solve(ridge))


def _linear(inputs: MixerInputs, power: float, scale: torch.Tensor) -> torch.Tensor:
    """The focused linear part alone, [B, N, H, D] in float32."""
    query, key, value = (x.float() for x in (inputs.query, inputs.key, inputs.value))
    return focused_linear_attention(
        query, key, value, focusing_factor=power, scale=scale.float(), key_mask=inputs.key_mask
    )


def _shared(inputs: MixerInputs, feature: torch.Tensor) -> torch.Tensor:
    """A part of the mixer's output as it counts in the layer's product, [B, N, H, D]."""
    return feature if inputs.share is None else inputs.share.float() * feature


def _frames(tokens: torch.Tensor, grid: Grid) -> list[torch.Tensor]:
    """[B, N, H, D] -> for each picture [B * frames * H, D, height, width], in float32."""
    batch, _, heads, head_dim = tokens.shape
    pictures = pictures_of(grid)
    parts = tokens.float().split([frames * height * width for frames, height, width in pictures], dim=1)
    return [
        part.reshape(batch * frames, height * width, heads, head_dim)
        .permute(0, 2, 3, 1)
        .reshape(batch * frames * heads, head_dim, height, width)
        for part, (frames, height, width) in zip(parts, pictures, strict=True)
    ]


def _local_features(inputs: MixerInputs) -> list[torch.Tensor]:
    """Stand-ins for the convolution while maps are compared: the values, and their 3 x 3 mean, [B, N, H, D] each."""
    value = inputs.value.float()
    if inputs.grid is None:
        return []
    batch, _, heads, head_dim = value.shape
    blurred = [
        F.avg_pool2d(frames, 3, stride=1, padding=1)
        .reshape(-1, heads, head_dim, frames.shape[-2] * frames.shape[-1])
        .permute(0, 3, 1, 2)
        .reshape(batch, -1, heads, head_dim)
        for frames in _frames(value, inputs.grid)
    ]
    return [value, torch.cat(blurred, dim=1)]


def _patch_moments(inputs: MixerInputs, missing: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """[D, K * K + 1, K * K + 2] in float64: per channel, the normal equations of the kernel and bias."""
    assert inputs.grid is not None
    head_dim, taps = missing.shape[-1], kernel_size * kernel_size
    total = torch.zeros(head_dim, taps + 1, taps + 2, dtype=torch.float64)
    shares = torch.ones_like(missing[..., :1]) if inputs.share is None else inputs.share
    for values, targets, weights in zip(
        _frames(inputs.value, inputs.grid), _frames(missing, inputs.grid), _frames(shares, inputs.grid), strict=True
    ):
        for image, target, weight in zip(values.split(32), targets.split(32), weights.split(32), strict=True):
            patches = F.unfold(image, kernel_size, padding=kernel_size // 2)  # bounded by the split
            patches = patches.reshape(len(image), head_dim, taps, -1).permute(1, 2, 0, 3).flatten(2)  # [D, K K, B H N]
            patches = torch.cat([patches, patches.new_ones(head_dim, 1, patches.shape[-1])], dim=1)
            patches = patches * weight.reshape(1, 1, -1)
            wanted = target.permute(1, 0, 2, 3).reshape(head_dim, 1, -1)
            total += (patches @ torch.cat([patches, wanted], dim=1).transpose(1, 2)).double().cpu()
    return total


def _project(call: LayerCall, mixed: torch.Tensor) -> torch.Tensor:
    """The base output projection without its bias, in float32; nothing where the layer has none of its own."""
    projection = find_projection(call.attn, "out")
    return mixed.float() if projection is None else F.linear(mixed.float(), projection.weight(call.attn).float())


def _output_error(call: LayerCall, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """[2]: squared error of the projected output, and the variance of the teacher's, summed."""
    wanted = _project(call, teacher)
    error = _project(call, teacher.float() - student.float()).square().sum()
    spread = (wanted - wanted.mean((0, 1), keepdim=True)).square().sum()
    return torch.stack([error, spread]).double().cpu()


def _share(error: torch.Tensor) -> float:
    return float(error[0] / error[1])


def _check_finite(name: str, moments: torch.Tensor) -> None:
    if not moments.isfinite().all():
        raise ValueError(f"{name}: the teacher's activations are not finite: run calibration in float32 or bfloat16.")
