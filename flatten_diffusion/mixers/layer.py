"""What a converted layer carries: its mixer, what joins it with exact softmax, and its projections' additions."""

from __future__ import annotations

import torch
from torch import nn

from .base import Calibration, Context, LayerShape, Mixer
from .calibration import CalibratedLayer
from .parts.shares import JoinInputs, fit_shares
from .parts.text import OtherTokens, TextJoin
from .parts.window import WindowAttention


class LayerMixer(nn.Module):
    """The product of a converted layer's image queries.

    It must be called through `__call__`, so that offloading and sharding hooks see it.

    Attributes:
        mixer: the mechanism.
        window: joins it with the softmax over each query's window; None without windows.
        text: joins it with the softmax over other tokens of the sequence; None in layers over the image alone.
        deltas: what distillation adds to the layer's projections, a `ProjectionDelta` by the name of its projection
            (see `PROJECTIONS`); the processor applies them around this module.
        recorder: while a capture runs, keeps what each call is given.
    """

    def __init__(self, mixer: Mixer, layer: LayerShape, *, window: int = 0, text: bool = False) -> None:
        super().__init__()
        self.mixer = mixer
        self.window = WindowAttention(layer.heads, window) if window else None
        self.text = TextJoin(layer.heads, not (window or mixer.exact_partition)) if text else None
        self.deltas = nn.ModuleDict()

    @property
    def needs(self) -> frozenset[str]:
        """Out of "grid" and "hidden_states"."""
        return self.mixer.needs if self.window is None else self.mixer.needs | {"grid"}

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: Context,
        others: OtherTokens | None = None,
    ) -> torch.Tensor:
        """query [B, N, H, D], key and value [B, M, H, D] of the image, `others` beside it -> [B, N, H, D]."""
        output, log_partition = self.mixer(query, key, value, context)
        if self.window is not None:
            output, log_partition = self.window(output, query, key, value, context)
        if self.text is not None and others is not None:
            joined: torch.Tensor = self.text(output, query, key, context, others, log_partition)
            return joined
        return output

    def parts(self, inputs: JoinInputs) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """rest [B, N, H, D] and share [B, N, H, 1] of a call: its product is rest + share * (the mixer's); None where
        it is the mixer's own."""
        query, key, value, context, others = inputs
        rest, share, log_partition = None, None, None
        if self.window is not None:
            rest, share, log_partition = self.window.parts(query, key, value, context)
        if self.text is not None and others is not None:
            if self.mixer.exact_partition:
                log_partition = self.mixer(query, key, value, context).log_partition
            elif self.window is not None:
                _, log_partition = self.window(value, query, key, value, context)  # as `forward` rounds it
            text, image = self.text.parts(query, key, context, others, log_partition)
            if rest is None or share is None:
                return text, image
            return text + image * rest, image * share
        return rest, share

    def calibrate_joins(self, layer: CalibratedLayer) -> Calibration:
        """Fit what estimates the mass of keys, in place."""
        return (yield from fit_shares(self.window, self.text, layer.name, layer.selection))
