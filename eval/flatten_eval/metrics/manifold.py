"""Precision and recall (Kynkäänniemi et al., NeurIPS 2019), density and coverage (Naeem et al., ICML 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import InputError

NEIGHBOURS = 5


@dataclass(frozen=True)
class Manifold:
    """The four numbers, and the number of neighbours they were taken with."""

    precision: float
    recall: float
    density: float
    coverage: float
    neighbours: int


def manifold_metrics(
    real: torch.Tensor, candidate: torch.Tensor, neighbours: int = NEIGHBOURS, chunk: int = 1024
) -> Manifold:
    """Compares supports through balls that reach each point's k-th neighbour within its own set.

    Args:
        real, candidate: features [n, d] and [m, d].

    Raises:
        InputError: a set has no k-th neighbour.
    """
    if min(len(real), len(candidate)) <= neighbours:
        raise InputError(f"precision and recall need more than {neighbours} images in each set")
    real, candidate = real.to(torch.float64), candidate.to(torch.float64)
    real_radius = _radius(real, neighbours, chunk)
    candidate_radius = _radius(candidate, neighbours, chunk)
    inside_any = inside_count = 0.0
    recalled = torch.zeros(len(real), dtype=torch.bool)
    nearest = torch.full((len(real),), torch.inf, dtype=torch.float64)
    for start in range(0, len(candidate), chunk):
        part = candidate[start : start + chunk]
        squared = _squared_distance(real, part)
        inside = squared <= real_radius[:, None]
        inside_any += float(inside.any(0).sum())
        inside_count += float(inside.sum())
        recalled |= (squared <= candidate_radius[start : start + chunk]).any(1)
        nearest = torch.minimum(nearest, squared.min(1).values)
    return Manifold(
        precision=inside_any / len(candidate),
        recall=float(recalled.double().mean()),
        density=inside_count / (neighbours * len(candidate)),
        coverage=float((nearest <= real_radius).double().mean()),
        neighbours=neighbours,
    )


def _squared_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def _radius(points: torch.Tensor, neighbours: int, chunk: int) -> torch.Tensor:
    rows = []
    for start in range(0, len(points), chunk):
        squared = _squared_distance(points[start : start + chunk], points)
        # The nearest of all is the point itself.
        rows.append(squared.kthvalue(neighbours + 1, dim=1).values)
    return torch.cat(rows)
