"""Loads the trained scenes pipeline that ships inside the package; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

PIPELINE_DIR = Path(__file__).parent / "weights"
"""Where the pipeline ships: a folder in diffusers' own format."""
ADAPTER_DIR = Path(__file__).parent / "adapter"
"""The distilled adapter that belongs to it, for `load_adapter`."""


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

    if not (PIPELINE_DIR / "model_index.json").is_file():
        raise FileNotFoundError(f"no scenes pipeline in {PIPELINE_DIR}: reinstall flatten-diffusion")
    return StableDiffusionPipeline.from_pretrained(
        PIPELINE_DIR, torch_dtype=torch_dtype, local_files_only=True, safety_checker=None, requires_safety_checker=False
    )
