"""The diffusers pipelines that draw the stages: copies that share the models of the one given, and what they can do."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any, NamedTuple

from diffusers import AutoencoderKL, AutoPipelineForImage2Image, AutoPipelineForText2Image, DiffusionPipeline
from torch import nn

from ..adapter.convert import DENOISERS
from .rotary import check_rotary
from .settings import HighRes, Size, staged_sizes

_TEXT = frozenset({"prompt", "height", "width", "num_inference_steps", "generator", "callback_on_step_end"})
_IMAGE = frozenset({"prompt", "image", "strength", "num_inference_steps", "generator", "callback_on_step_end"})
_BESIDE = frozenset({"image", "control_image"})
"""Arguments of pipelines that are to draw after an image: what to hand them at a later stage is not known here."""


class Drawers(NamedTuple):
    """A text-to-image and an image-to-image pipeline around the same models, with a scheduler of their own."""

    text: Any
    image: Any


def drawers(pipeline: Any, scheduler: Any = None) -> Drawers:
    """Pipelines that share the modules of `pipeline` and nothing else: what is set on them never reaches it.

    Args:
        pipeline: a diffusers text-to-image pipeline.
        scheduler: theirs; a copy of the pipeline's own if None.

    Raises:
        TypeError: no diffusers pipeline.
        ValueError: diffusers has no image-to-image sibling of it, or one that takes no strength or wants more than a
            prompt.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        raise TypeError(
            f"{type(pipeline).__name__} is no diffusers pipeline: pass one, such as StableDiffusionPipeline."
        )
    name = type(pipeline).__name__
    scheduler = copy.deepcopy(pipeline.scheduler) if scheduler is None else scheduler
    try:
        text = AutoPipelineForText2Image.from_pipe(pipeline, scheduler=scheduler)
        image = AutoPipelineForImage2Image.from_pipe(pipeline, scheduler=scheduler)
    except ValueError as error:
        raise ValueError(
            f"{name} has no image-to-image sibling in diffusers, which later stages need: use a pipeline that has one "
            "(Stable Diffusion, SDXL, SD3, Flux)."
        ) from error
    if type(text) is not type(pipeline):
        raise ValueError(f"{name} is no text-to-image pipeline: pass a {type(text).__name__}.")
    taken, wanted = call_parameters(text), call_parameters(image)
    if not taken >= _TEXT or taken & _BESIDE or not wanted >= _IMAGE or "control_image" in wanted:
        raise ValueError(
            f"{name} cannot draw large pictures: they need a pipeline that draws from a prompt alone, and whose "
            "image-to-image sibling takes a strength."
        )
    if not denoisers(pipeline) or not isinstance(getattr(pipeline, "vae", None), nn.Module):
        raise ValueError(f"{name} cannot draw large pictures: it has no denoiser or no vae.")
    for drawer in (text, image):
        drawer.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    return Drawers(text, image)


def check_pipeline(pipeline: Any, settings: HighRes) -> tuple[Size, ...]:
    """The (height, width) of every stage, once everything that the settings ask of the pipeline is known to be there.

    Raises:
        TypeError, ValueError: see `drawers`; a size that the pipeline cannot draw, or an option that it has not.
    """
    found = drawers(pipeline)
    name, multiple = type(pipeline).__name__, multiple_of(pipeline)
    if settings.target is None:
        sizes = tuple(settings.sizes or ())
    else:
        for side in settings.target:
            _check_side(name, settings.target, side, multiple, None)
        sizes = tuple(staged_sizes(settings.target, native_size(pipeline), multiple))
    for size in sizes:
        for side in size:
            _check_side(name, size, side, multiple, _largest_side(pipeline))
    for stage in range(1, len(sizes) + 1):
        settings.strength_of(stage, len(sizes))
    vae = pipeline.vae
    if settings.tiled_vae and not hasattr(vae, "enable_tiling"):
        raise ValueError(f"{type(vae).__name__} has no tiling: pass tiled_vae=False.")
    if settings.tile is not None:
        if not isinstance(vae, AutoencoderKL):
            raise ValueError(f"{type(vae).__name__} keeps its own tile size: leave tile out.")
        quarter = 4 * pipeline.vae_scale_factor
        if settings.tile % quarter:
            raise ValueError(f"tile is {settings.tile}: pass a multiple of {quarter} pixels for {name}.")
    if settings.upsample == "latent":
        _check_latent_upsampling(found.image)
    if isinstance(settings.time_shift, (int, float)) and _shift_name(pipeline.scheduler) is None:
        raise ValueError(f"{type(pipeline.scheduler).__name__} has no time shift: leave time_shift at 'auto' or None.")
    if settings.rotary_scaling is not None:
        for model in denoisers(pipeline).values():
            check_rotary(model)
    return sizes


def _check_side(name: str, size: Size, side: int, multiple: int, largest: int | None) -> None:
    shown = f"{size[0]}x{size[1]}"
    if side % multiple:
        raise ValueError(f"{name} draws multiples of {multiple} pixels, not {shown}: choose another size.")
    if largest is not None and side > largest:
        raise ValueError(f"{name} has positions for {largest} pixels a side, not {shown}: choose a smaller size.")


def _check_latent_upsampling(image: Any) -> None:
    """Raise ValueError where the sibling would take resized latents for a picture."""
    processor = getattr(image, "image_processor", None)
    known = None if processor is None else processor.config.get("vae_latent_channels")
    channels = image.vae.config.get("latent_channels")
    if not isinstance(image.vae, AutoencoderKL) or known != channels:
        raise ValueError(
            f"{type(image).__name__} takes no latents of {channels} channels as its image: pass upsample='pixel'."
        )


def denoisers(pipeline: Any) -> dict[str, nn.Module]:
    """What predicts, by its name in the pipeline."""
    found = {name: getattr(pipeline, name, None) for name in DENOISERS}
    return {name: model for name, model in found.items() if isinstance(model, nn.Module)}


def call_parameters(pipeline: Any) -> frozenset[str]:
    """Names of the arguments that calling the pipeline takes."""
    return frozenset(inspect.signature(type(pipeline).__call__).parameters)


def call_default(pipeline: Any, name: str) -> Any:
    """The default of an argument of the pipeline's call."""
    return inspect.signature(type(pipeline).__call__).parameters[name].default


def multiple_of(pipeline: Any) -> int:
    """Pixels by which both sides of a picture must be divisible."""
    factor = int(pipeline.vae_scale_factor)
    if hasattr(pipeline, "_pack_latents"):  # Flux and its kin fold 2 x 2 latents into a token
        return 2 * factor
    (model, *_) = denoisers(pipeline).values()
    config = getattr(model, "config", None)
    patch = getattr(config, "patch_size", None) or max(getattr(config, "all_patch_size", None) or (1,))
    return factor * patch if isinstance(patch, int) else factor


def native_size(pipeline: Any) -> Size:
    """(height, width) in pixels that the pipeline draws by itself. Raises ValueError where it does not say."""
    (model, *_) = denoisers(pipeline).values()
    side = getattr(pipeline, "default_sample_size", None) or getattr(model.config, "sample_size", None)
    height, width = side if isinstance(side, (list, tuple)) and len(side) == 2 else (side, side)
    if not isinstance(height, int) or not isinstance(width, int):
        raise ValueError(f"{type(pipeline).__name__} does not say its native size: pass sizes instead of target.")
    return height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor


def _largest_side(pipeline: Any) -> int | None:
    """Pixels, where positions are a table of fixed size (SD3)."""
    (model, *_) = denoisers(pipeline).values()
    table = getattr(getattr(model, "pos_embed", None), "pos_embed_max_size", None)
    return None if table is None else int(table) * multiple_of(pipeline)


def stage_scheduler(pipeline: Any, settings: HighRes, size: Size, native: Size) -> Any:
    """A copy of the pipeline's scheduler, with the stage's time shift (see `HighRes`)."""
    scheduler, name = pipeline.scheduler, _shift_name(pipeline.scheduler)
    if name is None or settings.time_shift is None or size == native:
        return copy.deepcopy(scheduler)
    shift = settings.time_shift
    if shift == "auto":
        shift = _native_shift(pipeline, name, native) * math.sqrt(size[0] * size[1] / (native[0] * native[1]))
    changes = {name: float(shift), **({"use_dynamic_shifting": False} if _is_dynamic(scheduler) else {})}
    return type(scheduler).from_config(scheduler.config, **changes)


def _shift_name(scheduler: Any) -> str | None:
    """What the scheduler's time shift is called in its config; None where it has none."""
    config = scheduler.config
    if type(scheduler).__name__.startswith("FlowMatch") and "shift" in config:
        return "shift"
    return "flow_shift" if config.get("use_flow_sigmas") and "flow_shift" in config else None


def _is_dynamic(scheduler: Any) -> bool:
    return bool(scheduler.config.get("use_dynamic_shifting"))


def _native_shift(pipeline: Any, name: str, native: Size) -> float:
    """The shift of a picture of the native size."""
    config = pipeline.scheduler.config
    if not _is_dynamic(pipeline.scheduler):
        return float(config[name])
    # diffusers' calculate_shift: a line through two points over the number of tokens.
    tokens = native[0] * native[1] / multiple_of(pipeline) ** 2
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu: float = low + (high - low) * (tokens - few) / (many - few)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
