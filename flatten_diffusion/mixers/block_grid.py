"""Block and grid attention: softmax within windows, and among tokens spread evenly over the picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import LayerShape, MixerConfig
from .parts.partition import Axis, Pattern, groups, groups_pattern
from .parts.sparse import SparseAttention, halves, pair
from .registry import register_mixer


@dataclass(frozen=True)
class BlockGridConfig(MixerConfig):
    """Settings of `BlockGridAttention`.

    Args:
        partition: rows and columns of a block, and of the tokens of a grid; or one number for both, 1 to 64.
        kind: "half": half of the heads see blocks, half grids; "block" or "grid" (MaxViT, whose layers alternate:
            `overrides`).
        bias: whether it learns position biases.

    Raises:
        ValueError: a value out of range.
    """

    partition: int | tuple[int, int] = 7
    kind: str = "half"
    bias: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "partition", pair("partition", self.partition, 1, 64))
        if self.kind not in ("half", "block", "grid"):
            raise ValueError(f"kind is {self.kind!r:.60}: pass 'half', 'block' or 'grid'.")
        if not isinstance(self.bias, bool):
            raise ValueError(f"bias is {self.bias!r:.60}: pass true or false.")


@register_mixer("block-grid")
class BlockGridAttention(SparseAttention):
    """Softmax among the tokens of a group, p x q of them. A block is a window; of a grid are the tokens whose rows
    differ by multiples of ceil(H / p) and whose columns by multiples of ceil(W / q):

        out_i = sum over j in group(i) of softmax_j(s q_i.k_j + R[dy, dx]) v_j,

    with dy and dx, key minus query, in tokens for blocks and in those multiples for grids. Where p >= H and q >= W this
    is softmax.

    Parameters (zeros): bias: [heads, 2p - 1, 2q - 1], R.

    Source: Tu et al., "MaxViT: Multi-Axis Vision Transformer", ECCV 2022.
    """

    Config = BlockGridConfig
    examples = (BlockGridConfig(), BlockGridConfig(partition=(3, 4), kind="grid"), BlockGridConfig(2, "block"))
    summary = "softmax within blocks and among tokens spread evenly over the picture, half the heads each"
    cost = "O(N p q)"
    source = "Tu et al., MaxViT, ECCV 2022"

    def __init__(self, config: BlockGridConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        self.sides = pair("partition", config.partition, 1, 64)
        self.bias = self._biases(layer, self.sides) if config.bias else None

    def kinds(self) -> list[tuple[str, slice]]:
        """See `SparseAttention.kinds`."""
        if self.config.kind == "half":
            return halves(self.layer.heads, "block", "grid")
        return [(self.config.kind, slice(None))]

    def axes(self, size: tuple[int, int], kind: str, device: torch.device) -> tuple[Axis, Axis]:
        """See `SparseAttention.axes`."""
        rows, columns = (
            groups(length, side, interval=_apart(length, side, kind), device=device)
            for length, side in zip(size, self.sides, strict=True)
        )
        return rows, columns

    def patterns(self, size: tuple[int, int], kind: str, device: torch.device) -> tuple[Pattern, Pattern]:
        """See `SparseAttention.patterns`."""
        rows, columns = (
            groups_pattern(length, side, interval=_apart(length, side, kind), device=device)
            for length, side in zip(size, self.sides, strict=True)
        )
        return rows, columns


def _apart(length: int, side: int, kind: str) -> int:
    """How many tokens lie between those of a group."""
    return -(-length // side) if kind == "grid" else 1
