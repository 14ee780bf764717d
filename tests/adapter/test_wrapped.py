"""The whole life of a conversion on the families whose native processors run as they are, but for their product."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, FusedJointAttnProcessor2_0

from flatten_diffusion import AdapterConfig, FocusedLinearConfig, linearize, load_adapter, restore
from flatten_diffusion.models import find_attention_layers

from ..models.tiny import assert_compiled_gradients, assert_untouched, stir, train_towards_original
from ..models.tiny_wrapped import JOINT, WRAPPED, build_wrapped, position_ids

ALL = ("q", "k", "v", "out")
# No own output projection: single streams of Flux and its kin leave it to the block.
WITHOUT_OUT = dict.fromkeys(
    ("flux", "chroma", "hunyuanvideo", "ovis", "longcat", "bria", "briafibo", "hunyuanimage", "flux_controlnet",
     "framepack", "motifvideo"), 1
) | {"luminanext": 2}  # fmt: skip


def _convert(tiny, **settings):
    return linearize(tiny.model, AdapterConfig(include=tiny.include, **settings))


def _processors(model):
    return {finding.name: finding.attn.processor for finding in find_attention_layers(model)}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_whole_life_of_a_conversion(name):
    tiny = build_wrapped(name)
    before, keys, modules = _processors(tiny.model), list(tiny.model.state_dict()), list(tiny.model.named_modules())
    with torch.no_grad():
        native, native_turned = tiny(), tiny(**tiny.turn)
        adapter = _convert(tiny)
        assert len(adapter.report().converted) == tiny.converted and len(adapter.report()) == tiny.total
        assert sum(layer.text is not None for _, layer in adapter.layer_mixers()) == tiny.joint
        stir(adapter)
        converted = tiny()
        assert {row.grid for row in adapter.report().converted} == {tiny.grid}
        turned = tiny(**tiny.turn)
        assert {row.grid for row in adapter.report().converted} == {tiny.turned_grid}
        with adapter.disabled():
            assert torch.equal(tiny(), native)
            assert torch.equal(tiny(**tiny.turn), native_turned)
        assert torch.equal(tiny(), converted) and not torch.equal(converted, native) and converted.isfinite().all()
        assert torch.equal(tiny(**tiny.turn), turned)
        restore(tiny.model)
        assert torch.equal(tiny(), native)
    after = _processors(tiny.model)
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert_untouched(tiny.model, keys, modules)


@pytest.mark.parametrize("name", WRAPPED)
def test_the_layers_that_stay_are_native_bit_for_bit(name):
    tiny = build_wrapped(name)
    adapter = _convert(tiny)
    kept = [row.name for row in adapter.report().kept]
    assert len(kept) == tiny.total - tiny.converted
    restore(tiny.model)
    calls = {}

    def keep(layer):
        def hook(module, args, kwargs, output):
            calls[layer] = (args, kwargs, output)

        return hook

    handles = [tiny.model.get_submodule(x).register_forward_hook(keep(x), with_kwargs=True) for x in kept]
    with torch.no_grad():
        tiny()
        for handle in handles:
            handle.remove()
        _convert(tiny)
        for layer, (args, kwargs, output) in calls.items():
            assert torch.equal(tiny.model.get_submodule(layer)(*args, **kwargs), output), layer
    assert set(calls) == set(kept)


@pytest.mark.parametrize("name", WRAPPED)
def test_a_gradient_reaches_every_adapter_parameter(name):
    tiny = build_wrapped(name)
    adapter = _convert(tiny, deltas=ALL, delta_rank=2)
    stir(adapter)
    tiny().square().sum().backward()
    for key, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
        assert parameter.grad.isfinite().all(), key
    missing = 4 * len(adapter.layers) - sum(len(layer.deltas) for _, layer in adapter.layer_mixers())
    assert missing == WITHOUT_OUT.get(name, 0)


@pytest.mark.parametrize("name", WRAPPED)
def test_saved_loaded_copied_pickled_merged(name, tmp_path):
    tiny, fresh = build_wrapped(name), build_wrapped(name)
    with torch.no_grad():
        native = tiny()
        adapter = _convert(tiny)
        raw = tiny()
        adapter.add_deltas(ALL, 2)
        assert torch.equal(tiny(), raw)
        stir(adapter)
        converted = tiny()
        assert not torch.allclose(converted, raw)
        adapter.save_pretrained(tmp_path)
        loaded = load_adapter(fresh.model, tmp_path)
        assert loaded.layers == adapter.layers and loaded.config == adapter.config
        assert torch.equal(fresh(), converted)
        for twin in (copy.deepcopy(tiny.model), pickle.loads(pickle.dumps(tiny.model))):
            assert torch.equal(tiny(twin), converted)
            with twin.flatten_adapter.disabled():
                assert torch.equal(tiny(twin), native) and torch.equal(tiny(), converted)
        adapter.merge()
        torch.testing.assert_close(tiny(), converted, rtol=1e-3, atol=1e-4)
        adapter.unmerge()
        assert torch.equal(tiny(), converted)
        adapter.merge()
        restore(tiny.model)
        assert torch.equal(tiny(), native)


@pytest.mark.parametrize("name", ["sd3", "flux", "mochi", "wan"])
def test_feature_maps_live_with_the_adapter(name, tmp_path):
    tiny, fresh = build_wrapped(name), build_wrapped(name)
    with torch.no_grad():
        native = tiny()
        adapter = _convert(tiny)
        raw = tiny()
        for name, mixer in adapter.mixers():
            before = set(adapter.config.overrides)
            mixer.add_feature_maps()
            assert set(adapter.config.overrides) - before == {name} and torch.equal(tiny(), raw)
            assert adapter.config.overrides[name] == FocusedLinearConfig(feature_maps=True)
        stir(adapter)
        mapped = tiny()
        adapter.save_pretrained(tmp_path)
        loaded = load_adapter(fresh.model, tmp_path)
        assert loaded.config == adapter.config and torch.equal(fresh(), mapped)
        assert torch.equal(tiny(copy.deepcopy(tiny.model)), mapped)
        with adapter.disabled():
            assert torch.equal(tiny(), native)
    tiny().square().sum().backward()
    for key, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
    restore(tiny.model)
    assert torch.equal(tiny(), native)


@pytest.mark.parametrize("name", ["sd3", "flux", "mochi", "prx"])
def test_text_is_joined_without_a_convolution_too(name, tmp_path):
    tiny = build_wrapped(name)
    with torch.no_grad():
        native = tiny()
        adapter = _convert(tiny, mixer=FocusedLinearConfig(kernel_size=0))
        stir(adapter)
        converted = tiny()
        assert converted.isfinite().all() and not torch.equal(converted, native)
        joined = [row for row in adapter.report().converted if "softmax to and from other tokens" in row.reason]
        assert len(joined) == tiny.joint
        adapter.save_pretrained(tmp_path)
        restore(tiny.model)
        assert load_adapter(tiny.model, tmp_path).config.mixer == FocusedLinearConfig(kernel_size=0)
        assert torch.equal(tiny(), converted)


@pytest.mark.parametrize("name", WRAPPED)
def test_windows_live_with_the_adapter(name, tmp_path):
    tiny, fresh = build_wrapped(name), build_wrapped(name)
    keys, modules = list(tiny.model.state_dict()), list(tiny.model.named_modules())
    with torch.no_grad():
        native = tiny()
        plain = _convert(tiny)
        without = tiny()
        restore(tiny.model)
        adapter = _convert(tiny, window=2)
        assert plain.layers == adapter.layers
        assert all(layer.window is not None and layer.window.size == 2 for _, layer in adapter.layer_mixers())
        assert all("focused_linear beyond windows of 2" in row.reason for row in adapter.report().converted)
        nearer = (tiny() - native).square().sum() < (without - native).square().sum()
        stir(adapter)
        converted, turned = tiny(), tiny(**tiny.turn)
        assert converted.isfinite().all() and turned.isfinite().all()
        adapter.save_pretrained(tmp_path)
        assert load_adapter(fresh.model, tmp_path).config == adapter.config
        assert torch.equal(fresh(), converted) and torch.equal(fresh(**tiny.turn), turned)
        with adapter.disabled():
            assert torch.equal(tiny(), native)
    tiny().square().sum().backward()
    for key, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
    restore(tiny.model)
    assert torch.equal(tiny(), native)
    assert_untouched(tiny.model, keys, modules)
    assert nearer


@pytest.mark.parametrize("name", ["sd3", "flux", "wan", "zimage"])
def test_bfloat16_is_finite_and_parameters_follow_the_model(name):
    tiny = build_wrapped(name)
    tiny.model.to(torch.bfloat16)
    adapter = _convert(tiny)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.bfloat16}

    def half(value):
        if isinstance(value, list) and torch.is_tensor(value[0]):
            return [half(item) for item in value]
        return value.bfloat16() if torch.is_tensor(value) and value.is_floating_point() else value

    changes = {key: half(value) for key, value in tiny.inputs.items() if not key.endswith("_ids")}
    with torch.no_grad():
        assert tiny(**changes).isfinite().all()


@pytest.mark.parametrize("name", WRAPPED)
def test_smaller_calls_stay_softmax(name):
    tiny = build_wrapped(name)
    with torch.no_grad():
        native = tiny()
        adapter = _convert(tiny, min_tokens=1000)
        adapter.add_deltas(("q", "out"), 2)
        stir(adapter)
        assert torch.equal(tiny(), native)


# ---- what does not convert ----


def test_sana_is_linear_already_and_says_so():
    tiny = build_wrapped("sana")
    with pytest.raises(ValueError, match="no layer that can be converted: .*linear already.*include"):
        linearize(tiny.model)
    adapter = linearize(tiny.model, AdapterConfig(include=["*.0.attn1"]))
    reasons = {row.name: row.reason for row in adapter.report().kept}
    assert reasons["transformer_blocks.1.attn1"].startswith("linear already (ReLU attention)")
    assert reasons["transformer_blocks.0.attn2"] == "cross-attention"


def test_every_layer_that_stays_says_why():
    for name, pattern, why in (
        ("lumina2", "context_refiner", "attends over the text alone"),
        ("zimage", "context_refiner", "attends over the text alone"),
        ("hunyuanvideo", "context_embedder", "attends over the text alone"),
        ("wan", "attn2", "cross-attention"),
        ("ltx", "attn2", "cross-attention"),
        ("allegro", "attn2", "cross-attention"),
        ("stableaudio", "attn2", "cross-attention"),
        ("hunyuandit", "attn2", "cross-attention"),
    ):
        for finding in find_attention_layers(build_wrapped(name).model):
            assert (finding.reason == why) == (pattern in finding.name), finding


class CustomProcessor:
    def __call__(self, attn, hidden_states, **kwargs):
        return hidden_states


@pytest.mark.parametrize("processor", [CustomProcessor(), AttnProcessor2_0()], ids=["custom", "plain"])
def test_other_processors_raise_before_anything_is_changed(processor):
    tiny = build_wrapped("sd3")
    tiny.model.transformer_blocks[1].attn.set_processor(processor)
    before, keys = _processors(tiny.model), list(tiny.model.state_dict())
    message = rf"transformer_blocks.1.attn runs {type(processor).__name__}: put JointAttnProcessor2_0 or Fused.* back"
    with pytest.raises(ValueError, match=message) as error:
        linearize(tiny.model)
    assert "\n" not in str(error.value)
    assert _processors(tiny.model) == before and list(tiny.model.state_dict()) == keys
    linearize(tiny.model, AdapterConfig(exclude=["transformer_blocks.1.attn"]))


def test_a_processor_replaced_behind_our_back_is_named():
    tiny = build_wrapped("sd3")
    before = _processors(tiny.model)
    linearize(tiny.model)
    tiny.model.transformer_blocks[0].attn.set_processor(CustomProcessor())
    with pytest.raises(RuntimeError, match="transformer_blocks.0.attn: its processor was replaced by CustomProcessor"):
        tiny()
    restore(tiny.model)
    assert _processors(tiny.model) == before


# ---- with the rest of the field ----


@pytest.mark.parametrize("name", ["sd3", "flux", "auraflow", "hunyuandit", "cogvideox"])
def test_fused_projections_before_and_after(name):
    tiny = build_wrapped(name)
    if name == "sd3":  # fused, diffusers itself cannot run dual attention, and forgets the norms of query and key
        tiny.model = type(tiny.model)(**{**tiny.model.config, "dual_attention_layers": (), "qk_norm": None}).eval()
    with torch.no_grad():
        adapter = _convert(tiny, deltas=ALL, delta_rank=2)
        stir(adapter)
        expected = tiny()
        restore(tiny.model)
        tiny.model.fuse_qkv_projections()
        native = tiny()
        adapter = _convert(tiny, deltas=ALL, delta_rank=2)
        stir(adapter)
        torch.testing.assert_close(tiny(), expected, rtol=1e-3, atol=1e-4)
        with adapter.disabled():
            assert torch.equal(tiny(), native)
        with pytest.raises(ValueError, match="fused projections: call unfuse_qkv_projections"):
            adapter.merge()
    if name == "sd3":
        assert type(tiny.model.transformer_blocks[0].attn.flatten_layer.native) is FusedJointAttnProcessor2_0


def test_lora_on_the_base(tmp_path):
    peft = pytest.importorskip("peft")
    tiny = build_wrapped("sd3")
    adapter = _convert(tiny, deltas=ALL, delta_rank=2)
    stir(adapter)
    plain = tiny().detach()
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    tiny.model.add_adapter(config)
    adapter.requires_grad_()
    tiny().square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())
    adapter.save_pretrained(tmp_path)
    tiny.model.delete_adapters("default")
    with torch.no_grad():
        torch.testing.assert_close(tiny(), plain)


CHECKPOINTED = (
    "sd3", "auraflow", "flux", "qwenimage", "lumina2", "cogvideox", "wan", "omnigen", "unclip", "flux3", "cosmos3",
    "ltx2", "sd3_controlnet", "qwenimage21",
)  # fmt: skip


@pytest.mark.parametrize("name", [*CHECKPOINTED, "ltx2 with audio", "kandinsky6 with audio"])
def test_two_aspect_ratios_before_one_backward_checkpointed(name):
    tiny = build_wrapped(name.removesuffix(" with audio"))
    if name.endswith(" with audio"):  # two sequences, each with a length of its own
        tiny.include = None
        tiny.turn |= {"audio_hidden_states": torch.randn(2, 14, 4)}
        tiny.turn |= {"audio_num_frames": 14} if "audio_num_frames" in tiny.inputs else {}
    adapter = _convert(tiny)
    stir(adapter)
    tiny.model.train()

    def gradients():
        loss = tiny().square().sum() + 2 * tiny(**tiny.turn).square().sum()
        return torch.autograd.grad(loss, list(adapter.parameters()))

    expected = gradients()
    tiny.model.enable_gradient_checkpointing()
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * expected[0].abs().max().item())


@pytest.mark.parametrize("name", ["krea2", "minimaxh3"])
def test_ids_of_more_than_the_image_compile_whole_with_the_grid_pinned(name):
    tiny = build_wrapped(name)
    torch._dynamo.reset()
    with torch.no_grad():
        adapter = linearize(tiny.model)
        stir(adapter)
        expected = tiny()
        adapter.pin_grid(tiny.grid)
        whole = torch.compile(tiny.model, fullgraph=True, backend="eager", dynamic=False)
        torch.testing.assert_close(tiny(whole), expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(RuntimeError, match="not those of the grid given to pin_grid"):
            tiny(whole, **tiny.turn)


@pytest.mark.parametrize("name", ["unclip", "cosmos3", "framepack"])
def test_newer_models_compile_whole_as_natively(name):
    tiny = build_wrapped(name)
    torch._dynamo.reset()
    with torch.no_grad():
        stir(_convert(tiny))
        compiled = torch.compile(tiny.model, fullgraph=True, backend="eager", dynamic=False)
        torch.testing.assert_close(tiny(compiled), tiny(), rtol=1e-4, atol=1e-4)


def test_bria_fibo2_compiled_reads_where_its_images_stand():
    """Natively in several graphs, too: the gist's length is read from the mask."""
    tiny = build_wrapped("briafibo2")
    torch._dynamo.reset()
    with torch.no_grad():
        stir(_convert(tiny))
        compiled = torch.compile(tiny.model, backend="eager", dynamic=False)
        torch.testing.assert_close(tiny(compiled), tiny(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("name", ["sd3", "wan", "lumina2", "hunyuanvideo"])
def test_compiles_as_the_native_model_does(name, window):
    """In one graph, but for Lumina2, which diffusers itself cannot compile whole."""
    tiny = build_wrapped(name)
    torch._dynamo.reset()
    with torch.no_grad():
        native = tiny()
        adapter = _convert(tiny, deltas=("q", "out") if name == "sd3" else (), delta_rank=2, window=window)
        stir(adapter)
        expected = tiny()
        compiled = torch.compile(tiny.model, fullgraph=name != "lumina2", backend="eager", dynamic=False)
        torch.testing.assert_close(tiny(compiled), expected, rtol=1e-4, atol=1e-5)
        if name == "sd3":
            turned = tiny(**tiny.turn)
            torch.testing.assert_close(tiny(compiled, **tiny.turn), turned, rtol=1e-4, atol=1e-5)
            with adapter.disabled():
                torch.testing.assert_close(tiny(compiled), native, rtol=1e-4, atol=1e-5)


@pytest.mark.compatibility("torch.compile", "works", "Flux and its kin: with breaks, or whole with `pin_grid`")
def test_flux_compiles_with_breaks_or_whole_with_its_grid_pinned():
    tiny = build_wrapped("flux")
    torch._dynamo.reset()
    with torch.no_grad():
        adapter = linearize(tiny.model)
        stir(adapter)
        expected, turned = tiny(), tiny(**tiny.turn)
        compiled = torch.compile(tiny.model, backend="eager", dynamic=False)
        torch.testing.assert_close(tiny(compiled), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tiny(compiled, **tiny.turn), turned, rtol=1e-4, atol=1e-5)
        torch._dynamo.reset()
        adapter.pin_grid((4, 6))
        whole = torch.compile(tiny.model, fullgraph=True, backend="eager", dynamic=False)
        torch.testing.assert_close(tiny(whole), expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(RuntimeError, match="not those of the grid given to pin_grid"):
            tiny(whole, **tiny.turn)
        torch.testing.assert_close(tiny(**tiny.turn), turned)  # uncompiled code reads the ids


def test_a_pinned_grid_of_several_images_is_checked_on_the_device():
    from flatten_diffusion.models.token_layout import _agree

    ids = torch.cat([position_ids(4, 6), position_ids(3, 3, picture=1)])
    assert _agree(ids, ((1, 4, 6), (1, 3, 3))).item()
    assert not _agree(ids, ((1, 6, 4), (1, 3, 3))).item()


@pytest.mark.parametrize("name", ["qwenimage", "wan"])
def test_compiled_block_by_block_every_layer_keeps_its_own_mixer(name):
    """The blocks share one piece of compiled code; what is learned must not be baked into it."""
    tiny = build_wrapped(name)
    if not getattr(tiny.model, "_repeated_blocks", None):
        pytest.skip("this diffusers compiles no repeated blocks")
    torch._dynamo.reset()
    with torch.no_grad():
        adapter = linearize(tiny.model)
        stir(adapter)
        expected = tiny()
        tiny.model.compile_repeated_blocks(backend="eager", fullgraph=True, dynamic=False)
        torch.testing.assert_close(tiny(), expected, rtol=1e-4, atol=1e-5)


def test_compiled_and_checkpointed_gradients():
    tiny = build_wrapped("sd3")
    adapter = linearize(tiny.model)
    stir(adapter)
    assert_compiled_gradients(tiny, adapter)


@pytest.mark.parametrize("name", JOINT)
def test_an_optimizer_step_lowers_the_distance_to_the_original(name):
    tiny = build_wrapped(name)
    adapter = _convert(tiny)
    tiny.model.requires_grad_(False)
    adapter.requires_grad_()
    losses = train_towards_original(tiny, adapter, steps=4)
    assert losses[-1] < losses[0], losses
