"""Images of a pipeline, one PNG per (prompt, seed), made so that stopping and starting again changes nothing."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from PIL import Image, PngImagePlugin
from tqdm.auto import tqdm

from flatten_diffusion.files import read_json, sweep
from flatten_diffusion.scenes.check import SETTINGS_KEY

from .errors import InputError
from .files import create_json, replacing, require_space, require_writable, shown_name, write_text
from .images import Pixels, blocks
from .pipelines import adapter_sha256, call_parameters, pipeline_sha256
from .processes import Processes

logger = logging.get_logger(__name__)
SETTINGS_FILE = "generation.json"
# Pixels; whatever a pipeline asks sides to be divisible by divides it.
_ROUND = 256


@dataclass(frozen=True)
class GenerationSettings:
    """What decides an image besides its prompt and seed. Batch size and process count do not.

    Attributes:
        pipeline, revision, variant: what was loaded: a hub id, an embedded one's name, or the last part of a folder's
            path, with `pipeline_sha256` of what is in it.
        adapter, adapter_sha256: the conversion, likewise, or None for the original.
        height, width: pixels; None for the pipeline's own size.
        steps, guidance: denoising steps and classifier-free guidance scale; None for the pipeline's own.
        negative_prompt: or None.
        dtype: a key of pipelines.DTYPES.
    """

    pipeline: str
    pipeline_sha256: str | None = None
    revision: str | None = None
    variant: str | None = None
    adapter: str | None = None
    adapter_sha256: str | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    dtype: str = "float32"


@dataclass(frozen=True)
class Job:
    """One image. `generator_seed` mixes prompt index and seed, so that no two images of a run share their noise."""

    index: int
    prompt: str | None
    seed: int

    @property
    def file(self) -> str:
        return f"{self.index:06d}-{self.seed}.png"

    @property
    def generator_seed(self) -> int:
        digest = hashlib.sha256(f"{self.seed}/{self.index}".encode()).digest()
        return int.from_bytes(digest[:6], "big")


def make_jobs(prompts: Sequence[str] | None, seeds: Sequence[int], count: int | None = None) -> list[Job]:
    """Every (prompt, seed), prompts outermost; `count` images per seed for a pipeline without prompts."""
    if len(set(seeds)) != len(seeds):
        raise InputError("--seeds: a seed is given twice; each (prompt, seed) is one image")
    texts: Sequence[str | None] = prompts if prompts is not None else [None] * (count or 1)
    return [Job(index, text, seed) for index, text in enumerate(texts) for seed in seeds]


def jobs_from(arguments: argparse.Namespace, prompts: Sequence[str] | None) -> list[Job]:
    """The jobs the options name; raises InputError also where --output is no place for them."""
    require_writable(arguments.output, folder=True)
    return make_jobs(prompts, arguments.seeds or [arguments.seed], arguments.num_images)


def settings_from(arguments: argparse.Namespace) -> GenerationSettings:
    """The settings the options name."""
    height, width = arguments.size or (None, None)
    adapter = arguments.adapter
    return GenerationSettings(
        pipeline=shown_name(arguments.pipeline),
        pipeline_sha256=pipeline_sha256(arguments.pipeline),
        adapter=None if adapter is None else shown_name(adapter),
        adapter_sha256=adapter_sha256(adapter),
        height=height,
        width=width,
        **{n: getattr(arguments, n) for n in ("revision", "variant", "steps", "guidance", "negative_prompt", "dtype")},
    )


def check_settings(pipeline: Any, settings: GenerationSettings, prompts: Sequence[str] | None) -> None:
    """Raises InputError where the pipeline does not take what was asked for."""
    accepted = call_parameters(pipeline)
    name = type(pipeline).__name__
    wanted = {
        "height": settings.height,
        "width": settings.width,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
        "negative_prompt": settings.negative_prompt,
    }
    for argument, value in wanted.items():
        if value is not None and argument not in accepted:
            raise InputError(f"{name} takes no {argument}; leave it out")
    conditioned = bool(accepted & {"prompt", "class_labels"})
    if conditioned and prompts is None:
        raise InputError(f"{name} needs prompts; give --prompts FILE")
    if not conditioned and prompts is not None:
        raise InputError(f"{name} takes no prompts; give --num-images instead of --prompts")
    if "prompt" not in accepted and "class_labels" in accepted:
        for prompt in prompts or ():
            class_label(pipeline, prompt)
    if settings.height is not None and settings.width is not None:
        _check_size(pipeline, settings.height, settings.width)


def _check_size(pipeline: Any, height: int, width: int) -> None:
    """Raises InputError for a size that the pipeline refuses, or would draw smaller than asked."""
    name = type(pipeline).__name__
    refusal = _own_refusal(pipeline, height, width)
    if refusal is not None:
        raise InputError(f"{name} refuses {width}x{height} ({refusal}); choose another --size")
    factor = getattr(pipeline, "vae_scale_factor", None)
    if not isinstance(factor, int):
        return
    # Flux and its kin fold 2 x 2 latents into a token, and cut what is left over.
    multiple = factor * 2 if hasattr(pipeline, "_pack_latents") else factor
    if height % multiple or width % multiple:
        raise InputError(f"{name} needs multiples of {multiple} pixels, not {width}x{height}; choose another --size")


def _own_refusal(pipeline: Any, height: int, width: int) -> str | None:
    """What the pipeline's own check of its inputs says against this size, and not against a rounder one."""
    check = getattr(pipeline, "check_inputs", None)
    if check is None:
        return None
    parameters = inspect.signature(check).parameters
    if not {"height", "width"} <= parameters.keys():
        return None
    required = {name: None for name, parameter in parameters.items() if parameter.default is parameter.empty}
    known = {name: value for name, value in (("prompt", ""), ("callback_steps", 1)) if name in parameters}

    def refusal(height: int, width: int) -> str | None:
        try:
            check(**(required | known | {"height": height, "width": width}))
        except Exception as error:
            return " ".join(str(error).split())
        return None

    found = refusal(height, width)
    rounder = refusal(*(-(-side // _ROUND) * _ROUND for side in (height, width)))
    return found if found is not None and rounder is None else None


def class_label(pipeline: Any, text: str) -> int:
    """The class number a line names: a number, or one of the pipeline's label names."""
    labels: dict[str, int] = getattr(pipeline, "labels", None) or {}
    classes = getattr(getattr(getattr(pipeline, "transformer", None), "config", None), "num_embeds_ada_norm", None)
    if text.isdecimal() and len(text) < 10 and int(text) < (classes or 10**9):
        return int(text)
    if text not in labels:
        raise InputError(f"{text[:100]!r}: not a class number or label of {type(pipeline).__name__}")
    return labels[text]


def generate(
    pipeline: Any,
    settings: GenerationSettings,
    jobs: Sequence[Job],
    output: Path,
    processes: Processes,
    batch_size: int = 1,
) -> int:
    """Makes the images that are missing in `output`; returns how many this process made.

    Jobs form fixed batches, batch b goes to process b mod world, and a batch of which any image is missing is run
    whole: neither an interruption nor the number of processes changes what a batch holds. Each image has its own noise
    generator on the CPU, so batch size and device change it by arithmetic rounding only.

    Raises:
        InputError: `output` holds images of other settings, the disk is full, or an image is not finite.
    """
    _claim(output, settings, len(jobs), processes)
    spans = list(blocks(len(jobs), batch_size))[processes.rank :: processes.world]
    made = 0
    with tqdm(
        total=sum(end - start for start, end in spans),
        unit="img",
        desc=output.name,
        disable=None if processes.is_main else True,
    ) as bar:
        for start, end in spans:
            batch = jobs[start:end]
            missing = [job for job in batch if not _is_done(output / job.file, settings, job)]
            if missing:
                drawn = run_batch(pipeline, settings, batch)
                for job, pixels in zip(batch, drawn, strict=True):
                    if job in missing:
                        _write_png(output / job.file, pixels, settings, job)
                        made += 1
            bar.update(end - start)
    processes.wait()
    if processes.is_main:
        _write_captions(output, jobs)
    return made


def run_batch(pipeline: Any, settings: GenerationSettings, batch: Sequence[Job]) -> list[Pixels]:
    """Runs the pipeline once; uint8 [H, W, 3] per job.

    Raises:
        InputError: an image is NaN or infinite, or the device is out of memory.
    """
    accepted = call_parameters(pipeline)
    arguments: dict[str, Any] = {
        "generator": [torch.Generator("cpu").manual_seed(job.generator_seed) for job in batch],
        "output_type": "np",
    }
    optional = {
        "height": settings.height,
        "width": settings.width,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
    }
    arguments |= {name: value for name, value in optional.items() if value is not None}
    if settings.negative_prompt is not None:
        arguments["negative_prompt"] = [settings.negative_prompt] * len(batch)
    prompts = [job.prompt or "" for job in batch]
    if "prompt" in accepted:
        arguments["prompt"] = prompts
    elif "class_labels" in accepted:
        arguments["class_labels"] = [class_label(pipeline, prompt) for prompt in prompts]
    else:
        arguments["batch_size"] = len(batch)
    try:
        output = pipeline(**arguments)
    except torch.OutOfMemoryError as error:
        raise InputError(f"out of memory with {len(batch)} images at once; lower --batch-size or the size") from error
    except Exception as error:  # pipelines check in many ways, and late
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        raise InputError(f"{type(pipeline).__name__}: {reason}") from error
    flagged = getattr(output, "nsfw_content_detected", None)
    for job, bad in zip(batch, flagged or [False] * len(batch), strict=True):
        if bad:
            logger.warning(f"{job.file}: blacked out by the pipeline's safety checker; it will distort every metric")
    return [_to_uint8(np.asarray(image), job, settings) for image, job in zip(output.images, batch, strict=True)]


def _to_uint8(image: np.ndarray[Any, Any], job: Job, settings: GenerationSettings) -> Pixels:
    if not np.isfinite(image).all():
        raise InputError(f"{job.file}: the image is not finite in {settings.dtype}; try --dtype float32 or bfloat16")
    pixels: Pixels = np.rint(image.astype(np.float64).clip(0, 1) * 255).astype(np.uint8)
    return pixels


def _image_settings(settings: GenerationSettings, job: Job) -> dict[str, Any]:
    return asdict(settings) | {"prompt": job.prompt, "seed": job.seed, "generator_seed": job.generator_seed}


def _write_png(path: Path, pixels: Pixels, settings: GenerationSettings, job: Job) -> None:
    information = PngImagePlugin.PngInfo()
    text = json.dumps(_image_settings(settings, job), ensure_ascii=False)
    information.add_itxt(SETTINGS_KEY, text.encode("utf-8", "backslashreplace"))
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=information)


def _is_done(path: Path, settings: GenerationSettings, job: Job) -> bool:
    if not path.is_file():
        return False
    try:
        with Image.open(path) as image:
            image.load()
            written = json.loads(image.info[SETTINGS_KEY])
    except Exception:
        # Damaged from outside (files appear here only whole): made again.
        return False
    if written != json.loads(json.dumps(_image_settings(settings, job))):
        raise InputError(f"{path}: made from another prompt or settings; choose another --output or remove it")
    return True


def _claim(output: Path, settings: GenerationSettings, count: int, processes: Processes) -> None:
    """Writes what the folder's images are made with, or checks that it is the same; other runs may try just now."""
    record, mine = output / SETTINGS_FILE, asdict(settings)
    height, width = settings.height or 512, settings.width or 512
    missing = count - sum(1 for _ in output.glob("*.png"))
    # A PNG of noise is slightly larger than its pixels.
    require_space(output, max(0, missing) * (height * width * 3 + 4096))
    _require_same(record, mine)
    processes.wait()
    if processes.is_main:
        create_json(record, mine)
    processes.wait()
    _require_same(record, mine)  # another run may have been first


def _require_same(record: Path, mine: dict[str, Any]) -> None:
    if not record.exists():
        return
    sweep(record)
    try:
        theirs = read_json(record)
    except (OSError, ValueError) as error:
        raise InputError(f"{record}: damaged; remove it or choose another --output") from error
    if not isinstance(theirs, dict):
        raise InputError(f"{record}: damaged; remove it or choose another --output")
    for name, value in mine.items():
        if theirs.get(name) != value:
            made, folder = str(theirs.get(name))[:200], record.parent
            raise InputError(
                f"{folder}: holds images made with {name} {made}, this run has {value}; choose another --output"
            )


def _write_captions(output: Path, jobs: Sequence[Job]) -> None:
    if any(job.prompt is not None for job in jobs):
        lines = [json.dumps({"file_name": job.file, "text": job.prompt or ""}, ensure_ascii=False) for job in jobs]
        write_text(output / "metadata.jsonl", "\n".join(lines) + "\n")
