"""Writing files so that a reader never sees half of one, and knowing which bytes were read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block succeeds and is removed when it fails.

    Raises:
        InputError: the disk is full or the folder cannot be written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        # mkstemp makes private files; results are ordinary ones.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(describe_write_error(path, error)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def describe_write_error(path: Path, error: OSError) -> str:
    """One line for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{path}: no space left on the disk; free some or choose another output folder"
    return f"{path}: cannot be written ({error.strerror or error}); choose another output path"


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all; NaN and infinity are refused by the format, not written."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_of(path: Path) -> str:
    """The file's sha256, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_folder(folder: Path, pattern: str = "*.safetensors") -> str | None:
    """One sha256 over the files of `folder` that match, in name order; None where none does."""
    files = sorted(folder.glob(pattern))
    if not files:
        return None
    if len(files) == 1:
        return sha256_of(files[0])
    return hashlib.sha256("".join(sha256_of(file) for file in files).encode()).hexdigest()


def require_space(folder: Path, needed: int) -> None:
    """Checks before a long run that `needed` bytes fit on the disk of `folder` (which need not exist yet).

    Raises:
        InputError: they do not.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"{folder}: not enough disk space: about {needed / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free; "
            "free some or choose another output folder"
        )
