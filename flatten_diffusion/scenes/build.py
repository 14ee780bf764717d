"""Builds the scenes pipelines with random weights: real diffusers classes, small enough to train on two CPU cores."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .grammar import vocabulary
from .latents import LATENT_CHANNELS

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

ARCHITECTURES = ("unet", "sd3")
"""What a scenes pipeline can be built like: Stable Diffusion, or Stable Diffusion 3."""
_MAX_TOKENS = 24
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which each word of the grammar is one token (and any other word falls back to letters)."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=_EOS))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[_BOS, _EOS],
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator([*vocabulary(), *letters], trainer)
    trained = json.loads(bpe.to_str())["model"]
    vocab = trained["vocab"]
    for letter in letters:
        vocab.setdefault(letter + "</w>", len(vocab))
    merges = [tuple(pair.split()) if isinstance(pair, str) else tuple(pair) for pair in trained["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=_MAX_TOKENS, pad_token=_EOS)


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Of a three-layer CLIP text model for the grammar's captions; output [B, 24, 128]."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        projection_dim=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=_MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_vae(resolution: int) -> AutoencoderKL:
    """An 8× autoencoder for the latents of `picture_latents`; `resolution` in pixels is what it is meant for."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=resolution,
        scaling_factor=1.0,
        shift_factor=0.0,
        mid_block_add_attention=False,
    )


def build_unet(resolution: int, latent_channels: int = LATENT_CHANNELS) -> UNet2DConditionModel:
    """A three-level Stable-Diffusion-type UNet with heads of 32 channels; native latents are `resolution` / 8."""
    return UNet2DConditionModel(
        sample_size=resolution // 8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        layers_per_block=1,
        norm_num_groups=16,
        block_out_channels=(64, 128, 192),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=(2, 4, 6),
        use_linear_projection=True,
    )


def build_scheduler() -> DDIMScheduler:
    """v-prediction with zero terminal SNR, so that black and white backgrounds come out right."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def build_pipeline(
    resolution: int = 128, seed: int = 0, architecture: str = "unet", position_spacing: float = 1.0
) -> StableDiffusionPipeline | StableDiffusion3Pipeline:
    """The whole text-to-image pipeline, untrained, float32 on CPU.

    Args:
        resolution: native picture side in pixels, a multiple of 32.
        seed: of the random weights.
        architecture: one of `ARCHITECTURES`: "unet" has Stable Diffusion's classes, "sd3" those of Stable Diffusion 3.
        position_spacing: of "sd3", see `build_sd3.build_transformer`.

    Raises:
        ValueError: `resolution` is not a positive multiple of 32, or an unknown architecture.
    """
    if resolution <= 0 or resolution % 32:
        raise ValueError(f"resolution {resolution} is not a positive multiple of 32: the UNet halves the latents twice")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r} is unknown: use {' or '.join(ARCHITECTURES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "sd3":
            from .build_sd3 import build_sd3_pipeline

            return build_sd3_pipeline(resolution, position_spacing)
        tokenizer = build_tokenizer()
        return StableDiffusionPipeline(
            vae=build_vae(resolution),
            text_encoder=CLIPTextModel(text_config(tokenizer)),
            tokenizer=tokenizer,
            unet=build_unet(resolution),
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def export_pipeline(pipeline: DiffusionPipeline, folder: str | os.PathLike[str]) -> None:
    """Write a pipeline for shipping: float16 weights, and vocabulary files that transformers 4 reads as well.

    Args:
        pipeline: left as it is.
        folder: replaced whole, once everything is written.
    """
    target = Path(folder)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    modules = {name for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    parts = {name: copy.deepcopy(part).half() if name in modules else part for name, part in _parts(pipeline).items()}
    type(pipeline)(**parts).save_pretrained(partial, safe_serialization=True)
    for name in sorted(modules):
        if name.startswith("text_encoder"):
            _write_for_transformers_4(partial, name, getattr(pipeline, name.replace("text_encoder", "tokenizer")))
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _parts(pipeline: DiffusionPipeline) -> dict[str, Any]:
    parts = dict(pipeline.components)
    if "requires_safety_checker" in pipeline.config:
        parts["requires_safety_checker"] = False
    return parts


def _write_for_transformers_4(folder: Path, text_encoder: str, tokenizer: CLIPTokenizer) -> None:
    weights = folder / text_encoder / "model.safetensors"
    tensors = load_file(weights)
    # The names that published CLIP checkpoints use; transformers 5 drops the prefix but reads both.
    named = ("text_model.", "text_projection.")
    prefixed = {key if key.startswith(named) else f"text_model.{key}": value for key, value in tensors.items()}
    save_file(prefixed, weights, metadata={"format": "pt"})
    vocabulary_folder = folder / text_encoder.replace("text_encoder", "tokenizer")
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (vocabulary_folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])]
    (vocabulary_folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
