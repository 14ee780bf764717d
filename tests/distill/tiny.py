"""A tiny random text-to-image pipeline of the real classes, and what the distillation tests make from it."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from eval.experiments.scenes_build import build_tokenizer
from flatten_diffusion.distill import CacheSettings, LatentCache, build_cache, prompts_as_examples

CAPTIONS = ("a red circle", "a blue square", "two green stars", "a cross", "a pink ring", "a mirrored pair")


def tiny_pipeline(prediction_type: str = "epsilon", seed: int = 0) -> StableDiffusionPipeline:
    """32 x 32 pixels natively, 4x autoencoder with 4 channels, attention at 8 x 8 and 4 x 4 tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = deepcopy(_tokenizer())
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                block_out_channels=(8, 8, 8),
                latent_channels=4,
                norm_num_groups=4,
                sample_size=32,
                scaling_factor=0.5,
            ),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=24,
                    intermediate_size=32,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    max_position_embeddings=24,
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            ),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(16, 32),
                layers_per_block=1,
                norm_num_groups=8,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=24,
                attention_head_dim=2,
            ),
            scheduler=DDIMScheduler(
                prediction_type=prediction_type, clip_sample=False, steps_offset=1, set_alpha_to_one=False
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        sharpen(pipeline.unet)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@cache
def _tokenizer() -> Any:
    """Trained once: another training may number its tokens otherwise."""
    return build_tokenizer()


def tiny_sd3(dual: bool = False) -> diffusers.StableDiffusion3Pipeline:
    """Flow matching, joint attention (`dual`: and a second over the image), two CLIP text encoders, no T5; the
    autoencoder of `tiny_pipeline`."""
    torch.manual_seed(0)
    base = tiny_pipeline()
    config = base.text_encoder.config
    config.projection_dim = 12
    encoders = [CLIPTextModelWithProjection(config).eval() for _ in range(2)]
    return diffusers.StableDiffusion3Pipeline(
        vae=base.vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        text_encoder_3=None,
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer,
        tokenizer_3=None,
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_layers=1,
            dual_attention_layers=(0,) if dual else (),
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=56,
            caption_projection_dim=16,
            pooled_projection_dim=24,
            out_channels=4,
            pos_embed_max_size=16,
        ).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def tiny_flux() -> diffusers.FluxPipeline:
    """Packed latents, rotary positions, guidance as an input; CLIP and T5."""
    torch.manual_seed(0)
    base = tiny_pipeline()
    t5 = T5Config(vocab_size=40, d_model=24, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipeline = diffusers.FluxPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=tiny_t5_tokenizer(),
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=24,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_aura_flow() -> diffusers.AuraFlowPipeline:
    """Joint attention with registers; a model class whose conditioning no row describes."""
    torch.manual_seed(0)
    t5 = UMT5Config(vocab_size=40, d_model=24, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipeline = diffusers.AuraFlowPipeline(
        tokenizer=tiny_t5_tokenizer(),
        text_encoder=UMT5EncoderModel(t5).eval(),
        vae=tiny_pipeline().vae,
        transformer=diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            caption_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=256,
        ).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_t5_tokenizer() -> T5Tokenizer:
    letters = [(letter, -2.0) for letter in "abcdefghijklmnopqrstuvwxyz\u2581"]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0)


def sharpen(model: Any, factor: float = 4.0) -> None:
    """Queries and keys grown, so that the random softmax differs from a plain mean."""
    for name, parameter in model.named_parameters():
        if "attn1.to_q" in name or "attn1.to_k" in name:
            parameter.data *= factor


def drawn_cache(
    pipeline: Any, folder: Path, count: int = 24, buckets: tuple[tuple[int, int], ...] = ((32, 32),)
) -> LatentCache:
    """Examples that the pipeline drew in one step."""
    examples = prompts_as_examples([CAPTIONS[i % len(CAPTIONS)] for i in range(count)])
    settings = CacheSettings(buckets, draw_steps=1, shard_size=8, batch_size=8)
    return build_cache(pipeline, pipeline.unet, examples, folder, settings)
