"""Feature extractors by name."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import InputError
from .base import Extractor, ExtractorIdentity, cropped, require_same
from .crops import CropRequest, Crops
from .custom import CustomExtractor
from .inception import PUBLISHED_SHA256, InceptionExtractor, cache_folder
from .resize import RESIZE_MODES, ResizeMode
from .transformer import TransformerExtractor

__all__ = [
    "RESIZE_MODES",
    "CropRequest",
    "Crops",
    "Extractor",
    "ExtractorIdentity",
    "ResizeMode",
    "TransformerExtractor",
    "cache_folder",
    "cropped",
    "is_published_fid",
    "load_extractor",
    "require_same",
]


def load_extractor(
    name: str,
    *,
    device: torch.device,
    resize: ResizeMode = "clean",
    resize_to: int | None = None,
    weights: Path | None = None,
    weights_sha256: str | None = None,
    model: str | None = None,
    offline: bool = False,
) -> Extractor:
    """Builds an extractor.

    Args:
        name: `inception`, `dinov2`, `clip`, `pixels`, a TorchScript file, or `module:function`.
        resize: resizer; custom extractors use it only with `resize_to`.
        resize_to: square input size of a custom extractor, in pixels.
        weights, weights_sha256: of `inception`.
        model: folder or hub id, of `dinov2` and `clip`.

    Raises:
        InputError: unknown name, an option the extractor does not have, or weights missing or not matching.
    """
    if name != "inception" and (weights is not None or weights_sha256 is not None):
        raise InputError(f"--weights belongs to the inception extractor, not to {name}")
    if name not in ("dinov2", "clip") and model is not None:
        raise InputError(f"--model belongs to the dinov2 and clip extractors, not to {name}")
    if name in ("inception", "dinov2", "clip") and resize_to is not None:
        raise InputError(f"--resize-to belongs to custom extractors; {name} has its own input size")
    if name == "inception":
        return InceptionExtractor(weights, resize, device, offline, weights_sha256)
    if name == "dinov2":
        return TransformerExtractor("dinov2", model, resize, device, offline)
    if name == "clip":
        return TransformerExtractor("clip", model, resize, device, offline)
    if name == "pixels":
        return CustomExtractor(f"{__name__}.pixels:thumbnail", resize, resize_to, device, name)
    return CustomExtractor(name, resize, resize_to, device)


def is_published_fid(identity: ExtractorIdentity) -> bool:
    """Whether a Fréchet distance in these features may be called FID."""
    return identity.name == "inception" and identity.weights_sha256 in PUBLISHED_SHA256
