from __future__ import annotations

import pytest
import torch
from PIL import Image

from flatten_diffusion.distill.buckets import check_sizes, make_buckets, nearest_bucket, parse_sizes, to_pixels


def test_buckets_keep_the_area_and_the_step() -> None:
    buckets = make_buckets(512, 64)
    assert (512, 512) in buckets and (384, 640) in buckets and (640, 384) in buckets
    for height, width in buckets:
        assert height % 64 == width % 64 == 0
        assert 0.7 * 512**2 <= height * width <= 512**2
        assert 0.5 <= width / height <= 2
    assert len(set(buckets)) == len(buckets)


def test_nearest_bucket_is_by_ratio_not_by_size() -> None:
    buckets = [(512, 512), (384, 640), (640, 384)]
    assert nearest_bucket((3000, 5000), buckets) == (384, 640)
    assert nearest_bucket((50, 30), buckets) == (640, 384)
    assert nearest_bucket((7, 8), buckets) == (512, 512)


def test_sizes() -> None:
    assert parse_sizes("512x768, 64x64") == [(512, 768), (64, 64)]
    for bad in ("512", "512x", "x4", "512x7a"):
        with pytest.raises(ValueError, match="HEIGHTxWIDTH"):
            parse_sizes(bad)
    with pytest.raises(ValueError, match="multiples of 16"):
        check_sizes([(32, 40)], 16)


def test_pixels_are_cut_around_the_middle() -> None:
    image = Image.new("RGB", (30, 10), (255, 0, 0))
    image.paste((0, 255, 0), (10, 0, 20, 10))
    pixels = to_pixels(image, (10, 10))
    assert pixels.shape == (3, 10, 10)
    assert torch.equal(pixels[:, 5, 5], torch.tensor([-1.0, 1.0, -1.0]))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_of_image(mode: str) -> None:
    pixels = to_pixels(Image.new("RGB", (9, 13)).convert("L" if mode == "I;16" else mode), (8, 12))
    assert pixels.shape == (3, 8, 12) and pixels.min() >= -1 and pixels.max() <= 1


def test_exif_rotation() -> None:
    image = Image.new("RGB", (20, 10), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 10, 10))  # left half white
    image.getexif()[0x0112] = 6  # to be shown turned a quarter clockwise: white above
    pixels = to_pixels(image, (20, 10))
    assert pixels[:, 2].mean() > 0.9 and pixels[:, 17].mean() < -0.9
