"""Tiny random text-to-image pipelines of the four families that have an image-to-image sibling, and their state."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from transformers import CLIPTextModelWithProjection

from ..distill.tiny import sharpen, tiny_flux, tiny_pipeline, tiny_sd3

PROMPT = "a red circle"


def tiny_sdxl() -> diffusers.StableDiffusionXLPipeline:
    """Two text encoders, sizes as conditions; the autoencoder of `tiny_pipeline`."""
    torch.manual_seed(0)
    base = tiny_pipeline()
    config = base.text_encoder.config
    config.projection_dim = 12
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=48,
        attention_head_dim=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
    )
    sharpen(unet)
    return diffusers.StableDiffusionXLPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(config).eval(),
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer,
        unet=unet.eval(),
        scheduler=base.scheduler,
        add_watermarker=False,
    )


def build(name: str) -> Any:
    """The tiny pipeline `name`: 32 x 32 pixels natively or more, its bars off."""
    makers = {"sd": tiny_pipeline, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
    pipeline = makers[name]()
    if name in ("sd3", "flux"):
        pipeline.vae.register_to_config(shift_factor=0.1)
    if name == "flux":  # axes of rows and columns as wide as each other, as in the real one
        config = {**pipeline.transformer.config, "axes_dims_rope": (4, 6, 6)}
        torch.manual_seed(0)
        pipeline.transformer = diffusers.FluxTransformer2DModel.from_config(config).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = ("sd", "sdxl", "sd3", "flux")


def state_of(pipeline: Any) -> list[Any]:
    """What a drawing must leave as it was: objects by identity, switches and configurations by value."""
    found: list[Any] = [id(part) for part in pipeline.components.values()]
    found += [dict(pipeline.config), dict(vars(pipeline.scheduler)), dict(pipeline.scheduler.config)]
    for part in (pipeline.vae, getattr(pipeline, "unet", None) or pipeline.transformer):
        for name, module in part.named_modules():
            plain = {key: value for key, value in vars(module).items() if not key.startswith("_")}
            hooks = [dict(module._forward_pre_hooks), dict(module._forward_hooks)]
            found.append((name, {key: repr(value) for key, value in plain.items()}, id(plain.get("processor")), hooks))
    return found
