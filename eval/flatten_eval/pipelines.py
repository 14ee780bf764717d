"""The pipeline, adapter and prompts that are evaluated, and which arguments a pipeline takes."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

import torch

from flatten_diffusion.captions import decode_text
from flatten_diffusion.files import parse_json, sha256_of
from flatten_diffusion.images import is_hidden
from flatten_diffusion.scenes.pipeline import PIPELINES, load_embedded

from .errors import InputError, first_line

_EDGE = 2**20
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
    named: dict[str, Any] = {"torch_dtype": DTYPES[dtype], "revision": revision, "variant": variant}
    try:
        return DiffusionPipeline.from_pretrained(source, local_files_only=offline, use_safetensors=True, **named)
    except Exception as error:  # a damaged folder raises many kinds
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
    """sha256 of a local adapter's weights, so that two adapters of one name are told apart."""
    file = Path(source or "") / "adapter_model.safetensors"
    return sha256_of(file) if source is not None and file.is_file() else None


def pipeline_sha256(source: str) -> str | None:
    """One sha256 of a local pipeline, so that two of one name are told apart: over each file's name, size, first and
    last megabyte (whole files of gigabytes would take longer than drawing)."""
    folder = Path(source)
    if source in PIPELINES or not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not is_hidden(path, folder):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode(errors="surrogateescape"))
            with path.open("rb") as file:
                digest.update(file.read(_EDGE))
                file.seek(max(0, size - _EDGE))
                digest.update(file.read(_EDGE))
    return digest.hexdigest()


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
        # Not splitlines(): U+2028 and its like may stand inside a prompt.
        lines = [line.strip() for line in decode_text(path.read_bytes(), str(path)).split("\n")]
    except (OSError, ValueError) as error:
        raise InputError(first_line(error)) from error
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
