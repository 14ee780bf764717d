"""Images into the latents that a denoiser is trained on, and latents that the teacher draws itself."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .buckets import Size
from .conditioning import encode_prompts, family_of, unpack_latents
from .denoiser_call import draw_recorded

_MORE_THAN_A_PROMPT = frozenset(
    [
        "strength",
        "mask_image",
        "image_embeds",
        "image_guidance_scale",
        "control_image",
        "control_video",
        "controlnet_conditioning_scale",
        "reference_image",
    ]
)


def check_pipeline(cls: type) -> None:
    """Raise ValueError for pipelines that take an image, a mask or a control beside the prompt."""
    accepted = set(inspect.signature(cls.__call__).parameters)
    unet = "unet" in inspect.signature(cls).parameters  # newer transformers take optional images for reference
    found = sorted(accepted & _MORE_THAN_A_PROMPT) or (["image"] if unet and "image" in accepted else [])
    if found:
        raise ValueError(
            f"{cls.__name__} cannot be distilled: it takes {', '.join(found)} beside the prompt; load its model as a "
            "text-to-image pipeline."
        )


def pixels_per_token_step(pipeline: Any, model: nn.Module) -> int:
    """What both image sides must be a multiple of, for this pipeline's autoencoder, patches and U-Net levels."""
    config: Any = model.config
    vae = getattr(pipeline, "vae", None)
    factor = 1 if vae is None else _compression(pipeline, vae)
    levels = len(config.get("block_out_channels") or ()) if "UNet" in type(model).__name__ else 0
    packed = family_of(model).packed or family_of(model).recorded
    patch = 2 if packed else int(config.get("patch_size") or 1)
    return factor * patch * 2 ** max(levels - 1, 0)


def _compression(pipeline: Any, vae: Any) -> int:
    names = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
    stated = next((getattr(pipeline, name) for name in names if hasattr(pipeline, name)), None)
    return int(stated) if stated is not None else 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def encode_images(pipeline: Any, pixels: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] in [-1, 1] -> scaled latents [B, C, h, w], float32 on CPU; the pixels where there is no VAE."""
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        return pixels.float().cpu()
    dtype = vae.dtype
    upcast = dtype == torch.float16 and bool(vae.config.get("force_upcast"))
    if upcast:  # such autoencoders overflow in half precision
        vae.to(torch.float32)
    try:
        encoded = vae.encode(pixels.to(vae.device, vae.dtype))
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    finally:
        if upcast:
            vae.to(dtype)
    return _normalise(latents.float().cpu(), vae.config)


def _normalise(mean: torch.Tensor, config: Any) -> torch.Tensor:
    """What pipelines undo before decoding: shift or per-channel statistics, then the scaling factor."""
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        centre, spread = (torch.tensor(config[name]).reshape(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
        return (mean - centre) / spread * config.scaling_factor
    return (mean - (config.get("shift_factor") or 0.0)) * config.scaling_factor


@torch.no_grad()
def draw_latents(
    pipeline: Any,
    model: nn.Module,
    prompts: Sequence[str],
    seeds: Sequence[int],
    size: Size,
    steps: int,
    guidance: float,
) -> torch.Tensor:
    """Latents that the pipeline itself draws for `prompts`, one seed each: [B, C, h, w], float32 on CPU.

    Those of a recorded family have the layout that the denoiser takes.
    """
    if family_of(model).recorded:
        return draw_recorded(pipeline, model, prompts, seeds, size, steps, guidance)
    arguments: dict[str, Any] = {
        "num_inference_steps": steps,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
    }
    accepted = inspect.signature(type(pipeline).__call__).parameters
    if "height" in accepted:
        arguments["height"], arguments["width"] = size
    if "guidance_scale" in accepted:
        arguments["guidance_scale"] = guidance
    if "prompt" in accepted:
        arguments["prompt"] = list(prompts)
    elif "class_labels" in accepted:
        arguments["class_labels"] = encode_prompts(pipeline, model, prompts, size)["class_labels"].tolist()
    else:
        arguments["batch_size"] = len(prompts)
    if "use_resolution_binning" in accepted:
        arguments["use_resolution_binning"] = False
    if "prompt" in accepted and getattr(pipeline, "vae", None) is not None:
        latents: torch.Tensor = pipeline(**arguments, output_type="latent").images
        if family_of(model).packed:
            step = pixels_per_token_step(pipeline, model)
            latents = unpack_latents(latents, (size[0] // step, size[1] // step))
        return latents.float().cpu()
    pictures = torch.from_numpy(pipeline(**arguments, output_type="np").images).permute(0, 3, 1, 2)
    return encode_images(pipeline, pictures * 2 - 1)
