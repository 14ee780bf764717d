"""Vicinity attention: relu features that weigh keys by how near they lie in rows and columns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from .base import Calibration, Context, LayerShape, Mixed, Mixer, MixerConfig
from .calibration import CalibratedLayer
from .grid import Grid, images_of
from .parts.gated import grid_of
from .parts.linear import fit_shifts, hide, wide
from .registry import register_mixer

_EPS = 1e-4


@dataclass(frozen=True)
class VicinityConfig(MixerConfig):
    """Settings of `VicinityAttention`.

    Args:
        combine: "sum", the paper's, or "product" of the cosines of both distances.

    Raises:
        ValueError: another value.
    """

    combine: str = "sum"

    def __post_init__(self) -> None:
        if self.combine not in ("sum", "product"):
            raise ValueError(f'combine is {self.combine!r:.60}: pass "sum" or "product".')


@register_mixer("vicinity")
class VicinityAttention(Mixer):
    """A token at row r and column c of H rows and W columns has angles a = pi r / 2 H and b = pi c / 2 W. Per head,
    query i reads key j with the weight

        (phi(q_i) . phi(k_j)) (cos(a_i - a_j) + cos(b_i - b_j)),    phi(x) = relu(x + shift),

    which features of 4 D channels give in linear time, over the sum of the weights plus 1e-4. As in the authors' code,
    sum_j k_j^T v_j, the normaliser's reciprocal and the output are kept at magnitudes from 1e-4 to 1e4; zeros stay.
    The paper's squeeze-and-excitation gate acts behind the output projection, which is inherited, and is left out.

    Parameters: query_shift, key_shift: [heads, D], zeros, which is the paper's; calibration chooses them.

    Source: Sun et al., "Vicinity Vision Transformer", TPAMI 2023.
    """

    Config = VicinityConfig
    examples = (VicinityConfig(), VicinityConfig("product"))
    summary = "relu features that weigh keys by their nearness in rows and columns"
    source = "Sun et al., Vicinity Vision Transformer, TPAMI 2023"
    needs = frozenset({"grid"})
    supports = frozenset({"mask", "frames", "text", "window", "compile"})

    def __init__(self, config: VicinityConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        self.query_shift, self.key_shift = (nn.Parameter(torch.zeros(layer.heads, layer.head_dim)) for _ in range(2))

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """See `Mixer.forward`. Raises ValueError when the grid does not hold the tokens."""
        mask, grid = context.key_mask, grid_of(context, query.shape[1])
        with torch.autocast(query.device.type, enabled=False):
            queries, keys = (self._features(x, grid) for x in self._mapped(wide(query), wide(key), mask))
            state = _kept(torch.einsum("bmhf,bmhd->bhfd", keys, wide(hide(value, mask))))
            inverse = _kept(1 / (torch.einsum("bnhf,bhf->bnh", queries, keys.sum(dim=1)) + _EPS))
            mixed = _kept(_kept(torch.einsum("bnhf,bhfd->bnhd", queries, state)) * inverse[..., None])
        return Mixed(mixed.to(query.dtype))

    def _mapped(
        self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """phi of query and key, [B, N, H, D] each; masked keys are zeros."""
        key = (hide(key, mask) + self.key_shift.to(key.dtype)).relu()
        return (query + self.query_shift.to(query.dtype)).relu(), hide(key, mask)

    def _features(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """[B, N, H, D] -> [B, N, H, 4 D]."""
        angles = _angles(grid, x)
        (row_cos, column_cos), (row_sin, column_sin) = (part.unbind(-1) for part in (angles.cos(), angles.sin()))
        if self.config.combine == "sum":
            factors = [row_cos, row_sin, column_cos, column_sin]
        else:
            factors = [row * column for row in (row_cos, row_sin) for column in (column_cos, column_sin)]
        return torch.cat([x * factor[:, None, None] for factor in factors], dim=-1)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """The normaliser from the weights of all pairs, written with the distances."""
        mask, grid = context.key_mask, grid_of(context, query.shape[1])
        queries, keys = self._mapped(query, key, mask)
        angles = _angles(grid, query)
        near = (angles[:, None] - angles[None]).cos()  # [N, M, 2]
        near = near.sum(-1) if self.config.combine == "sum" else near.prod(-1)
        weights = torch.einsum("bnhd,bmhd->bnhm", queries, keys) * near[:, None]
        inverse = _kept(1 / (weights.sum(dim=-1, keepdim=True) + _EPS))
        state = torch.einsum("bmhf,bmhd->bhfd", self._features(keys, grid), hide(value, mask))
        mixed = torch.einsum("bnhf,bhfd->bnhd", self._features(queries, grid), _kept(state))
        return Mixed(_kept(_kept(mixed) * inverse))

    def calibrate(self, layer: CalibratedLayer, settings: None) -> Calibration:
        """Each head's shift, by what its output leaves of the softmax. Returns the shares of the root mean square."""
        return (yield from fit_shifts(self, self.query_shift, self.key_shift, layer))


def _kept(x: torch.Tensor) -> torch.Tensor:
    """x with its magnitude kept between 1e-4 and 1e4; zeros stay zeros."""
    return x.sign() * x.abs().clamp(1e-4, 1e4)


def _angles(grid: Grid, like: torch.Tensor) -> torch.Tensor:
    """[N, 2], by row and by column, from 0 to below pi / 2, in the dtype of `like`."""
    parts = []
    for frames, height, width in images_of(grid):
        rows = torch.arange(height, device=like.device, dtype=like.dtype).repeat_interleave(width) / height
        columns = torch.arange(width, device=like.device, dtype=like.dtype).repeat(height) / width
        parts.append((torch.stack([rows, columns], dim=-1) * (math.pi / 2)).repeat(frames, 1))
    return torch.cat(parts)
