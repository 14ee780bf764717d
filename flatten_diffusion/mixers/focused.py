"""Focused linear attention with its learned scale, depthwise convolution, and maps of query and key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ..ops import even_rows, focused_linear_attention, split_focused_linear_attention
from .base import Calibration, Context, LayerShape, Mixed, Mixer, MixerConfig
from .calibration import CalibratedLayer, LayerCall, MixerInputs, Statistic, Sums
from .grid import images_of
from .parts.convolution import convolve, frames_of, patch_moments, solve_convolution
from .parts.feature_maps import (
    FeatureMap,
    LayerChoice,
    MapChoice,
    QueryKeyMoments,
    apply_maps,
    candidates,
    query_key_sums,
)
from .parts.least_squares import check_finite, in_full_precision, second_moments, solve_ridge, squared_errors
from .registry import register_mixer

_LARGEST_FACTOR = 64.0
"""Beyond, every power of a value well below the largest is zero in float32."""
_LARGEST_KERNEL = 63


@dataclass(frozen=True)
class FocusedLinearConfig(MixerConfig):
    """Settings of `FocusedLinearAttention`.

    Args:
        focusing_factor: power of the focused map, positive, at most 64. 3 is the paper's choice; 1 leaves the map
            unfocused.
        kernel_size: side of the depthwise convolution on the token grid, odd, at most 63; 0 leaves it out, and with it
            the need for a grid.
        feature_maps: whether query and key pass learned maps inside the mixer; calibration asks for them where the
            projections cannot carry its maps (norms, rotary embeddings, joint attention).

    Raises:
        ValueError: a value out of range.
    """

    focusing_factor: float = 3.0
    kernel_size: int = 5
    feature_maps: bool = False

    def __post_init__(self) -> None:
        factor, size = self.focusing_factor, self.kernel_size
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor <= _LARGEST_FACTOR:
            raise ValueError(f"focusing_factor is {factor!r:.60}: pass a positive number, at most {_LARGEST_FACTOR:g}.")
        odd = isinstance(size, int) and not isinstance(size, bool) and (size == 0 or size % 2 == 1)
        if not odd or not 0 <= size <= _LARGEST_KERNEL:
            raise ValueError(
                f"kernel_size is {size!r:.60}: pass an odd number up to {_LARGEST_KERNEL}, or 0 for no convolution."
            )
        if not isinstance(self.feature_maps, bool):
            raise ValueError(f"feature_maps is {self.feature_maps!r:.60}: pass True or False.")
        object.__setattr__(self, "focusing_factor", float(factor))

    def timed(self) -> FocusedLinearConfig:
        """Whole powers are multiplications and cost about the same; any other needs a logarithm."""
        return replace(self, focusing_factor=3.0 if self.focusing_factor in range(1, 9) else 2.5)


@dataclass(frozen=True)
class FocusedCalibration:
    """What the calibration of `FocusedLinearAttention` chooses from.

    Attributes:
        powers: focusing factors; empty keeps each layer's maps as they are.
        scale_exponents: the scale is the channels' root mean square after the relu to this power.
        shifts: added to query and key, in units of their root mean square.
        pair_shifts: the same for paired directions; where maps are folded into projections, only if the projections'
            deltas are full matrices.
        rotations: how many rotations of paired directions are tried beside none.
        ridge: weight of the penalty in regressions, relative to the features' mean square.
    """

    powers: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0)
    scale_exponents: tuple[float, ...] = (0.0, 0.5)
    shifts: tuple[float, ...] = (0.5,)
    pair_shifts: tuple[float, ...] = (0.25, 0.5, 1.0)
    rotations: int = 5
    ridge: float = 1e-4


@register_mixer("focused_linear")
class FocusedLinearAttention(Mixer):
    """The learned part of focused linear attention for one layer.

    Parameters (all start where they change nothing):
        log_scale: [heads * head_dim], zeros. `exp(log_scale)` divides query and key inside the map: positive, and
            exactly 1 at the start in every dtype.
        conv_weight: [heads * head_dim, 1, K, K], zeros, and conv_bias: [heads * head_dim], zeros: the depthwise
            convolution of the values on the token grid. The paper's one kernel for all heads costs as much, and heads
            differ in how far they look. Absent when `kernel_size` is 0.
        query_map, key_map: see `FeatureMap`. Absent without `feature_maps`.

    Source: Han et al., "FLatten Transformer: Vision Transformer using Focused Linear Attention", ICCV 2023, eq. 5-8.
    """

    Config = FocusedLinearConfig
    CalibrationSettings = FocusedCalibration
    examples = (
        FocusedLinearConfig(),
        FocusedLinearConfig(focusing_factor=2.5, kernel_size=0),
        FocusedLinearConfig(focusing_factor=1, kernel_size=3, feature_maps=True),
    )
    summary = "relu features sharpened by a power, and a depthwise convolution of the values"
    source = "Han et al., FLatten Transformer, ICCV 2023"
    supports = frozenset({"mask", "frames", "images", "text", "window", "split", "compile"})

    def __init__(self, config: FocusedLinearConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        channels, size = layer.heads * layer.head_dim, config.kernel_size
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.conv_weight = nn.Parameter(torch.zeros(channels, 1, size, size)) if size else None
        self.conv_bias = nn.Parameter(torch.zeros(channels)) if size else None
        self.query_map = FeatureMap(layer.heads, layer.head_dim) if config.feature_maps else None
        self.key_map = FeatureMap(layer.heads, layer.head_dim) if config.feature_maps else None
        self.needs = frozenset({"grid"}) if size else frozenset()

    def add_feature_maps(self) -> None:
        """Let query and key learn a map of their own here, which changes nothing yet; kept where there is one."""
        if self.query_map is None:
            like, shape = self.log_scale, (self.layer.heads, self.layer.head_dim)
            self.query_map, self.key_map = (FeatureMap(*shape).to(like.device, like.dtype) for _ in range(2))
            self.config = replace(self.config, feature_maps=True)

    def map_features(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Query and key [B, N, H, D] behind the maps, where there are any."""
        if self.query_map is None or self.key_map is None:
            return query, key
        return self.query_map(query), self.key_map(key)

    @property
    def scale(self) -> torch.Tensor:
        """[heads * head_dim], positive, at least float32."""
        log_scale = self.log_scale
        # exp in half precision would quantise the scale far coarser than its logarithm.
        return log_scale.to(torch.promote_types(log_scale.dtype, torch.float32)).exp()

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """Attention is over all tokens; the convolution stays within each frame.

        Raises ValueError when the convolution has no grid or the grid does not fit, or where several frames or images
        are split over processes.
        """
        grid, mask = context.grid, context.key_mask
        pictures = images_of(grid) if self.conv_weight is not None and grid is not None else []
        one_frame = len(pictures) < 2 and all(frames == 1 for frames, _, _ in pictures)
        if context.group is not None:
            if not one_frame:
                raise ValueError("Tokens of several frames or images cannot be split over processes: pass one image.")
            rows = even_rows(pictures[0][1], dist.get_world_size(context.group)) if pictures else None
            return Mixed(
                split_focused_linear_attention(
                    query,
                    key,
                    value,
                    group=context.group,
                    rows=rows,
                    focusing_factor=self.config.focusing_factor,
                    scale=self.scale,
                    query_map=None if self.query_map is None else self.query_map.affine,
                    key_map=None if self.key_map is None else self.key_map.affine,
                    conv_weight=self.conv_weight,
                    conv_bias=self.conv_bias,
                    key_mask=mask,
                    backend=self.backend,
                )
            )
        mixed = focused_linear_attention(
            query,
            key,
            value,
            focusing_factor=self.config.focusing_factor,
            scale=self.scale,
            query_map=None if self.query_map is None else self.query_map.affine,
            key_map=None if self.key_map is None else self.key_map.affine,
            conv_weight=self.conv_weight if one_frame else None,
            conv_bias=self.conv_bias if one_frame else None,
            grid=pictures[0][1:] if one_frame and pictures else None,
            key_mask=mask,
            backend=self.backend,
        )
        if not one_frame and self.conv_weight is not None and grid is not None:
            mixed = mixed + convolve(value, self.conv_weight, self.conv_bias, grid, mask).to(mixed.dtype)
        return Mixed(mixed)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """The paper's formulas over all tokens, and the convolution frame by frame."""
        if context.key_mask is not None:
            key, value = (x.masked_fill(~context.key_mask[:, :, None, None], 0.0) for x in (key, value))
        query, key = self.map_features(query, key)
        mixed = focused_linear_attention(
            query,
            key,
            value,
            focusing_factor=self.config.focusing_factor,
            scale=self.scale,
            key_mask=context.key_mask,
            backend="reference",
        )
        if self.conv_weight is None:
            return Mixed(mixed)
        assert context.grid is not None, "its needs say so"
        return Mixed(mixed + convolve(value, self.conv_weight, self.conv_bias, context.grid, context.key_mask))

    def calibrate(self, layer: CalibratedLayer, settings: FocusedCalibration | None) -> Calibration:
        """The focusing power, the scale, and the query and key maps, by the residual that they leave.

        Maps go into the projections where these can carry them, else into the mixer. Returns a `LayerChoice`.
        """
        settings = settings or FocusedCalibration()
        if not settings.powers:
            return None
        first = slice(layer.selection.start, 1)
        moments = QueryKeyMoments((yield Statistic(lambda call: query_key_sums(call.inputs), first)))
        check_finite(layer.name, torch.stack([moments.query, moments.key]))
        choices = candidates(
            settings.powers,
            settings.scale_exponents,
            settings.shifts,
            settings.pair_shifts,
            settings.rotations,
            pairable=not layer.can_fold or layer.full_rank,
        )
        (second,) = yield Statistic(lambda call: _candidate_moments(call, choices, moments), layer.selection)
        choice = _best(choices, second, layer.head_weights, self.layer.head_dim, settings.ridge)
        self._install(layer, choice, moments)
        return choice

    def refine(self, layer: CalibratedLayer, settings: FocusedCalibration | None) -> Calibration:
        """The depthwise kernel and bias: least squares on what the linear part misses of the softmax."""
        if self.conv_weight is None or self.conv_bias is None:
            return
        weight, bias, ridge = self.conv_weight, self.conv_bias, (settings or FocusedCalibration()).ridge

        def measure(call: LayerCall) -> torch.Tensor:
            inputs, factor = call.inputs, self.config.focusing_factor
            mapped = inputs.with_tokens(*self.map_features(inputs.query, inputs.key))
            linear = inputs.join(linear_part(mapped, factor, self.scale))
            missing = call.target().reshape(linear.shape) - linear
            return patch_moments(inputs, missing, self.config.kernel_size, call.weights)

        (moments,) = yield Statistic(measure)
        solve_convolution(layer.name, moments, weight, bias, ridge)

    def _install(self, layer: CalibratedLayer, choice: LayerChoice, moments: QueryKeyMoments) -> None:
        """Power and scale into the mixer; maps into the projections where these can carry them, else into the mixer."""
        query_matrix, query_shift, key_matrix, key_shift = moments.linear_maps(choice)
        if choice.mapped and not layer.can_fold:
            self.add_feature_maps()
        self.config = replace(self.config, focusing_factor=choice.power)
        with torch.no_grad():
            self.log_scale.copy_(moments.scale(choice.scale_exponent).log())
        if self.query_map is not None and self.key_map is not None:
            self.query_map.assign(query_matrix, query_shift)
            self.key_map.assign(key_matrix, key_shift)
        elif choice.mapped:
            layer.fold((query_matrix, query_shift), (key_matrix, key_shift))


@in_full_precision
def linear_part(inputs: MixerInputs, power: float, scale: torch.Tensor) -> torch.Tensor:
    """The focused linear part alone, [B, N, H, D] in float32."""
    query, key, value = (x.float() for x in (inputs.query, inputs.key, inputs.value))
    return focused_linear_attention(
        query, key, value, focusing_factor=power, scale=scale.float(), key_mask=inputs.context.key_mask
    )


@in_full_precision
def _candidate_moments(call: LayerCall, choices: Sequence[MapChoice], moments: QueryKeyMoments) -> Sums:
    """[choices, H, F + 1 + D, F + 1 + D]: head by head, linear part and values against the softmax's product."""
    inputs, product = call.inputs, call.product
    local = [inputs.shared(feature) for feature in _local_features(inputs)]
    wanted = _by_head(product if inputs.rest is None else product - inputs.rest)
    roots = call.weights.token_roots(product)
    heads = inputs.query.shape[2]
    sums = []
    for choice in choices:
        query, key = apply_maps(inputs, moments.linear_maps([choice] * heads))
        scale = moments.scale(choice.scale_exponent).to(query.device)
        linear = linear_part(inputs.with_tokens(query, key), choice.power, scale)
        features = _by_head(torch.cat([inputs.shared(linear), *local], dim=-1))
        sums.append(second_moments(features, wanted, roots))
    return (torch.stack(sums),)


def _best(
    choices: Sequence[MapChoice], second: torch.Tensor, head_weights: torch.Tensor, head_dim: int, ridge: float
) -> LayerChoice:
    """The power and scale with which the heads, each at its best, leave least together.

    Heads are judged alone, in units of what their errors weigh in the layer's output.
    """
    solution = solve_ridge(second, second.shape[-1] - 1 - head_dim, ridge)
    left = squared_errors(second, solution) * head_weights.double()
    layers: dict[tuple[float, float], list[int]] = {}
    for index, choice in enumerate(choices):
        layers.setdefault((choice.power, choice.scale_exponent), []).append(index)
    _, members = min(layers.items(), key=lambda item: float(left[item[1]].amin(0).sum()))
    return LayerChoice(choices[members[int(row)]] for row in left[members].argmin(0))


def _by_head(tokens: torch.Tensor) -> torch.Tensor:
    """[B, N, H, D] -> [H, B N, D]."""
    return tokens.permute(2, 0, 1, 3).flatten(1, 2)


def _local_features(inputs: MixerInputs) -> list[torch.Tensor]:
    """Stand-ins for the convolution while maps are compared: the values, and their 3 x 3 mean, [B, N, H, D] each."""
    value = inputs.value.float()
    if inputs.context.grid is None:
        return []
    batch, _, heads, head_dim = value.shape
    blurred = [
        F.avg_pool2d(frames, 3, stride=1, padding=1)
        .reshape(-1, heads, head_dim, frames.shape[-2] * frames.shape[-1])
        .permute(0, 3, 1, 2)
        .reshape(batch, -1, heads, head_dim)
        for frames in frames_of(value, inputs.context.grid)
    ]
    return [value, torch.cat(blurred, dim=1)]
