"""Short and long distance attention: softmax among neighbours, and among tokens a fixed interval apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .base import LayerShape, MixerConfig
from .parts.partition import Axis, Pattern, groups, groups_pattern
from .parts.sparse import SparseAttention, halves, whole
from .registry import register_mixer


@dataclass(frozen=True)
class LongShortConfig(MixerConfig):
    """Settings of `LongShortAttention`.

    Args:
        size: side of a group in tokens, 1 to 64.
        interval: of the long distance groups, 1 to 64.
        kind: "half": half of the heads each; "short" or "long" (CrossFormer, whose layers alternate: `overrides`).
        centred: whether the tiles that do not fit are cut on both sides of the picture, or on the right and below.
        width: of the small network that makes position biases, 2 to 256; 0 for a sixteenth of the channels, at least 4.

    Raises:
        ValueError: a value out of range.
    """

    size: int = 7
    interval: int = 4
    kind: str = "half"
    centred: bool = False
    width: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (("size", 1, 64), ("interval", 1, 64), ("width", 0, 256)):
            whole(name, getattr(self, name), least, most)
        if self.width == 1:
            raise ValueError("width is 1: pass 2 to 256, or 0.")
        if self.kind not in ("half", "short", "long"):
            raise ValueError(f"kind is {self.kind!r:.60}: pass 'half', 'short' or 'long'.")
        if not isinstance(self.centred, bool):
            raise ValueError(f"centred is {self.centred!r:.60}: pass true or false.")


@register_mixer("long-short")
class LongShortAttention(SparseAttention):
    """Softmax among the G x G tokens of a group: short distance groups are windows; of a tile of G I x G I tokens,
    those whose rows and columns differ by multiples of the interval I are a long distance group. With P the dynamic
    position bias,

        out_i = sum over j in group(i) of softmax_j(s q_i.k_j + P(place_i - place_j)) v_j,
        P = three times [LayerNorm, ReLU, linear] behind a linear map of the offset in steps of the group.

    Where a group holds the picture and P = 0 this is softmax.

    Parameters: input, norms and layers of P, drawn as the paper does, but for the last, which is drawn with a standard
    deviation of 1e-3 so that the biases start next to zero and a gradient reaches all of them.

    Source: Wang et al., "CrossFormer", ICLR 2022.
    """

    Config = LongShortConfig
    examples = (LongShortConfig(), LongShortConfig(2, 3, "long", centred=True), LongShortConfig(3, 2, "short", width=5))
    summary = "softmax among neighbours, and among tokens an interval apart, half the heads each"
    cost = "O(N G^2)"
    source = "Wang et al., CrossFormer, ICLR 2022"

    def __init__(self, config: LongShortConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        width = config.width or max(4, layer.channels // 16)
        self.input = nn.Linear(2, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(width, out) for out in (width, width, layer.heads))
        for linear in self.modules():
            if isinstance(linear, nn.Linear):
                nn.init.trunc_normal_(linear.weight, std=1e-3 if linear is self.layers[-1] else 0.02)
                nn.init.zeros_(linear.bias)

    def table(self) -> torch.Tensor:
        """P of all offsets, [heads, 2G - 1, 2G - 1], by key minus query: once per call, not per pair."""
        weight = self.input.weight
        steps = torch.arange(self.config.size - 1, -self.config.size, -1, device=weight.device)
        hidden = self.input(torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1).to(weight.dtype))
        for norm, linear in zip(self.norms, self.layers, strict=True):
            hidden = linear(F.relu(norm(hidden)))
        return hidden.permute(2, 0, 1)

    def kinds(self) -> list[tuple[str, slice]]:
        """See `SparseAttention.kinds`."""
        if self.config.kind == "half":
            return halves(self.layer.heads, "short", "long")
        return [(self.config.kind, slice(None))]

    def axes(self, size: tuple[int, int], kind: str, device: torch.device) -> tuple[Axis, Axis]:
        """See `SparseAttention.axes`."""
        rows, columns = (
            groups(length, self.config.size, interval=self._apart(kind), start=self._start(length, kind), device=device)
            for length in size
        )
        return rows, columns

    def patterns(self, size: tuple[int, int], kind: str, device: torch.device) -> tuple[Pattern, Pattern]:
        """See `SparseAttention.patterns`."""
        rows, columns = (
            groups_pattern(
                length, self.config.size, interval=self._apart(kind), start=self._start(length, kind), device=device
            )
            for length in size
        )
        return rows, columns

    def _apart(self, kind: str) -> int:
        interval: int = self.config.interval
        return interval if kind == "long" else 1

    def _start(self, length: int, kind: str) -> int:
        """Where the first tile begins."""
        missing: int = -length % (self.config.size * self._apart(kind))
        return -(missing // 2) if self.config.centred else 0
