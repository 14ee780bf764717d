"""Builds the joint-attention scenes pipeline with random weights: Stable Diffusion 3's classes, small."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.embeddings import get_2d_sincos_pos_embed_from_grid
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from .build import build_tokenizer, build_vae, text_config
from .latents import LATENT_CHANNELS

_MAX_GRID = 64  # tokens a side that have a position: 512 pixels


def build_sd3_pipeline(resolution: int, position_spacing: float = 1.0) -> StableDiffusion3Pipeline:
    """The whole pipeline, untrained, without a T5 encoder; `resolution` in pixels is its native side.

    Args:
        resolution: a multiple of 32.
        position_spacing: see `build_transformer`.
    """
    tokenizer = build_tokenizer()
    config = text_config(tokenizer)
    return StableDiffusion3Pipeline(
        transformer=build_transformer(resolution, config, position_spacing),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        vae=build_vae(resolution),
        text_encoder=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def build_transformer(resolution: int, text: CLIPTextConfig, position_spacing: float = 1.0) -> SD3Transformer2DModel:
    """Six joint blocks of four heads of 48 channels, a token per latent pixel, query and key normalised.

    Args:
        resolution: native picture side in pixels; the tokens' grid has `resolution` / 8 rows and columns.
        text: configuration of each of the two text encoders.
        position_spacing: between the positions of neighbouring tokens. Trained at half the size with twice the
            spacing, a model sees the same range of positions, and can be gone on from at the whole size.
    """
    transformer = SD3Transformer2DModel(
        sample_size=resolution // 8,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=6,
        attention_head_dim=48,
        num_attention_heads=4,
        joint_attention_dim=2 * text.hidden_size,
        caption_projection_dim=192,
        pooled_projection_dim=2 * text.projection_dim,
        pos_embed_max_size=_MAX_GRID,
        qk_norm="rms_norm",
    )
    positions = (torch.arange(_MAX_GRID) - (_MAX_GRID - 1) / 2) * position_spacing
    grid = torch.stack(torch.meshgrid(positions, positions, indexing="xy"))
    embedding = get_2d_sincos_pos_embed_from_grid(transformer.inner_dim, grid, output_type="pt")
    transformer.pos_embed.pos_embed.copy_(embedding[None])
    # Blocks start as the identity (Peebles & Xie, ICCV 2023, section 3.2), which diffusers leaves to the trainer.
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and (".norm1" in name or name.startswith(("norm_out", "proj_out"))):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return transformer
