"""Window attention: softmax within windows, plain, shifted, half of each, and with keys that overlap."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import LayerShape, MixerConfig
from .parts.partition import Axis, Pattern, groups, groups_pattern
from .parts.sparse import SparseAttention, halves, whole
from .registry import register_mixer


@dataclass(frozen=True)
class WindowConfig(MixerConfig):
    """Settings of `ShiftedWindowAttention`.

    Args:
        size: side of the windows, 1 to 64.
        shift: "half" (StyleSwin): half of the heads have windows moved by size // 2; "none" or "all" (Swin, whose
            layers alternate: `overrides`).
        margin: a window also reads the keys up to so many tokens around it (HAT: a quarter of the size), 0 to 32.
        zero_keys: whether places of a window outside the picture count as keys and values of zeros, as HAT has it;
            otherwise windows are cut at the border.
        bias: whether it learns position biases.

    Raises:
        ValueError: a value out of range.
    """

    size: int = 8
    shift: str = "half"
    margin: int = 0
    zero_keys: bool = False
    bias: bool = True

    def __post_init__(self) -> None:
        whole("size", self.size, 1, 64)
        whole("margin", self.margin, 0, 32)
        if self.shift not in ("half", "none", "all"):
            raise ValueError(f"shift is {self.shift!r:.60}: pass 'half', 'none' or 'all'.")
        for name in ("zero_keys", "bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r:.60}: pass true or false.")


@register_mixer("window")
class ShiftedWindowAttention(SparseAttention):
    """Windows of w x w tokens from the upper left corner, or moved by w // 2 and cut at the picture's borders. With
    W(i) the window of query i, grown by the margin,

        out_i = sum over j in W(i) of softmax_j(s q_i.k_j + R[y_j - y_i, x_j - x_i]) v_j.

    An axis that one window holds is not shifted: where the window holds the picture, this is softmax.

    Parameters (zeros): bias: [heads, 2 (w + margin) - 1, the same], R.

    Source: Liu et al., "Swin Transformer", ICCV 2021; Zhang et al., "StyleSwin", CVPR 2022; Chen et al., "Activating
    More Pixels in Image Super-Resolution Transformer" (HAT), CVPR 2023.
    """

    Config = WindowConfig
    examples = (
        WindowConfig(),
        WindowConfig(size=3, shift="all"),
        WindowConfig(size=4, shift="none", margin=1, zero_keys=True),
        WindowConfig(size=2, margin=1),
    )
    summary = "softmax within windows: plain, shifted, half the heads each, or overlapping"
    cost = "O(N w^2)"
    source = "Liu et al., Swin Transformer, ICCV 2021; StyleSwin, CVPR 2022; HAT, CVPR 2023"

    def __init__(self, config: WindowConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        reach = config.size + config.margin
        self.bias = self._biases(layer, (reach, reach)) if config.bias else None
        self.zeros = config.zero_keys

    def kinds(self) -> list[tuple[str, slice]]:
        """See `SparseAttention.kinds`."""
        if self.config.shift == "half":
            return halves(self.layer.heads, "plain", "shifted")
        return [("shifted" if self.config.shift == "all" else "plain", slice(None))]

    def axes(self, size: tuple[int, int], kind: str, device: torch.device) -> tuple[Axis, Axis]:
        """See `SparseAttention.axes`."""
        window, margin = self.config.size, self.config.margin
        rows, columns = (groups(n, window, start=self._start(n, kind), margin=margin, device=device) for n in size)
        return rows, columns

    def patterns(self, size: tuple[int, int], kind: str, device: torch.device) -> tuple[Pattern, Pattern]:
        """See `SparseAttention.patterns`."""
        window, margin = self.config.size, self.config.margin
        rows, columns = (
            groups_pattern(n, window, start=self._start(n, kind), margin=margin, zeros=self.zeros, device=device)
            for n in size
        )
        return rows, columns

    def _start(self, length: int, kind: str) -> int:
        """Where the first window begins."""
        size: int = self.config.size
        shift = size // 2 if kind == "shifted" and length > size else 0
        return shift - size if shift else 0
