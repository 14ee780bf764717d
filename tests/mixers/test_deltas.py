from __future__ import annotations

import pytest
import torch

from flatten_diffusion.mixers import ProjectionDelta


def moments(features: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, features, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(features, features, generator=generator, dtype=torch.float64)
    return x, x.T @ x


@pytest.mark.parametrize("rank", [None, 1, 3])
def test_adds_nothing_at_first(rank: int | None) -> None:
    delta = ProjectionDelta(8, 12, rank)
    assert torch.equal(delta(torch.randn(2, 5, 8)), torch.zeros(2, 5, 12))


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_its_matrix_and_keeps_the_inputs_dtype(rank: int | None, dtype: torch.dtype) -> None:
    delta = ProjectionDelta(8, 12, rank)
    torch.nn.init.normal_(delta.bias)
    for parameter in delta.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 5, 8).to(dtype)
    output = delta(x)
    assert output.dtype == dtype
    expected = x.float() @ delta.matrix().T + delta.bias
    assert torch.allclose(output.float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_factors_are_kept_only_where_they_save_something() -> None:
    assert {name for name, _ in ProjectionDelta(8, 8, 3).named_parameters()} == {"bias", "down", "up"}
    assert {name for name, _ in ProjectionDelta(8, 8, 4).named_parameters()} == {"bias", "weight"}


def test_assign_is_exact_at_full_rank_and_best_below() -> None:
    x, gram = moments(8)
    matrix, bias = torch.randn(12, 8, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    full = ProjectionDelta(8, 12, None).double()
    full.assign(matrix, bias, gram)
    assert torch.equal(full.matrix(), matrix) and torch.equal(full.bias, bias)

    def error(delta: ProjectionDelta) -> float:
        return float((x @ (delta.matrix() - matrix).T).square().sum())

    low, plain = ProjectionDelta(8, 12, 2).double(), ProjectionDelta(8, 12, 2).double()
    low.assign(matrix, bias, gram)
    plain.assign(matrix, bias)
    # The best approximation of rank 2 of the outputs themselves (Eckart-Young).
    best = float(torch.linalg.svdvals(x @ matrix.T)[2:].square().sum())
    assert error(low) == pytest.approx(best, rel=1e-6)
    assert error(plain) >= error(low)
    frobenius = float(torch.linalg.svdvals(matrix)[2:].square().sum())
    assert float((plain.matrix() - matrix).square().sum()) == pytest.approx(frobenius, rel=1e-6)


def test_assign_survives_features_that_depend_on_each_other() -> None:
    x, _ = moments(8)
    x[:, 7] = x[:, 0]
    delta = ProjectionDelta(8, 12, 2)
    delta.assign(torch.randn(12, 8), torch.zeros(12), x.T @ x)
    assert all(parameter.isfinite().all() for parameter in delta.parameters())
