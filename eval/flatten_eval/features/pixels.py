"""A feature that needs no weights: the image's colours on a coarse grid. For quick looks; never called FID."""

from __future__ import annotations

import torch
import torch.nn.functional as F

GRID = 8


def thumbnail(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 3, H, W] to float [N, 192]: mean colour of each cell of an 8x8 grid, 0 to 1."""
    return F.adaptive_avg_pool2d(images.float() / 255, GRID).flatten(1)


def edges(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 3, H, W] to float [N, 128]: how strongly and how rarely 32 fixed zero-mean filters answer.

    Needs no weights and sees what `thumbnail` does not: blur, noise, compression. Comparable only with itself.
    """
    generator = torch.Generator().manual_seed(0)
    filters = torch.randn(32, 3, 5, 5, generator=generator)
    filters -= filters.mean(dim=(1, 2, 3), keepdim=True)
    filters /= filters.flatten(1).norm(dim=1)[:, None, None, None]
    pixels = images.float() / 255
    answers = []
    for _ in range(2):
        answer = F.conv2d(pixels, filters.to(pixels.device)).abs()
        answers.append(answer.mean(dim=(2, 3)).sqrt())
        # Compression silences weak answers and hardly moves the mean: the logarithm sees them.
        answers.append((answer + 1e-3).log().mean(dim=(2, 3)) / 5)
        pixels = F.avg_pool2d(pixels, 2)
    return torch.cat(answers, dim=1)
