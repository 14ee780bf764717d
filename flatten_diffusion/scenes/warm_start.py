"""Starts a scenes pipeline from the weights of another one, of another size or architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from safetensors.torch import load_file

logger = logging.get_logger(__name__)

# Positions belong to a size: they are built, not learned.
_BUILT = ("pos_embed.pos_embed",)


def start_from(pipeline: Any, folder: Path) -> None:
    """Copy every weight of the pipeline in `folder` that has the name and shape of one here.

    A second text encoder starts as the first one where `folder` has only that.

    Raises:
        FileNotFoundError: `folder` holds no pipeline.
        ValueError: nothing in it fits.
    """
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder}: no pipeline to start from (no model_index.json)")
    copied = {name: _copy(part, _weights(folder, name)) for name, part in _modules(pipeline).items()}
    if not any(copied.values()):
        raise ValueError(f"{folder}: none of its weights fits a {type(pipeline).__name__}")
    logger.info(
        "started from %s: %s", folder, ", ".join(f"{count} tensors of {name}" for name, count in copied.items())
    )


def _modules(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def _weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    for part in (name, "text_encoder") if name.startswith("text_encoder") else (name,):
        files = sorted((folder / part).glob("*.safetensors"))
        if files:
            return {_plain(key): tensor for file in files for key, tensor in load_file(file).items()}
    return {}


def _copy(part: torch.nn.Module, weights: dict[str, torch.Tensor]) -> int:
    copied = 0
    with torch.no_grad():
        for key, tensor in part.state_dict().items():
            source = weights.get(_plain(key))
            if key not in _BUILT and source is not None and source.shape == tensor.shape:
                tensor.copy_(source)
                copied += 1
    return copied


def _plain(key: str) -> str:
    # Text models with and without a projection, of transformers 4 and 5, differ in this prefix.
    return key.removeprefix("text_model.")
