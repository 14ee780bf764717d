"""Images as training and evaluation both see them: which files count, and how each is decoded."""

from __future__ import annotations

from pathlib import PurePath

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
"""In lower case, of the files that count as images."""

_WHITE = (255, 255, 255, 255)


def is_hidden(path: PurePath, root: PurePath) -> bool:
    """Whether a part of `path` below `root` starts with a dot or is __MACOSX: nobody's image or caption.

    Raises:
        ValueError: `path` is not below `root`.
    """
    return any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(root).parts)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any image, by one rule:

    turned as its EXIF says; 16-bit grey divided by 257; floating point from 0 to 1 times 255; what is transparent laid
    on white; palettes, CMYK and the rest as Pillow converts them, without colour profiles; of several frames the first.

    Raises:
        ValueError: integers beyond 16 bits, floats beyond 0 to 1, or a mode that has no RGB.
        OSError, SyntaxError: truncated or corrupt.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _scaled(image, 65535)
    elif image.mode == "F":
        image = _scaled(image, 1)
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, _WHITE), layer).convert("RGB")
    return image.convert("RGB")


def _scaled(image: Image.Image, white: int) -> Image.Image:
    """8-bit grey: `white` becomes 255, and so does the value that the file calls transparent."""
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= white:
        raise ValueError(f"its values go from {low:g} to {high:g}, not from 0 to {white}: convert it to 8 bits")
    grey = np.rint(values * (255 / white)).astype(np.uint8)
    clear = image.info.get("transparency")
    return Image.fromarray(grey if clear is None else np.where(values == clear, np.uint8(255), grey))
