"""Whether distances order as they must on real images: halves of one set are near, damaged copies far.

    python -m eval.experiments.photo_order PHOTOS --json order.json

Splits a folder in two by name, damages copies of the second half mildly and strongly (blur, noise, JPEG), and takes
the distance of each to the first half with `flatten-eval fid`. Exit code 1 when an expected order does not hold.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from tqdm.auto import tqdm

from flatten_eval.cli import main as flatten_eval
from flatten_eval.files import write_json
from flatten_eval.versions import environment

DEFAULT_EXTRACTOR = "flatten_eval.features.pixels:edges"


Damage = Callable[[Image.Image, int], Image.Image]


def blur(radius: float) -> Damage:
    """Gaussian blur of `radius` pixels."""
    return lambda image, _: image.filter(ImageFilter.GaussianBlur(radius))


def noise(deviation: float) -> Damage:
    """Gaussian noise of `deviation` in 0..255, seeded by the image's number."""

    def damage(image: Image.Image, index: int) -> Image.Image:
        values = np.asarray(image, np.float64)
        noisy = values + np.random.default_rng(index).normal(0, deviation, values.shape)
        return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))

    return damage


def jpeg(quality: int) -> Damage:
    """Written as JPEG of `quality` and read again."""

    def damage(image: Image.Image, _: int) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer).convert("RGB")

    return damage


DAMAGES: dict[str, Damage] = {
    "half": lambda image, _: image,
    **{f"blur {radius}": blur(radius) for radius in (1, 3)},
    **{f"noise {deviation}": noise(deviation) for deviation in (10, 30)},
    **{f"jpeg {quality}": jpeg(quality) for quality in (60, 15)},
}
ORDER = (("half", "blur 1", "blur 3"), ("half", "noise 10", "noise 30"), ("half", "jpeg 60", "jpeg 15"))


def distances(photos: Path, extractor: str) -> dict[str, float]:
    """The Fréchet distance of each damaged second half to the first half."""
    files = sorted(path for path in photos.iterdir() if path.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp"})
    if len(files) < 4:
        raise SystemExit(f"{photos}: {len(files)} images; give a folder of at least 4")
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name.replace(" ", "-") for name in ("real", *DAMAGES)}
        for folder in folders.values():
            folder.mkdir()
        for index, path in enumerate(tqdm(files, desc="damaging")):
            with Image.open(path) as opened:
                image = opened.convert("RGB")
            if index % 2 == 0:
                image.save(folders["real"] / f"{path.stem}.png", compress_level=1)
                continue
            for name, damage in DAMAGES.items():
                damage(image, index).save(folders[name] / f"{path.stem}.png", compress_level=1)
        for name in DAMAGES:
            result = Path(scratch) / "result.json"
            options = ["--extractor", extractor, "--device", "cpu", "--no-resume", "--json", str(result)]
            if flatten_eval(["fid", str(folders["real"]), str(folders[name]), *options]) != 0:
                raise SystemExit(f"fid failed on {name}")
            found[name] = float(json.loads(result.read_text(encoding="utf-8"))["frechet_distance"])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of images of one size")
    parser.add_argument("--extractor", default=DEFAULT_EXTRACTOR, help="as in flatten-eval fid")
    parser.add_argument("--json", type=Path, help="write the distances there")
    arguments = parser.parse_args(argv)
    found = distances(arguments.photos, arguments.extractor)
    broken = [chain for chain in ORDER if not found[chain[0]] < found[chain[1]] < found[chain[2]]]
    result = {"extractor": arguments.extractor, "frechet_distance": found, "broken_orders": broken}
    print(json.dumps(result, indent=2))
    if arguments.json is not None:
        command = f"python -m eval.experiments.photo_order PHOTOS --extractor {arguments.extractor}"
        write_json(arguments.json, {"command": command} | result | {"environment": environment(torch.device("cpu"))})
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
