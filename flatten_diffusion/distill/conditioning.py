"""What each denoiser is conditioned on: how prompts become tensors, and how tensors become the model's arguments.

One row of `FAMILIES` per model class. To add one, write its two functions and the row. A class without one is fed as
its pipeline feeds it (see `denoiser_call`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging
from torch import nn

from .denoiser_call import Conditioning, can_record, is_shared, record_rows, record_shared, replay
from .equal_tokens import can_count, counted_last_key, merge_zeros, repeat_last

logger = logging.get_logger(__name__)

LAST_TOKEN_COUNTS = "last_token_counts"
"""Conditioning [B]: how many equal text tokens the last one of `encoder_hidden_states` stands for."""


@dataclass(frozen=True)
class Family:
    """How one model class is fed.

    Attributes:
        encode: (pipeline, prompts, (height, width) in pixels) -> conditioning on CPU, one row per prompt; an empty
            prompt gives the unconditional row that the pipeline itself would use for guidance.
        arguments: (model, conditioning) -> keyword arguments beside the noisy sample and the timestep.
        sample: name of the noisy sample's argument.
        conditional: whether prompts mean anything.
        packed: the model takes 2 x 2 patches as tokens [B, h w / 4, 4 C] and positions beside them, as Flux does, and
            a timestep between 0 and 1.
        recorded: conditioning and layout are the pipeline's own, see `denoiser_call`; the teacher has to draw the data.
    """

    encode: Callable[[Any, Sequence[str], tuple[int, int]], Conditioning]
    arguments: Callable[[Any, Conditioning], dict[str, Any]]
    sample: str = "sample"
    conditional: bool = True
    packed: bool = False
    recorded: bool = False


def _encode_stable_diffusion(pipeline: Any, prompts: Sequence[str], size: tuple[int, int]) -> Conditioning:
    device = pipeline.text_encoder.device
    if getattr(pipeline, "text_encoder_2", None) is None:
        return {"encoder_hidden_states": pipeline.encode_prompt(list(prompts), device, 1, False)[0]}
    embeddings, _, pooled, _ = pipeline.encode_prompt(
        list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    if pipeline.config.get("force_zeros_for_empty_prompt"):
        given = torch.tensor([bool(prompt) for prompt in prompts], device=embeddings.device)
        embeddings, pooled = embeddings * given[:, None, None], pooled * given[:, None]
    time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32).expand(len(prompts), -1)
    return {"encoder_hidden_states": embeddings, "text_embeds": pooled, "time_ids": time_ids}


def _unet_arguments(model: Any, conditioning: Conditioning) -> dict[str, Any]:
    added = {name: conditioning[name] for name in ("text_embeds", "time_ids") if name in conditioning}
    arguments: dict[str, Any] = {"encoder_hidden_states": conditioning["encoder_hidden_states"]}
    if added:
        arguments["added_cond_kwargs"] = added
    return arguments


def _encode_pixart(pipeline: Any, prompts: Sequence[str], size: tuple[int, int]) -> Conditioning:
    embeddings, mask, *_ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    conditioning = {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}
    if pipeline.transformer.use_additional_conditions:
        conditioning["resolution"] = torch.tensor([size], dtype=torch.float32).repeat(len(prompts), 1)
        conditioning["aspect_ratio"] = torch.full((len(prompts), 1), size[0] / size[1])
    return conditioning


def _pixart_arguments(model: Any, conditioning: Conditioning) -> dict[str, Any]:
    return {
        "encoder_hidden_states": conditioning["encoder_hidden_states"],
        "encoder_attention_mask": conditioning["encoder_attention_mask"],
        "added_cond_kwargs": {name: conditioning.get(name) for name in ("resolution", "aspect_ratio")},
    }


def _encode_class(pipeline: Any, prompts: Sequence[str], size: tuple[int, int]) -> Conditioning:
    """Prompts are class numbers or names in the pipeline's label table; the empty one is the null class."""
    null = pipeline.transformer.config.num_embeds_ada_norm
    labels: Mapping[str, int] = getattr(pipeline, "labels", None) or {}
    numbers = []
    for prompt in prompts:
        number = null if not prompt else int(prompt) if prompt.isdecimal() else labels.get(prompt, -1)
        if not 0 <= number <= null:
            raise ValueError(f"Caption {prompt!r} is no class of this model: give a number below {null} or a label.")
        numbers.append(number)
    return {"class_labels": torch.tensor(numbers)}


def _class_arguments(model: Any, conditioning: Conditioning) -> dict[str, Any]:
    return {"class_labels": conditioning["class_labels"]}


def _encode_joint(pipeline: Any, prompts: Sequence[str], size: tuple[int, int]) -> Conditioning:
    embeddings, _, pooled, _ = pipeline.encode_prompt(
        list(prompts), prompt_2=None, prompt_3=None, do_classifier_free_guidance=False
    )
    conditioning = {"encoder_hidden_states": embeddings, "pooled_projections": pooled}
    if pipeline.text_encoder_3 is None:
        conditioning["encoder_hidden_states"], conditioning[LAST_TOKEN_COUNTS] = merge_zeros(embeddings)
    return conditioning


def _joint_arguments(model: Any, conditioning: Conditioning) -> dict[str, Any]:
    return {name: conditioning[name] for name in ("encoder_hidden_states", "pooled_projections")}


def _encode_flux(pipeline: Any, prompts: Sequence[str], size: tuple[int, int]) -> Conditioning:
    embeddings, pooled, _ = pipeline.encode_prompt(list(prompts), prompt_2=None)
    return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}


def _flux_arguments(model: Any, conditioning: Conditioning) -> dict[str, Any]:
    embeddings = conditioning["encoder_hidden_states"]
    guidance = None
    if model.config.guidance_embeds:  # guidance is an input of such models: distilled where it is used
        guidance = torch.full((len(embeddings),), _FLUX_GUIDANCE, device=embeddings.device)
    text_positions = torch.zeros(embeddings.shape[1], 3, device=embeddings.device, dtype=embeddings.dtype)
    return {**_joint_arguments(model, conditioning), "guidance": guidance, "txt_ids": text_positions}


def _encode_nothing(pipeline: Any, prompts: Sequence[str], size: tuple[int, int]) -> Conditioning:
    return {}


def _no_arguments(model: Any, conditioning: Conditioning) -> dict[str, Any]:
    return {}


# The default of diffusers' FluxPipeline.
_FLUX_GUIDANCE = 3.5

FAMILIES: dict[str, Family] = {
    "UNet2DConditionModel": Family(_encode_stable_diffusion, _unet_arguments),
    "UNet2DModel": Family(_encode_nothing, _no_arguments, conditional=False),
    "PixArtTransformer2DModel": Family(_encode_pixart, _pixart_arguments, sample="hidden_states"),
    "DiTTransformer2DModel": Family(_encode_class, _class_arguments, sample="hidden_states"),
    "SD3Transformer2DModel": Family(_encode_joint, _joint_arguments, sample="hidden_states"),
    "FluxTransformer2DModel": Family(_encode_flux, _flux_arguments, sample="hidden_states", packed=True),
}


def _encode_recorded(pipeline: Any, prompts: Sequence[str], size: tuple[int, int]) -> Conditioning:
    return record_rows(pipeline, pipeline.transformer, prompts, size)


_RECORDED = Family(_encode_recorded, _no_arguments, recorded=True)


def family_of(model: nn.Module) -> Family:
    """The row of a model, or the recorded family. Raises ValueError for what is no denoiser."""
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    if can_record(model):
        return _RECORDED
    raise ValueError(f"{type(model).__name__} cannot be distilled: it is no denoiser that a pipeline calls on prompts.")


@torch.no_grad()
def encode_prompts(pipeline: Any, model: nn.Module, prompts: Sequence[str], size: tuple[int, int]) -> Conditioning:
    """Conditioning of `prompts` for pictures of `size` (height, width) in pixels: CPU tensors, a row per prompt."""
    conditioning = family_of(model).encode(pipeline, prompts, size)
    return {name: tensor.detach().cpu() for name, tensor in conditioning.items()}


def encode_shared(pipeline: Any, model: nn.Module, size: tuple[int, int]) -> Conditioning:
    """What all prompts have in common for pictures of `size`; empty but for recorded families."""
    return record_shared(pipeline, model, size) if family_of(model).recorded else {}


def predict(
    model: nn.Module, network: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
) -> torch.Tensor:
    """The prediction for `noisy` [B, C, h, w] at `timesteps` [B]; [B, C or 2 C, h, w] with a learned variance.

    `network` is what is called: `model` itself, or a wrapper of it (data parallel, compiled).
    """
    family = family_of(model)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    inputs = {
        name: tensor.to(noisy.device, dtype if tensor.is_floating_point() and not is_shared(name) else tensor.dtype)
        for name, tensor in conditioning.items()
    }
    if family.recorded:
        recorded: torch.Tensor = network(**replay(model, noisy.to(dtype), timesteps, inputs), return_dict=False)[0]
        return recorded
    counted = _count_last_token(model, inputs)
    arguments = {family.sample: noisy.to(dtype), "timestep": timesteps, **family.arguments(model, inputs)}
    if family.packed:
        height, width = noisy.shape[-2] // 2, noisy.shape[-1] // 2
        arguments[family.sample] = pack_latents(arguments[family.sample])
        arguments["img_ids"] = _positions(height, width).to(noisy.device, dtype)
        arguments["timestep"] = (timesteps / 1000).to(dtype)
    with counted:
        output: torch.Tensor = network(**arguments, return_dict=False)[0]
    return unpack_latents(output, (height, width)) if family.packed else output


def _count_last_token(model: nn.Module, inputs: Conditioning) -> AbstractContextManager[Any]:
    """What the model runs within, so that its last text token counts as `LAST_TOKEN_COUNTS` says, which is taken out of
    `inputs`; where that cannot be, the token is put there as often."""
    counts = inputs.pop(LAST_TOKEN_COUNTS, None)
    if counts is None:
        return nullcontext()
    if can_count(model):
        return counted_last_key(model, counts)
    inputs["encoder_hidden_states"] = repeat_last(inputs["encoder_hidden_states"], counts)
    return nullcontext()


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] -> tokens [B, h w / 4, 4 C], one per 2 x 2 patch, row-major."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


def unpack_latents(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Tokens [B, h w / 4, 4 C] on the `grid` (h / 2, w / 2) -> [B, C, h, w]; the inverse of `pack_latents`."""
    batch, _, channels = tokens.shape
    patches = tokens.reshape(batch, *grid, channels // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, 2 * grid[0], 2 * grid[1])


def _positions(height: int, width: int) -> torch.Tensor:
    """[height * width, 3]: zero, row and column of each token."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
