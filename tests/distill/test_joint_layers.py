"""Distillation of layers that run their native processor: joint, single-stream, ragged, video."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flatten_diffusion.distill.measure import Batch
from flatten_diffusion.distill.record import LayerCall, watch_teacher
from flatten_diffusion.distill.share import fit_shares

from flatten_diffusion import AdapterConfig, linearize
from flatten_diffusion.adapter import Adapter
from flatten_diffusion.distill import CalibrationSettings, calibrate, transfer_step
from flatten_diffusion.mixers import count_tokens, list_joints, pictures_of
from flatten_diffusion.ops.windows import window_indices

from ..models.tiny import stir
from ..models.tiny_wrapped import WRAPPED, TinyWrapped, build_wrapped
from .tiny import sharpen


def converted(name: str, **settings: Any) -> tuple[TinyWrapped, Adapter]:
    tiny = build_wrapped(name)
    tiny.model.requires_grad_(False)
    return tiny, linearize(tiny.model, AdapterConfig(include=tiny.include, **settings))


def watched(tiny: TinyWrapped, adapter: Adapter) -> dict[str, LayerCall]:
    calls: dict[str, LayerCall] = {}
    with torch.no_grad(), watch_teacher(adapter, lambda call: calls.__setitem__(call.name, call)):
        tiny()
    return calls


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("name", WRAPPED)
def test_teacher_and_student_of_every_layer(name: str, window: int) -> None:
    tiny, adapter = converted(name, window=window)
    adapter.add_deltas(("q", "out"), 2)
    stir(adapter)
    seen: list[str] = []

    def consume(call: LayerCall) -> None:
        seen.append(call.name)
        inputs, rows = call.mixer_inputs(), call.student_rows()
        assert inputs is not None and rows is not None
        heads, width = inputs.query.shape[2:]
        picture = inputs.join(call.mixer(*inputs.arguments())).flatten(2)
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
        with watch_teacher(adapter, consume):
            output = tiny()
        # The watched run is the original; Sana's layers, written by hand, are it up to rounding.
        assert torch.allclose(output, native, atol=1e-5) if name.startswith("sana") else torch.equal(output, native)
        assert set(seen) == set(adapter.layers)
        tiny()
    assert not any(getattr(attn, "flatten_layer").tap for _, attn in adapter.attention_modules())  # noqa: B009


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
    ("name", "settings"),
    [
        (name, {"joint": form})
        for name in ("sd3", "flux", "flux2", "cogview4", "lumina2", "hunyuanvideo", "mochi", "prx")
        for form in list_joints()
    ]
    + [("sd3", {"window": 3}), ("hunyuanvideo", {"window": 3, "joint": "gated_branches"}), ("wan", {"window": 2})],
)
def test_calibration_brings_every_layer_nearer(name: str, settings: dict[str, Any]) -> None:
    tiny, adapter = converted(name, kernel_size=3, **settings)
    sharpen(tiny.model)
    with torch.no_grad(), adapter.disabled():
        native = tiny()

    def errors() -> dict[str, float]:
        left: dict[str, float] = {}

        def consume(call: LayerCall) -> None:
            left[call.name] = float((call.student() - call.output).square().sum())

        with torch.no_grad(), watch_teacher(adapter, consume):
            tiny()
        return left

    before = errors()
    fits = calibrate(
        adapter, [lambda: tiny()[None]] * 2, CalibrationSettings(powers=(1.0, 3.0), scale_exponents=(0.0, 1.0))
    )
    after = errors()
    assert [fit.name for fit in fits] == adapter.layers
    for fit in fits:
        assert after[fit.name] < 0.9 * before[fit.name], fit
        assert 0 <= fit.after < fit.before, fit
        assert fit.choice is not None
    shifted = {fit.name for fit in fits if fit.choice is not None and fit.choice.mapped}
    assert set(adapter.config.feature_maps) == shifted  # norms and rotations stand between them and the projections
    with torch.no_grad(), adapter.disabled():
        assert torch.equal(tiny(), native)


def test_the_convolution_of_a_joint_layer_is_solved_exactly() -> None:
    """A teacher that is the student with a kernel: least squares must find that kernel, shares and frames included."""
    from flatten_diffusion.distill.measure import Batch, linear_part, patch_moments

    tiny, adapter = converted("hunyuanvideo", kernel_size=3)
    stir(adapter)
    calls = watched(tiny, adapter)
    for call in calls.values():
        with torch.no_grad():
            tiny()  # the readings of this picture
            inputs = call.mixer_inputs()
            assert inputs is not None and inputs.share is not None
            mixer: Any = call.mixer
            missing = inputs.join(mixer(*inputs.arguments())) - inputs.join(linear_part(inputs, 3.0, mixer.scale))
            moments = patch_moments(inputs, missing.float(), 3, Batch(tiny, torch.ones(1)))
            solution = torch.linalg.solve(moments[..., :-1], moments[..., -1:])[..., 0]
        torch.testing.assert_close(
            solution[..., :-1].flatten(0, 1).float(), mixer.conv_weight.flatten(1), rtol=1e-2, atol=1e-3
        )
        torch.testing.assert_close(solution[..., -1].flatten().float(), mixer.conv_bias, rtol=1e-2, atol=1e-3)


def share_errors(adapter: Adapter, tiny: TinyWrapped) -> dict[str, float]:
    """Squared error of each joint layer's product were its linear part the true softmax over the picture."""
    left: dict[str, float] = {}

    def consume(call: LayerCall) -> None:
        for sample, given in enumerate(call.joint_inputs()):
            scores = torch.einsum("bnhd,bmhd->bnhm", given.query, given.key) * given.query.shape[-1] ** -0.5
            if given.key_mask is not None:
                scores = scores.masked_fill(~given.key_mask[:, None, None], -torch.inf)
            picture = torch.einsum("bnhm,bmhd->bnhd", scores.softmax(-1), given.value)
            arguments = (given.query, given.key, given.text_key, given.text_value, given.key_mask, given.text_mask)
            joined = call.mixer.joint(picture, *arguments, given.scale)
            wanted = call.mixed if len(joined) == len(call.mixed) else call.mixed[sample : sample + 1]
            left[call.name] = left.get(call.name, 0.0) + float((joined.flatten(2) - wanted).square().sum())

    with torch.no_grad(), watch_teacher(adapter, consume):
        tiny()
    return left


@pytest.mark.parametrize("form", list_joints())
@pytest.mark.parametrize("name", ["sd3", "lumina2", "hunyuanvideo", "mochi"])
def test_shares_are_fitted_to_the_softmax(name: str, form: str) -> None:
    tiny, adapter = converted(name, joint=form)
    sharpen(tiny.model)
    before = share_errors(adapter, tiny)
    fit_shares(adapter, [Batch(tiny, torch.ones(2))], lambda tensor: tensor)
    after = share_errors(adapter, tiny)
    assert set(after) == {name for name, mixer in adapter.mixers() if mixer.joint is not None} != set()
    for layer, error in before.items():
        assert after[layer] < (0.9 if form == "shared_normalizer" else 1.0) * error, layer
    if form == "gated_branches":  # one number per head: least squares has no better one
        for moved in (-0.3, 0.3):
            with torch.no_grad():
                for _, mixer in adapter.mixers():
                    if mixer.joint is not None:
                        mixer.joint.bias.add_(moved)
            assert all(error > after[layer] for layer, error in share_errors(adapter, tiny).items())
            fit_shares(adapter, [Batch(tiny, torch.ones(2))], lambda tensor: tensor)


def mass_errors(adapter: Adapter, tiny: TinyWrapped) -> dict[str, float]:
    """Squared error of each layer's product with windows were its linear part the softmax over all keys beyond."""
    left: dict[str, float] = {}

    def consume(call: LayerCall) -> None:
        for sample, given in enumerate(call.joint_inputs()):
            window = call.mixer.window
            assert window is not None and given.grid is not None
            indices = window_indices(pictures_of(given.grid), window.size, given.key.device)
            near = (indices[:, None] == indices)[:, None]
            scores = torch.einsum("bnhd,bmhd->bnhm", given.query, given.key) * given.scale
            if given.key_mask is not None:
                scores = scores.masked_fill(~given.key_mask[:, None, None], -torch.inf)
            beyond = scores.masked_fill(near, -torch.inf).softmax(-1)
            beyond = torch.einsum("bnhm,bmhd->bnhd", beyond, given.value)
            picture = given.query, given.key, given.value, given.grid, given.key_mask
            joined, log_mass = window(beyond, *picture, given.scale)
            if call.mixer.joint is not None:
                text = given.text_key, given.text_value, given.key_mask, given.text_mask, given.scale
                joined = call.mixer.joint(joined, given.query, given.key, *text, log_mass)
            wanted = call.mixed if len(joined) == len(call.mixed) else call.mixed[sample : sample + 1]
            left[call.name] = left.get(call.name, 0.0) + float((joined.flatten(2) - wanted).square().sum())

    with torch.no_grad(), watch_teacher(adapter, consume):
        tiny()
    return left


@pytest.mark.parametrize("name", ["sd3", "lumina2", "hunyuanvideo", "mochi", "wan"])
def test_the_mass_beyond_windows_is_fitted_to_the_softmax(name: str) -> None:
    tiny, adapter = converted(name, window=3)
    sharpen(tiny.model)
    before = mass_errors(adapter, tiny)
    fit_shares(adapter, [Batch(tiny, torch.ones(2))], lambda tensor: tensor)
    after = mass_errors(adapter, tiny)
    assert set(after) == set(adapter.layers)
    assert all(after[layer] < error for layer, error in before.items())
    for moved in (-0.5, 1.0):
        with torch.no_grad():
            for _, mixer in adapter.mixers():
                assert mixer.window is not None
                mixer.window.bias.add_(moved)
        assert all(error > after[layer] for layer, error in mass_errors(adapter, tiny).items())
