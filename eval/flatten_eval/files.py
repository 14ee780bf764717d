"""Writing with the errors of this command line: `flatten_diffusion.files`, its OSError told in one line."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flatten_diffusion import files

from .errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` when the block succeeds; see `files.atomic_path`.

    Raises:
        InputError: the disk is full or the folder cannot be written.
    """
    try:
        with files.atomic_path(path) as temporary:
            yield temporary
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = "no space left on the disk; free some or choose another output folder"
        else:
            problem = f"cannot be written ({error.strerror or error}); choose another output path"
        raise InputError(f"{path}: {problem}") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """As UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """As indented JSON, whole or not at all. Raises ValueError for NaN and infinity, which are not JSON."""
    write_text(path, to_json(value) + "\n")


def to_json(value: Any) -> str:
    """Indented, without NaN and infinity (ValueError)."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)


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
