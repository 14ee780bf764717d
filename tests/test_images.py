"""One decoding rule, whatever the file holds."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image

from flatten_diffusion.images import is_hidden, to_rgb


def decoded(image: Image.Image, path: Path, **options: object) -> list[list[int]]:
    """RGB of each pixel of the first row, after a round trip through the file."""
    image.save(path, **options)
    with Image.open(path) as opened:
        rgb = to_rgb(opened)
    assert rgb.mode == "RGB"
    return np.asarray(rgb)[0].tolist()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_of_16_bits_is_scaled(tmp_path: Path, suffix: str) -> None:
    grey = Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=np.uint16))
    assert decoded(grey, tmp_path / f"x.{suffix}") == [[v] * 3 for v in (0, 1, 128, 255)]


def test_a_transparent_grey_of_16_bits_is_white(tmp_path: Path) -> None:
    grey = Image.fromarray(np.array([[0, 300]], dtype=np.uint16))
    assert decoded(grey, tmp_path / "x.png", transparency=300) == [[0] * 3, [255] * 3]


def test_floats_from_0_to_1_are_scaled_and_others_refused(tmp_path: Path) -> None:
    assert decoded(Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32)), tmp_path / "x.tif")[1] == [128] * 3
    for bad in ([[0, 200.0]], [[-0.1, 1]], [[0, np.nan]]):
        with pytest.raises(ValueError, match="not from 0 to 1: convert"):
            to_rgb(Image.fromarray(np.array(bad, dtype=np.float32)))
    with pytest.raises(ValueError, match="not from 0 to 65535"):
        to_rgb(Image.fromarray(np.array([[70000]], dtype=np.int32)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_transparency_is_laid_on_white(tmp_path: Path, mode: str) -> None:
    black = (0,) * len(Image.new(mode, (1, 1)).getbands())
    options = {} if mode.endswith("A") else {"transparency": black if mode == "RGB" else 0}  # the transparent colour
    assert decoded(Image.new(mode, (1, 1), black), tmp_path / "x.png", **options) == [[255] * 3]


def test_half_transparent_is_half_white(tmp_path: Path) -> None:
    assert decoded(Image.new("RGBA", (1, 1), (255, 0, 0, 128)), tmp_path / "x.png") == [[255, 127, 127]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_opaque_modes(tmp_path: Path, mode: str) -> None:
    red = Image.new("RGB", (1, 1), (200, 0, 0)).convert(mode)
    expected = red.convert("RGB").getpixel((0, 0))
    assert decoded(red, tmp_path / "x.tif") == [list(expected)]  # type: ignore[arg-type]
    assert mode in ("1", "L") or expected[0] > 150 > 100 > expected[1]  # type: ignore[index]


def test_exif_orientation(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 257 * 9]], dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    assert decoded(image, tmp_path / "x.png", exif=exif) == [[9] * 3, [0] * 3]


def test_hidden() -> None:
    root = Path("/data/.cache/set")
    for name in ("a/.ipynb_checkpoints/x.png", "__MACOSX/x.png", ".x.png"):
        assert is_hidden(root / name, root) and is_hidden(PurePosixPath(name), PurePosixPath())
    assert not is_hidden(root / "a.b" / "x.png", root)
    with pytest.raises(ValueError, match="not in the subpath"):
        is_hidden(Path("/elsewhere/x.png"), root)
