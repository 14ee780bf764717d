"""Pictures of the same prompt and seed, compared pixel by pixel: PSNR, SSIM, and LPIPS where it is installed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..errors import InputError
from ..images import ImageReader, ImageSet, Pixels, UnreadableImage, open_images, unreadable_message

WINDOW = 11
SIGMA = 1.5


@dataclass(frozen=True)
class Pair:
    """One pair. `psnr` is infinite for identical pictures; `lpips` is None where it is not available."""

    name: str
    psnr: float
    ssim: float
    lpips: float | None


def psnr(first: Pixels, second: Pixels) -> float:
    """Peak signal-to-noise ratio in decibels of two uint8 pictures [H, W, 3], in float64; infinite when equal."""
    error = float(np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255.0**2 / error)


def ssim(first: Pixels, second: Pixels) -> float:
    """Structural similarity of two uint8 pictures [H, W, 3], in float64 (Wang et al., IEEE TIP 2004, eq. 13).

    Gaussian window of 11x11, sigma 1.5, K1 0.01, K2 0.03; only windows wholly inside count; the mean over the three
    channels.

    Raises:
        InputError: a side is shorter than the window.
    """
    if min(first.shape[:2]) < WINDOW:
        raise InputError(f"SSIM needs pictures of at least {WINDOW}x{WINDOW}, got {first.shape[1]}x{first.shape[0]}")
    x, y = (torch.from_numpy(picture.astype(np.float64)).permute(2, 0, 1)[:, None] for picture in (first, second))
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return float((luminance * structure).mean())


def _blur(x: torch.Tensor) -> torch.Tensor:
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weight = torch.exp(-offsets.square() / (2 * SIGMA**2))
    weight = weight / weight.sum()
    return F.conv2d(F.conv2d(x, weight.view(1, 1, WINDOW, 1)), weight.view(1, 1, 1, WINDOW))


def load_lpips(device: torch.device, offline: bool) -> tuple[Callable[[Pixels, Pixels], float] | None, str | None]:
    """LPIPS (Zhang et al., CVPR 2018, AlexNet) from the package `lpips`, or the reason why it is not available."""
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
        x, y = (
            torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)[None].to(device) / 127.5 - 1
            for picture in (first, second)
        )
        return float(network(x, y))

    return measure, None


def match_pairs(original: Path, candidate: Path) -> tuple[ImageSet, ImageSet]:
    """The two sets, which must hold the same names.

    Raises:
        InputError: a picture is missing on one side.
    """
    first, second = open_images(original), open_images(candidate)
    only = sorted(set(first.names) ^ set(second.names))
    if only:
        raise InputError(
            f"{original} and {candidate}: {len(only)} pictures have no partner of the same name (first: {only[0]})"
        )
    return first, second


def measure_pairs(
    original: Path, candidate: Path, lpips: Callable[[Pixels, Pixels], float] | None = None
) -> list[Pair]:
    """Every pair's numbers, in name order.

    Raises:
        InputError: pictures without partner, unreadable, or of two sizes.
    """
    first, second = match_pairs(original, candidate)
    pairs: list[Pair] = []
    with ImageReader(first) as first_reader, ImageReader(second) as second_reader:
        for name in tqdm(first.names, unit="pair", desc="pairs", disable=None):
            x, y = _read(first_reader, first, name), _read(second_reader, second, name)
            if x.shape != y.shape:
                raise InputError(
                    f"{name}: {x.shape[1]}x{x.shape[0]} in {original} but {y.shape[1]}x{y.shape[0]} in {candidate}; "
                    "paired metrics need equal sizes"
                )
            pairs.append(Pair(name, psnr(x, y), ssim(x, y), lpips(x, y) if lpips is not None else None))
    return pairs


def _read(reader: ImageReader, images: ImageSet, name: str) -> Pixels:
    try:
        return reader.pixels(name)
    except UnreadableImage as error:
        raise InputError(unreadable_message(images.path, [name], len(images))) from error


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
