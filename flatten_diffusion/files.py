"""Files that a reader never sees half of, and digests of what was read."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialised

JSON_LIMIT = 16 * 2**20
"""Bytes; the largest JSON file read: what this package writes stays far below."""

_DESCRIPTION, _CHECKSUM = "description", "sha256"
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]


@contextmanager
def atomic_path(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block succeeds, and is removed when it fails.

    What killed writers of the same path left behind is swept first. The block creates the file (with `folder`, finds
    an empty folder); replacing is one step for a file, and for a folder as near to one as a file system allows.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    temporary = path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        if folder:
            temporary.mkdir()
        yield temporary
        _sync(temporary)
        if folder and path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        _remove(temporary)


def sweep(path: Path) -> None:
    """Remove temporary files of `path` whose writer on this machine is gone."""
    for left in path.parent.glob(f".{_escaped(path.name)}.{_HOST}-*.tmp"):
        writer = left.name.removesuffix(".tmp").rpartition(".")[2].split("-")[1]
        if writer.isdecimal() and not _alive(int(writer)):
            _remove(left)


def write_bytes(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """As UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """As indented JSON, whole or not at all. Raises ValueError for NaN and infinity, which are not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def parse_json(content: bytes | str, source: str, constant: Callable[[str], Any] | None = None) -> Any:
    """The value of a JSON text from `source`, which messages name; `constant` says what NaN and infinities stand for.

    Raises:
        ValueError: too large, no UTF-8, no JSON, or nested beyond sense; one short line.
    """
    try:
        if len(content) > JSON_LIMIT:
            raise ValueError(f"{len(content)} bytes are more than the {JSON_LIMIT} that are read")
        return json.loads(content, parse_constant=constant or _refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise ValueError(f"{source} is truncated or no JSON ({reason})") from error


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises ValueError as `parse_json`, OSError when it cannot be read or is no file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file")
    with path.open("rb") as file:
        return parse_json(file.read(JSON_LIMIT + 1), str(path))


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], description: str = "") -> None:
    """As safetensors, whole or not at all, with a text and one checksum over both in the header."""
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {_DESCRIPTION: description, _CHECKSUM: sha256_of_tensors(data, description)}
    write_bytes(path, serialised(data, metadata))  # safetensors' own file would be its owner's alone to read


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """What `write_tensors` wrote. Raises OSError when it is missing, truncated, or does not match its checksum."""
    try:
        with safe_open(path, framework="pt") as file:
            description, checksum = read_header(file)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path} is missing or damaged ({str(error)[:200]})") from error
    if checksum != sha256_of_tensors(tensors, description):
        raise OSError(f"{path} is damaged: it does not match its checksum")
    return tensors, description


def read_header(file: safe_open) -> tuple[str, str]:
    """(description, checksum) of an open file that `write_tensors` wrote; nothing is verified."""
    metadata = file.metadata() or {}
    return metadata.get(_DESCRIPTION, ""), metadata.get(_CHECKSUM, "")


def sha256_of(path: Path) -> str:
    """The file's sha256, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_tensors(tensors: Mapping[str, torch.Tensor], description: str = "") -> str:
    """One sha256, in hexadecimal, over names, dtypes, shapes and values, and over a text that belongs to them."""
    digest = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _refuse(number: str) -> Any:
    raise ValueError(f"{number[:20]} is no finite number")


def _finite(number: str) -> float:
    return value if math.isfinite(value := float(number)) else _refuse(number)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _sync(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
