"""What each denoiser is conditioned on: how prompts become tensors, and how tensors become the model's arguments.

One row of `FAMILIES` per model class. To add one, write how it encodes prompts, under the names of the model's own
arguments, and the row. A class without one is fed as its pipeline feeds it (see `denoiser_call`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from .denoiser_call import (
    Conditioning,
    can_record,
    default_of,
    is_shared,
    record_rows,
    record_shared,
    replay,
    sample_name,
)
from .equal_tokens import can_count, counted_last_key, merge_zeros, repeat_last

LAST_TOKEN_COUNTS = "last_token_counts"
"""Conditioning [B]: how many equal text tokens the last one of `encoder_hidden_states` stands for."""


@dataclass(frozen=True)
class Family:
    """How one model class is fed.

    Attributes:
        encode: (pipeline, model, prompts, (height, width) in pixels) -> conditioning on CPU, one row per prompt; an
            empty prompt gives the unconditional row that the pipeline itself would use for guidance.
        packed: the model takes 2 x 2 patches as tokens [B, h w / 4, 4 C] and positions beside them, as Flux does, and
            a timestep between 0 and 1.
        recorded: conditioning and layout are the pipeline's own, see `denoiser_call`; the teacher has to draw the data.
    """

    encode: Callable[[Any, Any, Sequence[str], tuple[int, int]], Conditioning]
    packed: bool = False
    recorded: bool = False


def _encode_stable_diffusion(pipeline: Any, model: Any, prompts: Sequence[str], size: tuple[int, int]) -> Conditioning:
    device, conditioning = pipeline.text_encoder.device, {}
    if model.config.get("time_cond_proj_dim"):  # guidance is an input of latent consistency models
        strength = torch.full((len(prompts),), default_of(pipeline, "guidance_scale") - 1)
        conditioning["timestep_cond"] = pipeline.get_guidance_scale_embedding(strength, model.config.time_cond_proj_dim)
    if getattr(pipeline, "text_encoder_2", None) is None:
        return {**conditioning, "encoder_hidden_states": pipeline.encode_prompt(list(prompts), device, 1, False)[0]}
    embeddings, _, pooled, _ = pipeline.encode_prompt(
        list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    if pipeline.config.get("force_zeros_for_empty_prompt"):
        given = torch.tensor([bool(prompt) for prompt in prompts], device=embeddings.device)
        embeddings, pooled = embeddings * given[:, None, None], pooled * given[:, None]
    time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32).expand(len(prompts), -1)
    return {**conditioning, "encoder_hidden_states": embeddings, "text_embeds": pooled, "time_ids": time_ids}


def _encode_pixart(pipeline: Any, model: Any, prompts: Sequence[str], size: tuple[int, int]) -> Conditioning:
    embeddings, mask, *_ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    conditioning = {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}
    if pipeline.transformer.use_additional_conditions:
        conditioning["resolution"] = torch.tensor([size], dtype=torch.float32).repeat(len(prompts), 1)
        conditioning["aspect_ratio"] = torch.full((len(prompts), 1), size[0] / size[1])
    return conditioning


def _encode_class(pipeline: Any, model: Any, prompts: Sequence[str], size: tuple[int, int]) -> Conditioning:
    """Prompts are class numbers or names in the pipeline's label table; the empty one is DiT's null class."""
    null = model.config.get("num_embeds_ada_norm")
    last = model.config.num_class_embeds - 1 if null is None else null
    labels: Mapping[str, int] = getattr(pipeline, "labels", None) or {}
    numbers = []
    for prompt in prompts:
        number = int(prompt) if prompt.isdecimal() else labels.get(prompt, -1) if prompt or null is None else null
        if not 0 <= number <= last:
            raise ValueError(f"Caption {prompt[:40]!r} is no class of this model: give a label or a number to {last}.")
        numbers.append(number)
    return {"class_labels": torch.tensor(numbers)}


def _encode_unconditional(pipeline: Any, model: Any, prompts: Sequence[str], size: tuple[int, int]) -> Conditioning:
    return _encode_class(pipeline, model, prompts, size) if model.config.num_class_embeds else {}


def _encode_joint(pipeline: Any, model: Any, prompts: Sequence[str], size: tuple[int, int]) -> Conditioning:
    embeddings, _, pooled, _ = pipeline.encode_prompt(
        list(prompts), prompt_2=None, prompt_3=None, do_classifier_free_guidance=False
    )
    conditioning = {"encoder_hidden_states": embeddings, "pooled_projections": pooled}
    if pipeline.text_encoder_3 is None:
        conditioning["encoder_hidden_states"], conditioning[LAST_TOKEN_COUNTS] = merge_zeros(embeddings)
    return conditioning


def _encode_flux(pipeline: Any, model: Any, prompts: Sequence[str], size: tuple[int, int]) -> Conditioning:
    embeddings, pooled, _ = pipeline.encode_prompt(list(prompts), prompt_2=None)
    return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}


# What such conditioning is called by models, which take it as one dictionary.
_ADDED = ("text_embeds", "time_ids", "resolution", "aspect_ratio")
# The default of diffusers' FluxPipeline.
_FLUX_GUIDANCE = 3.5
# Settings of U-Nets that are fed as the row says; with others only their pipelines know what they are given.
_PLAIN = {"num_class_embeds": None, "addition_embed_type": "text_time", "encoder_hid_dim_type": "text_proj"}

FAMILIES: dict[str, Family] = {
    "UNet2DConditionModel": Family(_encode_stable_diffusion),
    "UNet2DModel": Family(_encode_unconditional),
    "PixArtTransformer2DModel": Family(_encode_pixart),
    "DiTTransformer2DModel": Family(_encode_class),
    "SD3Transformer2DModel": Family(_encode_joint),
    "FluxTransformer2DModel": Family(_encode_flux, packed=True),
}


_RECORDED = Family(record_rows, recorded=True)


def family_of(model: nn.Module) -> Family:
    """The row of a model, or the recorded family. Raises ValueError for what is no denoiser."""
    name = next((cls.__name__ for cls in type(model).__mro__ if cls.__name__ in FAMILIES), "")
    config: Any = model.config if name else {}
    plain = name != "UNet2DConditionModel" or all(config.get(key) in (None, value) for key, value in _PLAIN.items())
    if name and plain and config.get("class_embed_type") is None:
        return FAMILIES[name]
    if can_record(model):
        return _RECORDED
    raise ValueError(f"{type(model).__name__} cannot be distilled: it is no denoiser that a pipeline calls on prompts.")


@torch.no_grad()
def encode_prompts(pipeline: Any, model: nn.Module, prompts: Sequence[str], size: tuple[int, int]) -> Conditioning:
    """Conditioning of `prompts` for images of `size` (height, width) in pixels: CPU tensors, a row per prompt."""
    conditioning = family_of(model).encode(pipeline, model, prompts, size)
    return {name: tensor.detach().cpu() for name, tensor in conditioning.items()}


def encode_null(pipeline: Any, model: nn.Module, size: tuple[int, int]) -> Conditioning:
    """Conditioning of the empty prompt, one row; empty for a model whose classes have none."""
    config: Any = model.config
    known = family_of(model).encode is not _encode_unconditional or not config.num_class_embeds
    return encode_prompts(pipeline, model, [""], size) if known else {}


def encode_shared(pipeline: Any, model: nn.Module, size: tuple[int, int]) -> Conditioning:
    """What all prompts have in common for images of `size`; empty but for recorded families."""
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
    counted, grid = _count_last_token(model, inputs), (noisy.shape[-2] // 2, noisy.shape[-1] // 2)
    added = {name: inputs.pop(name) for name in _ADDED if name in inputs}
    arguments: dict[str, Any] = {**inputs, sample_name(model): noisy.to(dtype), "timestep": timesteps}
    if added:
        arguments["added_cond_kwargs"] = added
    if family.packed:
        text = inputs["encoder_hidden_states"]
        arguments[sample_name(model)] = pack_latents(noisy.to(dtype))
        arguments["timestep"] = (timesteps / 1000).to(dtype)
        arguments["img_ids"] = torch.cartesian_prod(*map(torch.arange, (1, *grid))).to(text)
        arguments["txt_ids"] = text.new_zeros(text.shape[1], 3)
        if cast(Any, model).config.guidance_embeds:  # an input of such models: distilled where it is used
            arguments["guidance"] = torch.full((len(text),), _FLUX_GUIDANCE, device=text.device)
    with counted:
        output: torch.Tensor = network(**arguments, return_dict=False)[0]
    return unpack_latents(output, grid) if family.packed else output


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
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack_latents(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Tokens [B, h w / 4, 4 C] on the `grid` (h / 2, w / 2) -> [B, C, h, w]; the inverse of `pack_latents`."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), 2)
