"""Pipelines, schedulers and what changes a run: converted, native inside `disabled()`, and native again after."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from flatten_diffusion import AdapterConfig, linearize, restore

from ..models.tiny import build, stir
from .test_interplay import _draw, _parts

SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check(pipe: Any, draw: Callable[[], torch.Tensor]) -> None:
    native = draw()
    adapter = linearize(pipe)
    stir(adapter)
    converted = draw()
    assert converted.isfinite().all() and not torch.equal(converted, native)
    assert torch.equal(draw(), converted)
    with adapter.disabled():
        assert torch.equal(draw(), native)
    restore(pipe)
    assert torch.equal(draw(), native)


@pytest.mark.compatibility("Schedulers", "works", "DDIM, DDPM, DPM-Solver++, Euler, Euler a, Heun, LCM, PNDM, UniPC")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str) -> None:
    pipe = quiet(diffusers.StableDiffusionPipeline(**_parts()))
    options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}  # which want more steps than two
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    check(pipe, lambda: _draw(pipe))


@pytest.mark.compatibility("Inversion", "works", "DDIMInverseScheduler")
def test_inversion() -> None:
    pipe = quiet(diffusers.StableDiffusionPipeline(**_parts()))
    pipe.scheduler = diffusers.DDIMInverseScheduler.from_config(pipe.scheduler.config)
    latents = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(1))
    check(pipe, lambda: _draw(pipe, latents=latents))


def edit(pipe: Any, **arguments: Any) -> torch.Tensor:
    """As `_draw`, for pipelines that take their size from an image."""
    torch.manual_seed(3)
    images: torch.Tensor = pipe(
        prompt_embeds=torch.randn(1, 7, 24),
        negative_prompt_embeds=torch.randn(1, 7, 24),
        num_inference_steps=3,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **arguments,
    ).images
    return images


@pytest.mark.compatibility("img2img", "works", "")
def test_image_to_image() -> None:
    pipe = quiet(diffusers.StableDiffusionImg2ImgPipeline(**_parts()))
    image = torch.rand(1, 3, 16, 24)
    check(pipe, lambda: edit(pipe, image=image, strength=0.7))


@pytest.mark.compatibility("Inpainting", "works", "")
def test_inpainting() -> None:
    pipe = quiet(diffusers.StableDiffusionInpaintPipeline(**_parts()))
    image, mask = torch.rand(1, 3, 16, 24), torch.zeros(1, 1, 16, 24)
    mask[..., 8:] = 1
    check(pipe, lambda: edit(pipe, image=image, mask_image=mask, strength=1.0, height=16, width=24))


@pytest.mark.compatibility("T2I-Adapter", "works", "")
def test_t2i_adapter() -> None:
    torch.manual_seed(2)
    control = diffusers.T2IAdapter(in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=1).eval()
    parts = _parts()
    pipe = quiet(diffusers.StableDiffusionAdapterPipeline(**parts, adapter=control))
    image = torch.rand(1, 3, 16, 24)
    check(pipe, lambda: _draw(pipe, image=image))


@pytest.mark.compatibility("FreeU", "works", "before, after, off again")
def test_freeu() -> None:
    pipe = quiet(diffusers.StableDiffusionPipeline(**_parts()))
    plain = _draw(pipe)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    check(pipe, lambda: _draw(pipe))
    pipe.disable_freeu()
    assert torch.equal(_draw(pipe), plain)


@pytest.mark.compatibility("Interrupted pipelines", "works", "`pipe._interrupt`, exceptions from callbacks")
def test_interrupts() -> None:
    pipe = quiet(diffusers.StableDiffusionPipeline(**_parts()))
    native = _draw(pipe)
    adapter = linearize(pipe)
    stir(adapter)
    converted = _draw(pipe)

    def stop(pipeline: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        pipeline._interrupt = True
        return state

    def fail(pipeline: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        raise KeyboardInterrupt

    assert not torch.equal(_draw(pipe, callback_on_step_end=stop), converted)
    with pytest.raises(KeyboardInterrupt), adapter.disabled():
        _draw(pipe, callback_on_step_end=fail)
    assert torch.equal(_draw(pipe), converted)
    restore(pipe)
    assert torch.equal(_draw(pipe), native)


@pytest.mark.compatibility("Modular pipelines", "works", "pass the pipeline, or its component")
def test_a_modular_pipeline() -> None:
    if not hasattr(diffusers, "ModularPipelineBlocks"):
        pytest.skip("this diffusers has no modular pipelines")
    from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam

    class Denoise(diffusers.ModularPipelineBlocks):
        @property
        def expected_components(self) -> list[Any]:
            return [ComponentSpec("unet", diffusers.UNet2DConditionModel)]

        @property
        def inputs(self) -> list[Any]:
            return [InputParam("sample", required=True), InputParam("encoder_hidden_states", required=True)]

        @property
        def intermediate_outputs(self) -> list[Any]:
            return [OutputParam("noise", type_hint=torch.Tensor)]

        @torch.no_grad()
        def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
            block = self.get_block_state(state)
            block.noise = components.unet(block.sample, 5, block.encoder_hidden_states).sample
            self.set_block_state(state, block)
            return components, state

    tiny = build("sd15")
    pipe = Denoise().init_pipeline()
    pipe.update_components(unet=tiny.model)
    inputs = {name: tiny.inputs[name] for name in ("sample", "encoder_hidden_states")}
    check(pipe, lambda: pipe(**inputs, output="noise"))


def _lora(model: Any, name: str = "default", dora: bool = False) -> None:
    from peft import LoraConfig

    torch.manual_seed(5)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, use_dora=dora)
    model.add_adapter(config, adapter_name=name)


@pytest.mark.compatibility("DoRA", "works", "load it before or after; `merge` refuses while it is loaded")
def test_dora_before_and_after() -> None:
    pytest.importorskip("peft")
    first, last = build("sd15"), build("sd15")
    _lora(first.model, dora=True)
    config = AdapterConfig(deltas=("q", "out"), delta_rank=2)
    adapters = [linearize(first.model, config), linearize(last.model, config)]
    for adapter in adapters:
        stir(adapter)
    with torch.no_grad():
        without = last()
        _lora(last.model, dora=True)
        assert torch.equal(first(), last()) and not torch.equal(last(), without)
        before = {key: tensor.clone() for key, tensor in last.model.state_dict().items()}
        with pytest.raises(ValueError, match=r"scales the weight \(DoRA, IA3\)"):
            adapters[1].merge()
        assert all(torch.equal(tensor, before[key]) for key, tensor in last.model.state_dict().items())
        last.model.delete_adapters("default")
        adapters[1].merge()
        torch.testing.assert_close(last(), without, rtol=1e-3, atol=1e-4)


@pytest.mark.compatibility("LoRA", "works", "of any name, from files too: no warning about the adapter's own tensors")
@pytest.mark.parametrize("name", ["v", "mid", "mixer", "down", "up"])
def test_a_lora_of_any_name_loads_without_a_warning(
    name: str, tmp_path: Any, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("peft")
    source, tiny, plain = build("sd15"), build("sd15"), build("sd15")
    if not hasattr(source.model, "save_lora_adapter"):
        pytest.skip("this diffusers saves no LoRA of a model")
    _lora(source.model, "x")
    source.model.save_lora_adapter(tmp_path, adapter_name="x", safe_serialization=True)
    adapter = linearize(tiny.model, AdapterConfig(deltas=("q", "k", "v", "out"), delta_rank=2))
    keys = [key for key, _ in adapter.named_parameters()]
    recwarn.clear()
    caplog.clear()
    weights = "pytorch_lora_weights.safetensors"
    tiny.model.load_lora_adapter(tmp_path, prefix=None, adapter_name=name, weight_name=weights)
    # Loaded from the same file: diffusers 0.33.1 does not read back all that it was given.
    plain.model.load_lora_adapter(tmp_path, prefix=None, adapter_name=name, weight_name=weights)
    said = [str(warning.message) for warning in recwarn] + [r.getMessage() for r in caplog.records]
    assert not [text for text in said if "flatten" in text or "unexpected" in text.lower() or "missing" in text.lower()]
    with torch.no_grad():
        loaded = tiny()
        with adapter.disabled():
            torch.testing.assert_close(tiny(), plain())
        tiny.model.delete_adapters(name)
        assert not torch.equal(tiny(), loaded)
    assert [key for key, _ in adapter.named_parameters()] == keys


@pytest.mark.compatibility(
    "ControlNetModel.from_unet",
    "refused",
    "of a converted UNet (torch names its `flatten_mixer` keys): `restore` first",
)
def test_a_controlnet_from_a_unet() -> None:
    tiny = build("sd15")
    before = copy.deepcopy(tiny.model.state_dict())
    adapter = linearize(tiny.model)
    with pytest.raises(RuntimeError, match="Unexpected key.*flatten_mixer"):
        diffusers.ControlNetModel.from_unet(tiny.model)
    with torch.no_grad():
        assert tiny().isfinite().all()
    assert adapter.report().converted
    restore(tiny.model)
    control = diffusers.ControlNetModel.from_unet(tiny.model)
    assert linearize(control).report().converted
    assert all(torch.equal(tensor, before[key]) for key, tensor in tiny.model.state_dict().items())
