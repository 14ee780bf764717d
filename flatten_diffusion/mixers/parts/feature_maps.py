"""Maps of each head's queries and keys, and candidates for them, built from second moments alone, to choose from.

Two kinds of candidates. "Inherited": the layer's own query and key, their channels scaled, or shifted by a share of
their root mean square so that the relu cuts less. "Paired": each head's query and key are turned into the directions
that matter most to their product, and each of the first head_dim / 2 directions x enters as the pair (b + x, b - x):
for a focusing factor of 1 and |x| < b, a pair's contribution to query . key is 2 b^2 + 2 x_q x_k, the first two terms
of the softmax's exponential up to a factor, with no relu in the way. The directions are those of balanced truncation
(Moore, IEEE TAC 1981): both second moments become the same diagonal, so they are ordered by what they add to
query . key. A rotation of them changes no product but spreads it evenly over the pairs, and with a focusing factor
above 1 it matters which: a few are tried, drawn from fixed seeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...ops.focused_linear.reference import HeadMap, map_heads
from ..calibration import MixerInputs, Sums
from .least_squares import in_full_precision

Maps = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""(query matrix, query shift, key matrix, key shift), [H, D, D] and [H, D]: x becomes x @ matrix + shift."""


class FeatureMap(nn.Module):
    """Adds an affine map of each head to queries or keys, behind norms and rotary embeddings.

    Parameters: weight: [heads, head_dim, head_dim], and bias: [heads, head_dim], zeros, which change nothing.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, head_dim, head_dim))
        self.bias = nn.Parameter(torch.zeros(heads, head_dim))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, N, H, D] -> x + x @ weight + bias, in the input's dtype."""
        return map_heads(tokens, self.affine)

    @property
    def affine(self) -> HeadMap:
        """(eye + weight, bias): the map as the operator takes it, at least float32 beside the ones."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return torch.eye(self.weight.shape[-1], device=self.weight.device, dtype=dtype) + self.weight, self.bias

    @torch.no_grad()
    def assign(self, matrix: torch.Tensor, shift: torch.Tensor) -> None:
        """Become x @ matrix + shift."""
        self.weight.copy_(matrix - torch.eye(matrix.shape[-1]))
        self.bias.copy_(shift)


@dataclass(frozen=True)
class MapChoice:
    """One candidate: the focusing factor, the exponent that shapes the scale, whether directions are paired, the
    shift of query and key in units of their root mean square, and which rotation of the paired directions (0: none)."""

    power: float
    scale_exponent: float = 0.0
    paired: bool = False
    shift: float = 0.0
    rotation: int = 0


class LayerChoice(tuple[MapChoice, ...]):
    """A map for each head, of one focusing power and scale exponent."""

    @property
    def power(self) -> float:
        """The focusing power of the layer."""
        return self[0].power

    @property
    def scale_exponent(self) -> float:
        """The exponent that shapes the layer's scale."""
        return self[0].scale_exponent

    @property
    def mapped(self) -> bool:
        """Whether query and key are mapped at all."""
        return any(choice.shift for choice in self)

    def __str__(self) -> str:
        kinds = Counter("paired" if choice.paired else "shifted" if choice.shift else "inherited" for choice in self)
        maps = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        return f"power {self.power:g}, scale exponent {self.scale_exponent:g}, heads: {maps}"


@in_full_precision
def query_key_sums(inputs: MixerInputs) -> Sums:
    """Of one call: the second moments of queries and of keys [H, D, D], the squares of both after the relu [H, D], and
    the number of tokens; what `QueryKeyMoments` is made of once summed."""
    query, key = inputs.query, inputs.key
    seconds = [torch.einsum("bnhd,bnhe->hde", x.float(), x.float()).double().cpu() for x in (query, key)]
    positive = torch.cat([query, key], dim=1).float().relu().square().sum((0, 1)).double().cpu()
    return *seconds, positive, torch.tensor(float(query.shape[0] * query.shape[1]), dtype=torch.float64)


class QueryKeyMoments:
    """Second moments of one layer's queries and keys, [H, D, D] each, per token; from the sums of `query_key_sums`."""

    def __init__(self, sums: Sums) -> None:
        query, key, positive, tokens = sums
        self.query, self.key = query / tokens, key / tokens
        self.positive = positive.flatten() / (2 * tokens)
        self._directions: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None

    def scale(self, exponent: float) -> torch.Tensor:
        """[H * D], geometric mean 1: channels' root mean square after the relu, to a power."""
        log = 0.5 * exponent * self.positive.clamp(min=1e-12).log()
        return (log - log.mean()).exp().float()

    def linear_maps(self, heads: Sequence[MapChoice]) -> Maps:
        """The maps of a choice for each head."""
        by_choice = {choice: self._maps(choice) for choice in set(heads)}
        parts = [[part[head] for part in by_choice[choice]] for head, choice in enumerate(heads)]
        query_matrix, query_shift, key_matrix, key_shift = (torch.stack(part) for part in zip(*parts, strict=True))
        return query_matrix, query_shift, key_matrix, key_shift

    def _maps(self, choice: MapChoice) -> Maps:
        if not choice.paired:
            identity = torch.eye(self.query.shape[-1]).expand(self.query.shape)
            roots = (x.diagonal(dim1=-2, dim2=-1).sqrt().float() for x in (self.query, self.key))
            query_shift, key_shift = (choice.shift * root for root in roots)
            return identity, query_shift, identity, key_shift
        if self._directions is None:
            self._directions = [_balance(q, k) for q, k in zip(self.query, self.key, strict=True)]
        query, key, spread = (torch.stack(parts).float() for parts in zip(*self._directions, strict=True))
        half, rest = self.query.shape[-1] // 2, self.query.shape[-1] % 2
        if choice.rotation:
            rotation = _rotation(half, choice.rotation)
            query, key = (torch.cat([x[..., :half] @ rotation, x[..., half:]], dim=-1) for x in (query, key))
            spread = (spread[:, :half].square() @ rotation.square()).sqrt()
        shift = choice.shift * spread[:, :half]
        shift = torch.cat([shift, shift, shift.new_zeros(len(shift), rest)], dim=-1)
        query, key = (torch.cat([x[..., :half], -x[..., :half], x[..., half : half + rest]], -1) for x in (query, key))
        return query, shift, key, shift


def apply_maps(inputs: MixerInputs, maps: Maps) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key [B, N, H, D] after the maps, in float32."""
    query_matrix, query_shift, key_matrix, key_shift = (part.to(inputs.query.device) for part in maps)
    query = torch.einsum("bnhd,hde->bnhe", inputs.query.float(), query_matrix) + query_shift
    key = torch.einsum("bnhd,hde->bnhe", inputs.key.float(), key_matrix) + key_shift
    return query.contiguous(), key.contiguous()


def candidates(
    powers: Sequence[float],
    scale_exponents: Sequence[float],
    shifts: Sequence[float],
    pair_shifts: Sequence[float],
    rotations: int,
    *,
    pairable: bool,
) -> list[MapChoice]:
    """Every choice that the settings name; scale and shift are not combined. Paired ones only where `pairable`."""
    choices = [MapChoice(power, exponent) for power in powers for exponent in scale_exponents]
    choices += [MapChoice(power, shift=shift) for power in powers for shift in shifts]
    if pairable:
        choices += [
            MapChoice(power, paired=True, shift=shift, rotation=rotation)
            for power in powers
            for shift in pair_shifts
            for rotation in range(rotations + 1)
        ]
    return choices


def _rotation(size: int, seed: int) -> torch.Tensor:
    """[size, size], orthogonal, the same everywhere."""
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed))).Q


def _balance(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Matrices A, B [D, D] with A B^T = 1 that give query @ A and key @ B one diagonal second moment, and its root
    [D], falling."""
    query_root, key_root = (_root(x) for x in (query, key))
    left, values, right = torch.linalg.svd(key_root.T @ query_root)
    whiten = values.clamp(min=1e-12).rsqrt()
    return key_root @ left * whiten, query_root @ right.T * whiten, values.sqrt()


def _root(moment: torch.Tensor) -> torch.Tensor:
    """R [D, D] with R R^T = moment, whose directions without any spread get a little."""
    values, vectors = torch.linalg.eigh(moment)
    root: torch.Tensor = vectors * values.clamp(min=3e-3 * float(values.mean()) + 1e-12).sqrt()
    return root
