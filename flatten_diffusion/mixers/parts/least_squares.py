"""Regressions from second moments alone, as calibration solves them: summed over batches, solved once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def in_full_precision(function: _Function) -> _Function:
    """Decorator: no autocast inside, which would take sums of products in half precision where the model runs so."""

    @wraps(function)
    def exact(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return cast(_Function, exact)


@in_full_precision
def second_moments(features: torch.Tensor, targets: torch.Tensor, roots: torch.Tensor) -> torch.Tensor:
    """[..., F + 1 + T, F + 1 + T] in float64 on CPU of features [..., R, F], 1 and targets [..., R, T], all times the
    roots [R, 1] of what the rows count: all that a regression needs."""
    ones = torch.ones_like(targets[..., :1], dtype=torch.float32)
    rows = torch.cat([features.float(), ones, targets.float()], dim=-1) * roots
    return (rows.transpose(-1, -2) @ rows).double().cpu()


def solve_ridge(second: torch.Tensor, features: int, ridge: float) -> torch.Tensor:
    """[..., T, F + 1] from `second_moments`: the regression's matrix and, in the last column, its intercept, which the
    penalty (`ridge` times the features' mean square) leaves alone."""
    size = features + 1
    gram, cross = second[..., :size, :size], second[..., :size, size:]
    penalty = ridge * gram.diagonal(dim1=-2, dim2=-1)[..., :-1].mean(-1, keepdim=True) + 1e-30
    penalty = torch.cat([penalty.expand(*penalty.shape[:-1], features), torch.zeros_like(penalty)], dim=-1)
    return torch.linalg.solve(gram + penalty.diag_embed(), cross).transpose(-1, -2)


def squared_errors(second: torch.Tensor, solution: torch.Tensor) -> torch.Tensor:
    """[...]: sums of squared errors of solutions [..., T, F + 1]."""
    eye = torch.eye(solution.shape[-2], dtype=solution.dtype).expand(*solution.shape[:-1], -1)
    rows = torch.cat([-solution, eye], dim=-1)
    return (rows @ second * rows).sum((-2, -1))


def check_finite(name: str, moments: torch.Tensor) -> None:
    """Raise ValueError, naming the layer, unless all of its moments are finite."""
    if not moments.isfinite().all():
        raise ValueError(f"{name}: the teacher's activations are not finite: run calibration in float32 or bfloat16.")
