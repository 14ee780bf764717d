"""checkpoint-N folders: written whole or not at all, rotated, verified when read; safetensors only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from ..files import atomic_path, parse_json, read_tensors, sweep, write_tensors

logger = logging.get_logger(__name__)

_FILE = "state.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and everything else as JSON types."""

    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


def save_checkpoint(
    folder: str | Path, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], limit: int | None
) -> Path:
    """Write folder/checkpoint-`step`, then remove the oldest ones beyond `limit` (None keeps all)."""
    root = Path(folder)
    target = root / f"checkpoint-{step}"
    for left in root.glob(".checkpoint-*.tmp"):  # of whatever step
        sweep(root / left.name[1:].partition(".")[0])
    with atomic_path(target, folder=True) as partial:
        write_tensors(partial / _FILE, tensors, json.dumps(state))
    if limit is not None:
        for old in list_checkpoints(root)[:-limit]:
            shutil.rmtree(old)
    return target


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read one checkpoint folder. Raises OSError when it is incomplete or damaged."""
    file = Path(path) / _FILE
    tensors, state = read_tensors(file)
    return Checkpoint(tensors, parse_json(state, str(file), constant=float))


def load_latest(folder: str | Path) -> Checkpoint | None:
    """The newest checkpoint that can be read, saying which damaged ones were passed over; None when there is none."""
    for path in reversed(list_checkpoints(folder)):
        try:
            checkpoint = load_checkpoint(path)
        except OSError as error:
            logger.warning(f"{error}. Falling back to the checkpoint before it.")
            continue
        logger.info(f"Resuming from {path}.")
        return checkpoint
    return None
