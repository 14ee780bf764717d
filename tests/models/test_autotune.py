"""`min_tokens="auto"`: decided per call from what was measured; here by timings made up per head size and dtype."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from flatten_diffusion import AdapterConfig, FocusedLinearAttnProcessor, linearize, load_adapter, restore
from flatten_diffusion.mixers import FocusedLinearConfig, LayerShape, WindowAttention
from flatten_diffusion.models import Kind, autotune, timing

from .tiny import build, stir


@pytest.fixture(autouse=True)
def timings(tmp_path, monkeypatch):
    """Linear meets softmax at 100 tokens in float32 and at 1000 in bfloat16; returns (tokens, dtype) of each timing."""
    monkeypatch.setenv("FLATTEN_DIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(timing, "_known", {})
    monkeypatch.setattr(autotune, "_found", {})
    done = []

    def ratio(runs_at, side, device):
        linear, softmax = runs_at(side)
        assert linear().shape == softmax().shape
        dtype = linear().dtype
        done.append((side * side, dtype))
        return (100 if dtype == torch.float32 else 1000) / (side * side)

    monkeypatch.setattr(timing, "_time_ratio", ratio)
    return done


def states(adapter):
    return (layer for _, layer, _ in adapter.converted_layers())


def halved(inputs):
    return {k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}


SMALL = {"sample": torch.randn(2, 4, 8, 8)}  # 64 and 16 tokens


def test_small_calls_are_bit_equal_and_large_ones_linear(timings):
    tiny = build("sd15")
    with torch.no_grad():
        native, native_small = tiny(), tiny(**SMALL)
        state = torch.get_rng_state()
        adapter = linearize(tiny.model, AdapterConfig(min_tokens="auto"))
        assert torch.equal(torch.get_rng_state(), state)
        count = len(timings)
        assert count > 0 and adapter.config.min_tokens == "auto"
        assert torch.equal(tiny(**SMALL), native_small)
        assert not torch.equal(tiny(), native)  # 384 tokens; 96 below it stay softmax
        assert len(timings) == count, "a call timed something"
    assert all(100 < layer.min_tokens < 160 for layer in states(adapter))
    assert "tokens (measured)" in adapter.report().converted[0].reason
    restore(tiny.model)
    assert not any(module._forward_pre_hooks for module in tiny.model.modules())
    with torch.no_grad():
        assert torch.equal(tiny(), native)


@pytest.mark.parametrize("text", [False, True])
def test_windows_are_timed_as_they_run(timings, text, monkeypatch):
    joined = []
    forward = WindowAttention.forward
    monkeypatch.setattr(WindowAttention, "forward", lambda self, *a: joined.append(self.size) or forward(self, *a))
    config, shape = FocusedLinearConfig(), LayerShape(2, 8, 16)
    found = {
        window: autotune.softmax_below_on(torch.device("cpu"), torch.float32, Kind(config, shape, text, window))
        for window in (0, 4)
    }
    assert set(joined) == {4} and all(100 < tokens < 160 for tokens in found.values())
    kept = timing.cache_file().read_text(encoding="utf-8")
    assert kept.count("windows of 4") == 1 and kept.count("text tokens") == 2 * text and len(json.loads(kept)) > 0


def test_another_dtype_is_looked_up_again(timings):
    tiny = build("sd15")
    adapter = linearize(tiny.model, AdapterConfig(min_tokens="auto"))
    with torch.no_grad():
        tiny()
        assert {dtype for _, dtype in timings} == {torch.float32}
        tiny.model.to(torch.bfloat16)
        halves = halved(tiny.inputs)
        tiny.model(**halves)
        assert all(layer.min_tokens > 1000 for layer in states(adapter))
        count = len(timings)
        tiny.model.float()
        tiny()
        assert all(layer.min_tokens < 160 for layer in states(adapter))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tiny()
        assert all(layer.min_tokens > 1000 for layer in states(adapter))
    assert len(timings) == count


def test_a_copy_decides_for_itself():
    tiny = build("sd15")
    linearize(tiny.model, AdapterConfig(min_tokens="auto"))
    twin = copy.deepcopy(tiny.model).to(torch.bfloat16)
    with torch.no_grad():
        tiny()
        twin(**halved(tiny.inputs))
    assert all(layer.min_tokens > 1000 for layer in states(twin.flatten_adapter))
    assert all(layer.min_tokens < 160 for layer in states(tiny.model.flatten_adapter))


@pytest.mark.parametrize("first", ["small", "large"])
def test_compiles_to_one_graph(first):
    torch._dynamo.reset()
    tiny = build("sd15")
    linearize(tiny.model, AdapterConfig(min_tokens="auto"))
    compiled = torch.compile(tiny.model, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        calls = [tiny.inputs | SMALL, tiny.inputs]
        for inputs in calls if first == "small" else calls[::-1]:
            expected = tiny.model(**inputs, return_dict=False)[0]
            assert torch.allclose(compiled(**inputs, return_dict=False)[0], expected, atol=1e-5)


def test_a_dtype_first_met_while_compiling_is_looked_up_in_the_graph():
    torch._dynamo.reset()
    tiny = build("pixart")
    halves = halved(tiny.inputs)
    with torch.no_grad():
        native = build("pixart").model.to(torch.bfloat16)(**halves)[0]
    adapter = linearize(tiny.model, AdapterConfig(min_tokens="auto"))
    tiny.model.to(torch.bfloat16)
    compiled = torch.compile(tiny.model, fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad():
        assert torch.allclose(compiled(**halves)[0], native, atol=1e-2)
    assert all(layer.min_tokens > 1000 for layer in states(adapter))


def test_on_the_meta_device_nothing_is_timed(timings):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(build("sd15").model.config)
    adapter = linearize(model, AdapterConfig(min_tokens="auto"))
    assert timings == [] and next(states(adapter)).min_tokens == timing.UNMEASURED_TOKENS


def test_a_model_on_the_cpu_beside_a_gpu_is_timed_where_it_runs(timings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tiny = build("sd15")
    adapter = linearize(tiny.model, AdapterConfig(min_tokens="auto"))
    assert timings == [] and next(states(adapter)).min_tokens == timing.UNMEASURED_TOKENS
    with torch.no_grad():
        tiny()
    assert timings and next(states(adapter)).min_tokens < 160


def test_inference_mode_gives_the_same(timings):
    tiny = build("sd15")
    linearize(tiny.model, AdapterConfig(min_tokens="auto"))
    with torch.inference_mode():
        inference = tiny()
    with torch.no_grad():
        assert torch.equal(tiny(), inference)
    tiny().sum().backward()  # what was made while timing is no inference tensor in the graph


# --- trained weights --------------------------------------------------------------------------------------------------


def test_a_trained_layer_stays_linear_and_the_report_says_what_that_costs(tmp_path, timings):
    tiny = build("sd15")
    adapter = linearize(tiny.model, AdapterConfig(min_tokens="auto"))
    names = adapter.layers
    with torch.no_grad():
        native_small = tiny(**SMALL)  # all softmax
        dict(adapter.mixers())[names[0]].conv_weight.add_(0.1)
    adapter.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["config"]["min_tokens"] == "auto"
    restore(tiny.model)

    adapter = load_adapter(tiny.model, tmp_path)
    modules = dict(adapter.attention_modules())
    assert modules[names[0]].flatten_layer.min_tokens == 0
    assert all(modules[name].flatten_layer.min_tokens > 100 for name in names[1:])
    with torch.no_grad():
        assert not torch.equal(tiny(**SMALL), native_small)
    rows = {row.name: row for row in adapter.report().converted}
    assert rows[names[0]].time_ratio == pytest.approx(100 / 64, rel=1e-3)
    assert "its weights are trained for it, 1.56 times softmax's time at this size" in rows[names[0]].reason
    assert rows[names[1]].time_ratio is None  # it ran softmax
    with torch.no_grad():
        tiny()
    assert {row.name: row for row in adapter.report().converted}[names[0]].time_ratio < 1
    assert "softmax's time" not in adapter.report().converted[0].reason


@pytest.mark.parametrize("setting", [0, 70, "auto"])
def test_min_tokens_given_to_load_adapter_wins(setting, tmp_path):
    tiny = build("sd15")
    adapter = linearize(tiny.model, AdapterConfig(min_tokens="auto"))
    stir(adapter)
    adapter.save_pretrained(tmp_path)
    restore(tiny.model)
    adapter = load_adapter(tiny.model, tmp_path, min_tokens=setting)
    found = {layer.min_tokens for layer in states(adapter)}
    assert adapter.config.min_tokens == setting
    assert found == {setting} if setting != "auto" else min(found) > 100


def test_a_bad_setting_is_refused_before_the_file_is_looked_for(tmp_path):
    with pytest.raises(ValueError, match="min_tokens is 'some'"):
        load_adapter(build("sd15").model, tmp_path / "nowhere", min_tokens="some")


def test_merging_needs_a_decision(tmp_path):
    adapter = linearize(build("sd15").model, AdapterConfig(min_tokens="auto", deltas=("q",)))
    for layer in states(adapter):
        layer.min_tokens = 0  # linear everywhere on this device, softmax maybe on the next
    with pytest.raises(ValueError, match="min_tokens"):
        adapter.merge()


# --- the bare processor -----------------------------------------------------------------------------------------------


def attention():
    torch.manual_seed(0)
    return Attention(query_dim=24, heads=3, dim_head=8).requires_grad_(False)


def test_the_processor_decides_by_the_size_of_the_call(timings, caplog):
    attn, small, large = attention(), torch.randn(2, 64, 24), torch.randn(2, 400, 24)
    native = attn(small), attn(large)
    attn.set_processor(FocusedLinearAttnProcessor(min_tokens="auto"))
    assert timings == []
    with caplog.at_level(logging.INFO):
        assert torch.equal(attn(small), native[0])
    assert "3 heads of 8, focusing_factor 3.0, kernel_size 0" in caplog.text
    count = len(timings)
    assert count > 0 and not torch.equal(attn(large), native[1]) and len(timings) == count
    always = attention()
    always.set_processor(FocusedLinearAttnProcessor())
    assert torch.equal(attn(large), always(large))


def test_cross_attention_times_nothing(timings):
    attn, hidden, text = attention(), torch.randn(2, 64, 24), torch.randn(2, 7, 24)
    native = attn(hidden, encoder_hidden_states=text)
    attn.set_processor(FocusedLinearAttnProcessor(min_tokens="auto"))
    assert torch.equal(attn(hidden, encoder_hidden_states=text), native) and timings == []


def test_the_processor_compiles_whole_and_times_while_tracing(timings):
    torch._dynamo.reset()
    attn, inputs = attention(), [torch.randn(2, tokens, 24) for tokens in (64, 400, 81)]
    attn.set_processor(AttnProcessor2_0())
    native = attn(inputs[0])
    attn.set_processor(FocusedLinearAttnProcessor(min_tokens="auto"))
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
    outputs = [compiled(x) for x in inputs]
    assert timings
    assert torch.allclose(outputs[0], native, atol=1e-6)
    for x, output in zip(inputs, outputs, strict=True):
        assert torch.allclose(output, attn(x), atol=1e-6)


@pytest.mark.parametrize("value", ["fast", 1.5, None])
def test_wrong_settings(value):
    if value is not None:  # which leaves it at its default
        with pytest.raises(ValueError, match="min_tokens is"):
            FocusedLinearAttnProcessor(min_tokens=value)
    with pytest.raises(ValueError, match="min_tokens is"):
        AdapterConfig(min_tokens=value)
