"""The latent space of the scenes pipelines: a Haar transform of the image at a quarter of its size.

A small UNet learns a latent space that is smooth and linear in the pixels sooner than one an autoencoder finds on its
own, so the encoder is trained to give these latents and the decoder to undo them. The quarter-size image still
bears out a caption's facts when it is merely enlarged again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

LATENT_CHANNELS = 12
_REDUCTION = 4
# Means span -1..1 and differences are zero but for edges: weighted to similar energies where objects are.
_MEAN_GAIN, _DIFFERENCE_GAIN = 1.25, 2.5


def image_latents(pictures: torch.Tensor) -> torch.Tensor:
    """Latents of images: per 8 × 8 block the mean and the three Haar differences of each colour.

    Args:
        images: [B, 3, H, W] in -1..1, H and W multiples of 8.

    Returns:
        [B, 12, H / 8, W / 8]: means (3 channels), then left-right, top-bottom and diagonal differences (3 each),
        of about unit variance together.

    Raises:
        ValueError: H or W is not a multiple of 8.
    """
    height, width = pictures.shape[-2:]
    if height % 8 or width % 8:
        raise ValueError(f"images of {height}x{width} pixels: sides must be multiples of 8 to have latents")
    small = F.avg_pool2d(pictures, _REDUCTION)
    top_left, top_right = small[..., 0::2, 0::2], small[..., 0::2, 1::2]
    low_left, low_right = small[..., 1::2, 0::2], small[..., 1::2, 1::2]
    mean = (top_left + top_right + low_left + low_right) / 4
    across = (top_left - top_right + low_left - low_right) / 4
    down = (top_left + top_right - low_left - low_right) / 4
    diagonal = (top_left - top_right - low_left + low_right) / 4
    return torch.cat([_MEAN_GAIN * mean, *(_DIFFERENCE_GAIN * part for part in (across, down, diagonal))], dim=1)
