"""Calibration: what is linear in a converted layer, solved in closed form from the teacher's own activations.

Per layer, and without gradients: the focusing power, the scale and the query and key maps (see `maps`) by the residual
that they leave; the depthwise kernel by least squares on (softmax - linear); then the output projection by ridge
regression towards the teacher's output. Maps and output are kept as the adapter's projection deltas; the base weights
are only read. Of joint layers, the same for the picture's share of their product, and how they share (see `share`).

Every sample counts by how far the prediction moves when its layers err (see `weigh`): at low noise the same error in
an attention layer can cost a hundred times what it costs at high noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..adapter import Adapter
from ..mixers import FocusedLinearAttention, ProjectionDelta
from ..models import find_projection
from .choose import ChoiceSettings, LayerChoice, choose_maps
from .measure import (
    Batch,
    Reduce,
    check_finite,
    in_full_precision,
    linear_part,
    output_error,
    patch_moments,
    project,
    second_moments,
    share_missed,
    solve_ridge,
    squared_errors,
    watch,
    weigh,
)
from .record import LayerCall, MixerInputs
from .share import fit_shares


@dataclass(frozen=True)
class CalibrationSettings(ChoiceSettings):
    """What calibration chooses from.

    Attributes, beside those of `ChoiceSettings`:
        selection_batches: batches that the choice looks at; the solutions use all.
        rounds: how often the kernel and the output are solved for, in turn.
    """

    selection_batches: int = 3
    rounds: int = 3


@dataclass(frozen=True)
class LayerFit:
    """How much of the teacher's attention output one layer misses, as a share of its variance, before and after."""

    name: str
    choice: LayerChoice | None
    before: float
    after: float


def calibrate(
    adapter: Adapter,
    run_model: Iterable[Callable[[], torch.Tensor]],
    settings: CalibrationSettings | None = None,
    reduce: Reduce = lambda tensor: tensor,
) -> list[LayerFit]:
    """Solve for every converted layer of `adapter`, in place.

    Args:
        adapter: of the model to calibrate; it gets an "out" delta, and "q" and "k" deltas where they help, of the rank
            that its config says.
        run_model: forward passes of the model, one per batch, each giving the prediction [B, ...]; called several
            times, with the adapter enabled and disabled.
        settings: see `CalibrationSettings`.
        reduce: sums over processes, each of which runs its own batches.

    Returns:
        One row per layer.

    Raises:
        ValueError: no batches, or activations that are not finite (named by layer).
    """
    settings = settings or CalibrationSettings()
    runs = list(run_model)
    if not runs:
        raise ValueError("Calibration needs at least one batch.")
    batches = weigh(adapter, runs, reduce)
    adapter.add_deltas(("out",), adapter.config.delta_rank)
    fit_shares(adapter, batches[: settings.selection_batches], reduce)
    choices, before = choose_maps(adapter, batches[: settings.selection_batches], settings, reduce)
    after: dict[str, float] = {}
    for _ in range(settings.rounds):
        _solve_convolutions(adapter, batches, settings, reduce)
        after = _solve_outputs(adapter, batches, settings, reduce)
    return [LayerFit(name, choices.get(name), before[name], after[name]) for name in adapter.layers if name in before]


def _solve_convolutions(
    adapter: Adapter, batches: Sequence[Batch], settings: CalibrationSettings, reduce: Reduce
) -> None:
    """The depthwise kernel and bias of every layer: least squares on what the linear part misses of the softmax.

    Where the output has a delta already, what is missed is taken behind it and led back through its inverse.
    """
    sums: dict[str, torch.Tensor] = {}

    def consume(call: LayerCall, batch: Batch) -> None:
        inputs, mixer = call.mixer_inputs(), call.mixer
        if inputs is None or not isinstance(mixer, FocusedLinearAttention) or mixer.conv_weight is None:
            return
        query, key = mixer.map_features(inputs.query, inputs.key)
        mapped = replace(inputs, query=query, key=key)
        linear = inputs.join(linear_part(mapped, mixer.spec.focusing_factor, mixer.scale))
        missing = _wanted_product(call, mixer, inputs).reshape(linear.shape) - linear
        sums[call.name] = sums.get(call.name, 0) + patch_moments(inputs, missing, mixer.spec.kernel_size, batch)

    watch(adapter, batches, consume)
    for name, mixer in adapter.mixers():
        if name not in sums or not isinstance(mixer, FocusedLinearAttention):
            continue
        assert mixer.conv_weight is not None and mixer.conv_bias is not None
        moments = reduce(sums[name])
        gram, cross = moments[..., :-1], moments[..., -1:]
        check_finite(name, moments)
        penalty = settings.ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        solution = torch.linalg.solve(gram + penalty * torch.eye(gram.shape[-1], dtype=gram.dtype), cross)[..., 0]
        with torch.no_grad():
            mixer.conv_weight.copy_(solution[..., :-1].reshape(mixer.conv_weight.shape))
            mixer.conv_bias.copy_(solution[..., -1].flatten())


def _wanted_product(call: LayerCall, mixer: FocusedLinearAttention, inputs: MixerInputs) -> torch.Tensor:
    """[B, N, C]: the product that behind the output delta gives the teacher's output; the teacher's own without one."""
    teacher = call.mixed.float()
    delta, projection = mixer.deltas["out"] if "out" in mixer.deltas else None, find_projection(call.attn, "out")
    if not isinstance(delta, ProjectionDelta) or projection is None or not bool(delta.matrix().any()):
        return teacher
    student = inputs.join(mixer(*inputs.arguments())).flatten(2).float()
    return _lead_back(teacher, student, projection.weight(call.attn).float(), delta)


@in_full_precision
def _lead_back(
    teacher: torch.Tensor, student: torch.Tensor, base: torch.Tensor, delta: ProjectionDelta
) -> torch.Tensor:
    """The student's product and what must be added to it: base and delta shall make of it what base makes of the
    teacher's."""
    whole = base.double() + delta.matrix().double()
    missing = F.linear(teacher, base) - F.linear(student, whole.float()) - delta.bias.float()
    # Ridge, as the projection may be nearly singular: only the residual passes it, on top of the student's product.
    square = whole @ whole.T
    eye = torch.eye(len(square), dtype=square.dtype, device=square.device)
    inverse = torch.linalg.solve(square + 1e-3 * square.diagonal().mean() * eye, whole)
    return student + missing @ inverse.float()


def _solve_outputs(
    adapter: Adapter, batches: Sequence[Batch], settings: CalibrationSettings, reduce: Reduce
) -> dict[str, float]:
    """The output delta of every layer: ridge regression from the mixer's output to what the projection still misses."""
    sums: dict[str, torch.Tensor] = {}
    errors: dict[str, torch.Tensor] = {}

    def consume(call: LayerCall, batch: Batch) -> None:
        rows = call.student_rows()
        if rows is None:
            return
        errors[call.name] = errors.get(call.name, 0) + output_error(call, rows, batch)
        if "out" in call.mixer.deltas:
            missing = project(call, call.rows.float() - rows.float())
            moments = second_moments(rows.flatten(0, 1), missing.flatten(0, 1), batch.token_roots(rows))
            sums[call.name] = sums.get(call.name, 0) + moments

    watch(adapter, batches, consume)
    total = {name: reduce(error) for name, error in errors.items()}
    left = {name: share_missed(error) for name, error in total.items()}
    for name, mixer in adapter.mixers():
        if name not in sums:
            continue
        moments, delta = reduce(sums[name]), mixer.deltas["out"]
        assert isinstance(delta, ProjectionDelta)
        check_finite(name, moments)
        features = delta.matrix().shape[1]
        solution = solve_ridge(moments, features, settings.ridge)  # [out, in + 1], the last column the bias
        delta.assign(solution[:, :-1].float(), solution[:, -1].float(), moments[:features, :features])
        left[name] = float(squared_errors(moments, solution) / total[name][1])
    return left
