from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from PIL import Image
from transformers import CLIPTextModelWithProjection

from flatten_diffusion import linearize
from flatten_diffusion.distill import CacheSettings, Diffusion, NoisyBatches, build_cache, image_folder
from flatten_diffusion.distill.conditioning import encode_prompts, family_of, pack_latents, predict, unpack_latents
from flatten_diffusion.distill.equal_tokens import counted_last_key, merge_zeros, repeat_last
from flatten_diffusion.distill.latents import check_pipeline, pixels_per_token_step
from flatten_diffusion.models.attention import heads_first_product

from ..models.tiny import build
from .tiny import tiny_pipeline, tiny_sd3


@pytest.mark.parametrize("name", ["sd15", "sdxl", "unet2d", "dit", "pixart"])
def test_predict_is_the_models_own_call(name: str) -> None:
    tiny = build(name)
    inputs: dict[str, Any] = dict(tiny.inputs)
    noisy = inputs.pop(tiny.picture)
    timesteps = inputs.pop("timestep").expand(len(noisy))
    conditioning = {**inputs.pop("added_cond_kwargs", {}), **inputs}
    conditioning = {key: value for key, value in conditioning.items() if value is not None}
    with torch.no_grad():
        expected = tiny.model(**{**tiny.inputs, "timestep": timesteps}, return_dict=False)[0]
        assert torch.equal(predict(tiny.model, tiny.model, noisy, timesteps, conditioning), expected)


def test_flux_tokens_are_the_pipelines_own() -> None:
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()
    noisy, timesteps = torch.randn(2, 4, 8, 12), torch.tensor([200.0, 700.0])
    conditioning = {"encoder_hidden_states": torch.randn(2, 7, 24), "pooled_projections": torch.randn(2, 20)}
    packed = diffusers.FluxPipeline._pack_latents(noisy, 2, 4, 8, 12)
    positions = diffusers.FluxPipeline._prepare_latent_image_ids(2, 4, 6, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        tokens = model(
            hidden_states=packed,
            timestep=timesteps / 1000,
            guidance=torch.tensor([3.5, 3.5]),
            img_ids=positions,
            txt_ids=torch.zeros(7, 3),
            return_dict=False,
            **conditioning,
        )[0]
        expected = diffusers.FluxPipeline._unpack_latents(tokens, 64, 96, 8)
        assert torch.equal(predict(model, model, noisy, timesteps, conditioning), expected)
    assert torch.equal(unpack_latents(pack_latents(noisy), (4, 6)), noisy)


def test_sd3_prompts_and_call() -> None:
    pipeline = tiny_sd3()
    encoded = encode_prompts(pipeline, pipeline.transformer, ["a red circle", ""], (32, 48))
    with torch.no_grad():
        embeddings, negative, pooled, negative_pooled = pipeline.encode_prompt("a red circle", None, None)
    whole = torch.cat([embeddings, negative])
    counts = encoded.pop("last_token_counts")
    assert counts.tolist() == [256, 256] and encoded["encoder_hidden_states"].shape[1] == whole.shape[1] - 255
    assert torch.allclose(repeat_last(encoded["encoder_hidden_states"], counts), whole, atol=1e-5)
    assert torch.allclose(encoded["pooled_projections"], torch.cat([pooled, negative_pooled]), atol=1e-5)


@pytest.mark.parametrize("kind", ["original", "converted", "disabled", "dual"])
def test_an_equal_token_counts_as_often_as_it_stands_there(kind: str) -> None:
    pipeline = tiny_sd3(dual=kind == "dual")
    model = pipeline.transformer
    encoded = encode_prompts(pipeline, model, ["a red circle", ""], (32, 48))
    counted = kind in ("converted", "disabled")
    adapter = None if kind == "original" else linearize(model)
    noisy, timesteps = torch.randn(2, 4, 8, 12), torch.tensor([300.0, 900.0])
    whole = repeat_last(encoded["encoder_hidden_states"], encoded["last_token_counts"])
    seen: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    with torch.no_grad(), nullcontext() if adapter is None or kind != "disabled" else adapter.disabled():
        found = predict(model, model, noisy, timesteps, encoded)
        handle.remove()
        pooled = encoded["pooled_projections"]
        expected = model(noisy, whole, pooled, timesteps, return_dict=False)[0]
        wrong = model(noisy, encoded["encoder_hidden_states"], pooled, timesteps, return_dict=False)[0]
    assert seen == [whole.shape[1] - 255 * counted]
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(wrong, expected, atol=1e-3)


def test_a_counted_token_is_counted_again_when_checkpointing_recomputes() -> None:
    pipeline = tiny_sd3()
    model = pipeline.transformer.requires_grad_(False)
    encoded = encode_prompts(pipeline, model, ["a red circle", ""], (32, 48))
    adapter = linearize(model)
    noisy, timesteps = torch.randn(2, 4, 8, 12), torch.tensor([300.0, 900.0])
    whole = dict(encoded)
    counts = whole.pop("last_token_counts")
    whole["encoder_hidden_states"] = repeat_last(encoded["encoder_hidden_states"], counts)

    def gradients(conditioning: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        loss = predict(model, model, noisy, timesteps, conditioning).square().sum()
        return list(torch.autograd.grad(loss, list(adapter.parameters())))

    model.train()
    expected = gradients(whole)
    model.enable_gradient_checkpointing()
    for ours, theirs in zip(gradients(encoded), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(expected[0].abs().max()))


@pytest.mark.parametrize("filled", [0, 1, 4, 5])
def test_zero_tokens_at_the_end_become_one(filled: int) -> None:
    embeddings = torch.zeros(3, 5, 2)
    embeddings[1, :filled] = 1.0  # the longest of the batch decides
    merged, counts = merge_zeros(embeddings)
    assert merged.shape[1] == min(filled + 1, 5)
    assert torch.equal(repeat_last(merged, counts), embeddings)


def test_a_mask_of_ones_own_cannot_be_counted() -> None:
    model = tiny_sd3().transformer
    adapter = linearize(model)
    query, attn = torch.randn(1, 2, 3, 8), model.transformer_blocks[0].attn
    refused = pytest.raises(RuntimeError, match="transformer_blocks.0.attn: a masked attention .* feed all tokens")
    with counted_last_key(model, torch.tensor([4])), adapter.disabled(), refused:
        heads_first_product(attn, query, query, query, torch.zeros(3, 3))


def test_stable_diffusion_prompts() -> None:
    pipeline = tiny_pipeline()
    encoded = encode_prompts(pipeline, pipeline.unet, ["a red circle", ""], (32, 32))["encoder_hidden_states"]
    assert torch.equal(encoded[:1], pipeline.encode_prompt("a red circle", "cpu", 1, False)[0])
    assert torch.equal(encoded[1:], pipeline.encode_prompt("", "cpu", 1, False)[0])


@pytest.mark.parametrize("force_zeros", [True, False])
def test_sdxl_prompts(force_zeros: bool) -> None:
    base = tiny_pipeline()
    config = base.text_encoder.config
    config.projection_dim = 24
    encoders = [CLIPTextModelWithProjection(config).eval() for _ in range(2)]
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=base.vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer,
        unet=build("sdxl").model,
        scheduler=base.scheduler,
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )
    encoded = encode_prompts(pipeline, pipeline.unet, ["a red circle", ""], (32, 48))
    with torch.no_grad():
        embeddings, negative, pooled, negative_pooled = pipeline.encode_prompt("a red circle", device="cpu")
    assert torch.allclose(encoded["encoder_hidden_states"], torch.cat([embeddings, negative]), atol=1e-5)
    assert torch.allclose(encoded["text_embeds"], torch.cat([pooled, negative_pooled]), atol=1e-5)
    assert encoded["time_ids"].tolist() == [[32, 48, 0, 0, 32, 48]] * 2


def unet_like(unet: Any, **changes: Any) -> diffusers.UNet2DConditionModel:
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    return diffusers.UNet2DConditionModel(**{**config, **changes})


def test_guidance_of_a_latent_consistency_model_is_its_pipelines() -> None:
    pipeline = tiny_pipeline()
    unet = unet_like(pipeline.unet, time_cond_proj_dim=8).eval()
    scheduler = diffusers.LCMScheduler.from_config(pipeline.scheduler.config)
    parts = {**pipeline.components, "unet": unet, "scheduler": scheduler, "safety_checker": None}
    pipeline = diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    calls: list[dict[str, Any]] = []
    handle = unet.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append({**kwargs, "args": args}), with_kwargs=True
    )
    pipeline("a red circle", height=32, width=32, num_inference_steps=1, output_type="latent")
    handle.remove()
    encoded = encode_prompts(pipeline, unet, ["a red circle"], (32, 32))
    assert torch.equal(encoded["timestep_cond"], calls[0]["timestep_cond"])
    noisy, timesteps = calls[0]["args"]
    with torch.no_grad():
        expected = unet(noisy, timesteps, **{key: calls[0][key] for key in encoded}).sample
        assert torch.equal(predict(unet, unet, noisy, timesteps[None], encoded), expected)
        assert not torch.equal(unet(noisy, timesteps, encoded["encoder_hidden_states"]).sample, expected)


def test_classes_of_a_unet_without_text(tmp_path: Path) -> None:
    unet = diffusers.UNet2DModel(
        sample_size=8,
        num_class_embeds=5,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    noisy, timesteps = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    encoded = encode_prompts(pipeline, unet, ["4", "0"], (8, 8))
    with torch.no_grad():
        expected = unet(noisy, timesteps, class_labels=torch.tensor([4, 0])).sample
        assert torch.equal(predict(unet, unet, noisy, timesteps, encoded), expected)
    for bad in ("5", "", "cat"):
        with pytest.raises(ValueError, match="no class of this model"):
            encode_prompts(pipeline, unet, [bad], (8, 8))
    # It has no empty class: what a dropped caption leaves is the sample's own.
    for index in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(str(index))
    cache = build_cache(pipeline, unet, image_folder(tmp_path), tmp_path / "cache", CacheSettings(((8, 8),)))
    settings: dict[str, Any] = {"seed": 0, "stage": "test", "caption_dropout": 1.0}
    batch = next(iter(NoisyBatches(cache, Diffusion(pipeline.scheduler), 4, range(1), **settings)))
    assert sorted(batch.conditioning["class_labels"].tolist()) == [0, 1, 2, 3]


def test_unconditional_models_train_on_images_alone(tmp_path: Path) -> None:
    unet = build("unet2d").model
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    cache = build_cache(pipeline, unet, image_folder(tmp_path), tmp_path / "cache", CacheSettings(((8, 8),)))
    batch = next(iter(NoisyBatches(cache, Diffusion(pipeline.scheduler), 2, range(1), seed=0, stage="test")))
    assert batch.conditioning == {} and len(batch) == 2


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionInpaintPipeline",
        "StableDiffusionInstructPix2PixPipeline",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionUpscalePipeline",
        "FluxControlPipeline",
        "FluxFillPipeline",
    ],
)
def test_pipelines_that_need_more_than_a_prompt_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} cannot be distilled: it takes .* text-to-image"):
        check_pipeline(getattr(diffusers, name))


def test_pipelines_that_need_no_more_pass() -> None:
    for cls in (*AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values(), diffusers.DiTPipeline, diffusers.WanPipeline):
        if not {"ControlNet", "Control"} & set(re.findall("ControlNet|Control", cls.__name__)):
            check_pipeline(cls)


def test_a_unet_with_classes_is_fed_by_its_pipeline() -> None:
    unet = tiny_pipeline().unet
    assert not family_of(unet).recorded
    for more in ({"num_class_embeds": 4}, {"class_embed_type": "timestep"}, {"addition_embed_type": "text"}):
        with torch.device("meta"):
            assert family_of(unet_like(unet, **more)).recorded


def test_classes() -> None:
    model = build("dit").model
    pipeline = diffusers.DiTPipeline(
        transformer=model, vae=tiny_pipeline().vae, scheduler=tiny_pipeline().scheduler, id2label={3: "cat, house cat"}
    )
    assert encode_prompts(pipeline, model, ["7", "cat", ""], (8, 8))["class_labels"].tolist() == [7, 3, 10]
    with pytest.raises(ValueError, match="'dragon'"):
        encode_prompts(pipeline, model, ["dragon"], (8, 8))


def test_unknown_models_are_named() -> None:
    with pytest.raises(ValueError, match="UNet2DModel cannot be distilled"):
        model = build("unet2d").model
        model.register_to_config(class_embed_type="timestep")
        family_of(model)
    with pytest.raises(ValueError, match="ControlNetModel cannot be distilled"):
        family_of(build("controlnet").model)


def test_sizes_that_a_model_takes() -> None:
    pipeline = tiny_pipeline()
    assert pixels_per_token_step(pipeline, pipeline.unet) == 4 * 2  # 4x autoencoder, two levels
    unconditional = diffusers.DDPMPipeline(build("unet2d").model, pipeline.scheduler)
    assert pixels_per_token_step(unconditional, unconditional.unet) == 2
