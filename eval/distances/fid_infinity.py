"""The Fréchet distance extrapolated to infinitely many images (Chong and Forsyth, CVPR 2020)."""

from __future__ import annotations

import torch

from ..errors import InputError
from .frechet import covariance_root, frechet_from_roots

POINTS = 15


def frechet_infinity(
    mean: torch.Tensor, covariance: torch.Tensor, candidate: torch.Tensor, generator: torch.Generator
) -> float:
    """Fits distance = a + b / N over random subsets of the candidate and returns a.

    Args:
        mean, covariance: of the real set, [d] and [d, d], float64.
        candidate: features [N, d].

    Raises:
        InputError: too few images for several subset sizes.
    """
    count, dim = candidate.shape
    # With fewer images than dimensions the covariance loses rank and 1/N is no longer a line.
    smallest = max(count // 10, min(dim + 1, count // 2))
    if smallest < 2 or count - smallest < POINTS:
        raise InputError(f"FID-infinity needs more images than {count}")
    real_root = covariance_root(covariance)
    features = candidate.to(torch.float64)
    inverse, distances = [], []
    for size in torch.linspace(smallest, count, POINTS).round().long().tolist():
        subset = features[torch.randperm(count, generator=generator)[:size]]
        centred = subset - subset.mean(0)
        root = covariance_root(centred.T @ centred / (size - 1))
        inverse.append(1.0 / size)
        distances.append(frechet_from_roots(mean, real_root, subset.mean(0), root))
    design = torch.stack([torch.ones(POINTS, dtype=torch.float64), torch.tensor(inverse, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(design, torch.tensor(distances, dtype=torch.float64)[:, None]).solution
    return float(solution[0, 0])
