"""Where training images come from: a folder, a Hub dataset, or nothing but prompts. Listed here, opened later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from PIL import Image

from ..captions import METADATA, as_caption, decode_text, read_metadata
from ..images import SUFFIXES, is_hidden

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Example:
    """One caption and, unless the teacher draws it, its image.

    Attributes:
        name: for messages and the fingerprint.
        caption: "" where there is none.
        stamp: changes when the image does.
        open: loads the image; None where the teacher draws it.
    """

    name: str
    caption: str
    stamp: str = ""
    open: Callable[[], Image.Image] | None = None


def image_folder(
    folder: str | Path, *, image_column: str = "file_name", caption_column: str = "text", max_samples: int | None = None
) -> list[Example]:
    """Images below `folder`, captioned by metadata files in it or its subfolders, else by a .txt file beside each.

    What metadata lists comes first, once per line, missing files too (they are named when the cache is built); then
    the other images in name order. Hidden files and folders do not count, and neither does what is no plain file.

    Args:
        folder: searched in all its subfolders.
        image_column, caption_column: columns of metadata.jsonl, .csv or .parquet; the first holds paths relative to
            that file.
        max_samples: only the first so many.

    Raises:
        NotADirectoryError: no such folder.
        ValueError: no image in it; metadata that cannot be read, that lacks a column, or twice for one folder or
            image; a caption that is no UTF-8 text.
        ImportError: metadata.parquet without pyarrow.
    """
    root = Path(folder)
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is no folder: pass one with images.")
    files = sorted(path for path in root.rglob("*") if path.is_file() and not is_hidden(path, root))
    listed: list[tuple[Path, str]] = []
    source: dict[Path, Path] = {}
    for metadata in (path for path in files if path.name in METADATA):
        for name, caption in read_metadata(metadata.read_bytes(), str(metadata), image_column, caption_column):
            picture = metadata.parent / name
            if source.setdefault(picture, metadata) != metadata:
                raise ValueError(f"{picture} is listed in {source[picture]} and in {metadata}: keep one.")
            listed.append((picture, caption))
    pictures = (path for path in files if path.suffix.lower() in SUFFIXES and path not in source)
    listed += [(path, _caption_beside(path)) for path in pictures]
    if not listed:
        raise ValueError(f"{root} holds no images: pass a folder with {', '.join(sorted(SUFFIXES))} files.")
    return _counted([_file_example(root, path, caption) for path, caption in listed[:max_samples]], str(root))


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
    stamp = str(getattr(rows, "_fingerprint", ""))
    examples = []
    for index, caption in enumerate(rows.select(range(count))[caption_column]):
        row = f"{name}[{index}]"
        examples.append(Example(row, as_caption(caption, row), stamp, partial(_open_row, rows, index, image_column)))
    return _counted(examples, name)


def prompt_file(path: str | Path, max_samples: int | None = None) -> list[Example]:
    """One prompt per line; the teacher draws the images. Blank lines are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no prompt.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file: pass a text file with one prompt per line.")
    lines = [line.strip() for line in decode_text(file.read_bytes(), str(file)).split("\n")]
    prompts = [line for line in lines if line][:max_samples]
    if not prompts:
        raise ValueError(f"{file} holds no prompts: write one per line.")
    return prompts_as_examples(prompts)


def prompts_as_examples(prompts: Sequence[str]) -> list[Example]:
    """Examples whose images the teacher draws."""
    return [Example(f"prompt {index}", prompt) for index, prompt in enumerate(prompts)]


def _counted(examples: list[Example], source: str) -> list[Example]:
    """The same, saying how many have no caption."""
    missing = sum(not example.caption for example in examples)
    if missing:
        logger.warning(
            f"{source}: {missing} of {len(examples)} images have no caption and are taken for the empty prompt's."
        )
    return examples


def _caption_beside(picture: Path) -> str:
    text = picture.with_suffix(".txt")
    return as_caption(decode_text(text.read_bytes(), str(text)), str(text)) if text.is_file() else ""


def _file_example(root: Path, path: Path, caption: str) -> Example:
    try:
        status = path.stat()
        stamp = f"{status.st_size} {status.st_mtime_ns}"
    except OSError:
        stamp = "missing"  # named and skipped with the other broken ones, when it is opened
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
    return Example(name, caption, stamp, partial(_open_file, path))


def _open_file(path: Path) -> Image.Image:
    if not path.is_file():  # a pipe would wait for ever
        raise FileNotFoundError("no such file")
    return Image.open(path)


def _open_row(rows: Any, index: int, column: str) -> Image.Image:
    picture = rows[index][column]
    if not isinstance(picture, Image.Image):
        raise ValueError(f"its {column!r} is {type(picture).__name__}, no image")
    return picture
