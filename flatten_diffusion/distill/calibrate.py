"""Calibration: what is linear in a converted layer, solved in closed form from the teacher's own activations.

Without gradients, and knowing no mechanism: every layer's mixer says what it wants measured and solves for its own
parameters (`Mixer.calibrate`, `Mixer.refine`); what joins it with softmax is fitted to the softmax's own shares; the
output projection is solved for by ridge regression towards the teacher's output. Maps and output are kept as the
adapter's projection deltas; the base weights are only read. All layers advance in lockstep, so that one pass of the
teacher serves them all.

Every sample counts by how far the prediction moves when its layers err (see `weigh`): at low noise the same error in
an attention layer can cost a hundred times what it costs at high noise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils import logging

from ..adapter import Adapter
from ..mixers import Calibration, LayerMixer, ProjectionDelta, Reduce, Statistic, Weights
from ..mixers.parts.least_squares import check_finite, second_moments, solve_ridge, squared_errors
from ..models import MIXER, WrappedProcessor, find_projection
from .capture import LayerCapture, capture_teacher

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class CalibrationSettings:
    """What calibration does.

    Attributes:
        selection_batches: batches that choices between candidates look at; the solutions use all.
        rounds: how often the mixers' `refine` and the output are solved for, in turn.
        ridge: weight of the output's penalty, relative to the features' mean square.
        mixers: settings of mechanisms, such as `FocusedCalibration`; those without one use their defaults.
    """

    selection_batches: int = 3
    rounds: int = 3
    ridge: float = 1e-4
    mixers: tuple[Any, ...] = ()


@dataclass(frozen=True)
class LayerFit:
    """How much of the teacher's attention output one layer misses, as a share of its variance, before and after; and
    what its mixer chose."""

    name: str
    choice: Any
    before: float
    after: float


@dataclass(frozen=True)
class Batch:
    """One forward pass, and what its samples count."""

    run: Callable[[], torch.Tensor]
    weights: Weights


def calibrate(
    adapter: Adapter,
    run_model: Iterable[Callable[[], torch.Tensor]],
    settings: CalibrationSettings | None = None,
    reduce: Reduce = lambda tensor: tensor,
    held_out: Iterable[Callable[[], torch.Tensor]] = (),
) -> list[LayerFit]:
    """Solve for every converted layer of `adapter`, in place.

    Args:
        adapter: of the model to calibrate; it gets an "out" delta, and "q" and "k" deltas where they help, of the rank
            that its config says.
        run_model: forward passes of the model, one per batch, each giving the prediction [B, ...]; called several
            times, with the adapter enabled and disabled.
        settings: see `CalibrationSettings`.
        reduce: sums over processes, each of which runs its own batches.
        held_out: forward passes of other samples. A layer whose solution misses more of the teacher there than it did
            before (too few samples, say) is put back as it was, with a warning.

    Returns:
        One row per layer that ran its mixer.

    Raises:
        ValueError: no batches, or activations that are not finite (named by layer).
    """
    settings = settings or CalibrationSettings()
    runs = list(run_model)
    if not runs:
        raise ValueError("Calibration needs at least one batch.")
    batches = weigh(adapter, runs, reduce)
    adapter.add_deltas(("out",), adapter.config.delta_rank)
    layers = [Layer(adapter, name, attn, settings) for name, attn in adapter.attention_modules()]
    programs = {layer.name: _program(layer, settings) for layer in layers}
    judges = list(held_out)
    start = {layer.name: copy.deepcopy(layer.carried) for layer in layers} if judges else {}
    before = _errors(adapter, judges, reduce)
    fits = run_programs(adapter, batches, programs, reduce)
    after = _errors(adapter, judges, reduce)
    worse = [name for name in before if name in fits and after[name] > before[name]]
    for name in worse:
        setattr(adapter.model.get_submodule(name), MIXER, start[name])
        fits[name] = replace(fits[name], choice="as it was", after=fits[name].before)
    if worse:
        adapter.add_deltas((), adapter.config.delta_rank)  # what others got, adding nothing
        logger.warning(
            f"Calibration would leave {len(worse)} of {len(fits)} layers farther from the original on held-out data "
            f"({worse[0]}, ...): they stay as they were. More calibration batches help."
        )
    return [fits[name] for name in adapter.layers if name in fits]


def _errors(adapter: Adapter, runs: Sequence[Callable[[], torch.Tensor]], reduce: Reduce) -> dict[str, float]:
    """What each layer misses of the teacher in these passes, as a share of the variance."""
    sums: dict[str, torch.Tensor] = {}

    def consume(call: LayerCapture) -> None:
        if call.is_mixed:
            sums[call.name] = sums.get(call.name, 0) + output_error(call)

    for run in runs:
        with torch.no_grad(), capture_teacher(adapter, consume):
            run()
    return {name: share_missed(reduce(error)) for name, error in sums.items()}


def run_programs(
    adapter: Adapter, batches: Sequence[Batch], programs: Mapping[str, Calibration], reduce: Reduce
) -> dict[str, Any]:
    """Run every layer's calibration to its end, all in lockstep: each pass of the teacher measures what each layer asks
    for next. Returns what they return; layers that stay softmax in all passes are absent."""
    results: dict[str, Any] = {}
    pending: dict[str, Statistic] = {}

    def advance(name: str, sums: tuple[torch.Tensor, ...] | None) -> None:
        try:
            with torch.no_grad():
                pending[name] = programs[name].send(sums)  # type: ignore[arg-type]
        except StopIteration as end:
            pending.pop(name, None)
            results[name] = end.value

    for name in programs:
        advance(name, None)
    while pending:
        totals = _measure(adapter, batches, pending, reduce)
        for name in list(pending):
            if name in totals:
                advance(name, totals[name])
            else:
                programs[name].close()
                del pending[name]
    return results


def _measure(
    adapter: Adapter, batches: Sequence[Batch], statistics: Mapping[str, Statistic], reduce: Reduce
) -> dict[str, tuple[torch.Tensor, ...]]:
    """The sums of what each layer asks for; without layers that stay softmax."""
    sums: dict[str, tuple[torch.Tensor, ...]] = {}
    wanted = {name: range(len(batches))[statistic.batches] for name, statistic in statistics.items()}
    for index, batch in enumerate(batches):
        asking = {name for name, indices in wanted.items() if index in indices}

        def consume(call: LayerCapture, asking: set[str] = asking) -> None:
            if call.name in asking and call.is_mixed:
                measured = statistics[call.name].measure(call)
                measured = measured if isinstance(measured, tuple) else (measured,)
                before = sums.get(call.name)
                sums[call.name] = measured if before is None else tuple(map(torch.add, before, measured))

        if asking:
            with torch.no_grad(), capture_teacher(adapter, consume, batch.weights):
                batch.run()
    return {name: tuple(reduce(part) for part in sums[name]) for name in statistics if name in sums}


def _program(layer: Layer, settings: CalibrationSettings) -> Generator[Statistic, Any, LayerFit]:
    """All that one layer solves for, in order."""
    mixer = layer.carried.mixer
    own = next((given for given in settings.mixers if isinstance(given, mixer.CalibrationSettings)), None)
    yield from layer.carried.calibrate_joins(layer)
    (error,) = yield Statistic(output_error, layer.selection)
    choice = yield from mixer.calibrate(layer, own)
    before = after = share_missed(error)
    for _ in range(settings.rounds):
        yield from mixer.refine(layer, own)
        after = yield from _solve_output(layer, settings.ridge)
    return LayerFit(layer.name, choice, before, after)


def _solve_output(layer: Layer, ridge: float) -> Generator[Statistic, Any, float]:
    """The output delta: ridge regression from the mixer's output to what the projection still misses. Returns the share
    of the variance that is left."""
    delta = layer.carried.deltas["out"] if "out" in layer.carried.deltas else None

    def measure(call: LayerCapture) -> tuple[torch.Tensor, ...]:
        rows = call.student_rows()
        if delta is None:
            return (output_error(call),)
        missing = call.project(call.rows.float() - rows.float())
        moments = second_moments(rows.flatten(0, 1), missing.flatten(0, 1), call.weights.token_roots(rows))
        return output_error(call), moments

    error, *rest = yield Statistic(measure)
    if delta is None:
        return share_missed(error)
    (moments,) = rest
    assert isinstance(delta, ProjectionDelta)
    check_finite(layer.name, moments)
    features = delta.matrix().shape[1]
    solution = solve_ridge(moments, features, ridge)  # [out, in + 1], the last column the bias
    delta.assign(solution[:, :-1].float(), solution[:, -1].float(), moments[:features, :features])
    return float(squared_errors(moments, solution) / error[1])


class Layer:
    """What surrounds a layer's mixer, see `mixers.CalibratedLayer`."""

    def __init__(self, adapter: Adapter, name: str, attn: Any, settings: CalibrationSettings) -> None:
        self.adapter, self.name, self.attn = adapter, name, attn
        self.selection = slice(0, settings.selection_batches)

    @property
    def carried(self) -> LayerMixer:
        """What the layer carries."""
        carried: LayerMixer = getattr(self.attn, MIXER)
        return carried

    @property
    def head_weights(self) -> torch.Tensor:
        """[H]: the mean square that the output projection makes of a head's errors."""
        heads, projection = self.carried.mixer.layer.heads, find_projection(self.attn, "out")
        if projection is None:
            return torch.ones(heads)
        return projection.weight(self.attn).float().square().sum(0).reshape(heads, -1).mean(1).cpu()

    @property
    def can_fold(self) -> bool:
        """Whether query and key projections can carry a map: no norm between, ordinary weights.

        Wrapped layers may rotate between; the text of joint ones reads the same keys through softmax, as windows do.
        """
        attn = self.attn
        if isinstance(attn.processor, WrappedProcessor) or self.carried.window is not None:
            return False
        plain = all(self._base(name).weight.is_floating_point() for name in ("q", "k"))
        return plain and attn.norm_q is None and attn.norm_k is None

    @property
    def full_rank(self) -> bool:
        """Whether deltas are full matrices."""
        return self.adapter.config.delta_rank is None

    @torch.no_grad()
    def fold(self, query_map: tuple[torch.Tensor, torch.Tensor], key_map: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Make the "q" and "k" deltas such that projection plus delta gives what it gave before, mapped."""
        self.adapter.add_deltas(("q", "k"), self.adapter.config.delta_rank)
        for name, (matrix, shift) in (("q", query_map), ("k", key_map)):
            base, delta = self._base(name), self.carried.deltas[name]
            assert isinstance(delta, ProjectionDelta)
            weight = base.weight.float()
            matrix, shift = matrix.to(weight.device), shift.to(weight.device)
            bias = torch.zeros_like(weight[:, 0]) if base.bias is None else base.bias.float()
            present, present_bias = weight + delta.matrix().float(), bias + delta.bias.float()
            heads, head_dim = matrix.shape[:2]
            mapped = torch.einsum("hdc,hde->hec", present.unflatten(0, (heads, head_dim)), matrix).flatten(0, 1)
            mapped_bias = torch.einsum("hd,hde->he", present_bias.unflatten(0, (heads, head_dim)), matrix) + shift
            delta.assign(mapped - weight, mapped_bias.flatten() - bias)

    def _base(self, name: str) -> Any:
        projection = find_projection(self.attn, name)
        assert projection is not None, "an image layer has its own query and key projections"
        return projection.base(self.attn)


@torch.no_grad()
def weigh(adapter: Adapter, runs: Sequence[Callable[[], torch.Tensor]], reduce: Reduce) -> list[Batch]:
    """Per sample, the squared change of the prediction by the squared errors of the layers; 1 on average."""
    ratios: list[torch.Tensor] = []
    for run in runs:
        errors: list[torch.Tensor] = []

        def consume(call: LayerCapture, errors: list[torch.Tensor] = errors) -> None:
            if call.is_mixed:
                missing = call.project(call.rows.float() - call.student_rows().float())
                errors.append(missing.square().flatten(1).sum(1).double().cpu())

        with capture_teacher(adapter, consume):
            wanted = run()
        moved = (run().float() - wanted.float()).square().flatten(1).sum(1).double().cpu()
        fitting = [error.reshape(len(moved), -1).sum(1) for error in errors if len(error) % len(moved) == 0]
        missed = torch.stack(fitting).sum(0) if fitting else torch.ones_like(moved)
        ratio = moved / missed
        # A prediction that did not move, or half precision that ran over, says nothing.
        ratios.append(torch.where(ratio.isfinite() & (ratio > 0), ratio, torch.nan))
    said = torch.cat(ratios).nan_to_num(0.0)
    total = reduce(torch.stack([said.sum(), (said > 0).sum().double()]))
    mean = total[0] / total[1].clamp(min=1)
    return [Batch(run, Weights((r / mean).nan_to_num(1.0).float())) for run, r in zip(runs, ratios, strict=True)]


def output_error(call: LayerCapture) -> torch.Tensor:
    """[2]: squared error of the projected output, and the variance of the teacher's, summed."""
    student = call.student_rows()
    roots = call.weights.roots(student)
    wanted = call.project(call.rows)
    error = (call.project(call.rows.float() - student.float()) * roots).square().sum()
    spread = ((wanted - wanted.mean((0, 1), keepdim=True)) * roots).square().sum()
    return torch.stack([error, spread]).double().cpu()


def share_missed(error: torch.Tensor) -> float:
    """The error of `output_error`'s sums as a share of the variance."""
    return float(error[0] / error[1])
