from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flatten_diffusion import AdapterConfig, FocusedLinearConfig, linearize, load_adapter, restore
from flatten_diffusion.distill import CalibrationSettings, calibrate
from flatten_diffusion.distill.calibrate import weigh
from flatten_diffusion.distill.capture import LayerCapture, capture_teacher
from flatten_diffusion.mixers import Context, FocusedCalibration, FocusedLinearAttention, MixerInputs, Weights
from flatten_diffusion.mixers.parts.convolution import patch_moments
from flatten_diffusion.mixers.parts.least_squares import second_moments, solve_ridge, squared_errors

from ..models.tiny import Tiny, build
from .tiny import sharpen


def teacher_runs(tiny: Tiny, count: int = 4) -> list[Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)
    shape = tiny.inputs[tiny.picture].shape
    pictures = [torch.randn(shape, generator=generator) for _ in range(count)]
    return [
        lambda picture=picture: tiny(**{tiny.picture: picture}).unflatten(0, (shape[0], -1)) for picture in pictures
    ]


def even(samples: int) -> Weights:
    return Weights(torch.ones(samples))


def settings(powers: tuple[float, ...], **more: Any) -> CalibrationSettings:
    """With few paired candidates, which take most of the time."""
    own = {name: more.pop(name) for name in ("scale_exponents",) if name in more}
    mixer = FocusedCalibration(powers, **own, pair_shifts=(0.5,), rotations=1)
    return CalibrationSettings(mixers=(mixer,), **more)


def sharp(name: str) -> Tiny:
    tiny = build(name)
    sharpen(tiny.model)
    return tiny


def residuals(adapter: Any, runs: list[Callable[[], Any]]) -> dict[str, float]:
    """Squared error of the converted layers' outputs, from their calls alone."""
    sums: dict[str, float] = {}

    def consume(call: LayerCapture) -> None:
        sums[call.name] = sums.get(call.name, 0.0) + float((call.student() - call.output).square().sum())

    with torch.no_grad(), capture_teacher(adapter, consume):
        for run in runs:
            run()
    return sums


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "unet2d", "dit", "pixart"])
def test_every_layer_comes_nearer(name: str) -> None:
    tiny = sharp(name)
    base = tiny()
    runs = teacher_runs(tiny)
    adapter = linearize(tiny.model)
    before = residuals(adapter, runs)
    fits = calibrate(adapter, runs, settings(powers=(1.0, 3.0), scale_exponents=(0.0, 1.0)))
    after = residuals(adapter, runs)
    assert {fit.name for fit in fits} == set(adapter.layers)
    for fit in fits:
        assert after[fit.name] < 0.9 * before[fit.name]
        assert 0 <= fit.after < fit.before
    with adapter.disabled():
        assert torch.equal(tiny(), base)


def test_the_report_is_the_layers_own_error() -> None:
    tiny = sharp("sd15")
    runs, adapter = teacher_runs(tiny), linearize(tiny.model)
    weights = [batch.weights.samples for batch in weigh(adapter, runs, lambda tensor: tensor)]

    def shares() -> dict[str, float]:
        sums: dict[str, torch.Tensor] = {}

        def consume(call: LayerCapture, weights: torch.Tensor) -> None:
            error = (call.student() - call.output).square().flatten(1).sum(1)
            spread = (call.output - call.output.mean((0, 1))).square().flatten(1).sum(1)
            sums[call.name] = sums.get(call.name, 0) + torch.stack([error @ weights, spread @ weights])

        for run, weight in zip(runs, weights, strict=True):
            with torch.no_grad(), capture_teacher(adapter, partial(consume, weights=weight)):
                run()
        return {name: float(error / spread) for name, (error, spread) in sums.items()}

    before = shares()
    fits = calibrate(adapter, runs, settings((1.0, 2.0), selection_batches=len(runs)))
    after = shares()
    for fit in fits:
        assert fit.before == pytest.approx(before[fit.name], rel=1e-4)
        assert fit.after == pytest.approx(after[fit.name], rel=1e-3)


def test_samples_count_by_what_their_errors_do_to_the_prediction() -> None:
    tiny = sharp("sd15")
    runs, adapter = teacher_runs(tiny), linearize(tiny.model)
    layers: list[torch.Tensor] = []

    def consume(call: LayerCapture) -> None:
        layers.append((call.student() - call.output).square().flatten(1).sum(1))

    ratios = []
    with torch.no_grad():
        for run in runs:
            layers.clear()
            with capture_teacher(adapter, consume):
                teacher = run()
            ratios.append((run() - teacher).square().flatten(1).sum(1) / sum(layers))
    expected = torch.cat(ratios) / torch.cat(ratios).mean()
    found = torch.cat([batch.weights.samples for batch in weigh(adapter, runs, lambda tensor: tensor)])
    assert torch.allclose(found, expected, rtol=1e-3)
    assert found.std() > 0.01


def moments_of(features: torch.Tensor, targets: torch.Tensor, weights: Weights) -> torch.Tensor:
    return second_moments(features.flatten(0, 1), targets.flatten(0, 1), weights.token_roots(features))


def test_a_sample_that_counts_twice_is_a_sample_seen_twice() -> None:
    generator = torch.Generator().manual_seed(3)
    features, targets = torch.randn(2, 20, 4, generator=generator), torch.randn(2, 20, 3, generator=generator)
    weighted = moments_of(features, targets, Weights(torch.tensor([2.0, 1.0])))
    repeated = moments_of(features[[0, 0, 1]], targets[[0, 0, 1]], even(3))
    assert torch.allclose(weighted, repeated, rtol=1e-5)
    value, missing = torch.randn(2, 15, 2, 3, generator=generator), torch.randn(2, 15, 2, 3, generator=generator)

    def equations(samples: list[int], weights: Weights) -> torch.Tensor:
        chosen = value[samples]
        return patch_moments(MixerInputs(chosen, chosen, chosen, Context((3, 5))), missing[samples], 3, weights)

    twice = Weights(torch.tensor([2.0, 1.0]))
    assert torch.allclose(equations([0, 1], twice), equations([0, 0, 1], even(3)), rtol=1e-5, atol=1e-5)


def test_a_prediction_that_does_not_move_counts_as_one() -> None:
    tiny = sharp("sd15")
    runs, adapter = teacher_runs(tiny, 2), linearize(tiny.model)
    still = [*runs, lambda: (tiny(), torch.zeros(1, 5))[1]]
    weights = [batch.weights.samples for batch in weigh(adapter, still, lambda tensor: tensor)]
    assert torch.equal(weights[2], torch.ones(1)) and torch.isfinite(torch.cat(weights)).all()


def test_kernel_equations_are_least_squares() -> None:
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(2, 15, 2, 3, generator=generator)
    kernel, bias = torch.randn(6, 1, 3, 3, generator=generator), torch.randn(6, generator=generator)
    images = value.permute(0, 2, 3, 1).reshape(2, 6, 3, 5)
    convolved = F.conv2d(images, kernel, bias, padding=1, groups=6)
    missing = convolved.reshape(2, 2, 3, 15).permute(0, 3, 1, 2)
    moments = patch_moments(MixerInputs(value, value, value, Context((3, 5))), missing, 3, even(2))
    solution = torch.linalg.solve(moments[..., :-1], moments[..., -1:])[..., 0]
    assert torch.allclose(solution[..., :-1].reshape(6, 1, 3, 3), kernel.double(), atol=1e-4)
    assert torch.allclose(solution[..., -1].flatten(), bias.double(), atol=1e-4)


def test_moments_are_ridge_regression() -> None:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    targets = torch.randn(50, 3, generator=generator, dtype=torch.float64) + 2
    moments = moments_of(features[None, :20], targets[None, :20], even(1))
    moments = moments + moments_of(features[None, 20:], targets[None, 20:], even(1))
    design = torch.cat([features, torch.ones(50, 1, dtype=torch.float64)], dim=1)
    plain = torch.linalg.lstsq(design, targets).solution
    assert torch.allclose(solve_ridge(moments, 4, 0.0).T, plain, atol=1e-5)
    left = float((design @ plain - targets).square().sum())
    assert float(squared_errors(moments, plain.T)) == pytest.approx(left, rel=1e-5)
    penalty = (0.1 * features.square().sum(0).mean()).sqrt() * torch.eye(4, 5, dtype=torch.float64)
    augmented = torch.linalg.lstsq(torch.cat([design, penalty]), F.pad(targets, (0, 0, 0, 4))).solution
    assert torch.allclose(solve_ridge(moments, 4, 0.1).T, augmented, atol=1e-5)


def test_processes_together_solve_what_one_would() -> None:
    alone, shared = sharp("sd15"), sharp("sd15")
    chosen = settings(powers=(3.0,), scale_exponents=(1.0,), selection_batches=4)
    whole = linearize(alone.model)
    calibrate(whole, teacher_runs(alone), chosen)
    half = linearize(shared.model)
    runs = teacher_runs(shared)
    # Both processes see the same two batches, so a sum over two is twice what one has.
    calibrate(half, runs, chosen, reduce=lambda tensor: tensor * 2)
    for (name, one), (_, other) in zip(whole.named_parameters(), half.named_parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4), name


def test_choices_and_deltas_are_saved(tmp_path: Path) -> None:
    tiny = sharp("sd15")
    adapter = linearize(tiny.model)
    calibrate(adapter, teacher_runs(tiny), settings(powers=(1.0, 2.0)))
    expected = tiny()
    adapter.save_pretrained(tmp_path)
    chosen = dict(adapter.config.overrides)
    assert set(chosen) == set(adapter.layers)  # no candidate is the config's own factor of 3
    restore(tiny.model)
    again = load_adapter(tiny.model, tmp_path)
    assert again.config.overrides == chosen
    assert torch.equal(tiny(), expected)


def test_a_low_rank_output_delta() -> None:
    errors = {}
    for rank in (None, 1, 4):
        tiny = sharp("sd15")
        adapter = linearize(tiny.model)
        adapter.add_deltas(("out",), rank)
        runs = teacher_runs(tiny)
        before = residuals(adapter, runs)
        calibrate(adapter, runs, settings(powers=(3.0,)))
        after = residuals(adapter, runs)
        errors[rank] = sum(after[name] for name in after)
        assert errors[rank] < sum(before.values())
    assert errors[None] <= errors[4] * 1.001 <= errors[1] * 1.002


def test_without_convolution_only_the_rest_is_solved() -> None:
    tiny = sharp("sd15")
    adapter = linearize(tiny.model, AdapterConfig(mixer=FocusedLinearConfig(kernel_size=0)))
    runs = teacher_runs(tiny)
    before = residuals(adapter, runs)
    calibrate(adapter, runs)
    after = residuals(adapter, runs)
    assert all(after[name] < before[name] for name in before)
    assert all(isinstance(mixer, FocusedLinearAttention) and mixer.conv_weight is None for _, mixer in adapter.mixers())


def test_no_batches_and_broken_activations() -> None:
    tiny = sharp("sd15")
    adapter = linearize(tiny.model)
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(adapter, [])
    bad = torch.full_like(tiny.inputs["sample"], float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        calibrate(adapter, [lambda: tiny(sample=bad)[None]])


def test_autocast_does_not_reach_the_equations() -> None:
    generator = torch.Generator().manual_seed(4)
    features, targets = torch.randn(1, 300, 6, generator=generator), torch.randn(1, 300, 2, generator=generator)
    value, missing = torch.randn(1, 15, 2, 3, generator=generator), torch.randn(1, 15, 2, 3, generator=generator)

    def solve() -> tuple[torch.Tensor, torch.Tensor]:
        return moments_of(features, targets, even(1)), patch_moments(
            MixerInputs(value, value, value, Context((3, 5))), missing, 3, even(1)
        )

    expected = solve()
    with torch.autocast("cpu", torch.bfloat16):
        found = solve()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_layers_that_come_out_worse_on_held_out_samples_stay_as_they_were(caplog: pytest.LogCaptureFixture) -> None:
    tiny = sharp("sd15")
    runs = teacher_runs(tiny, 3)
    adapter = linearize(tiny.model)
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    # A judge that was never like the samples: constant images, far from noise.
    flat = torch.full(tiny.inputs[tiny.picture].shape, 30.0)
    judge = [lambda: tiny(**{tiny.picture: flat})]
    fits = calibrate(adapter, runs[:1], held_out=judge)
    kept = {fit.name for fit in fits if fit.choice == "as it was"}
    after = adapter.state_dict()
    for name in adapter.layers:
        same = all(torch.equal(before[key], after[key]) for key in before if key.startswith(f"{name}."))
        assert same == (name in kept)
    assert kept and all(fit.after == fit.before for fit in fits if fit.name in kept)
    assert len({frozenset(mixer.deltas) for _, mixer in adapter.layer_mixers()}) == 1
    assert "stay as they were" in caplog.text
