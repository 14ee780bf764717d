"""Full-size architectures by name, with random weights and inputs: enough to measure speed without any download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from ..errors import InputError

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One published model's shape.

    Attributes:
        model: class name in diffusers.
        config: constructor arguments that differ from the class's defaults.
        steps: denoising steps its authors recommend, for seconds per image.
        guidance_batches: forward passes per step and image (2 with classifier-free guidance).
    """

    model: str
    config: dict[str, Any]
    steps: int
    guidance_batches: int = 2


_DIT_BLOCKS: dict[str, Any] = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28,
    "patch_size": 2, "attention_bias": True, "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
    "norm_elementwise_affine": False,
}  # fmt: skip
ARCHITECTURES: dict[str, Architecture] = {
    "sd15": Architecture(
        "UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}, 50
    ),
    "sd21": Architecture("UNet2DConditionModel", {
        "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    }, 50),
    "sdxl": Architecture("UNet2DConditionModel", {
        "sample_size": 128, "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }, 50),
    "dit": Architecture("DiTTransformer2DModel", _DIT_BLOCKS | {"sample_size": 32, "norm_type": "ada_norm_zero"}, 250),
    "pixart": Architecture("PixArtTransformer2DModel", _DIT_BLOCKS | {
        "sample_size": 128, "cross_attention_dim": 1152, "caption_channels": 4096, "norm_type": "ada_norm_single",
        "norm_eps": 1e-6, "use_additional_conditions": False,
    }, 20),
    "sd3": Architecture("SD3Transformer2DModel", {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
        "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
        "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
    }, 28),
    "flux": Architecture("FluxTransformer2DModel", {
        "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    }, 28, guidance_batches=1),
}  # fmt: skip


def build_model(name: str, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The named architecture with random weights, in evaluation mode.

    Raises:
        InputError: unknown name, or its weights alone do not fit in memory.
    """
    size = sum(parameter.numel() for parameter in build_meta_model(name, dtype).parameters())
    needed, free = size * dtype.itemsize, free_memory(device)
    if free is not None and needed > free:
        raise InputError(
            f"--arch {name}: its weights need {needed / 2**30:.1f} GiB in {dtype}, {free / 2**30:.1f} GiB are free on "
            f"{device}; use a smaller --dtype or another --device"
        )
    return _build(ARCHITECTURES[name], device, dtype)


def build_meta_model(name: str, dtype: torch.dtype) -> torch.nn.Module:
    """The named architecture on the meta device: shapes and dtypes, no memory.

    Raises:
        InputError: unknown name.
    """
    if name not in ARCHITECTURES:
        raise InputError(f"--arch {name}: unknown; choose one of {', '.join(ARCHITECTURES)}")
    return _build(ARCHITECTURES[name], torch.device("meta"), dtype)


def _build(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    import diffusers

    previous = torch.get_default_dtype()
    # Built in the target dtype and place, so that no second copy is ever held.
    torch.set_default_dtype(dtype)
    try:
        with device:
            model: torch.nn.Module = getattr(diffusers, architecture.model)(**architecture.config)
    finally:
        torch.set_default_dtype(previous)
    return model.eval().requires_grad_(False)


def free_memory(device: torch.device) -> int | None:
    """Free bytes on the device; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available) if device.type == "cpu" else None


def check_size(model: Any, height: int, width: int, compression: int = 8) -> None:
    """Raises InputError where no inputs are known for this class of model, or the size does not fit it."""
    name = type(model).__name__
    if name not in _BUILDERS:
        raise InputError(f"{name}: its speed cannot be measured, inputs are known for {', '.join(_BUILDERS)} only")
    patches = 2 ** (len(model.config.block_out_channels) - 1) if name == "UNet2DConditionModel" else 2
    multiple = compression * patches
    if height % multiple or width % multiple:
        raise InputError(f"{width}x{height}: measuring the speed of {name} needs multiples of {multiple} pixels")


def make_inputs(model: Any, height: int, width: int, batch: int, seed: int, compression: int = 8) -> Inputs:
    """Random keyword inputs of one forward pass for an image of height x width pixels.

    Args:
        batch: samples in the forward pass (guidance counted).
        compression: pixels per latent, along one side.

    Raises:
        InputError: see `check_size`.
    """
    check_size(model, height, width, compression)
    parameter = next(model.parameters())
    generator = torch.Generator("cpu").manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(parameter.device, parameter.dtype)

    return _BUILDERS[type(model).__name__](model, random, height // compression, width // compression, batch)


_Random = Callable[..., torch.Tensor]


def _unet(model: Any, random: _Random, height: int, width: int, batch: int) -> Inputs:
    config = model.config
    inputs: Inputs = {
        "sample": random(batch, config.in_channels, height, width),
        "timestep": 500,
        "encoder_hidden_states": random(batch, 77, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        ids = 6
        text = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": random(batch, text), "time_ids": random(batch, ids)}
    return inputs


def _latents(model: Any, random: _Random, height: int, width: int, batch: int) -> Inputs:
    sample = random(batch, model.config.in_channels, height, width)
    return {"hidden_states": sample, "timestep": torch.full((batch,), 500, device=sample.device)}


def _dit(model: Any, random: _Random, height: int, width: int, batch: int) -> Inputs:
    inputs = _latents(model, random, height, width, batch)
    return inputs | {"class_labels": torch.zeros_like(inputs["timestep"])}


def _pixart(model: Any, random: _Random, height: int, width: int, batch: int) -> Inputs:
    return _latents(model, random, height, width, batch) | {
        "encoder_hidden_states": random(batch, 300, model.config.caption_channels),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _sd3(model: Any, random: _Random, height: int, width: int, batch: int) -> Inputs:
    return _latents(model, random, height, width, batch) | {
        "encoder_hidden_states": random(batch, 154, model.config.joint_attention_dim),
        "pooled_projections": random(batch, model.config.pooled_projection_dim),
    }


def _flux(model: Any, random: _Random, height: int, width: int, batch: int) -> Inputs:
    rows, columns = height // 2, width // 2
    sample = random(batch, rows * columns, model.config.in_channels)
    ids = torch.zeros(rows, columns, 3, device=sample.device, dtype=sample.dtype)
    ids[..., 1] += torch.arange(rows, device=sample.device)[:, None]
    ids[..., 2] += torch.arange(columns, device=sample.device)
    inputs = {
        "hidden_states": sample,
        "encoder_hidden_states": random(batch, 512, model.config.joint_attention_dim),
        "pooled_projections": random(batch, model.config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5, device=sample.device, dtype=sample.dtype),
        "img_ids": ids.reshape(rows * columns, 3),
        "txt_ids": torch.zeros(512, 3, device=sample.device, dtype=sample.dtype),
    }
    if model.config.guidance_embeds:
        inputs["guidance"] = torch.full((batch,), 3.5, device=sample.device, dtype=sample.dtype)
    return inputs


_BUILDERS: dict[str, Callable[[Any, _Random, int, int, int], Inputs]] = {
    "UNet2DConditionModel": _unet,
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}
