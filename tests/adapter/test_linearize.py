import copy
import pickle

import pytest
import torch
from diffusers import PriorTransformer
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)

from flatten_diffusion import (
    AdapterConfig,
    FocusedLinearAttnProcessor,
    FocusedLinearConfig,
    linearize,
    load_adapter,
    restore,
)

from ..models.tiny import CONVERTIBLE, assert_untouched, build, stir


class CustomProcessor:
    def __call__(self, attn, hidden_states, **kwargs):
        return hidden_states


def _processors(model):
    return {name: module.processor for name, module in model.named_modules() if hasattr(module, "set_processor")}


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_the_whole_life_of_a_conversion(name):
    tiny = build(name)
    before, keys, modules = _processors(tiny.model), list(tiny.model.state_dict()), list(tiny.model.named_modules())
    with torch.no_grad():
        native = tiny()
        adapter = linearize(tiny.model)
        stir(adapter)
        converted = tiny()
        with adapter.disabled():
            assert torch.equal(tiny(), native)
        assert torch.equal(tiny(), converted) and not torch.equal(converted, native)
        restore(tiny.model)
        assert torch.equal(tiny(), native)
    after = _processors(tiny.model)
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert_untouched(tiny.model, keys, modules)


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_a_fresh_adapter_is_the_parameter_free_swap(name):
    tiny, swapped = build(name), build(name)
    names = linearize(tiny.model).layers
    for layer in names:
        swapped.model.get_submodule(layer).set_processor(FocusedLinearAttnProcessor())
    with torch.no_grad():
        torch.testing.assert_close(tiny(), swapped(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_a_gradient_reaches_every_adapter_parameter(name):
    tiny = build(name)
    adapter = linearize(tiny.model)
    stir(adapter)
    tiny().square().sum().backward()
    assert len(list(adapter.parameters())) == 3 * len(adapter.layers) == 3 * tiny.converted
    for key, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", ["sd15", "unet2d", "pixart"])
def test_bfloat16_is_finite_and_parameters_follow_the_model(name):
    tiny = build(name)
    tiny.model.to(torch.bfloat16)
    adapter = linearize(tiny.model)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.bfloat16}
    floats = {k: v for k, v in tiny.inputs.items() if torch.is_tensor(v) and v.is_floating_point()}
    with torch.no_grad():
        out = tiny(**{name: tensor.to(torch.bfloat16) for name, tensor in floats.items()})
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    tiny.model.float()
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_windows_live_with_the_adapter(name, tmp_path):
    tiny, fresh = build(name), build(name)
    keys, modules = list(tiny.model.state_dict()), list(tiny.model.named_modules())
    with torch.no_grad():
        native = tiny()
        linearize(tiny.model, AdapterConfig(mixer=FocusedLinearConfig(kernel_size=0)))
        plain = tiny()
        restore(tiny.model)
        adapter = linearize(tiny.model, AdapterConfig(mixer=FocusedLinearConfig(kernel_size=0), window=3))
        assert (tiny() - native).norm() < (plain - native).norm()
        stir(adapter)
        converted = tiny()
        assert converted.isfinite().all() and not torch.equal(converted, native)
        adapter.save_pretrained(tmp_path)
        assert load_adapter(fresh.model, tmp_path).config == adapter.config
        assert torch.equal(fresh(), converted)
        with adapter.disabled():
            assert torch.equal(tiny(), native)
    trained = tiny()
    torch.testing.assert_close(trained, converted, rtol=1e-3, atol=1e-4)
    trained.square().sum().backward()
    for key, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
    restore(tiny.model)
    assert torch.equal(tiny(), native)
    assert_untouched(tiny.model, keys, modules)


def test_disabled_nests_and_survives_exceptions():
    tiny = build("sd15")
    with torch.no_grad():
        native = tiny()
        adapter = linearize(tiny.model)
        converted = tiny()
        with pytest.raises(KeyError), adapter.disabled() as model:
            assert model is tiny.model
            with adapter.disabled():
                assert torch.equal(tiny(), native)
            assert torch.equal(tiny(), native)
            assert "disabled at the moment" in adapter.report().converted[0].reason
            raise KeyError
        assert torch.equal(tiny(), converted)


def test_disabled_holds_no_second_copy():
    tiny = build("sd15")
    adapter = linearize(tiny.model)
    before = {key: tensor.data_ptr() for key, tensor in tiny.model.state_dict().items()}
    with adapter.disabled():
        assert {key: tensor.data_ptr() for key, tensor in tiny.model.state_dict().items()} == before


def test_min_tokens_is_decided_by_the_size_of_the_call():
    tiny = build("sd15")
    with torch.no_grad():
        native = tiny()
        small = {"sample": torch.randn(2, 4, 8, 8)}
        native_small = tiny(**small)
        adapter = linearize(tiny.model, AdapterConfig(min_tokens=65))
        assert torch.equal(tiny(**small), native_small)  # 64 and 16 tokens
        assert not torch.equal(tiny(), native)  # 384 and 96 tokens
    assert "softmax below 65 tokens" in adapter.report().converted[0].reason


def test_include_and_exclude():
    tiny = build("sd15")
    adapter = linearize(tiny.model, AdapterConfig(include=["up_blocks.*", "mid*"], exclude=["*.attentions.1.*"]))
    assert adapter.layers == [
        "up_blocks.1.attentions.0.transformer_blocks.0.attn1",
        "mid_block.attentions.0.transformer_blocks.0.attn1",
    ]
    reasons = {row.name: row.reason for row in adapter.report().kept}
    assert reasons["down_blocks.0.attentions.0.transformer_blocks.0.attn1"] == "not selected by include and exclude"
    with torch.no_grad():
        tiny()


def test_the_report_names_every_layer_and_prints_as_a_table():
    tiny = build("unet_motion")
    adapter = linearize(tiny.model)
    report = adapter.report()
    assert len(report) == tiny.total and len(report.converted) == tiny.converted
    assert [row.name for row in report.converted] == adapter.layers
    lines = str(report).splitlines()
    assert lines[0] == f"UNetMotionModel: {tiny.converted} of {tiny.total} attention layers linear"
    assert len(lines) == tiny.total + 3
    for row in report:
        (line,) = [line for line in lines if line.startswith(row.name + " ")]
        assert row.reason in line and ("linear" if row.converted else "softmax") in line
    assert "heads" in lines[1] and repr(adapter).startswith("Adapter(UNetMotionModel, focused_linear, 4 layers")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"include": ["nope*"]}, "Pattern 'nope\\*' matches none of the 8 attention layers"),
        ({"exclude": ["nope*"]}, "Pattern 'nope\\*' matches none"),
        ({"include": ["*.attn2"]}, "leave none of the 4 convertible layers"),
    ],
)
def test_patterns_that_select_nothing_raise(config, message):
    tiny = build("sd15")
    before = _processors(tiny.model)
    with pytest.raises(ValueError, match=message):
        linearize(tiny.model, AdapterConfig(**config))
    assert all(_processors(tiny.model)[name] is processor for name, processor in before.items())
    linearize(tiny.model)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"mixer": "nothing"}, "Unknown mixer 'nothing'"),
        ({"mixer": {"name": "focused_linear", "focusing_factor": 0.0}}, "focusing_factor is 0.0"),
        ({"mixer": {"name": "focused_linear", "focusing_factor": float("nan")}}, "focusing_factor is nan"),
        ({"mixer": {"name": "focused_linear", "focusing_factor": "3"}}, "focusing_factor is '3'"),
        ({"mixer": {"name": "focused_linear", "focusing_factor": 10**400}}, "focusing_factor is 1000.*: pass a pos"),
        ({"mixer": {"name": "focused_linear", "kernel_size": 4}}, "kernel_size is 4"),
        ({"mixer": {"name": "focused_linear", "kernel_size": -1}}, "kernel_size is -1"),
        ({"mixer": {"name": "focused_linear", "kernel_size": True}}, "kernel_size is True"),
        ({"mixer": {"name": "focused_linear", "kernel_size": 3001}}, "kernel_size is 3001: pass an odd number up to"),
        ({"mixer": {"name": "focused_linear", "kernel": 3}}, "Unknown setting 'kernel' of mixer focused_linear"),
        ({"mixer": {"kernel_size": 3}}, "Unknown mixer 'None'"),
        ({"overrides": {"x": {"name": "focused_linear", "kernel_size": 4}}}, "kernel_size is 4"),
        ({"overrides": [1]}, r"overrides is \[1\]: pass attention paths"),
        ({"min_tokens": 1.5}, "min_tokens is 1.5"),
        ({"window": 1}, "window is 1: pass a whole number from 2"),
        ({"window": True}, "window is True"),
        ({"include": "down*"}, "include is 'down\\*'"),
        ({"exclude": None}, "exclude is None"),
        ({"exclude": [""]}, "exclude is"),
    ],
)
def test_bad_settings_raise_one_line(setting, message):
    with pytest.raises(ValueError, match=message) as error:
        AdapterConfig(**setting)
    assert "\n" not in str(error.value)


def test_settings_as_json_types_and_back():
    config = AdapterConfig(
        FocusedLinearConfig(2, 0), {"a.b": FocusedLinearConfig(2)}, min_tokens=7, include=["a*"], exclude=("b",)
    )
    assert config.to_dict()["include"] == ["a*"]
    assert AdapterConfig.from_dict(config.to_dict()) == config
    assert AdapterConfig.from_dict({}) == AdapterConfig()
    with pytest.raises(ValueError, match="Unknown setting 'kernel'"):
        AdapterConfig.from_dict({"kernel": 3})


@pytest.mark.parametrize("how", ["linearize", "set_attn_processor"])
def test_converting_twice_raises_and_changes_nothing(how):
    tiny = build("sd15")
    if how == "linearize":
        linearize(tiny.model)
    else:
        tiny.model.set_attn_processor(FocusedLinearAttnProcessor())
    with torch.no_grad():
        once = tiny()
        with pytest.raises(ValueError, match="UNet2DConditionModel is converted already: call restore"):
            linearize(tiny.model)
        assert torch.equal(tiny(), once)


def test_restoring_what_was_never_converted_raises():
    with pytest.raises(ValueError, match="nothing to restore"):
        restore(build("sd15").model)
    tiny = build("sd15")
    linearize(tiny.model)
    restore(tiny.model)
    with pytest.raises(ValueError, match="nothing to restore"):
        restore(tiny.model)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["sd15", "unclip"])
def test_restore_after_set_attn_processor_puts_the_defaults_back(name, fused):
    tiny = build(name)
    if fused and name == "unclip":
        pytest.skip("diffusers does not fuse added projections")
    if fused:
        tiny.model.fuse_qkv_projections()
    before = {name: type(processor) for name, processor in _processors(tiny.model).items()}
    with torch.no_grad():
        native = tiny()
        tiny.model.set_attn_processor(FocusedLinearAttnProcessor())
        restore(tiny.model)
        assert torch.equal(tiny(), native)
    assert {name: type(processor) for name, processor in _processors(tiny.model).items()} == before


def test_set_attn_processor_after_linearize_is_undone_too():
    tiny = build("sd15")
    before = _processors(tiny.model)
    with torch.no_grad():
        native = tiny()
        adapter = linearize(tiny.model)
        stir(adapter)
        converted = tiny()
        tiny.model.set_attn_processor(FocusedLinearAttnProcessor())
        assert torch.equal(tiny(), converted)  # a layer's mixer wins over the object's own settings
    restore(tiny.model)
    assert all(_processors(tiny.model)[name] is processor for name, processor in before.items())
    with torch.no_grad():
        assert torch.equal(tiny(), native)


@pytest.mark.compatibility(
    "Attention slicing, xFormers, custom processors",
    "refused",
    "by the layer's name: put the default back, or `exclude` it",
)
@pytest.mark.parametrize(
    "processor",
    [SlicedAttnProcessor(1), AttnProcessor(), XFormersAttnProcessor(), CustomProcessor()],
    ids=lambda processor: type(processor).__name__,
)
def test_other_processors_raise_before_anything_is_changed(processor):
    tiny = build("sd15")
    tiny.model.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1").set_processor(processor)
    before, keys = _processors(tiny.model), list(tiny.model.state_dict())
    message = rf"mid_block.*attn1 runs {type(processor).__name__}: .*AttnProcessor2_0"
    with pytest.raises(ValueError, match=message) as error:
        linearize(tiny.model)
    assert "\n" not in str(error.value)
    assert all(_processors(tiny.model)[name] is p for name, p in before.items())
    assert list(tiny.model.state_dict()) == keys
    linearize(tiny.model, AdapterConfig(exclude=["mid_block.*"]))


def test_any_processor_may_run_cross_attention():
    tiny = build("sd15")
    tiny.model.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2").set_processor(SlicedAttnProcessor(1))
    with torch.no_grad():
        native = tiny()
        with linearize(tiny.model).disabled():
            assert torch.equal(tiny(), native)


def test_fused_projections():
    tiny = build("sd15")
    with torch.no_grad():
        plain = build("sd15")
        stir(linearize(plain.model))
        expected = plain()
        tiny.model.fuse_qkv_projections()
        native = tiny()
        adapter = linearize(tiny.model)
        stir(adapter)
        torch.testing.assert_close(tiny(), expected, rtol=1e-4, atol=1e-5)
        for _, attn in adapter.attention_modules():  # the fused weights are the ones in use
            attn.to_q.weight.fill_(float("nan"))
        assert tiny().isfinite().all()
        with adapter.disabled():
            assert torch.equal(tiny(), native)
    restore(tiny.model)
    assert {type(p) for p in _processors(tiny.model).values()} == {FusedAttnProcessor2_0}


@pytest.mark.parametrize("action", ["slice", "fuse", "default"])
def test_a_processor_replaced_behind_our_back_is_named(action, caplog):
    tiny = build("sd15")
    before = _processors(tiny.model)
    with torch.no_grad():
        native = tiny()
        adapter = linearize(tiny.model)
        if action == "slice":
            tiny.model.set_attention_slice(1)
        elif action == "fuse":
            tiny.model.fuse_qkv_projections()
        else:
            tiny.model.set_attn_processor(AttnProcessor2_0())
        with pytest.raises(RuntimeError, match="attn1: its processor was replaced by .*Processor"):
            tiny()
        assert not adapter.report().converted
        assert "was replaced by" in next(r for r in adapter.report() if r.name == adapter.layers[0]).reason
        restore(tiny.model)
        assert all(_processors(tiny.model)[name] is before[name] for name in before if name.endswith("attn1"))
        if action == "default":
            assert torch.equal(tiny(), native)


@pytest.mark.compatibility("deepcopy and pickle", "works", "each copy is a conversion of its own")
def test_a_copy_and_a_pickle_are_conversions_of_their_own():
    tiny = build("sd15")
    with torch.no_grad():
        native = tiny()
        adapter = linearize(tiny.model)
        stir(adapter)
        converted = tiny()
        for twin in (copy.deepcopy(tiny.model), pickle.loads(pickle.dumps(tiny.model))):
            assert torch.equal(tiny(twin), converted)
            with twin.flatten_adapter.disabled():
                assert torch.equal(tiny(twin), native)
                assert torch.equal(tiny(), converted)
            tiny(twin, **tiny.turned())
            assert adapter.report().converted[0].grid == (16, 24)
            restore(twin)
            assert torch.equal(tiny(twin), native)
        assert torch.equal(tiny(), converted)


def test_an_adapter_is_of_no_use_after_restore():
    tiny = build("sd15")
    adapter = linearize(tiny.model)
    restore(tiny.model)
    for use in (adapter.report, lambda: list(adapter.parameters()), lambda: adapter.save_pretrained("never")):
        with pytest.raises(RuntimeError, match="call linearize or load_adapter again"):
            use()
    assert repr(adapter) == "Adapter(restored)"


def test_freezing_and_backends():
    tiny = build("sd15")
    adapter = linearize(tiny.model)
    tiny.model.requires_grad_(False)
    adapter.requires_grad_()
    assert [name for name, p in tiny.model.named_parameters() if p.requires_grad] == [
        f"{layer}.flatten_mixer.{name}"
        for layer, mixer in adapter.layer_mixers()
        for name, _ in mixer.named_parameters()
    ]
    stir(adapter)
    with torch.no_grad():
        fast = tiny()
        adapter.set_backend("reference")
        torch.testing.assert_close(tiny(), fast, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="Unknown backend 'x'"):
        adapter.set_backend("x")


def test_what_cannot_be_converted_raises():
    prior = PriorTransformer(num_attention_heads=2, attention_head_dim=4, num_layers=1, embedding_dim=8)
    with pytest.raises(
        ValueError, match="no layer that can be converted: predicts an image embedding from a few tokens"
    ):
        linearize(prior)
    with pytest.raises(ValueError, match="Linear has no layer that can be converted: it has no attention layers"):
        linearize(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="dict is no module and has neither .unet nor .transformer"):
        linearize({})


@pytest.mark.compatibility("Meta device", "works", "convert empty weights, materialise later")
def test_empty_weights_convert_and_materialise():
    from diffusers import UNet2DConditionModel

    tiny = build("sd15")
    with torch.device("meta"):
        empty = UNet2DConditionModel.from_config(tiny.model.config)
    adapter = linearize(empty)
    assert all(parameter.is_meta for parameter in adapter.parameters())
    with pytest.raises(ValueError, match="meta device"):
        adapter.save_pretrained("never")
