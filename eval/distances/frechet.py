"""The Fréchet distance between two Gaussians (Dowson and Landau 1982; Heusel et al., NeurIPS 2017, eq. 6)."""

from __future__ import annotations

import torch

from ..errors import RefusedComparison


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
