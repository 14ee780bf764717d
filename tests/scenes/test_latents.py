"""The scenes' latent space: a Haar transform of the image at a quarter of its size."""

import numpy as np
import pytest
import torch
from PIL import Image

from flatten_diffusion.scenes import check, render, sample_captions
from flatten_diffusion.scenes.latents import LATENT_CHANNELS, image_latents


def undo(latents):
    """The quarter-size images, written cell by cell: what the transform must be the inverse of."""
    batch, _, height, width = latents.shape
    mean, across, down, diagonal = (part.double() for part in latents.chunk(4, dim=1))
    small = torch.empty(batch, 3, 2 * height, 2 * width, dtype=torch.float64)
    for row in (0, 1):
        for column in (0, 1):
            signs = 1 - 2 * column, 1 - 2 * row
            cell = signs[0] * across + signs[1] * down + signs[0] * signs[1] * diagonal
            small[..., row::2, column::2] = mean / 1.25 + cell / 2.5
    return small


def test_they_hold_the_quarter_size_image():
    pictures = torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = image_latents(pictures)
    assert latents.shape == (2, LATENT_CHANNELS, 6, 10)
    expected = pictures.double().reshape(2, 3, 12, 4, 20, 4).mean(dim=(3, 5))
    torch.testing.assert_close(undo(latents), expected, rtol=0, atol=1e-6)


def test_they_bear_out_the_captions():
    captions = sample_captions(20, seed=5)
    held = []
    for index, caption in enumerate(captions):
        picture = np.asarray(render(caption, 128, index), np.float32) / 127.5 - 1
        small = undo(image_latents(torch.from_numpy(picture).permute(2, 0, 1)[None]))[0]
        pixels = ((small + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        enlarged = Image.fromarray(pixels).resize((128, 128), Image.Resampling.BICUBIC)
        held += [fact.holds for fact in check(enlarged, caption)]
    assert sum(held) / len(held) > 0.95


def test_other_sides_are_refused():
    with pytest.raises(ValueError, match="100x64"):
        image_latents(torch.zeros(1, 3, 100, 64))
