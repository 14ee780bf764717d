"""Writing with the errors of this command line: `flatten_diffusion.files`, its OSError told in one line."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flatten_diffusion import files

from .errors import InputError


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = "no space left on the disk; free some or choose another output folder"
        else:
            problem = f"cannot be written ({error.strerror or error}); choose another output path"
        raise InputError(f"{path}: {problem}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` when the block succeeds; see `files.atomic_path`.

    Raises:
        InputError: the disk is full or the folder cannot be written.
    """
    with _told(path), files.atomic_path(path) as temporary:
        yield temporary


def write_bytes(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    with _told(path):
        files.write_bytes(path, content)


def write_text(path: Path, text: str) -> None:
    """As UTF-8, whole or not at all; what has no UTF-8 (of a file's name, say) as an escape, which JSON reads back."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """As indented JSON, whole or not at all. Raises ValueError for NaN and infinity, which are not JSON."""
    write_text(path, to_json(value) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], description: str) -> None:
    """With a checksum, whole or not at all."""
    with _told(path):
        files.write_tensors(path, tensors, description)


def create_json(path: Path, value: Any) -> bool:
    """As `write_json`, but only where nothing is there yet, whoever else tries at the same time; whether it wrote."""
    with _told(path):
        try:
            with files.atomic_path(path) as temporary:
                temporary.write_text(to_json(value) + "\n", encoding="utf-8", errors="backslashreplace")
                os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            files.write_json(path, value)  # a file system without links: the last one wins
    return True


def to_json(value: Any) -> str:
    """Indented, without NaN and infinity (ValueError)."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)


def shown_name(path: str | Path) -> str:
    """What results call a local file or folder: its last part, so that nobody's folders are published."""
    return Path(path).resolve().name if Path(path).exists() else str(path)


def require_writable(path: Path, *, folder: bool = False) -> None:
    """Raises InputError before a long run where a file (or a folder) could not be written; leaves nothing behind."""
    if path.exists() and path.is_dir() != folder:
        raise InputError(f"{path}: {'not a folder' if folder else 'a folder, not a file'}; choose another output path")
    existing = path.absolute() if folder else path.absolute().parent
    while not existing.exists():
        existing = existing.parent
    with _told(path), tempfile.TemporaryFile(dir=existing):
        pass


def require_space(folder: Path, needed: int) -> None:
    """Raises InputError where `needed` bytes do not fit on the disk of `folder`, which need not exist yet."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"{folder}: not enough disk space: about {needed / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free; "
            "free some or choose another output folder"
        )
