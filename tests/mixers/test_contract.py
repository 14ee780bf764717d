"""The contract of every registered mixer and its example configs: see docs/adding-a-mixer.md."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from flatten_diffusion import AdapterConfig, linearize, load_adapter
from flatten_diffusion.distill import calibrate
from flatten_diffusion.distill.capture import LayerCapture, capture_teacher
from flatten_diffusion.mixers import Context, LayerShape, Mixer, MixerConfig, create_mixer, list_mixers, mixer_config
from flatten_diffusion.mixers.base import FEATURES
from flatten_diffusion.mixers.registry import MixerNames, mixer_class

from ..distill.tiny import sharpen
from ..models.tiny import build, stir
from ..models.tiny_wrapped import build_wrapped
from .registered import CONFIGS, IDS, OWN, stirred, tensors

every_example = pytest.mark.parametrize("config", CONFIGS, ids=IDS)
every_mixer = pytest.mark.parametrize("name", sorted(OWN))

SIZES = [((7, 9), LayerShape(2, 40, 80)), ((4, 11), LayerShape(3, 6, 18)), ((1, 5), LayerShape(1, 60, 60))]


def _supporting(feature: str) -> Any:
    pairs = [(i, c) for i, c in zip(IDS, CONFIGS, strict=True) if feature in mixer_class(c.name).supports]
    return pytest.mark.parametrize("config", [c for _, c in pairs], ids=[i for i, _ in pairs])


@every_mixer
def test_it_declares_what_it_is(name: str) -> None:
    cls = OWN[name]
    assert cls.examples and all(type(config) is cls.Config for config in cls.examples)
    assert cls.summary and cls.source and cls.supports <= FEATURES
    assert f"{name} " in str(MixerNames([name])) and name in list_mixers()
    assert cls.Config().name == name


@every_example
def test_its_config_goes_to_json_types_and_back(config: MixerConfig) -> None:
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert mixer_config(config.to_dict()) == config and hash(mixer_config(config.to_dict())) == hash(config)
    with pytest.raises(ValueError, match=f"Unknown setting 'nothing' of mixer {config.name}"):
        mixer_config({**config.to_dict(), "nothing": 1})
    assert mixer_config(config.timed().to_dict()).name == config.name


@every_example
@pytest.mark.parametrize(("grid", "shape"), SIZES)
def test_it_is_its_reference(config: MixerConfig, grid: tuple[int, int], shape: LayerShape) -> None:
    mixer = stirred(config, shape)
    query, key, value, context = tensors(grid, shape)
    context = context._replace(scale=0.3)
    inputs = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    weight = torch.randn(query.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = []
    for compute in (mixer, mixer.reference):
        mixed = compute(*inputs, context)
        assert mixed.output.shape == query.shape and mixed.output.dtype == query.dtype
        assert (mixed.log_partition is not None) == mixer.exact_partition
        loss = (mixed.output * weight).sum()
        if mixed.log_partition is not None:
            loss = loss + (mixed.log_partition * weight[..., 0]).sum()
        grads = torch.autograd.grad(loss, [*inputs, *mixer.parameters()], allow_unused=True)
        found.append([mixed.output, mixed.log_partition, *grads])
    for ours, expected in zip(*found, strict=True):
        if ours is None or expected is None:
            assert ours is expected
            continue
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@every_example
def test_a_gradient_reaches_every_parameter(config: MixerConfig) -> None:
    grid, shape = SIZES[0]
    mixer = create_mixer(config, shape)
    query, key, value, context = tensors(grid, shape, dtype=torch.float32)
    mixer(query.requires_grad_(), key, value, context).output.square().sum().backward()  # some have no parameters
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@every_example
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errs_at_most_twice_as_much_as_plain_torch(config: MixerConfig, dtype: torch.dtype) -> None:
    grid, shape = SIZES[0]
    mixer = stirred(config, shape)
    query, key, value, context = tensors(grid, shape, dtype=dtype)
    half = copy.deepcopy(mixer).to(dtype)
    exact = half.double()
    with torch.no_grad():
        wide = context._replace(hidden_states=context.hidden_states.double())
        expected = exact(query.double(), key.double(), value.double(), wide).output
        half = exact.to(dtype)
        ours = half(query, key, value, context)
        plain = half.reference(query, key, value, context).output
    assert ours.output.dtype == dtype and ours.output.isfinite().all()
    error, allowed = ((x.double() - expected).norm() / expected.norm() for x in (ours.output, plain))
    assert error <= 2 * allowed + torch.finfo(dtype).eps / 4, (float(error), float(allowed))


@_supporting("mask")
def test_masked_keys_are_never_read(config: MixerConfig) -> None:
    grid, shape = SIZES[1]
    mixer = stirred(config, shape)
    query, key, value, context = tensors(grid, shape)
    mask = torch.rand(key.shape[:2], generator=torch.Generator().manual_seed(5)) > 0.4
    mask[1, : key.shape[1] // 2] = False
    context = context._replace(key_mask=mask)
    poisoned = [x.masked_fill(~mask[:, :, None, None], float("nan")) for x in (key, value)]
    clean = mixer(query, key, value, context).output
    torch.testing.assert_close(mixer(query, *poisoned, context).output, clean)
    other = [x.masked_fill(~mask[:, :, None, None], 3.0) for x in (key, value)]
    torch.testing.assert_close(mixer.reference(query, *other, context).output, clean, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(clean, mixer(query, key, value, context._replace(key_mask=None)).output)


@_supporting("compile")
@pytest.mark.slow
def test_it_compiles_whole(config: MixerConfig) -> None:
    grid, shape = (4, 6), LayerShape(2, 8, 16)
    mixer = stirred(config, shape, torch.float32)
    query, key, value, context = tensors(grid, shape, dtype=torch.float32)
    torch._dynamo.reset()  # the limit of compilations counts those of the mixers before
    with torch.no_grad():
        expected = mixer(query, key, value, context).output
        compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(query, key, value, context).output, expected, rtol=1e-4, atol=1e-5)


@every_example
def test_a_fresh_one_is_the_same_every_time(config: MixerConfig) -> None:
    shape = SIZES[0][1]
    torch.manual_seed(7)
    first, state = create_mixer(config, shape, seed="a"), torch.random.get_rng_state()
    torch.manual_seed(7)
    assert torch.equal(state, torch.random.get_rng_state())  # the user's random numbers are not touched
    torch.manual_seed(8)
    again = create_mixer(config, shape, seed="a")
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), again.parameters(), strict=True))
    twin = copy.deepcopy(stirred(config, shape))
    query, key, value, context = tensors(*SIZES[0])
    assert torch.equal(
        twin(query, key, value, context).output, stirred(config, shape)(query, key, value, context).output
    )


@every_example
def test_it_lives_in_a_model(config: MixerConfig, tmp_path: Any) -> None:
    tiny, fresh = build("sd15"), build("sd15")
    with torch.no_grad():
        native = tiny()
        adapter = linearize(tiny.model, AdapterConfig(mixer=config))
        untrained = tiny()
        adapter.save_pretrained(tmp_path / "fresh")
        stir(adapter)
        converted = tiny()
        assert config.name in str(adapter.report())
        if list(adapter.parameters()):
            assert not torch.equal(converted, untrained)
        with adapter.disabled():
            assert torch.equal(tiny(), native)
            twin = copy.deepcopy(tiny.model)
        assert torch.equal(tiny(twin), converted)
        adapter.save_pretrained(tmp_path / "stirred")
        loaded = load_adapter(fresh.model, tmp_path / "stirred")
        assert torch.equal(fresh(), converted) and loaded.config == adapter.config


@every_mixer
def test_only_what_differs_from_a_fresh_one_counts_as_trained(name: str, tmp_path: Any) -> None:
    for trained in (False, True):
        adapter = linearize(
            build("sd15").model, AdapterConfig(mixer=name, min_tokens="auto", deltas=("q",), delta_rank=2)
        )
        if trained:
            stir(adapter)
        adapter.save_pretrained(tmp_path)
        loaded = load_adapter(build("sd15").model, tmp_path)
        states = [layer.auto for _, layer, _ in loaded.converted_layers()]
        assert states == [not trained] * len(states)


@every_mixer
def test_calibration_lowers_the_error_of_every_layer(name: str) -> None:
    tiny = build("sd15")
    sharpen(tiny.model)
    adapter = linearize(tiny.model, AdapterConfig(mixer=name))
    shape = tiny.inputs[tiny.picture].shape
    pictures = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    runs = [lambda p=p: tiny(**{tiny.picture: p}).unflatten(0, (shape[0], -1)) for p in pictures]

    def errors() -> dict[str, float]:
        left: dict[str, float] = {}

        def consume(call: LayerCapture) -> None:
            left[call.name] = left.get(call.name, 0.0) + float((call.student() - call.output).square().sum())

        with torch.no_grad(), capture_teacher(adapter, consume):
            for run in runs:
                run()
        return left

    before = errors()
    fits = calibrate(adapter, runs)
    after = errors()
    assert {fit.name for fit in fits} == set(adapter.layers) == set(before)
    for fit in fits:
        assert after[fit.name] < before[fit.name] and fit.after < fit.before, fit


@every_mixer
@pytest.mark.parametrize(("model", "feature"), [("wan", "frames"), ("mochi", "frames"), ("hunyuanvideo", "mask")])
def test_what_it_does_not_support_is_softmax_and_says_so(name: str, model: str, feature: str) -> None:
    tiny = build_wrapped(model)
    if model != "wan" and "text" not in mixer_class(name).supports:  # their layers hold text too
        with pytest.raises(ValueError, match=f"{name} .*other tokens"):
            linearize(tiny.model, AdapterConfig(mixer=name, include=tiny.include))
        return
    with torch.no_grad():
        native = tiny()
        adapter = linearize(tiny.model, AdapterConfig(mixer=name, include=tiny.include))
        converted = tiny()
    missing = {"frames", feature} - mixer_class(name).supports
    if missing:
        assert torch.equal(converted, native)
        reasons = [row.reason for row in adapter.report().converted]
        assert all(f"softmax in the last pass: {name} takes" in reason for reason in reasons), reasons
    else:
        assert not torch.equal(converted, native)


@every_mixer
@pytest.mark.parametrize("window", [0, 3])
def test_it_takes_text_beside_it(name: str, window: int) -> None:
    cls = mixer_class(name)
    if window and "window" not in cls.supports:
        with pytest.raises(ValueError, match=f"{name} .*windows"):
            linearize(build_wrapped("sd3").model, AdapterConfig(mixer=name, window=window))
        return
    if "text" not in cls.supports:
        with pytest.raises(ValueError, match=f"{name} .*other tokens"):
            linearize(build_wrapped("sd3").model, AdapterConfig(mixer=name, window=window))
        return
    tiny = build_wrapped("sd3")
    with torch.no_grad():
        native = tiny()
        adapter = linearize(tiny.model, AdapterConfig(mixer=name, window=window))
        stir(adapter)
        converted = tiny()
        assert converted.isfinite().all() and not torch.equal(converted, native)
        with adapter.disabled():
            assert torch.equal(tiny(), native)


@every_mixer
def test_it_is_split_over_processes_or_refused(name: str) -> None:
    adapter = linearize(build("pixart").model, AdapterConfig(mixer=name))
    if "split" in mixer_class(name).supports:
        pytest.skip("tests/adapter/test_parallel.py runs it on two processes")
    with pytest.raises(ValueError, match=f"{name} cannot be split over processes"), adapter.token_parallel():
        pass


class Alone(Mixer):
    """A mixer without parameters that supports nothing: the mean of the values."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Any:
        from flatten_diffusion.mixers import Mixed

        return Mixed(value.mean(dim=1, keepdim=True).expand_as(query))


def test_a_mixer_without_parameters_or_support(tmp_path: Any) -> None:
    from dataclasses import dataclass

    from flatten_diffusion.mixers.registry import _REGISTRY, register_mixer

    @dataclass(frozen=True)
    class AloneConfig(MixerConfig):
        pass

    Alone.Config = AloneConfig
    register_mixer("test_alone")(Alone)
    try:
        tiny = build("sd15")
        adapter = linearize(tiny.model, AdapterConfig(mixer="test_alone", min_tokens="auto"))
        tiny()
        assert "test_alone" in str(adapter.report()) and list(adapter.parameters()) == []
        adapter.save_pretrained(tmp_path)
        load_adapter(build("sd15").model, tmp_path)
        with pytest.raises(ValueError, match="test_alone"):
            linearize(build_wrapped("sd3").model, AdapterConfig(mixer="test_alone"))
        with pytest.raises(ValueError, match="taken by Alone"):
            register_mixer("test_alone")(Alone)
    finally:
        del _REGISTRY["test_alone"]
