"""Calibration's choice of each layer's focusing power, scale and query and key maps, and their installation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..adapter import Adapter
from ..mixers import FeatureMap, FocusedLinearAttention, ProjectionDelta
from ..models import MIXER, find_projection
from .maps import MapChoice, Maps, QueryKeyMoments, apply_maps, can_shift, candidates, fold_map
from .measure import (
    Batch,
    Reduce,
    check_finite,
    frames_of,
    in_full_precision,
    linear_part,
    output_error,
    second_moments,
    share_missed,
    shared_part,
    solve_ridge,
    squared_errors,
    watch,
)
from .record import LayerCall, MixerInputs


@dataclass(frozen=True)
class ChoiceSettings:
    """What `choose_maps` chooses from.

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


@dataclass(frozen=True)
class LayerChoice:
    """What one layer gets: a focusing power and a scale exponent for all of it, and a map for each head."""

    power: float
    scale_exponent: float
    heads: tuple[MapChoice, ...]

    @property
    def mapped(self) -> bool:
        """Whether query and key are mapped at all."""
        return any(choice.shift for choice in self.heads)

    def __str__(self) -> str:
        kinds = Counter(
            "paired" if choice.paired else "shifted" if choice.shift else "inherited" for choice in self.heads
        )
        maps = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        return f"power {self.power:g}, scale exponent {self.scale_exponent:g}, heads: {maps}"


class _Candidates:
    """The candidates of one layer, scored head by head: what a head's linear part and its values leave of its product.

    Heads are judged alone, in units of what their errors weigh in the layer's output.
    """

    def __init__(self, choices: Sequence[MapChoice], moments: QueryKeyMoments, weights: torch.Tensor) -> None:
        self.choices, self.moments, self.weights = choices, moments, weights
        self.features = 0
        self.second: torch.Tensor | None = None  # [choices, H, ...], see `second_moments`

    @in_full_precision
    def add(self, inputs: MixerInputs, product: torch.Tensor, batch: Batch) -> None:
        """product: the teacher's [B, N, H, D]."""
        local = [shared_part(inputs, feature) for feature in _local_features(inputs)]
        wanted = _by_head(product if inputs.rest is None else product - inputs.rest)
        roots = batch.token_roots(product)
        sums = []
        for choice in self.choices:
            query, key = apply_maps(inputs, self.moments.linear_maps([choice] * len(self.weights)))
            scale = self.moments.scale(choice.scale_exponent).to(query.device)
            linear = linear_part(replace(inputs, query=query, key=key), choice.power, scale)
            features = _by_head(torch.cat([shared_part(inputs, linear), *local], dim=-1))
            self.features = features.shape[-1]
            sums.append(second_moments(features, wanted, roots))
        second = torch.stack(sums)
        self.second = second if self.second is None else self.second + second

    def best(self, ridge: float, reduce: Reduce) -> LayerChoice:
        """The power and scale with which the heads, each at its best, leave least together."""
        assert self.second is not None
        second = reduce(self.second)
        left = squared_errors(second, solve_ridge(second, self.features, ridge)) * self.weights.double()
        layers: dict[tuple[float, float], list[int]] = {}
        for index, choice in enumerate(self.choices):
            layers.setdefault((choice.power, choice.scale_exponent), []).append(index)
        (power, exponent), members = min(layers.items(), key=lambda item: float(left[item[1]].amin(0).sum()))
        heads = (self.choices[members[int(row)]] for row in left[members].argmin(0))
        return LayerChoice(power, exponent, tuple(heads))


def _by_head(tokens: torch.Tensor) -> torch.Tensor:
    """[B, N, H, D] -> [H, B N, D]."""
    return tokens.permute(2, 0, 1, 3).flatten(1, 2)


def choose_maps(
    adapter: Adapter, batches: Sequence[Batch], settings: ChoiceSettings, reduce: Reduce
) -> tuple[dict[str, LayerChoice], dict[str, float]]:
    """Give each layer the maps that leave least; returns the choices, and the residuals of the layers as they were."""
    layers: dict[str, _Candidates] = {}
    errors: dict[str, torch.Tensor] = {}

    def consume(call: LayerCall, batch: Batch) -> None:
        inputs = call.mixer_inputs()
        if inputs is None:
            return
        rows = call.student_rows()
        assert rows is not None  # it had inputs
        errors[call.name] = errors.get(call.name, 0) + output_error(call, rows, batch)
        if not isinstance(call.mixer, FocusedLinearAttention) or not settings.powers:
            return
        if call.name not in layers:
            moments = QueryKeyMoments(inputs, reduce)
            check_finite(call.name, torch.stack([moments.query, moments.key]))
            choices = _choices(adapter, call, settings)
            layers[call.name] = _Candidates(choices, moments, _head_weights(call, inputs.query.shape[2]))
        layers[call.name].add(inputs, call.mixed.float().reshape(inputs.query.shape), batch)

    watch(adapter, batches, consume)
    chosen = {name: candidates.best(settings.ridge, reduce) for name, candidates in layers.items()}
    _install_maps(adapter, chosen, {name: candidates.moments for name, candidates in layers.items()})
    return chosen, {name: share_missed(reduce(error)) for name, error in errors.items()}


def _head_weights(call: LayerCall, heads: int) -> torch.Tensor:
    """[H]: the mean square that the output projection makes of a head's errors."""
    projection = find_projection(call.attn, "out")
    if projection is None:
        return torch.ones(heads)
    return projection.weight(call.attn).float().square().sum(0).reshape(heads, -1).mean(1).cpu()


def _choices(adapter: Adapter, call: LayerCall, settings: ChoiceSettings) -> list[MapChoice]:
    # Maps that cannot be folded into projections go into the mixer, as full matrices.
    pairable = not can_shift(call.attn) or adapter.config.delta_rank is None
    return candidates(
        settings.powers,
        settings.scale_exponents,
        settings.shifts,
        settings.pair_shifts,
        settings.rotations,
        pairable=pairable,
    )


def _install_maps(adapter: Adapter, chosen: dict[str, LayerChoice], moments: dict[str, QueryKeyMoments]) -> None:
    """Power and scale into the mixer; maps of query and key into their projections' deltas where these can carry them,
    else into the mixer."""
    modules = dict(adapter.attention_modules())
    mapped = [name for name, choice in chosen.items() if choice.mapped]
    if any(can_shift(modules[name]) for name in mapped):
        adapter.add_deltas(("q", "k"), adapter.config.delta_rank)
    adapter.add_feature_maps(name for name in mapped if not can_shift(modules[name]))
    for name, choice in chosen.items():
        attn, mixer = modules[name], getattr(modules[name], MIXER)
        adapter.set_focusing_factor(name, choice.power)
        with torch.no_grad():
            mixer.log_scale.copy_(moments[name].scale(choice.scale_exponent).log())
        maps = moments[name].linear_maps(choice.heads)
        if mixer.query_map is not None and mixer.key_map is not None:
            _assign_maps(mixer.query_map, mixer.key_map, maps)
        elif choice.mapped:
            for key, matrix, shift in (("q", *maps[:2]), ("k", *maps[2:])):
                delta = mixer.deltas[key]
                assert isinstance(delta, ProjectionDelta)
                fold_map(attn, key, delta, matrix, shift)


@torch.no_grad()
def _assign_maps(query_map: FeatureMap, key_map: FeatureMap, maps: Maps) -> None:
    query_matrix, query_shift, key_matrix, key_shift = maps
    for module, matrix, shift in ((query_map, query_matrix, query_shift), (key_map, key_matrix, key_shift)):
        module.weight.copy_(matrix - torch.eye(matrix.shape[-1]))
        module.bias.copy_(shift)


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
        for frames in frames_of(value, inputs.grid)
    ]
    return [value, torch.cat(blurred, dim=1)]
