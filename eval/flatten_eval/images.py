"""Sets of images: a folder (recursive) or a zip file, listed in a fixed order, decoded to RGB."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from .errors import InputError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"})
Pixels: TypeAlias = "NDArray[np.uint8]"


class UnreadableImage(Exception):
    """One image could not be decoded; carries its name."""


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
        if count is None:
            return self
        if count > len(self):
            raise InputError(f"{self.path}: {len(self)} images, {count} asked for; lower --max-images")
        return ImageSet(self.path, self.names[:count])

    def fingerprint(self) -> str:
        """A sha256 over names, sizes and times (checksums in a zip): changes when the set does."""
        digest = hashlib.sha256()
        if self.path.is_dir():
            for name in self.names:
                status = (self.path / name).stat()
                digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        else:
            with zipfile.ZipFile(self.path) as archive:
                for name in self.names:
                    entry = archive.getinfo(name)
                    digest.update(f"{name}\0{entry.file_size}\0{entry.CRC}\n".encode())
        return digest.hexdigest()


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
        """(width, height) as displayed, from the header alone.

        Raises:
            UnreadableImage: not an image.
        """
        try:
            with self._open(name) as file, Image.open(file) as image:
                width, height = image.size
                # EXIF orientations 5 to 8 lie on their side.
                return (height, width) if image.getexif().get(0x0112, 1) >= 5 else (width, height)
        except Exception as error:
            raise UnreadableImage(name) from error

    def pixels(self, name: str) -> Pixels:
        """The decoded image, uint8 [H, W, 3]; EXIF orientation applied, transparency laid on white.

        Raises:
            UnreadableImage: truncated, corrupt, or not an image.
        """
        try:
            with self._open(name) as file, Image.open(file) as image:
                return np.asarray(to_rgb(image))
        except Exception as error:  # Pillow raises many kinds: OSError, SyntaxError, struct.error, zipfile errors
            raise UnreadableImage(name) from error

    def close(self) -> None:
        """Closes the zip handles."""
        for archive in self._archives:
            archive.close()

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any Pillow image."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow's own conversion clips 16-bit grey to white instead of scaling it.
        wide = np.asarray(image).astype(np.float64) / 257.0
        image = Image.fromarray(np.rint(wide).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")


def open_images(path: Path) -> ImageSet:
    """Lists the images of a folder (recursively) or a zip file.

    Raises:
        InputError: the path does not exist, is not a folder or zip file, or holds no images.
    """
    if not path.exists():
        raise InputError(f"{path}: does not exist; give a folder of images, a zip file or saved statistics (.npz)")
    if path.is_dir():
        names = [
            file.relative_to(path).as_posix()
            for file in path.rglob("*")
            if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
        ]
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if _is_image_entry(name)]
    else:
        raise InputError(f"{path}: neither a folder, a zip file nor saved statistics (.npz)")
    if not names:
        raise InputError(f"{path}: no images in it (looked for {', '.join(sorted(SUFFIXES))})")
    return ImageSet(path, tuple(sorted(names)))


def _is_image_entry(name: str) -> bool:
    entry = Path(name)
    # macOS archives carry resource forks under __MACOSX with image suffixes.
    return entry.suffix.lower() in SUFFIXES and not entry.name.startswith(".") and "__MACOSX" not in entry.parts


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
            except UnreadableImage:
                broken.append(name)
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
    """One caption per image, from `captions` (JSON lines with file_name and text), else from a metadata.jsonl in the
    set, else from a .txt beside each image.

    Raises:
        InputError: an image has no caption, or a file is malformed.
    """
    table: dict[str, str] = {}
    source = captions
    if source is None and images.path.is_dir() and (images.path / "metadata.jsonl").is_file():
        source = images.path / "metadata.jsonl"
    if source is not None:
        table = _read_caption_table(source.read_text(encoding="utf-8"), str(source))
    elif not images.path.is_dir():
        with zipfile.ZipFile(images.path) as archive:
            if "metadata.jsonl" in archive.namelist():
                table = _read_caption_table(archive.read("metadata.jsonl").decode(), f"{images.path}:metadata.jsonl")
    found: list[str] = []
    missing: list[str] = []
    for name in images.names:
        text = table.get(name)
        beside = images.path / Path(name).with_suffix(".txt")
        if text is None and images.path.is_dir() and beside.is_file():
            text = beside.read_text(encoding="utf-8").strip()
        if text is None:
            missing.append(name)
        else:
            found.append(text)
    if missing:
        raise InputError(
            f"{images.path}: {len(missing)} of {len(images)} images have no caption (first: {missing[0]}); "
            "add metadata.jsonl (file_name, text), a .txt beside each image, or give --captions"
        )
    return found


def _read_caption_table(text: str, source: str) -> dict[str, str]:
    table: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            table[str(row["file_name"])] = str(row["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{source}, line {number}: needs JSON with file_name and text") from error
    return table
