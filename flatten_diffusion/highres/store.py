"""Finished stages on disk: a picture with its settings inside, its latents, and a record; whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, PngImagePlugin

from ..files import atomic_path, read_json, read_tensors, sweep, write_json, write_tensors
from .settings import Size

SETTINGS_KEY = "flatten_diffusion"
"""Where a stage's PNG keeps its settings, as JSON."""
RECORD = "settings.json"
"""What all stages of a folder are made with."""
_PICTURE, _LATENTS, _STAGE = "picture.png", "latents.safetensors", "stage.json"


class Drawn(NamedTuple):
    """A stage's picture and its latents on the CPU, and how many denoising steps and seconds they took."""

    image: Image.Image
    latents: torch.Tensor
    steps: int
    seconds: float


class StageStore:
    """The stages of one call in a folder.

    Args:
        folder: made if missing.
        record: JSON types; everything that the pictures depend on.

    Raises:
        ValueError: the folder holds stages of another record, or a record that cannot be read.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.folder = folder
        self.record: dict[str, Any] = json.loads(json.dumps(record))
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file: pass a folder.")
        path = folder / RECORD
        if path.exists():
            self._require_same(path)
        else:
            write_json(path, self.record)
        sweep(path)

    def _require_same(self, path: Path) -> None:
        theirs = read_json(path)
        if not isinstance(theirs, dict):
            raise ValueError(f"{path} is no record of settings: choose another output_dir.")
        for name in sorted({*theirs, *self.record}):
            if theirs.get(name) != self.record.get(name):
                pair = theirs.get(name), self.record.get(name)
                before, now = _difference(*pair), _difference(*reversed(pair))
                raise ValueError(
                    f"{self.folder} holds stages made with {name} {before}, not {now}: choose another output_dir."
                )

    def path_of(self, number: int, size: Size) -> Path:
        """The folder of one stage."""
        return self.folder / f"{number}-{size[0]}x{size[1]}"

    def save(self, number: int, size: Size, drawn: Drawn) -> None:
        """Write a finished stage."""
        stage = {"stage": number, "height": size[0], "width": size[1], "steps": drawn.steps}
        information = PngImagePlugin.PngInfo()
        text = json.dumps({**self.record, **stage}, ensure_ascii=False)
        information.add_itxt(SETTINGS_KEY, text.encode("utf-8", "backslashreplace"))
        with atomic_path(self.path_of(number, size), folder=True) as folder:
            drawn.image.save(folder / _PICTURE, format="PNG", pnginfo=information)
            write_tensors(folder / _LATENTS, {"latents": drawn.latents}, text)
            write_json(folder / _STAGE, {**stage, "seconds": drawn.seconds})

    def load(self, number: int, size: Size) -> Drawn | None:
        """A finished stage; None where it is not there or damaged, and is to be drawn again.

        Raises:
            ValueError: it was made with other settings.
        """
        folder = self.path_of(number, size)
        sweep(folder)
        if not folder.is_dir():
            return None
        try:
            tensors, text = read_tensors(folder / _LATENTS)
            stage = read_json(folder / _STAGE)
            # Not Image.open, which takes pictures of 179 megapixels for an attack.
            with PngImagePlugin.PngImageFile(folder / _PICTURE) as file:
                file.load()
                inside, image = file.info.get(SETTINGS_KEY), file.convert("RGB")
            made = json.loads(text)
            drawn = Drawn(image, tensors["latents"], int(stage["steps"]), float(stage["seconds"]))
        except (OSError, ValueError, SyntaxError, KeyError, TypeError):
            return None  # damaged from outside: folders appear here only whole
        if any(made.get(name) != value for name, value in self.record.items()) or inside != text:
            raise ValueError(f"{folder} was made with other settings: remove it, or choose another output_dir.")
        return drawn if drawn.image.size == (size[1], size[0]) else None


def _difference(value: Any, other: Any) -> str:
    """What differs, shortly: of two objects the first entry that does."""
    if isinstance(value, dict) and isinstance(other, dict):
        for name in sorted({*value, *other}):
            if value.get(name) != other.get(name):
                return f"{name} {str(value.get(name))[:60]}"
    return str(value)[:100]
