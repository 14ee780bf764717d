"""Kernel distances: KID (Binkowski et al., ICLR 2018) and CMMD (Jayasumana et al., CVPR 2024)."""

from __future__ import annotations

import torch

from ..errors import InputError

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0


def polynomial_mmd(real: torch.Tensor, candidate: torch.Tensor) -> float:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3.

    Args:
        real, candidate: [n, d] and [m, d].
    """
    real, candidate = real.to(torch.float64), candidate.to(torch.float64)
    n, m, dim = len(real), len(candidate), real.shape[1]
    within_real = (real @ real.T / dim + 1) ** 3
    within_candidate = (candidate @ candidate.T / dim + 1) ** 3
    across = (real @ candidate.T / dim + 1) ** 3
    first = (within_real.sum() - within_real.diagonal().sum()) / (n * (n - 1))
    second = (within_candidate.sum() - within_candidate.diagonal().sum()) / (m * (m - 1))
    return float(first + second - 2 * across.mean())


def kernel_distance(
    real: torch.Tensor,
    candidate: torch.Tensor,
    generator: torch.Generator,
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
) -> tuple[float, float, int]:
    """KID: mean and standard deviation of the polynomial MMD over random subsets, and the subset size used.

    Args:
        subset_size: at most half of the smaller set is used, or the subsets would hardly differ.

    Raises:
        InputError: fewer than four images in a set.
    """
    size = min(subset_size, len(real) // 2, len(candidate) // 2)
    if size < 2:
        raise InputError("KID needs at least 4 images in each set")
    values = torch.tensor(
        [
            polynomial_mmd(
                real[torch.randperm(len(real), generator=generator)[:size]],
                candidate[torch.randperm(len(candidate), generator=generator)[:size]],
            )
            for _ in range(subsets)
        ],
        dtype=torch.float64,
    )
    return float(values.mean()), float(values.std(correction=0)), size


def cmmd(real: torch.Tensor, candidate: torch.Tensor, chunk: int = 2048) -> float:
    """Squared MMD times 1000 with a Gaussian kernel of sigma 10 on CLIP embeddings of unit length, diagonal included.

    Args:
        real, candidate: [n, d] and [m, d], rows of unit length.
    """
    mean = _gaussian_mean(real, real, chunk) + _gaussian_mean(candidate, candidate, chunk)
    return CMMD_SCALE * (mean - 2 * _gaussian_mean(real, candidate, chunk))


def _gaussian_mean(a: torch.Tensor, b: torch.Tensor, chunk: int) -> float:
    b = b.to(torch.float64)
    total = 0.0
    for start in range(0, len(a), chunk):
        part = a[start : start + chunk].to(torch.float64)
        squared = part.square().sum(1)[:, None] + b.square().sum(1) - 2 * part @ b.T
        total += float(torch.exp(squared.clamp(min=0) * (-0.5 / CMMD_SIGMA**2)).sum())
    return total / (len(a) * len(b))
