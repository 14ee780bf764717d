"""Real photographs, where they lie beside the checkout: distances rise with damage."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from .pieces import ROOT

PHOTOS = ROOT.parent / "shared" / "photos"
# Logarithm of the mean response of random zero-mean 3x3 filters: sees texture, needs no weights.
FILTERS = """
import torch
import torch.nn.functional as F

weight = torch.randn(16, 3, 3, 3, generator=torch.Generator().manual_seed(0))
weight = weight - weight.mean((2, 3), keepdim=True)

def responses(images):
    return F.conv2d(images.float() / 255, weight).abs().mean((2, 3)).add(1e-3).log()
"""
pytestmark = pytest.mark.skipif(not PHOTOS.is_dir(), reason="no folder of photographs beside the checkout")


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def noise(image: Image.Image, strength: int) -> Image.Image:
    added = np.random.default_rng(0).normal(0, strength, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + added).clip(0, 255).astype(np.uint8))


DAMAGE: dict[str, tuple[Callable[[Image.Image, int], Image.Image], tuple[int, ...]]] = {
    "blur": (lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius)), (1, 3)),
    "noise": (noise, (10, 40)),
    "jpeg": (jpeg, (25, 5)),
}


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    paths = sorted(PHOTOS.glob("*.jpg"))[::8]
    folders = tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b")
    for index, path in enumerate(paths):
        Image.open(path).convert("RGB").save(folders[index % 2] / f"{index:04d}.png", compress_level=1)
    return folders


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_distance_rises_with_damage(
    halves: tuple[Path, Path], tmp_path: Path, run_json: Callable[..., dict[str, Any]], kind: str
) -> None:
    (tmp_path / "filters.py").write_text(FILTERS)
    damage, strengths = DAMAGE[kind]
    folders = [halves[1]]
    for strength in strengths:
        folders.append(tmp_path / f"{strength}")
        folders[-1].mkdir()
        for path in halves[1].glob("*.png"):
            damage(Image.open(path), strength).save(folders[-1] / path.name, compress_level=1)
    extractor = f"{tmp_path / 'filters.py'}:responses"
    saved = tmp_path / "real.npz"
    run_json("statistics", halves[0], saved, "--extractor", extractor)
    found = [run_json("fid", saved, folder, "--extractor", extractor)["frechet_distance"] for folder in folders]
    assert found == sorted(found), found
    assert found[-1] > 2 * found[0], found
