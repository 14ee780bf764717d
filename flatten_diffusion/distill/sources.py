"""Where training pictures come from: a folder, a Hub dataset, or nothing but prompts. Listed here, opened later."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from PIL import Image

logger = logging.get_logger(__name__)

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True)
class Example:
    """One caption and, unless the teacher draws it, its picture.

    Attributes:
        name: for messages and the fingerprint.
        caption: "" where there is none.
        stamp: changes when the picture does.
        open: loads the picture; None where the teacher draws it.
    """

    name: str
    caption: str
    stamp: str = ""
    open: Callable[[], Image.Image] | None = None


def image_folder(
    folder: str | Path,
    *,
    image_column: str = "file_name",
    caption_column: str = "text",
    max_samples: int | None = None,
) -> list[Example]:
    """Pictures below `folder`, captioned by its metadata.jsonl or by a .txt file beside each; "" without either.

    Args:
        folder: searched in all its subfolders, in name order.
        image_column, caption_column: keys in metadata.jsonl; the first holds paths relative to that file.
        max_samples: only the first so many.

    Raises:
        NotADirectoryError: no such folder.
        ValueError: no picture in it; a line of metadata.jsonl that is no JSON object or lacks a column.
    """
    root = Path(folder)
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is no folder: pass one with pictures.")
    metadata = root / "metadata.jsonl"
    if metadata.is_file():
        listed = _read_metadata(metadata, image_column, caption_column)
    else:
        pictures = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
        listed = [(path, _caption_beside(path)) for path in pictures]
    if not listed:
        raise ValueError(f"{root} holds no pictures: pass a folder with {', '.join(sorted(SUFFIXES))} files.")
    return [_file_example(root, path, caption) for path, caption in listed[:max_samples]]


def hub_dataset(
    name: str,
    *,
    config_name: str | None = None,
    split: str = "train",
    image_column: str = "image",
    caption_column: str = "text",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    max_samples: int | None = None,
) -> list[Example]:
    """Rows of a dataset on the Hub (or of anything else that `datasets.load_dataset` reads).

    Raises:
        ImportError: the datasets library is not installed.
        ValueError: no such column, or no row.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("A Hub dataset needs the datasets library: pip install datasets.") from error
    rows: Any = load_dataset(
        name, config_name, split=split, revision=revision, cache_dir=None if cache_dir is None else str(cache_dir)
    )
    for column in (image_column, caption_column):
        if column not in rows.column_names:
            raise ValueError(f"Dataset {name} has no column {column!r}: it has {', '.join(rows.column_names)}.")
    count = len(rows) if max_samples is None else min(max_samples, len(rows))
    if count == 0:
        raise ValueError(f"Dataset {name} has no rows in {split!r}: choose another split.")
    captions = rows.select(range(count))[caption_column]
    stamp = str(getattr(rows, "_fingerprint", ""))
    return [
        Example(f"{name}[{index}]", _first(captions[index]), stamp, _row_opener(rows, index, image_column))
        for index in range(count)
    ]


def prompt_file(path: str | Path, max_samples: int | None = None) -> list[Example]:
    """One prompt per line; the teacher draws the pictures. Blank lines are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no prompt.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file: pass a text file with one prompt per line.")
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line][:max_samples]
    if not prompts:
        raise ValueError(f"{file} holds no prompts: write one per line.")
    return prompts_as_examples(prompts)


def prompts_as_examples(prompts: Sequence[str]) -> list[Example]:
    """Examples whose pictures the teacher draws."""
    return [Example(f"prompt {index}", prompt) for index, prompt in enumerate(prompts)]


def _read_metadata(file: Path, image_column: str, caption_column: str) -> list[tuple[Path, str]]:
    listed = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: no JSON ({error}): write one object per line.") from error
        if not isinstance(row, dict) or image_column not in row or caption_column not in row:
            raise ValueError(f"{file}, line {number}: it must hold {image_column!r} and {caption_column!r}.")
        listed.append((file.parent / str(row[image_column]), _first(row[caption_column])))
    return listed


def _caption_beside(picture: Path) -> str:
    text = picture.with_suffix(".txt")
    return text.read_text(encoding="utf-8").strip() if text.is_file() else ""


def _first(caption: Any) -> str:
    """A caption, or the first of several."""
    if isinstance(caption, (list, tuple)):
        caption = caption[0] if caption else ""
    return str(caption)


def _file_example(root: Path, path: Path, caption: str) -> Example:
    try:
        status = path.stat()
        stamp = f"{status.st_size} {status.st_mtime_ns}"
    except OSError:
        stamp = "missing"  # named and skipped with the other broken ones, when it is opened
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
    return Example(name, caption, stamp, lambda: Image.open(path))


def _row_opener(rows: Any, index: int, column: str) -> Callable[[], Image.Image]:
    def load() -> Image.Image:
        picture: Image.Image = rows[index][column]
        return picture

    return load
