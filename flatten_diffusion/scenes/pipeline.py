"""Loads the trained scenes pipelines that ship inside the package; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

_HERE = Path(__file__).parent
PIPELINE_DIR, SD3_PIPELINE_DIR = _HERE / "weights", _HERE / "weights_sd3"
"""Where the pipelines ship: folders in diffusers' own format."""
ADAPTER_DIR, SD3_ADAPTER_DIR = _HERE / "adapter", _HERE / "adapter_sd3"
"""The distilled adapters that belong to them, for `load_adapter`."""
PIPELINES = ("scenes", "scenes-sd3")
"""Names of the embedded pipelines, wherever a command takes a pipeline."""


def load_scenes_pipeline(torch_dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """The embedded text-to-image pipeline: Stable Diffusion's classes, trained on the captions of the scene grammar.

    Args:
        torch_dtype: of the weights in memory (they are stored in float16).

    Returns:
        A pipeline on CPU; move it with `.to(...)`. Its model card, README.md in `PIPELINE_DIR`, states its native
        size, how it was trained and what was measured.

    Raises:
        FileNotFoundError: the installed package lacks the pipeline's files.
    """
    from diffusers import StableDiffusionPipeline  # heavy, and drawing or checking scenes does not need it

    _check(PIPELINE_DIR)
    return StableDiffusionPipeline.from_pretrained(
        PIPELINE_DIR, torch_dtype=torch_dtype, local_files_only=True, safety_checker=None, requires_safety_checker=False
    )


def load_sd3_scenes_pipeline(torch_dtype: torch.dtype = torch.float32) -> StableDiffusion3Pipeline:
    """The embedded pipeline of joint attention: Stable Diffusion 3's classes without T5, trained on the same scenes.

    Arguments, result and errors as of `load_scenes_pipeline`; its model card is in `SD3_PIPELINE_DIR`.
    """
    from diffusers import StableDiffusion3Pipeline

    _check(SD3_PIPELINE_DIR)
    return StableDiffusion3Pipeline.from_pretrained(
        SD3_PIPELINE_DIR, torch_dtype=torch_dtype, local_files_only=True, text_encoder_3=None, tokenizer_3=None
    )


def load_embedded(
    name: str, torch_dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline | StableDiffusion3Pipeline:
    """The embedded pipeline called `name`, one of `PIPELINES`. Raises ValueError for another name."""
    if name not in PIPELINES:
        raise ValueError(f"{name!r} is no embedded pipeline: use {' or '.join(PIPELINES)}")
    return load_scenes_pipeline(torch_dtype) if name == "scenes" else load_sd3_scenes_pipeline(torch_dtype)


def _check(folder: Path) -> None:
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"no scenes pipeline in {folder}: reinstall flatten-diffusion")
