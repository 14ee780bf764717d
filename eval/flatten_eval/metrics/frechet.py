"""The Fréchet distance between two Gaussians (Dowson and Landau 1982; Heusel et al., NeurIPS 2017, eq. 6), also
extrapolated to infinitely many images (Chong and Forsyth, CVPR 2020)."""

from __future__ import annotations

import torch

from ..errors import InputError, RefusedComparison

POINTS = 15


def covariance_root(covariance: torch.Tensor) -> torch.Tensor:
    """A factor R [d, r] with R R^T = covariance, by symmetric eigen-decomposition, null directions left out."""
    values, vectors = torch.linalg.eigh(covariance)
    # Below this, an eigenvalue is rounding: its square root would be 1e8 times larger noise.
    floor = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    kept = values > floor
    root: torch.Tensor = vectors[:, kept] * values[kept].sqrt()
    return root


def frechet_from_roots(mean_a: torch.Tensor, root_a: torch.Tensor, mean_b: torch.Tensor, root_b: torch.Tensor) -> float:
    """The distance from means [d] and covariance roots [d, r]; see `frechet_distance`."""
    # tr sqrt(A B) is the sum of singular values of Ra^T Rb; unlike eigenvalues of A B these keep full precision.
    cross = torch.linalg.svdvals(root_a.T @ root_b).sum() if root_a.shape[1] and root_b.shape[1] else 0.0
    squared = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(float(squared), 0.0)


def frechet_distance(
    mean_a: torch.Tensor, covariance_a: torch.Tensor, mean_b: torch.Tensor, covariance_b: torch.Tensor
) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 sqrt(A B)) (the squared 2-Wasserstein distance, as FID is reported).

    Args:
        mean_a, mean_b: [d], float64.
        covariance_a, covariance_b: [d, d], float64, symmetric.

    Raises:
        RefusedComparison: the dimensions differ.
    """
    if mean_a.shape != mean_b.shape:
        raise RefusedComparison(f"features of {len(mean_a)} and {len(mean_b)} dimensions cannot be compared")
    return frechet_from_roots(mean_a, covariance_root(covariance_a), mean_b, covariance_root(covariance_b))


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
