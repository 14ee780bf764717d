"""The resizers against float64 computations written from their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flatten_eval.features.resize import resize

from .pieces import draw

SIZES = [(256, 256), (512, 512), (200, 330), (64, 48)]
TARGET = 299


def bicubic_matrix(length: int, target: int) -> np.ndarray:
    """Antialiased Keys bicubic (a = -0.5): the kernel is stretched by the reduction, rows sum to one."""
    scale = length / target
    stretch = max(scale, 1.0)
    matrix = np.zeros((target, length))
    for row in range(target):
        centre = (row + 0.5) * scale
        first = max(0, int(centre - 2 * stretch + 0.5))
        last = min(length, int(centre + 2 * stretch + 0.5))
        x = np.abs((np.arange(first, last) - centre + 0.5) / stretch)
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        weights = np.where(x < 1, near, np.where(x < 2, far, 0))
        matrix[row, first:last] = weights / weights.sum()
    return matrix


def bilinear_matrix(length: int, target: int, half_pixel: bool) -> np.ndarray:
    matrix = np.zeros((target, length))
    for row in range(target):
        position = (row + 0.5) * length / target - 0.5 if half_pixel else row * length / target
        position = max(position, 0.0)
        low = min(int(position), length - 1)
        high, weight = min(low + 1, length - 1), position - low
        matrix[row, low] += 1 - weight
        matrix[row, high] += weight
    return matrix


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("mode", ["clean", "legacy", "legacy-pytorch"])
def test_matches_a_float64_computation(height: int, width: int, mode: str) -> None:
    pixels = draw(1, height, width)
    if mode == "clean":
        rows, columns = bicubic_matrix(height, TARGET), bicubic_matrix(width, TARGET)
    else:
        half = mode == "legacy-pytorch"
        rows, columns = bilinear_matrix(height, TARGET, half), bilinear_matrix(width, TARGET, half)
    expected = np.einsum("ij,jkc,lk->cil", rows, pixels.astype(np.float64), columns, optimize=True)
    found = resize(pixels, TARGET, TARGET, mode)
    assert found.dtype == torch.float32 and found.shape == (3, TARGET, TARGET)
    error = np.linalg.norm(found.double().numpy() - expected) / np.linalg.norm(expected)
    assert error < 3e-7


def test_the_three_differ_and_none_keeps_every_pixel() -> None:
    pixels = draw(2, 64, 64)
    found = [resize(pixels, 40, 40, mode) for mode in ("clean", "legacy", "legacy-pytorch")]
    assert all((a - b).abs().max() > 1 for a, b in [(found[0], found[1]), (found[1], found[2]), (found[0], found[2])])
    assert torch.equal(resize(pixels, 40, 40, "none"), torch.from_numpy(pixels).permute(2, 0, 1).float())
