"""How well pictures of the embedded scenes pipeline show what their captions state."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from .errors import InputError
from .images import ImageReader, load_captions, open_images


def mean_fact_accuracy(folder: Path) -> float:
    """Share of stated facts that hold, averaged over the pictures of a folder and their captions.

    Raises:
        InputError: a caption is not of the scene grammar.
    """
    from flatten_diffusion.scenes import fact_accuracy

    images = open_images(folder)
    captions = load_captions(images, None)
    total = 0.0
    with ImageReader(images) as reader:
        for name, caption in zip(images.names, captions, strict=True):
            try:
                total += fact_accuracy(Image.fromarray(reader.pixels(name)), caption)
            except ValueError as error:
                raise InputError(f"{folder}/{name}: {error}") from error
    return total / len(images)
