"""With the rest of the field: pipelines, LoRA, IP-Adapter, ControlNet, torch.compile, accelerate."""

import copy

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0

from flatten_diffusion import (
    AdapterConfig,
    FocusedLinearAttnProcessor,
    FocusedLinearConfig,
    linearize,
    load_adapter,
    restore,
)
from flatten_diffusion.adapter.fingerprint import fingerprint

from ..models.tiny import assert_compiled_gradients, build, stir, train_towards_original
from ..models.tiny_wrapped import build_wrapped


def _parts():
    torch.manual_seed(1)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=32).eval()
    return {
        "vae": vae,
        "text_encoder": None,
        "tokenizer": None,
        "unet": build("sd15").model,
        "scheduler": DDIMScheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _draw(pipe, **arguments):
    torch.manual_seed(3)
    return pipe(
        prompt_embeds=torch.randn(1, 7, 24),
        negative_prompt_embeds=torch.randn(1, 7, 24),
        height=16,
        width=24,
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **arguments,
    ).images


@pytest.fixture
def pipe():
    pipe = StableDiffusionPipeline(**_parts())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_pipeline_there_and_back(pipe, tmp_path):
    native = _draw(pipe)
    adapter = linearize(pipe)
    assert adapter.model is pipe.unet and pipe.unet.flatten_adapter is adapter
    stir(adapter)
    converted = _draw(pipe)
    assert not torch.equal(converted, native)
    with adapter.disabled():
        assert torch.equal(_draw(pipe), native)
    adapter.save_pretrained(tmp_path)
    restore(pipe)
    assert torch.equal(_draw(pipe), native)
    load_adapter(pipe, tmp_path)
    assert torch.equal(_draw(pipe), converted)


def test_the_one_line_swap_on_a_pipeline(pipe):
    native = _draw(pipe)
    pipe.unet.set_attn_processor(FocusedLinearAttnProcessor())
    assert not torch.equal(_draw(pipe), native)
    restore(pipe)
    assert torch.equal(_draw(pipe), native)


def test_a_pipeline_without_attention_modules_by_name_raises(pipe):
    del pipe.unet
    with pytest.raises(TypeError, match="StableDiffusionPipeline is no module and has neither .unet nor .transformer"):
        linearize(pipe)


def test_an_unconditional_pipeline():
    pipe = DDPMPipeline(build("unet2d").model, DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def draw():
        return torch.as_tensor(
            pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
        )

    native = draw()
    adapter = linearize(pipe)
    assert not torch.equal(draw(), native)
    with adapter.disabled():
        assert torch.equal(draw(), native)


@pytest.mark.compatibility("ControlNet", "works", "UNet and ControlNet, each converted by itself")
def test_with_a_controlnet():
    pipe = StableDiffusionControlNetPipeline(**_parts(), controlnet=build("controlnet").model)
    pipe.set_progress_bar_config(disable=True)
    pipe.controlnet.controlnet_cond_embedding.blocks[1].stride = (1, 1)  # this tiny VAE does not compress
    arguments = {"image": torch.rand(1, 3, 16, 24)}
    native = _draw(pipe, **arguments)
    unet, control = linearize(pipe), linearize(pipe.controlnet)
    stir(unet), stir(control)
    both = _draw(pipe, **arguments)
    with control.disabled():
        only_unet = _draw(pipe, **arguments)
        with unet.disabled():
            assert torch.equal(_draw(pipe, **arguments), native)
    assert not torch.equal(both, only_unet) and not torch.equal(only_unet, native)


def _add_lora(model):
    from peft import LoraConfig

    torch.manual_seed(5)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))


@pytest.mark.compatibility(
    "LoRA", "works", "load it before or after; both train; a later one freezes: `adapter.requires_grad_()`"
)
def test_lora_before_and_after(tmp_path):
    pytest.importorskip("peft")
    first, last = build("sd15"), build("sd15")
    shapes = fingerprint(first.model)
    _add_lora(first.model)
    assert fingerprint(first.model) == shapes
    with torch.no_grad():
        native = first()
    adapter = linearize(first.model)
    stir(adapter)
    other = linearize(last.model)
    stir(other)
    _add_lora(last.model)
    assert not any(parameter.requires_grad for parameter in other.parameters())  # peft freezes what it finds
    other.requires_grad_()
    with torch.no_grad():
        assert torch.equal(first(), last())
        with other.disabled():
            assert torch.equal(last(), native)
    first().square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())
    assert all(p.grad is not None for name, p in first.model.named_parameters() if "attn1" in name and "lora_" in name)
    adapter.save_pretrained(tmp_path)
    fresh = build("sd15")
    load_adapter(fresh.model, tmp_path)
    last.model.delete_adapters("default")
    with torch.no_grad():
        assert torch.equal(fresh(), last())


def _ip_adapter(model):
    """What `load_ip_adapter` does to the processors: new ones on cross-attention, `cls()` everywhere else."""
    processors = {}
    for name, processor in model.attn_processors.items():
        if name.endswith("attn2.processor"):
            attn = model.get_submodule(name.removesuffix(".processor"))
            processors[name] = IPAdapterAttnProcessor2_0(attn.query_dim, attn.cross_attention_dim, num_tokens=(4,))
        else:
            processors[name] = type(processor)()
    model.set_attn_processor(processors)


@pytest.mark.compatibility(
    "IP-Adapter on UNets", "works", "load it before or after; it stays when the model is restored"
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_ip_adapter_processors(when):
    tiny = build("sd15")
    context = {"encoder_hidden_states": (tiny.inputs["encoder_hidden_states"], [torch.randn(2, 1, 4, 24)])}
    originals = dict(tiny.model.attn_processors)
    if when == "before":
        _ip_adapter(tiny.model)
        adapter = linearize(tiny.model)
    else:
        adapter = linearize(tiny.model)
        _ip_adapter(tiny.model)
    stir(adapter)
    with torch.no_grad():
        hidden = torch.randn(2, 384, 16)
        attn2 = tiny.model.get_submodule(adapter.layers[0].replace("attn1", "attn2"))
        assert attn2(hidden, encoder_hidden_states=context["encoder_hidden_states"]).isfinite().all()
    assert len(adapter.report().converted) == 4
    restore(tiny.model)
    for name, processor in tiny.model.attn_processors.items():
        if name.endswith("attn2.processor"):
            assert type(processor) is IPAdapterAttnProcessor2_0  # not ours to take away
        elif when == "after":
            assert processor is originals[name]


@pytest.mark.compatibility(
    "IP-Adapter on UNets", "works", "also with the parameter-free swap, which keeps its settings"
)
def test_an_ip_adapter_leaves_the_one_line_swap_its_settings():
    tiny, plain = build("sd15"), build("sd15")
    settings = {"focusing_factor": 1.5, "min_tokens": 100}
    tiny.model.set_attn_processor(FocusedLinearAttnProcessor(**settings))
    plain.model.set_attn_processor(FocusedLinearAttnProcessor())
    with torch.no_grad():
        swapped = tiny()
        assert not torch.equal(swapped, plain())
        _ip_adapter(tiny.model)
        for name, processor in tiny.model.attn_processors.items():
            if name.endswith("attn1.processor"):
                assert (processor.focusing_factor, processor.min_tokens) == (1.5, 100)
            else:
                attn = tiny.model.get_submodule(name.removesuffix(".processor"))
                attn.set_processor(AttnProcessor2_0())  # all but the added image is as before
        assert torch.equal(tiny(), swapped)


def test_wrapped_processors_made_anew_run_what_they_ran():
    tiny = build_wrapped("sd3")
    with torch.no_grad():
        native = tiny()
        adapter = linearize(tiny.model)
        stir(adapter)
        converted = tiny()
        originals = {name: attn.flatten_layer.native for name, attn in adapter.attention_modules()}
        for _, attn in adapter.attention_modules():
            attn.set_processor(type(attn.processor)())
        assert torch.equal(tiny(), converted)
        with adapter.disabled():
            assert torch.equal(tiny(), native)
        restore(tiny.model)
        assert torch.equal(tiny(), native)
    assert all(tiny.model.get_submodule(name).processor is native for name, native in originals.items())


@pytest.mark.compatibility("torch.compile", "works", "in one graph, `disabled` and `restore` included")
@pytest.mark.parametrize("name", ["unet2d", "controlnet", "pixart", "dit"])
def test_compiles_in_one_graph(name):
    tiny = build(name)
    torch._dynamo.reset()
    with torch.no_grad():
        native = tiny()
        adapter = linearize(tiny.model)
        stir(adapter)
        expected = tiny()
        compiled = torch.compile(tiny.model, fullgraph=True, backend="eager", dynamic=False)
        torch.testing.assert_close(tiny(compiled), expected, rtol=1e-4, atol=1e-5)
        if name == "pixart":
            turned = tiny(**tiny.turned())
            torch.testing.assert_close(tiny(compiled, **tiny.turned()), turned, rtol=1e-4, atol=1e-5)
        with adapter.disabled():
            torch.testing.assert_close(tiny(compiled), native, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tiny(compiled), expected, rtol=1e-4, atol=1e-5)
        restore(compiled)
        torch.testing.assert_close(tiny(compiled), native, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sdxl", "svd"])
def test_compiles_in_one_graph_large(name):
    tiny = build(name)
    torch._dynamo.reset()
    with torch.no_grad():
        stir(linearize(tiny.model))
        compiled = torch.compile(tiny.model, fullgraph=True, backend="eager", dynamic=False)
        torch.testing.assert_close(tiny(compiled), tiny(), rtol=1e-4, atol=1e-5)


@pytest.mark.compatibility("torch.compile", "works", "with gradients and checkpointing")
@pytest.mark.parametrize("name", ["sd15", "pixart"])
def test_compiled_and_checkpointed_gradients(name):
    tiny = build(name)
    adapter = linearize(tiny.model)
    stir(adapter)
    assert_compiled_gradients(tiny, adapter)


@pytest.mark.compatibility("torch.compile", "works", "a compiled model can be converted")
def test_a_compiled_model_can_be_converted(tmp_path):
    tiny = build("pixart")
    torch._dynamo.reset()
    compiled = torch.compile(tiny.model, backend="eager")
    with torch.no_grad():
        native = tiny(compiled)
        adapter = linearize(compiled)
        stir(adapter)
        assert adapter.model is tiny.model
        torch.testing.assert_close(tiny(compiled), tiny(), rtol=1e-4, atol=1e-5)
        with adapter.disabled():
            torch.testing.assert_close(tiny(compiled), native, rtol=1e-4, atol=1e-5)


@pytest.mark.compatibility("accelerate", "works", "`prepare` after; `restore` through its wrapper")
def test_wrapped_by_accelerate():
    tiny = build("sd15")
    with torch.no_grad():
        native = tiny()
        adapter = linearize(tiny.model)
        stir(adapter)
        converted = tiny()
        accelerator = Accelerator(cpu=True)
        wrapped = accelerator.prepare(tiny.model)
        assert torch.equal(tiny(wrapped), converted)
        with adapter.disabled():
            assert torch.equal(tiny(wrapped), native)
        restore(wrapped)
        assert torch.equal(tiny(wrapped), native)


@pytest.mark.compatibility("Sequential offload", "order matters", "convert first; later is refused")
def test_sequential_offload():
    tiny = build("sd15")
    with torch.no_grad():
        adapter = linearize(tiny.model)
        stir(adapter)
        converted = tiny()
        cpu_offload(tiny.model, execution_device=torch.device("cpu"), offload_buffers=False)
        assert all(parameter.is_meta for parameter in adapter.parameters())
        assert torch.equal(tiny(), converted)
    late = build("sd15")
    cpu_offload(late.model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded layer by layer: convert before"):
        linearize(late.model)


def test_an_optimizer_step_lowers_the_distance_to_the_original():
    tiny = build("sd15")
    adapter = linearize(tiny.model, AdapterConfig(mixer=FocusedLinearConfig(kernel_size=3)))
    tiny.model.requires_grad_(False)
    adapter.requires_grad_()
    losses = train_towards_original(tiny, adapter, steps=6)
    assert losses[-1] < losses[0]
    twin = copy.deepcopy(tiny.model)
    assert torch.equal(tiny(twin), tiny())
