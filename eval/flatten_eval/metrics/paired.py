"""Images of the same prompt and seed, compared pixel by pixel: PSNR, SSIM, and LPIPS where it is to be had."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..errors import InputError
from ..images import ImageReader, ImageSet, Pixels, UnreadableImage, open_images
from .perceptual import LpipsMeasure

SSIM_WINDOW = 11
# Rows of windows at once: a picture of 4096 x 4096 in one piece would take gigabytes.
_STRIP = 256


@dataclass(frozen=True)
class Pair:
    """One pair. `psnr` is infinite for identical images; `lpips` is None where it is not available."""

    name: str
    psnr: float
    ssim: float
    lpips: float | None


def require_torchmetrics() -> None:
    """Raises InputError before a long run where pairs cannot be measured."""
    if find_spec("torchmetrics") is None:
        raise InputError("SSIM needs torchmetrics; install the eval extra (flatten-diffusion[eval])")


def psnr(first: Pixels, second: Pixels) -> float:
    """Peak signal-to-noise ratio in decibels of two uint8 images [H, W, 3], exactly summed; infinite when equal."""
    difference = np.subtract(first, second, dtype=np.int32)
    error = int(np.sum(np.square(difference), dtype=np.int64)) / difference.size
    return math.inf if error == 0 else 10 * math.log10(255.0**2 / error)


def ssim(first: Pixels, second: Pixels) -> float:
    """Structural similarity of two uint8 images [H, W, 3], in float64 (Wang et al., IEEE TIP 2004, eq. 13).

    Gaussian window of 11x11, sigma 1.5, K1 0.01, K2 0.03; only windows wholly inside count; the mean over the three
    channels.

    Raises:
        InputError: a side is shorter than the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(first.shape[:2]) < SSIM_WINDOW:
        shown = f"{first.shape[1]}x{first.shape[0]}"
        raise InputError(f"SSIM needs images of at least {SSIM_WINDOW}x{SSIM_WINDOW}, got {shown}")
    inside = slice(SSIM_WINDOW // 2, -(SSIM_WINDOW // 2))
    total, count = 0.0, 0
    for top in range(0, len(first) - SSIM_WINDOW + 1, _STRIP):
        rows = slice(top, top + _STRIP + SSIM_WINDOW - 1)
        _, windows = structural_similarity_index_measure(
            _batch(first[rows]), _batch(second[rows]), data_range=255.0, return_full_image=True
        )
        values = windows[..., inside, inside]
        total, count = total + float(values.sum()), count + values.numel()
    return total / count


def _batch(pixels: Pixels) -> torch.Tensor:
    return torch.from_numpy(pixels.astype(np.float64)).permute(2, 0, 1)[None]


def load_lpips(
    device: torch.device, offline: bool, weights: Path | None = None
) -> tuple[Callable[[Pixels, Pixels], float] | None, str | None]:
    """LPIPS (Zhang et al., CVPR 2018, AlexNet) from a file of weights or the package `lpips`, or the reason why it is
    not available.

    Raises:
        InputError: the file of weights is none.
    """
    if weights is not None:
        return LpipsMeasure(weights, device), None
    if offline and not any((Path(torch.hub.get_dir()) / "checkpoints").glob("alexnet-*.pth")):
        return None, "its AlexNet weights are not in the torch hub cache and --offline is set"
    try:
        import lpips
    except ImportError as error:
        return None, f"package lpips cannot be imported ({error})"
    try:
        network: Any = lpips.LPIPS(net="alex", verbose=False).to(device).eval()
    except Exception as error:  # its download may fail in many ways; the other metrics still stand
        return None, f"package lpips cannot load its weights ({error})"

    @torch.inference_mode()
    def measure(first: Pixels, second: Pixels) -> float:
        x, y = (_batch(pixels).float().to(device) / 127.5 - 1 for pixels in (first, second))
        return float(network(x, y))

    return measure, None


def measure_pairs(
    original: Path, candidate: Path, lpips: Callable[[Pixels, Pixels], float] | None = None
) -> list[Pair]:
    """Every pair's numbers, in name order.

    Raises:
        InputError: images without partner of the same name, unreadable, or of two sizes.
    """
    first, second = open_images(original), open_images(candidate)
    only = sorted(set(first.names) ^ set(second.names))
    if only:
        lonely = f"{len(only)} images have no partner of the same name (first: {only[0]})"
        raise InputError(f"{original} and {candidate}: {lonely}")
    return [
        Pair(name, psnr(x, y), ssim(x, y), lpips(x, y) if lpips is not None else None)
        for name, x, y in read_pairs(first, second)
    ]


def read_pairs(first: ImageSet, second: ImageSet) -> Iterator[tuple[str, Pixels, Pixels]]:
    """Yields the name and the two pictures, uint8 [H, W, 3], of every pair of two sets of the same names.

    Raises:
        InputError: unreadable, or of two sizes.
    """
    with ImageReader(first) as first_reader, ImageReader(second) as second_reader:
        for name in tqdm(first.names, unit="pair", desc="pairs", disable=None):
            try:
                x, y = first_reader.pixels(name), second_reader.pixels(name)
            except UnreadableImage as error:
                raise InputError(
                    f"{first.path} or {second.path}: {name} cannot be read; repair or remove it"
                ) from error
            if x.shape != y.shape:
                sides = f"{x.shape[1]}x{x.shape[0]} in {first.path} but {y.shape[1]}x{y.shape[0]} in {second.path}"
                raise InputError(f"{name}: {sides}; paired metrics need equal sizes")
            yield name, x, y


def summarise(pairs: list[Pair], lpips_missing: str | None) -> dict[str, Any]:
    """Means over pairs, JSON-ready. PSNR is averaged over pairs that differ; identical ones are counted."""
    differing = [pair.psnr for pair in pairs if math.isfinite(pair.psnr)]
    lpips_values = [pair.lpips for pair in pairs if pair.lpips is not None]
    return {
        "pairs": len(pairs),
        "identical_pairs": len(pairs) - len(differing),
        "psnr": float(np.mean(differing)) if differing else None,
        "ssim": float(np.mean([pair.ssim for pair in pairs])),
        "lpips": float(np.mean(lpips_values)) if lpips_values else None,
        "lpips_not_available": lpips_missing,
    }
