"""Draws a large picture stage by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from ..models import proportional_attention
from .memory import OneByOne, chunked_feed_forward, tiled_vae
from .pipelines import call_default, call_parameters, check_pipeline, denoisers, drawers, stage_scheduler
from .record import Request, record_of
from .rotary import ntk_rotary
from .settings import HighRes, Size
from .store import Drawn, StageStore


@dataclass(frozen=True)
class Stage:
    """A finished stage.

    Attributes:
        number: from 1, of `stages`.
        size: (height, width) in pixels.
        image: 8-bit RGB.
        latents: [1, C, height / f, width / f] on the CPU, as the pipeline scales them.
        steps: denoising steps that it took; `seconds`: with encoding and decoding.
        resumed: whether it was read from `output_dir`; `folder`: where it is there, or None.
    """

    number: int
    stages: int
    size: Size
    image: Image.Image
    latents: torch.Tensor
    steps: int
    seconds: float
    resumed: bool = False
    folder: Path | None = None


def generate_large(
    pipeline: Any,
    prompt: str,
    settings: HighRes,
    *,
    negative_prompt: str | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    output_dir: str | Path | None = None,
) -> Image.Image:
    """The last of `generate_stages`, with the same arguments and errors: the large picture."""
    last: Stage | None = None
    for stage in generate_stages(
        pipeline,
        prompt,
        settings,
        negative_prompt=negative_prompt,
        guidance_scale=guidance_scale,
        seed=seed,
        output_dir=output_dir,
    ):
        last = stage
    assert last is not None, "there is a first stage"
    return last.image


def generate_stages(
    pipeline: Any,
    prompt: str,
    settings: HighRes,
    *,
    negative_prompt: str | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    output_dir: str | Path | None = None,
) -> Iterator[Stage]:
    """Draws one picture at its native size, then larger and larger: upsampled, noised part of the way, denoised again.

    Text-to-image and image-to-image pipelines of diffusers do the work, on the models of `pipeline`, converted or not.
    The pipeline itself, its scheduler, processors and tiling are as before whenever a stage is handed over, and after
    an error.

    Args:
        pipeline: a text-to-image pipeline with an image-to-image sibling (Stable Diffusion, SDXL, SD3, Flux).
        prompt: of one picture.
        settings: see `HighRes`.
        negative_prompt, guidance_scale: as the pipeline takes them; None for its own.
        seed: of the noise of all stages.
        output_dir: where every finished stage is kept (a PNG with its settings inside, latents, a record). A call with
            the same arguments goes on after the newest that is whole, and ends bit-equal to one that was never
            interrupted, on the same machine.

    Yields:
        Every stage once it is finished, those read from `output_dir` too (of them only the newest).

    Raises:
        TypeError, ValueError: at the call, before anything runs: what the pipeline cannot do (see `check_pipeline`), or
            an `output_dir` with stages of other settings.
        RuntimeError: while drawing: values that are not finite, or a picture blacked out by the safety checker.
    """
    if not isinstance(settings, HighRes):
        raise TypeError(f"settings is {type(settings).__name__}: pass HighRes(sizes=...) or HighRes(target=...).")
    if not isinstance(prompt, str):
        raise TypeError(f"prompt is {type(prompt).__name__}: pass one text; large pictures are drawn one at a time.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is {seed!r:.60}: pass a whole number.")
    request = Request(prompt, negative_prompt, guidance_scale, seed)
    sizes = check_pipeline(pipeline, settings)
    accepted = call_parameters(pipeline)
    for name in ("negative_prompt", "guidance_scale"):
        if getattr(request, name) is not None and name not in accepted:
            raise ValueError(f"{type(pipeline).__name__} takes no {name}: leave it out.")
    for size in sizes:  # everything a stage switches on, once, to hear now what it says
        with switched_on(pipeline, settings, size, sizes[0]):
            pass
    store = None
    if output_dir is not None:
        store = StageStore(Path(output_dir), record_of(pipeline, settings, request, sizes))
    return _draw(pipeline, settings, request, sizes, store)


@contextmanager
def switched_on(pipeline: Any, settings: HighRes, size: Size, native: Size) -> Iterator[None]:
    """Inside, everything that the settings ask of the models for a stage of this size; then off again."""
    ratio = size[0] * size[1] / (native[0] * native[1])
    with ExitStack() as stack:
        if settings.tiled_vae:
            stack.enter_context(tiled_vae(pipeline.vae, settings.tile))
        for model in denoisers(pipeline).values():
            if settings.feed_forward_chunk:
                stack.enter_context(chunked_feed_forward(model, settings.feed_forward_chunk))
            if settings.proportional_attention and ratio != 1:
                stack.enter_context(proportional_attention(model, ratio))
            if settings.rotary_scaling is not None:
                stack.enter_context(ntk_rotary(model, max(size[0] / native[0], size[1] / native[1])))
        yield


def _draw(
    pipeline: Any, settings: HighRes, request: Request, sizes: tuple[Size, ...], store: StageStore | None
) -> Iterator[Stage]:
    start, before = 1, None
    if store is not None:
        for number in range(len(sizes), 0, -1):
            before = store.load(number, sizes[number - 1])
            if before is not None:
                start = number + 1
                yield _stage(number, sizes, before, store, resumed=True)
                break
    for number in range(start, len(sizes) + 1):
        begin = time.perf_counter()
        before = _draw_stage(pipeline, settings, request, sizes, number, before)
        before = before._replace(seconds=time.perf_counter() - begin)
        if store is not None:
            store.save(number, sizes[number - 1], before)
        yield _stage(number, sizes, before, store)


def _stage(
    number: int, sizes: tuple[Size, ...], drawn: Drawn, store: StageStore | None, resumed: bool = False
) -> Stage:
    size = sizes[number - 1]
    folder = None if store is None else store.path_of(number, size)
    return Stage(number, len(sizes), size, *drawn, resumed=resumed, folder=folder)


def _draw_stage(
    pipeline: Any, settings: HighRes, request: Request, sizes: tuple[Size, ...], number: int, before: Drawn | None
) -> Drawn:
    size, native = sizes[number - 1], sizes[0]
    text, image = drawers(pipeline, stage_scheduler(pipeline, settings, size, native))
    drawer = text if before is None else image
    bar = getattr(pipeline, "_progress_bar_config", {})
    drawer.set_progress_bar_config(**{**bar, "desc": f"stage {number} of {len(sizes)}, {size[0]}x{size[1]}"})
    if settings.sequential_guidance:
        for name, model in denoisers(drawer).items():
            setattr(drawer, name, OneByOne(model))
    accepted = call_parameters(drawer)
    arguments: dict[str, Any] = {
        "prompt": request.prompt,
        "num_inference_steps": settings.steps,
        "generator": request.generator(number),
    }
    guidance = request.guidance_scale
    if guidance is None and "guidance_scale" in accepted:  # siblings have defaults of their own
        guidance = call_default(text, "guidance_scale")
    if guidance is not None:
        arguments["guidance_scale"] = guidance
    if request.negative_prompt is not None:
        arguments["negative_prompt"] = request.negative_prompt
    if {"height", "width"} <= accepted:
        arguments.update(height=size[0], width=size[1])
    if before is not None:
        arguments["strength"] = settings.strength_of(number, len(sizes))
        arguments["image"] = enlarged(before, size, settings.upsample)
    steps, last, shown = 0, None, f"Stage {number} of {size[0]}x{size[1]}"

    def keep(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal steps, last
        steps, last = step + 1, tensors["latents"]
        if not torch.isfinite(last).all():
            raise RuntimeError(f"{shown} is not finite in {last.dtype} after step {steps}: use bfloat16 or float32.")
        return {}

    try:
        with switched_on(pipeline, settings, size, native):
            output = drawer(**arguments, callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["latents"])
    finally:
        pipeline.maybe_free_model_hooks()  # what enable_model_cpu_offload loaded: the drawer knows of no hooks
    assert last is not None, "the door saw to at least one step"
    if any(getattr(output, "nsfw_content_detected", None) or ()):
        raise RuntimeError(f"{shown} was blacked out by the pipeline's safety checker.")
    if last.dim() == 3:  # packed, as Flux and its kin run it
        last = drawer._unpack_latents(last, *size, drawer.vae_scale_factor)
    return Drawn(output.images[0].convert("RGB"), last.cpu().contiguous(), steps, 0.0)


def enlarged(before: Drawn, size: Size, upsample: str) -> Image.Image | torch.Tensor:
    """What the next stage starts from: the picture at `size`, or its latents [1, C, height / f, width / f]."""
    if upsample == "pixel":
        return before.image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    factor = before.image.height / before.latents.shape[-2]
    wanted = (round(size[0] / factor), round(size[1] / factor))
    return F.interpolate(before.latents.float(), wanted, mode="bicubic").to(before.latents.dtype)
