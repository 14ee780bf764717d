"""Pictures cut instead of shrunk: what a 299-pixel network does not see of a large picture."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from ..errors import InputError
from ..images import Pixels


@dataclass(frozen=True)
class Crops:
    """Square crops of a picture at its own resolution, for FID_c and KID_c (FreeScale, Qiu et al., arXiv 2412.09626,
    section 4): a crop of the extractor's input size reaches the network unresized.

    Attributes:
        size: side in pixels.
        count: crops per picture, each at a uniformly random place of its own; None for the grid of all whole crops that
            fit beside each other, centred.
        seed: of the random places. They depend on it and on the picture's name without its suffix, so that two sets of
            the same names are cut at the same places.
    """

    size: int
    count: int | None
    seed: int = 0

    @property
    def described(self) -> str:
        """What statistics call it; two sets may be compared only where it is the same."""
        return f"grid-{self.size}" if self.count is None else f"random-{self.count}-{self.size}-seed-{self.seed}"

    def number(self, height: int, width: int) -> int:
        """How many crops a picture of this size gives."""
        return self.count if self.count is not None else (height // self.size) * (width // self.size)

    def places(self, name: str, height: int, width: int) -> list[tuple[int, int]]:
        """(top, left) in pixels of every crop of a picture at least as large as a crop, rows first in a grid."""
        if self.count is None:
            top, left = (height % self.size) // 2, (width % self.size) // 2
            down, across = range(top, height - self.size + 1, self.size), range(left, width - self.size + 1, self.size)
            return [(row, column) for row in down for column in across]
        known = PurePosixPath(name).with_suffix("").as_posix()
        digest = hashlib.sha256(f"{self.seed}/{known}".encode(errors="surrogateescape")).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
        bounds = (height - self.size + 1, width - self.size + 1)
        rows, columns = (torch.randint(bound, (self.count,), generator=generator).tolist() for bound in bounds)
        return list(zip(rows, columns, strict=True))

    def cut(self, name: str, pixels: Pixels) -> list[Pixels]:
        """The crops of a picture, uint8 [size, size, 3] each, of uint8 [H, W, 3]."""
        places = self.places(name, *pixels.shape[:2])
        return [pixels[top : top + self.size, left : left + self.size] for top, left in places]

    def require_fit(self, path: Path, sizes: Iterable[tuple[int, int]]) -> None:
        """Raises InputError where a picture of one of these sizes, (width, height), is smaller than a crop."""
        small = sorted(size for size in sizes if min(size) < self.size)
        if small:
            shown = f"{small[0][0]}x{small[0][1]}"
            raise InputError(
                f"{path}: pictures of {shown} are smaller than crops of {self.size}x{self.size}; "
                "give a smaller --crop-size, or no --crops"
            )


@dataclass(frozen=True)
class CropRequest:
    """Crops as asked for: `size` None is the input size of whichever extractor takes them; else as in `Crops`."""

    count: int | None
    size: int | None = None
    seed: int = 0

    def of(self, input_size: int | None, name: str) -> Crops:
        """The crops for an extractor of this input size in pixels.

        Raises:
            InputError: neither says a size.
        """
        size = self.size or input_size
        if size is None:
            raise InputError(f"--crops: the {name} extractor has no input size of its own; give --crop-size PIXELS")
        return Crops(size, self.count, self.seed)
