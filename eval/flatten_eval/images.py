"""Sets of images: a folder (recursive) or a zip file, listed in a fixed order, decoded to RGB."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flatten_diffusion.captions import METADATA, decode_text, read_metadata
from flatten_diffusion.files import parse_json
from flatten_diffusion.images import SUFFIXES, is_hidden, to_rgb
from flatten_diffusion.scenes.check import SETTINGS_KEY

from .errors import InputError, first_line

Pixels: TypeAlias = "NDArray[np.uint8]"


class UnreadableImage(Exception):
    """One image could not be decoded; carries its name, and the reason where it is more than damage."""


@dataclass(frozen=True)
class ImageSet:
    """Images of one folder or zip file, ordered by name.

    Attributes:
        path: the folder or zip file.
        names: relative names, sorted.
    """

    path: Path
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def limited(self, count: int | None) -> ImageSet:
        """The first `count` images by name (all of them for None).

        Raises:
            InputError: there are fewer; a set is never shortened silently.
        """
        if count is not None and count > len(self):
            raise InputError(f"{self.path}: {len(self)} images, {count} asked for; lower --max-images")
        return ImageSet(self.path, self.names[:count])

    def fingerprint(self) -> str:
        """A sha256 over names, sizes and times (checksums in a zip): changes when the set does."""
        digest = hashlib.sha256()
        if self.path.is_dir():
            for name in self.names:
                status = (self.path / name).stat()
                digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
        else:
            with _archive(self.path) as archive:
                for name in self.names:
                    entry = archive.getinfo(name)
                    digest.update(f"{name}\0{entry.file_size}\0{entry.CRC}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """An open zip file; whatever is wrong with it becomes one line."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except InputError:
        raise
    except Exception as error:  # a damaged directory raises many kinds: BadZipFile, ValueError, struct.error, KeyError
        raise InputError(f"{path}: damaged zip file ({first_line(error)}); pack it again") from error


class ImageReader:
    """Opens images of a set; usable from several threads, each with its own zip handle."""

    def __init__(self, images: ImageSet) -> None:
        self._images = images
        self._is_zip = not images.path.is_dir()
        self._local = threading.local()
        self._archives: list[zipfile.ZipFile] = []

    def _open(self, name: str) -> IO[bytes]:
        if not self._is_zip:
            return (self._images.path / name).open("rb")
        if not hasattr(self._local, "archive"):
            self._local.archive = zipfile.ZipFile(self._images.path)
            self._archives.append(self._local.archive)
        return io.BytesIO(self._local.archive.read(name))

    def size(self, name: str) -> tuple[int, int]:
        """(width, height) as displayed, from the header alone. Raises UnreadableImage where it is not an image."""
        try:
            with self._open(name) as file, Image.open(file) as image:
                width, height = image.size
                # EXIF orientations 5 to 8 lie on their side.
                return (height, width) if image.getexif().get(0x0112, 1) >= 5 else (width, height)
        except Exception as error:
            raise UnreadableImage(name) from error

    def settings(self, name: str) -> dict[str, Any] | None:
        """What `generate` wrote into the image, from the header alone; None where it wrote nothing readable."""
        try:
            with self._open(name) as file, Image.open(file) as image:
                written = parse_json(image.info[SETTINGS_KEY], name)
        except Exception:  # no such key, of another kind, or no image at all
            return None
        return written if isinstance(written, dict) else None

    def pixels(self, name: str) -> Pixels:
        """The decoded image, uint8 [H, W, 3], by the rule of `flatten_diffusion.images.to_rgb`.

        Raises:
            UnreadableImage: truncated, corrupt, not an image, or beyond what that rule takes.
        """
        try:
            with self._open(name) as file, Image.open(file) as image:
                image.load()
                try:
                    return np.asarray(to_rgb(image))
                except ValueError as error:
                    raise UnreadableImage(f"{name} ({first_line(error)})") from error
        except UnreadableImage:
            raise
        except Exception as error:  # Pillow raises many kinds: OSError, SyntaxError, struct.error, zipfile errors
            raise UnreadableImage(name) from error

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(self, *exception: object) -> None:
        for archive in self._archives:
            archive.close()


def open_images(path: Path) -> ImageSet:
    """Lists the images of a folder (recursively) or a zip file; hidden files and folders do not count.

    Raises:
        InputError: the path does not exist, is neither folder nor zip file, holds no images, or something that is named
            like one and is no file.
    """
    if not path.exists():
        raise InputError(f"{path}: does not exist; give a folder of images, a zip file or saved statistics (.npz)")
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and not is_hidden(file, path)]
        odd = [file for file in found if not file.is_file() and not file.is_dir()]
        if odd:  # a pipe would block, a dangling link would shorten the set silently
            raise InputError(f"{odd[0]}: named like an image, but no file; remove it")
        names = [file.relative_to(path).as_posix() for file in found if file.is_file()]
    elif path.is_file() and zipfile.is_zipfile(path):
        with _archive(path) as archive:
            entries = [name for name in archive.namelist() if PurePosixPath(name).suffix.lower() in SUFFIXES]
        root = PurePosixPath()
        names = [name for name in set(entries) if not is_hidden(PurePosixPath(name.lstrip("/")), root)]
    else:
        raise InputError(f"{path}: neither a folder, a zip file nor saved statistics (.npz)")
    if not names:
        raise InputError(f"{path}: no images in it (looked for {', '.join(sorted(SUFFIXES))})")
    return ImageSet(path, tuple(sorted(names)))


def unreadable_message(path: Path, broken: Sequence[str], total: int) -> str:
    """One line that counts and names unreadable images."""
    shown = ", ".join(broken[:5]) + (f" and {len(broken) - 5} more" if len(broken) > 5 else "")
    return f"{path}: {len(broken)} of {total} images cannot be read: {shown}; repair or remove them"


def check_headers(images: ImageSet) -> set[tuple[int, int]]:
    """Reads every header before a long run; returns the (width, height) pairs that occur.

    Raises:
        InputError: some files are not images; counted and named.
    """
    sizes: set[tuple[int, int]] = set()
    broken: list[str] = []
    with ImageReader(images) as reader:
        for name in images.names:
            try:
                sizes.add(reader.size(name))
            except UnreadableImage as error:
                broken.append(str(error))
    if broken:
        raise InputError(unreadable_message(images.path, broken, len(images)))
    return sizes


def require_one_size(images: ImageSet, sizes: set[tuple[int, int]], remedy: str) -> None:
    """Raises InputError where the images differ in size."""
    if len(sizes) > 1:
        shown = ", ".join(f"{width}x{height}" for width, height in sorted(sizes)[:4])
        raise InputError(f"{images.path}: mixed image sizes ({shown}{', ...' if len(sizes) > 4 else ''}); {remedy}")


def blocks(count: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of consecutive blocks of at most `size`."""
    for start in range(0, count, size):
        yield start, min(start + size, count)


def load_captions(images: ImageSet, captions: Path | None) -> list[str]:
    """One caption per image, from `captions` (JSON lines, .csv or .parquet with file_name and text), else from metadata
    files in the set and its folders, else from a .txt beside each image.

    Raises:
        InputError: an image has no caption, or a file is malformed.
    """
    table: dict[str, str] = {}
    try:
        if captions is not None:
            table = dict(_rows(captions.read_bytes(), str(captions)))
        elif images.path.is_dir():
            table = _captions_of_folder(images)
        else:
            with _archive(images.path) as archive:
                for name in sorted(set(archive.namelist())):
                    if PurePosixPath(name).name in METADATA:
                        rows = _rows(archive.read(name), f"{images.path}:{name}")
                        table |= {str(PurePosixPath(name).parent / file): text for file, text in rows}
    except (OSError, ValueError, ImportError) as error:
        raise InputError(first_line(error)) from error
    missing = [name for name in images.names if not table.get(name)]
    if missing:
        raise InputError(
            f"{images.path}: {len(missing)} of {len(images)} images have no caption (first: {missing[0]}); "
            "add metadata.jsonl (file_name, text), a .txt beside each image, or give --captions"
        )
    return [table[name] for name in images.names]


def _captions_of_folder(images: ImageSet) -> dict[str, str]:
    table: dict[str, str] = {}
    for name in images.names:
        beside = (images.path / name).with_suffix(".txt")
        if beside.is_file():
            table[name] = decode_text(beside.read_bytes(), str(beside)).strip()
    for file in sorted(path for name in METADATA for path in images.path.rglob(name)):
        if file.is_file() and not is_hidden(file, images.path):
            below = file.parent.relative_to(images.path)
            table |= {(below / name).as_posix(): text for name, text in _rows(file.read_bytes(), str(file))}
    return table


def _rows(content: bytes, source: str) -> list[tuple[str, str]]:
    # --captions may have any name; what is neither .csv nor .parquet is JSON lines.
    known = source if Path(source).suffix in (".csv", ".parquet", ".jsonl") else f"{source}.jsonl"
    try:
        rows = read_metadata(content, known, "file_name", "text")
    except ValueError as error:
        raise ValueError(str(error).replace(known, source)) from error
    return [(PurePosixPath(name).as_posix(), text) for name, text in rows]
