"""The pipeline, adapter and prompts that are evaluated, and which arguments a pipeline takes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from flatten_diffusion.files import parse_json, sha256_of
from flatten_diffusion.scenes.pipeline import PIPELINES, load_embedded

from .errors import InputError, first_line

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_pipeline(
    source: str,
    *,
    dtype: str,
    device: torch.device,
    offline: bool,
    revision: str | None = None,
    variant: str | None = None,
) -> Any:
    """Loads a diffusers pipeline onto the device, its progress bar off.

    Args:
        source: hub id, local folder, or `scenes` or `scenes-sd3` for the pipelines embedded in this package.
        dtype: a key of DTYPES.

    Raises:
        InputError: not found, not a pipeline, or not loadable.
    """
    if source in PIPELINES:
        try:
            pipeline: Any = load_embedded(source, DTYPES[dtype])
        except (OSError, ValueError) as error:
            raise InputError(f"{source}: {first_line(error)}") from error
    else:
        pipeline = _from_pretrained(source, dtype, offline, revision, variant)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _from_pretrained(source: str, dtype: str, offline: bool, revision: str | None, variant: str | None) -> Any:
    from diffusers import DiffusionPipeline

    folder = Path(source)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise InputError(f"{source}: not a diffusers pipeline folder (no model_index.json)")
    try:
        return DiffusionPipeline.from_pretrained(
            source,
            torch_dtype=DTYPES[dtype],
            local_files_only=offline,
            revision=revision,
            variant=variant,
            use_safetensors=True,
        )
    except (OSError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise InputError(f"{source}: cannot be loaded as a pipeline ({first_line(error)})") from error


def apply_adapter(pipeline: Any, source: str, offline: bool) -> Any:
    """Converts the pipeline with a saved adapter; returns the handle.

    Raises:
        InputError: the adapter is missing, damaged, or belongs to another model.
    """
    from flatten_diffusion import load_adapter

    try:
        return load_adapter(pipeline, source, local_files_only=offline)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"adapter {source}: {first_line(error)}") from error


def adapter_sha256(source: str | None) -> str | None:
    """sha256 of a local adapter's weights, so that two adapters at one path are told apart."""
    if source is None:
        return None
    file = Path(source) / "adapter_model.safetensors"
    return sha256_of(file) if file.is_file() else None


def call_parameters(pipeline: Any) -> frozenset[str]:
    """Names of the arguments that calling the pipeline takes."""
    return frozenset(inspect.signature(type(pipeline).__call__).parameters) - {"self"}


def denoiser(pipeline: Any) -> torch.nn.Module:
    """The UNet or transformer of the pipeline.

    Raises:
        InputError: it has neither.
    """
    for name in ("unet", "transformer"):
        module = getattr(pipeline, name, None)
        if isinstance(module, torch.nn.Module):
            return module
    raise InputError(f"{type(pipeline).__name__}: has neither a unet nor a transformer")


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file (one per line) or a JSON lines file (key text, prompt or caption).

    Raises:
        InputError: missing, empty, not UTF-8, or malformed.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such prompts file")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text; give one prompt per line") from error
    if path.suffix in (".jsonl", ".ndjson"):
        prompts = [_prompt_of(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line]
    else:
        prompts = [line for line in lines if line]
    if not prompts:
        raise InputError(f"{path}: holds no prompts; give one per line")
    return prompts


def _prompt_of(where: str, line: str) -> str:
    try:
        row = parse_json(line, where)
    except ValueError as error:
        raise InputError(str(error)) from error
    for key in ("text", "prompt", "caption"):
        if isinstance(row, dict) and isinstance(row.get(key), str):
            return str(row[key])
    raise InputError(f"{where}: needs a text, prompt or caption")
