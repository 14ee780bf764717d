"""Every distance against a direct float64 computation and, where it exists, another implementation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from flatten_eval.errors import InputError, RefusedComparison
from flatten_eval.metrics.frechet import frechet_distance, frechet_infinity
from flatten_eval.metrics.kernel import cmmd, kernel_distance, polynomial_mmd
from flatten_eval.metrics.manifold import manifold_metrics

torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed (extra test)")


def gaussian(seed: int, count: int, dim: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return rows @ torch.randn(dim, dim, generator=generator, dtype=torch.float64) + shift


def direct_frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """tr sqrt(AB) as the sum of square roots of the eigenvalues of AB, by numpy."""
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real
    difference = a.numpy().mean(0) - b.numpy().mean(0)
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum())


def ours(a: torch.Tensor, b: torch.Tensor) -> float:
    return frechet_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())


@pytest.mark.parametrize("dim", [1, 7, 64])
def test_frechet_matches_the_direct_computation(dim: int) -> None:
    a, b = gaussian(0, 300, dim), gaussian(1, 200, dim, shift=0.3)
    a, b = a.reshape(-1, dim), b.reshape(-1, dim)
    if dim == 1:
        expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
        cov_a, cov_b = a.var().reshape(1, 1), b.var().reshape(1, 1)
        assert frechet_distance(a.mean(0), cov_a, b.mean(0), cov_b) == pytest.approx(float(expected), rel=1e-12)
    else:
        assert ours(a, b) == pytest.approx(direct_frechet(a, b), rel=1e-9)


def test_frechet_of_equal_sets_is_zero_and_of_a_shift_its_square() -> None:
    a = gaussian(2, 100, 12)
    assert ours(a, a) == pytest.approx(0, abs=1e-9)
    assert ours(a, a + 2) == pytest.approx(12 * 4, rel=1e-9)


def test_frechet_stays_exact_without_full_rank() -> None:
    """Two sets in orthogonal planes: tr sqrt(AB) is exactly 0, which eigenvalues of AB miss by about 1e-8 * rank."""
    dim = 256
    a, b = torch.zeros(40, dim, dtype=torch.float64), torch.zeros(40, dim, dtype=torch.float64)
    a[:, :30], b[:, 100:130] = gaussian(3, 40, 30), gaussian(4, 40, 30)
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace()
    assert ours(a, b) == pytest.approx(float(expected), rel=1e-13)


def test_frechet_refuses_other_dimensions() -> None:
    with pytest.raises(RefusedComparison, match="3 and 4 dimensions"):
        frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(4), torch.eye(4))


def direct_kid(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    within = [
        sum(kernel(s[i], s[j]) for i, j in itertools.permutations(range(len(s)), 2)) / (len(s) * (len(s) - 1))
        for s in (x, y)
    ]
    return within[0] + within[1] - 2 * sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))


def test_kid_matches_the_double_sum() -> None:
    x, y = gaussian(5, 17, 6), gaussian(6, 23, 6, shift=0.5)
    assert polynomial_mmd(x, y) == pytest.approx(direct_kid(x.numpy(), y.numpy()), rel=1e-10)


def test_kid_matches_torchmetrics() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    class Feature(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.double().flatten(1) / 255

    x, y = (torch.randint(0, 256, (n, 3, 2, 2), dtype=torch.uint8) for n in (40, 40))
    theirs = KernelInceptionDistance(feature=Feature(), subsets=1, subset_size=40)
    theirs.set_dtype(torch.float64)
    theirs.update(x, real=True)
    theirs.update(y, real=False)
    mean, _ = theirs.compute()
    assert polynomial_mmd(Feature()(x), Feature()(y)) == pytest.approx(float(mean), rel=1e-6)


def test_kid_over_subsets_is_repeatable_and_centred() -> None:
    x, y = gaussian(7, 120, 5), gaussian(8, 120, 5)
    results = [kernel_distance(x, y, torch.Generator().manual_seed(3), subset_size=50) for _ in range(2)]
    assert results[0] == results[1]
    mean, deviation, size = results[0]
    assert size == 50 and deviation > 0
    assert abs(mean - polynomial_mmd(x, y)) < 3 * deviation
    assert kernel_distance(x, y, torch.Generator().manual_seed(0))[2] == 60
    with pytest.raises(InputError, match="at least 4"):
        kernel_distance(x[:3], y, torch.Generator())


def test_cmmd_matches_the_double_sum_in_any_chunk() -> None:
    x, y = (torch.nn.functional.normalize(gaussian(s, n, 8), dim=1) for s, n in ((9, 31), (10, 19)))

    def mean(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(np.mean([math.exp(-float((p - q).square().sum()) / 200) for p in a for q in b]))

    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-9)
    assert cmmd(x, y, chunk=7) == pytest.approx(expected, rel=1e-9)


def test_manifold_metrics_match_brute_force() -> None:
    x, y, k = gaussian(11, 41, 3), gaussian(12, 37, 3, shift=0.7), 4

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).norm())

    def radius(points: torch.Tensor, index: int) -> float:
        return sorted(distance(points[index], other) for other in points)[k]

    inside_x = [[distance(c, r) <= radius(x, i) for i, r in enumerate(x)] for c in y]
    inside_y = [[distance(r, c) <= radius(y, j) for j, c in enumerate(y)] for r in x]
    found = manifold_metrics(x, y, neighbours=k, chunk=10)
    assert found.precision == pytest.approx(np.mean([any(row) for row in inside_x]))
    assert found.recall == pytest.approx(np.mean([any(row) for row in inside_y]))
    assert found.density == pytest.approx(np.sum(inside_x) / (k * len(y)))
    assert found.coverage == pytest.approx(np.mean(np.any(inside_x, axis=0)))
    with pytest.raises(InputError, match="more than 4"):
        manifold_metrics(x[:4], y, neighbours=k)


def test_fid_infinity_removes_the_bias_of_few_images() -> None:
    """Samples of the very Gaussian they are compared to: the true distance is 0."""
    dim = 20
    mean, covariance = torch.zeros(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64)
    plain, extrapolated = [], []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(2000, dim, generator=generator, dtype=torch.float64)
        plain.append(frechet_distance(mean, covariance, rows.mean(0), rows.T.cov()))
        extrapolated.append(frechet_infinity(mean, covariance, rows, generator))
    assert min(plain) > 0.05 and abs(np.mean(extrapolated)) < np.mean(plain) / 4
    with pytest.raises(InputError, match="more images"):
        frechet_infinity(mean, covariance, rows[:20], torch.Generator())
