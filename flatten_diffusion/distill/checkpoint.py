"""checkpoint-N folders: written whole or not at all, rotated, verified when read; safetensors only."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

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
    target, partial = root / f"checkpoint-{step}", root / f".checkpoint-{step}.{os.getpid()}.partial"
    for left_over in root.glob(".checkpoint-*.partial"):
        shutil.rmtree(left_over)
    partial.mkdir(parents=True)
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(data, partial / _FILE, metadata={"state": json.dumps(state), "sha256": _digest(data)})
    _sync(partial / _FILE)
    if target.exists():  # made before a restart from an earlier one
        shutil.rmtree(target)
    partial.rename(target)
    _sync(root)
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
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        state = json.loads(metadata["state"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise OSError(f"{file} is missing or damaged ({error}).") from error
    if metadata.get("sha256") != _digest(tensors):
        raise OSError(f"{file} is damaged: its tensors do not match their checksum.")
    return Checkpoint(tensors, state)


def load_latest(folder: str | Path) -> Checkpoint | None:
    """The newest checkpoint that can be read, saying which damaged ones were passed over; None when there is none."""
    for path in reversed(list_checkpoints(folder)):
        try:
            checkpoint = load_checkpoint(path)
        except OSError as error:
            logger.warning(f"{error} Falling back to the checkpoint before it.")
            continue
        logger.info(f"Resuming from {path}.")
        return checkpoint
    return None


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
