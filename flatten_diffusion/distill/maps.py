"""Candidate query and key maps of one layer, built from second moments alone, for calibration to choose from.

Two kinds. "Inherited": the layer's own query and key, their channels scaled, or shifted by a share of their root mean
square so that the relu cuts less. "Paired": each head's query and key are turned into the directions that matter most
to their product, and each of the first head_dim / 2 directions x enters as the pair (b + x, b - x): for a focusing
factor of 1 and |x| < b, a pair's contribution to query . key is 2 b^2 + 2 x_q x_k, the first two terms of the softmax's
exponential up to a factor, with no relu in the way. The directions are those of balanced truncation (Moore, IEEE TAC
1981): both second moments become the same diagonal, so they are ordered by what they add to query . key. A rotation of
them changes no product but spreads it evenly over the pairs, and with a focusing factor above 1 it matters which: a
few are tried, drawn from fixed seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..adapter.convert import projection_of
from ..mixers import ProjectionDelta
from ..models import MIXER, ReboundProcessor
from .measure import in_full_precision
from .record import MixerInputs

Maps = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""(query matrix, query shift, key matrix, key shift), [H, D, D] and [H, D]: x becomes x @ matrix + shift."""


@dataclass(frozen=True)
class MapChoice:
    """One candidate: the focusing factor, the exponent that shapes the scale, whether directions are paired, the
    shift of query and key in units of their root mean square, and which rotation of the paired directions (0: none)."""

    power: float
    scale_exponent: float = 0.0
    paired: bool = False
    shift: float = 0.0
    rotation: int = 0


class QueryKeyMoments:
    """Second moments of one layer's queries and keys, [H, D, D] each, per token.

    Args:
        inputs: the mixer's inputs of a batch.
        reduce: sum over processes.
    """

    @in_full_precision
    def __init__(self, inputs: MixerInputs, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        tokens = reduce(torch.tensor(float(inputs.query.shape[0] * inputs.query.shape[1]), dtype=torch.float64))
        self.query, self.key = (
            reduce(torch.einsum("bnhd,bnhe->hde", x.float(), x.float()).double().cpu()) / tokens
            for x in (inputs.query, inputs.key)
        )
        positive = torch.cat([inputs.query, inputs.key], dim=1).float().relu().square().sum((0, 1)).double().cpu()
        self.positive = reduce(positive).flatten() / (2 * tokens)
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


def can_shift(attn: Any) -> bool:
    """Whether maps of query and key can be folded into their projections: no norm between, ordinary weights.

    Rebound layers may rotate between, and the text of joint ones reads the same keys through softmax, as windows do.
    """
    if isinstance(attn.processor, ReboundProcessor) or getattr(attn, MIXER).window is not None:
        return False
    plain = all(base_of(projection_of(attn, name)).weight.is_floating_point() for name in ("q", "k"))
    return plain and attn.norm_q is None and attn.norm_k is None


def base_of(projection: Any) -> Any:
    """The base layer of a projection that LoRA has wrapped, or the projection."""
    return getattr(projection, "base_layer", projection)


@torch.no_grad()
def fold_map(attn: Any, name: str, delta: ProjectionDelta, matrix: torch.Tensor, shift: torch.Tensor) -> None:
    """Make `delta` such that the projection `name` plus delta gives what it gave before, mapped."""
    base = base_of(projection_of(attn, name))
    weight = base.weight.float()
    matrix, shift = matrix.to(weight.device), shift.to(weight.device)
    bias = torch.zeros_like(weight[:, 0]) if base.bias is None else base.bias.float()
    present, present_bias = weight + delta.matrix().float(), bias + delta.bias.float()
    heads, head_dim = matrix.shape[:2]
    mapped = torch.einsum("hdc,hde->hec", present.unflatten(0, (heads, head_dim)), matrix).flatten(0, 1)
    mapped_bias = torch.einsum("hd,hde->he", present_bias.unflatten(0, (heads, head_dim)), matrix) + shift
    delta.assign(mapped - weight, mapped_bias.flatten() - bias)


def candidates(
    powers: Sequence[float],
    scale_exponents: Sequence[float],
    shifts: Sequence[float],
    pair_shifts: Sequence[float],
    rotations: int,
    *,
    pairable: bool,
) -> list[MapChoice]:
    """Every choice that the settings name; scale and shift are not combined."""
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
