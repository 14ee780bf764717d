"""The scenes pipelines before and after training: real diffusers classes, small enough to train on two CPU cores.

Built with random weights, started from the weights of another one, and exported as they ship.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.embeddings import get_2d_sincos_pos_embed_from_grid
from diffusers.utils import logging
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from flatten_diffusion.files import atomic_path, read_json, write_json, write_text
from flatten_diffusion.scenes.grammar import vocabulary
from flatten_diffusion.scenes.latents import LATENT_CHANNELS

logger = logging.get_logger(__name__)
ARCHITECTURES = ("unet", "sd3")
"""What a scenes pipeline can be built like: Stable Diffusion, or Stable Diffusion 3."""
_MAX_TOKENS = 24
_MAX_GRID = 64  # tokens a side that have a position: 512 pixels
# Positions belong to a size: they are built, not learned.
_BUILT = ("pos_embed.pos_embed",)
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
    """An 8× autoencoder for the latents of `image_latents`; `resolution` in pixels is what it is meant for."""
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
        resolution: native image side in pixels, a multiple of 32.
        seed: of the random weights.
        architecture: one of `ARCHITECTURES`: "unet" has Stable Diffusion's classes, "sd3" those of Stable Diffusion 3.
        position_spacing: of "sd3", see `build_transformer`.

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
        resolution: native image side in pixels; the tokens' grid has `resolution` / 8 rows and columns.
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


def start_from(pipeline: Any, folder: Path) -> None:
    """Copy every weight of the pipeline in `folder` that has the name and shape of one here.

    A second text encoder starts as the first one where `folder` has only that.

    Raises:
        FileNotFoundError: `folder` holds no pipeline.
        ValueError: nothing in it fits.
    """
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder}: no pipeline to start from (no model_index.json)")
    copied = {name: _copy(part, _weights(folder, name)) for name, part in _modules(pipeline).items()}
    for name in copied:
        if name.startswith("text_encoder"):
            words = getattr(pipeline, name.replace("text_encoder", "tokenizer")).get_vocab()
            table = getattr(pipeline, name).get_input_embeddings().weight
            copied[name] += _copy_words(table, _weights(folder, name), _vocabulary(folder, name), words)
    if not any(copied.values()):
        raise ValueError(f"{folder}: none of its weights fits a {type(pipeline).__name__}")
    logger.info(
        "started from %s: %s", folder, ", ".join(f"{count} tensors of {name}" for name, count in copied.items())
    )


def _modules(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def _weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    for part in (name, "text_encoder") if name.startswith("text_encoder") else (name,):
        files = sorted((folder / part).glob("*.safetensors"))
        if files:
            return {_plain(key): tensor for file in files for key, tensor in load_file(file).items()}
    return {}


def _copy(part: torch.nn.Module, weights: dict[str, torch.Tensor]) -> int:
    copied = 0
    with torch.no_grad():
        for key, tensor in part.state_dict().items():
            source = weights.get(_plain(key))
            if key not in _BUILT and source is not None and source.shape == tensor.shape:
                tensor.copy_(source)
                copied += 1
    return copied


def _vocabulary(folder: Path, text_encoder: str) -> dict[str, int]:
    parts = (text_encoder.replace("text_encoder", "tokenizer"), "tokenizer")
    files = [path for part in parts if (path := folder / part / "vocab.json").is_file()]
    return read_json(files[0]) if files else {}


def _copy_words(
    table: torch.Tensor, weights: dict[str, torch.Tensor], theirs: dict[str, int], ours: dict[str, int]
) -> int:
    """Copy the embedding of every word both vocabularies have into `table`, where they differ; 1 if any was copied."""
    source = weights.get("embeddings.token_embedding.weight")
    shared = [word for word in ours if word in theirs]
    if source is None or not shared or theirs == ours:
        return 0
    with torch.no_grad():
        table[[ours[word] for word in shared]] = source[[theirs[word] for word in shared]].to(table.dtype)
    return 1


def _plain(key: str) -> str:
    # Text models with and without a projection, of transformers 4 and 5, differ in this prefix.
    return key.removeprefix("text_model.")


def export_pipeline(pipeline: DiffusionPipeline, folder: str | os.PathLike[str]) -> None:
    """Write a pipeline for shipping: float16, no paths of this machine, vocabulary files that transformers 4 reads too.

    `folder` is replaced whole, once everything is written.
    """
    modules = _modules(pipeline)
    parts = dict(pipeline.components)
    if "requires_safety_checker" in pipeline.config:
        parts["requires_safety_checker"] = False
    parts |= {name: copy.deepcopy(part).half() for name, part in modules.items()}
    with atomic_path(Path(folder), folder=True) as partial:
        type(pipeline)(**parts).save_pretrained(partial, safe_serialization=True)
        for config in partial.rglob("*.json"):
            values = read_json(config)
            if isinstance(values, dict) and "_name_or_path" in values:
                write_json(config, {name: value for name, value in values.items() if name != "_name_or_path"})
        for name in sorted(modules):
            if name.startswith("text_encoder"):
                _write_for_transformers_4(partial, name, getattr(pipeline, name.replace("text_encoder", "tokenizer")))


def _write_for_transformers_4(folder: Path, text_encoder: str, tokenizer: CLIPTokenizer) -> None:
    weights = folder / text_encoder / "model.safetensors"
    tensors = load_file(weights)
    # The names that published CLIP checkpoints use; transformers 5 drops the prefix but reads both.
    named = ("text_model.", "text_projection.")
    prefixed = {key if key.startswith(named) else f"text_model.{key}": value for key, value in tensors.items()}
    save_file(prefixed, weights, metadata={"format": "pt"})
    vocabulary_folder = folder / text_encoder.replace("text_encoder", "tokenizer")
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    write_text(vocabulary_folder / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
    lines = ["#version: 0.2", *(pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])]
    write_text(vocabulary_folder / "merges.txt", "\n".join(lines) + "\n")
