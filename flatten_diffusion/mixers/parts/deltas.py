"""What distillation adds to a layer's query, key, value and output projections; the base weights stay as they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

PROJECTIONS: tuple[str, ...] = ("q", "k", "v", "out")
"""The projections of an attention module that can carry a delta: query, key, value and output, as far as it has them.

Short names, so that LoRA target patterns such as "to_q" never match a delta.
"""


class ProjectionDelta(nn.Module):
    """A linear map added to one projection; adds nothing until it is trained or solved for.

    Parameters:
        down: [rank, in_features], random, and up: [out_features, rank], zeros (Hu et al., "LoRA", ICLR 2022,
            with alpha = rank); or, where `rank` is None or saves nothing, weight: [out_features, in_features], zeros.
        bias: [out_features], zeros.
    """

    def __init__(self, in_features: int, out_features: int, rank: int | None) -> None:
        super().__init__()
        self.rank = rank if rank is not None and rank * (in_features + out_features) < in_features * out_features else 0
        self.bias = nn.Parameter(torch.zeros(out_features))
        if self.rank:
            self.down = nn.Parameter(torch.randn(self.rank, in_features) * in_features**-0.5)
            self.up = nn.Parameter(torch.zeros(out_features, self.rank))
        else:
            self.weight = nn.Parameter(torch.zeros(out_features, in_features))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features] in the input's dtype, computed in the parameters' dtype."""
        hidden = hidden_states.to(self.bias.dtype)
        if self.rank:
            return F.linear(F.linear(hidden, self.down), self.up, self.bias).to(hidden_states.dtype)
        return F.linear(hidden, self.weight, self.bias).to(hidden_states.dtype)

    def matrix(self) -> torch.Tensor:
        """The map as [out_features, in_features]."""
        return self.up @ self.down if self.rank else self.weight

    @torch.no_grad()
    def assign(self, matrix: torch.Tensor, bias: torch.Tensor, gram: torch.Tensor | None = None) -> None:
        """Become `matrix` [out_features, in_features] and `bias` [out_features], or the nearest map of this rank.

        With `gram` [in_features, in_features], the inputs' second moment, nearest is meant in the mean square of the
        outputs (reduced-rank regression); without it, in the Frobenius norm.
        """
        self.bias.copy_(bias)
        if not self.rank:
            self.weight.copy_(matrix)
            return
        matrix = matrix.double()
        root, inverse = (None, None) if gram is None else _square_roots(gram.double())
        u, s, v = torch.linalg.svd(matrix if root is None else matrix @ root, full_matrices=False)
        left, right = u[:, : self.rank] * s[: self.rank].sqrt(), s[: self.rank, None].sqrt() * v[: self.rank]
        self.up.copy_(left)
        self.down.copy_(right if inverse is None else right @ inverse)

    def extra_repr(self) -> str:
        return f"rank={self.rank or 'full'}"


def _square_roots(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The symmetric square root of a positive semi-definite matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(gram)
    root = values.clamp(min=values[-1].item() * 1e-12 + 1e-30).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
