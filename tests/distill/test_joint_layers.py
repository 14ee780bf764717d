"""Distillation of layers that run their native processor: joint, single-stream, ragged, video."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flatten_diffusion import AdapterConfig, FocusedLinearConfig, linearize
from flatten_diffusion.adapter import Adapter
from flatten_diffusion.distill import CalibrationSettings, calibrate, transfer_step
from flatten_diffusion.distill.calibrate import Batch, Layer, run_programs
from flatten_diffusion.distill.capture import LayerCapture, capture_teacher
from flatten_diffusion.mixers import FocusedCalibration, Weights, count_tokens, images_of
from flatten_diffusion.mixers.focused import linear_part
from flatten_diffusion.mixers.parts.convolution import patch_moments
from flatten_diffusion.ops.windows import window_indices

from ..models.tiny import stir
from ..models.tiny_wrapped import WRAPPED, TinyWrapped, build_wrapped
from .tiny import sharpen


def converted(name: str, **settings: Any) -> tuple[TinyWrapped, Adapter]:
    tiny = build_wrapped(name)
    tiny.model.requires_grad_(False)
    return tiny, linearize(tiny.model, AdapterConfig(include=tiny.include, **settings))


def watched(tiny: TinyWrapped, adapter: Adapter) -> dict[str, LayerCapture]:
    calls: dict[str, LayerCapture] = {}
    with torch.no_grad(), capture_teacher(adapter, lambda call: calls.__setitem__(call.name, call)):
        tiny()
    return calls


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("name", WRAPPED)
def test_teacher_and_student_of_every_layer(name: str, window: int) -> None:
    tiny, adapter = converted(name, window=window)
    adapter.add_deltas(("q", "out"), 2)
    stir(adapter)
    seen: list[str] = []

    def consume(call: LayerCapture) -> None:
        seen.append(call.name)
        assert call.is_mixed
        inputs, rows = call.inputs, call.student_rows()
        heads, width = inputs.query.shape[2:]
        picture = inputs.join(inputs.mix(call.mixer)).flatten(2)
        assert picture.shape == call.mixed.shape == (tiny.batch, count_tokens(tiny.grid), heads * width)
        assert rows.shape == call.rows.shape
        assert not torch.allclose(picture, call.mixed)
        if rows.shape == picture.shape:
            torch.testing.assert_close(rows, picture, rtol=1e-4, atol=1e-5)
        student = call.student()
        assert student.shape == call.output.shape and not torch.equal(student, call.output)

    with torch.no_grad():
        with adapter.disabled():
            native = tiny()
        with capture_teacher(adapter, consume):
            output = tiny()
        # The watched run is the original; Sana's layers, written by hand, are it up to rounding.
        assert torch.allclose(output, native, atol=1e-5) if name.startswith("sana") else torch.equal(output, native)
        assert set(seen) == set(adapter.layers)
        tiny()
    assert all(layer.state.idle for _, layer, _ in adapter.converted_layers())


@pytest.mark.parametrize("name", WRAPPED)
def test_transfer_reaches_every_layer_and_lowers_its_error(name: str) -> None:
    tiny, adapter = converted(name)
    adapter.add_deltas(("q", "k", "v", "out"), 2)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    first: dict[str, torch.Tensor] = {}
    for _ in range(10):
        optimizer.zero_grad()
        last = transfer_step(adapter, tiny)
        first = first or last
        optimizer.step()
    assert set(first) == set(adapter.layers)
    for layer, loss in first.items():
        assert last[layer] < 0.95 * loss or loss < 0.02, layer  # Sana's own attention is near from the start
    assert sum(last.values()) < 0.9 * sum(first.values())


@pytest.mark.parametrize(
    ("name", "window"),
    [(name, 0) for name in ("sd3", "flux", "flux2", "cogview4", "lumina2", "hunyuanvideo", "mochi", "prx")]
    + [("sd3", 3), ("hunyuanvideo", 3), ("wan", 2)],
)
def test_calibration_brings_every_layer_nearer(name: str, window: int) -> None:
    tiny, adapter = converted(name, mixer=FocusedLinearConfig(kernel_size=3), window=window)
    sharpen(tiny.model)
    with torch.no_grad(), adapter.disabled():
        native = tiny()

    def errors() -> dict[str, float]:
        left: dict[str, float] = {}

        def consume(call: LayerCapture) -> None:
            left[call.name] = float((call.student() - call.output).square().sum())

        with torch.no_grad(), capture_teacher(adapter, consume):
            tiny()
        return left

    before = errors()
    chosen = FocusedCalibration((1.0, 3.0), (0.0, 1.0))
    fits = calibrate(adapter, [lambda: tiny()[None]] * 2, CalibrationSettings(mixers=(chosen,)))
    after = errors()
    assert [fit.name for fit in fits] == adapter.layers
    for fit in fits:
        assert after[fit.name] < 0.9 * before[fit.name], fit
        assert 0 <= fit.after < fit.before, fit
        assert fit.choice is not None
    shifted = {fit.name for fit in fits if fit.choice is not None and fit.choice.mapped}
    mapped = {name for name, config in adapter.config.overrides.items() if config.feature_maps}  # type: ignore
    assert mapped == shifted  # norms and rotations stand between them and the projections
    with torch.no_grad(), adapter.disabled():
        assert torch.equal(tiny(), native)


def test_the_convolution_of_a_joint_layer_is_solved_exactly() -> None:
    """A teacher that is the student with a kernel: least squares must find that kernel, shares and frames included."""
    tiny, adapter = converted("hunyuanvideo", mixer=FocusedLinearConfig(kernel_size=3))
    stir(adapter)
    calls = watched(tiny, adapter)
    for call in calls.values():
        with torch.no_grad():
            inputs, mixer = call.inputs, call.mixer
            assert inputs.share is not None
            missing = inputs.join(inputs.mix(mixer)) - inputs.join(linear_part(inputs, 3.0, mixer.scale))
            moments = patch_moments(inputs, missing.float(), 3, Weights(torch.ones(1)))
            solution = torch.linalg.solve(moments[..., :-1], moments[..., -1:])[..., 0]
        torch.testing.assert_close(
            solution[..., :-1].flatten(0, 1).float(), mixer.conv_weight.flatten(1), rtol=1e-2, atol=1e-3
        )
        torch.testing.assert_close(solution[..., -1].flatten().float(), mixer.conv_bias, rtol=1e-2, atol=1e-3)


def fit_joins(adapter: Adapter, tiny: TinyWrapped) -> None:
    layers = [Layer(adapter, name, attn, CalibrationSettings()) for name, attn in adapter.attention_modules()]
    programs = {layer.name: layer.carried.calibrate_joins(layer) for layer in layers}
    run_programs(adapter, [Batch(tiny, Weights(torch.ones(2)))], programs, lambda tensor: tensor)


def share_errors(adapter: Adapter, tiny: TinyWrapped) -> dict[str, float]:
    """Squared error of each joint layer's product were its linear part the true softmax over the image."""
    left: dict[str, float] = {}

    def consume(call: LayerCapture) -> None:
        text = call.carried.text
        for sample, given in enumerate(call.joins if text is not None else []):
            assert given.others is not None and text is not None
            scores = torch.einsum("bnhd,bmhd->bnhm", given.query, given.key) * given.query.shape[-1] ** -0.5
            if given.context.key_mask is not None:
                scores = scores.masked_fill(~given.context.key_mask[:, None, None], -torch.inf)
            picture = torch.einsum("bnhm,bmhd->bnhd", scores.softmax(-1), given.value)
            joined = text(picture, given.query, given.key, given.context, given.others)
            wanted = call.mixed if len(joined) == len(call.mixed) else call.mixed[sample : sample + 1]
            left[call.name] = left.get(call.name, 0.0) + float((joined.flatten(2) - wanted).square().sum())

    with torch.no_grad(), capture_teacher(adapter, consume):
        tiny()
    return left


@pytest.mark.parametrize("name", ["sd3", "lumina2", "hunyuanvideo", "mochi"])
def test_shares_are_fitted_to_the_softmax(name: str) -> None:
    tiny, adapter = converted(name)
    sharpen(tiny.model)
    before = share_errors(adapter, tiny)
    fit_joins(adapter, tiny)
    after = share_errors(adapter, tiny)
    assert set(after) == {name for name, layer in adapter.layer_mixers() if layer.text is not None} != set()
    for layer, error in before.items():
        assert after[layer] < 0.9 * error, layer


def mass_errors(adapter: Adapter, tiny: TinyWrapped) -> dict[str, float]:
    """Squared error of each layer's product with windows were its linear part the softmax over all keys beyond."""
    left: dict[str, float] = {}

    def consume(call: LayerCapture) -> None:
        for sample, given in enumerate(call.joins):
            query, key, value, context, others = given
            window, text = call.carried.window, call.carried.text
            assert window is not None and context.grid is not None
            indices = window_indices(images_of(context.grid), window.size, key.device)
            near = (indices[:, None] == indices)[:, None]
            scores = torch.einsum("bnhd,bmhd->bnhm", query, key) * context.softmax_scale(query)
            if context.key_mask is not None:
                scores = scores.masked_fill(~context.key_mask[:, None, None], -torch.inf)
            beyond = scores.masked_fill(near, -torch.inf).softmax(-1)
            beyond = torch.einsum("bnhm,bmhd->bnhd", beyond, value)
            joined, log_partition = window(beyond, query, key, value, context)
            if text is not None:
                assert others is not None
                joined = text(joined, query, key, context, others, log_partition)
            wanted = call.mixed if len(joined) == len(call.mixed) else call.mixed[sample : sample + 1]
            left[call.name] = left.get(call.name, 0.0) + float((joined.flatten(2) - wanted).square().sum())

    with torch.no_grad(), capture_teacher(adapter, consume):
        tiny()
    return left


@pytest.mark.parametrize("name", ["sd3", "lumina2", "hunyuanvideo", "mochi", "wan"])
def test_the_mass_beyond_windows_is_fitted_to_the_softmax(name: str) -> None:
    tiny, adapter = converted(name, window=3)
    sharpen(tiny.model)
    before = mass_errors(adapter, tiny)
    fit_joins(adapter, tiny)
    after = mass_errors(adapter, tiny)
    assert set(after) == set(adapter.layers)
    assert all(after[layer] < error for layer, error in before.items())
    for moved in (-0.5, 1.0):
        with torch.no_grad():
            for _, carried in adapter.layer_mixers():
                assert carried.window is not None
                carried.window.bias.add_(moved)
        assert all(error > after[layer] for layer, error in mass_errors(adapter, tiny).items())
