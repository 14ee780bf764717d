"""The resizers that published distances were made with. Each one gives a different number: never mix them."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..images import Pixels

ResizeMode = Literal["clean", "legacy", "legacy-pytorch", "none"]
RESIZE_MODES: tuple[str, ...] = get_args(ResizeMode)


def resize(pixels: Pixels, height: int, width: int, mode: ResizeMode) -> torch.Tensor:
    """Resizes one image.

    Args:
        pixels: uint8 [H, W, 3].
        height, width: target size in pixels.
        mode: `clean` is Pillow's antialiased bicubic, channel by channel in float and not rounded (Parmar et al.,
            "On Aliased Resizing and Surprising Subtleties in GAN Evaluation", CVPR 2022); `legacy` is the bilinear of
            TensorFlow 1, without antialiasing and without the half-pixel offset, inside the original FID network
            (Heusel et al., NeurIPS 2017); `legacy-pytorch` is the half-pixel bilinear without antialiasing of
            pytorch-fid; `none` leaves the image as it is.

    Returns:
        float32 [3, height, width], 0 to 255 (bicubic may overshoot by a little).
    """
    if mode == "none":
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).to(torch.float32)
    if mode == "clean":
        return _pillow_bicubic(pixels, height, width)
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).to(torch.float32)
    if mode == "legacy":
        return _tensorflow1_bilinear(image, height, width)
    # In float64, since float32 rounds the positions themselves.
    resized = F.interpolate(image[None].double(), size=(height, width), mode="bilinear", align_corners=False)
    return resized[0].float()


def _pillow_bicubic(pixels: Pixels, height: int, width: int) -> torch.Tensor:
    channels = [
        np.asarray(
            Image.fromarray(pixels[:, :, channel].astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
        )
        for channel in range(3)
    ]
    return torch.from_numpy(np.stack(channels))


def _tensorflow1_bilinear(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    rows = _lerp(image, height, 1)
    return _lerp(rows, width, 2)


def _lerp(image: torch.Tensor, target: int, dim: int) -> torch.Tensor:
    length = image.shape[dim]
    # TensorFlow 1 maps output index i to input coordinate i * length / target, corner to corner on the left only.
    position = torch.arange(target, dtype=torch.float64) * (length / target)
    low = position.floor().long().clamp(max=length - 1)
    high = (low + 1).clamp(max=length - 1)
    shape = [1, 1, 1]
    shape[dim] = target
    weight = (position - low).to(image.dtype).view(shape)
    bottom = image.index_select(dim, low)
    return bottom + (image.index_select(dim, high) - bottom) * weight
