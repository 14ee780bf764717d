"""Image sizes that share a batch: each image goes to the bucket whose aspect ratio is nearest to its own."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from PIL import Image, ImageOps

from ..images import to_rgb

Size = tuple[int, int]
"""(height, width) in pixels."""

LARGEST_SIDE = 16384
"""Pixels; larger images are taken for a slip."""


def make_buckets(resolution: int, step: int, widest: float = 2.0) -> list[Size]:
    """The square of side `resolution`, and shapes of about its area up to the aspect ratio `widest`, both ways.

    Sides are multiples of `step` pixels. Raises ValueError when `resolution` is not one itself.
    """
    check_sizes([(resolution, resolution)], step)
    buckets = {(resolution, resolution)}
    for width in range(resolution, int(resolution * math.sqrt(widest)) + step, step):
        height = int(resolution * resolution / width / step) * step
        if height and width / height <= widest:
            buckets |= {(height, width), (width, height)}
    return sorted(buckets, key=lambda size: size[1] / size[0])


def parse_sizes(text: str) -> list[Size]:
    """ "512x512,384x640" (height x width) -> sizes. Raises ValueError for anything else."""
    sizes = []
    for part in text.split(","):
        sides = re.fullmatch(r"\s*(\d{1,5})x(\d{1,5})\s*", part)
        if sides is None:
            raise ValueError(f"Size {part.strip()[:40]!r} is not HEIGHTxWIDTH in pixels, such as 512x768.")
        sizes.append((int(sides[1]), int(sides[2])))
    return sizes


def check_sizes(sizes: Sequence[Size], step: int) -> None:
    """Raise ValueError unless every side is a multiple of `step` from 1 to `LARGEST_SIDE`."""
    for height, width in sizes:
        if min(height, width) <= 0 or max(height, width) > LARGEST_SIDE or height % step or width % step:
            raise ValueError(
                f"{height}x{width} pixels do not fit this model: both sides must be multiples of {step} up to "
                f"{LARGEST_SIDE}."
            )


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest to that of `size` on a logarithmic scale."""
    wanted = math.log(size[1] / size[0])
    return min(buckets, key=lambda bucket: abs(math.log(bucket[1] / bucket[0]) - wanted))


def to_pixels(image: Image.Image, size: Size) -> torch.Tensor:
    """[3, height, width] in [-1, 1]: decoded as `to_rgb` says, resized to cover `size`, cut around the middle."""
    height, width = size
    fitted = ImageOps.fit(to_rgb(image), (width, height), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).reshape(height, width, 3)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1
