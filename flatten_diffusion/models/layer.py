"""What a converted attention module carries, and which native processor an attention module stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
)

from ..mixers import Grid, count_tokens, describe_grid

LAYER = "flatten_layer"
"""Attribute of a converted attention module: its `ConvertedLayer`."""
MIXER = "flatten_mixer"
"""Submodule of a converted attention module: its `Mixer`, so that parameters follow `.to`, hooks and state_dict."""

Place = Literal["alone", "first", "last"]
"""Where a layer's picture tokens stand in its sequence: alone, before all others (text, registers), or after them."""

_PLAIN = AttnProcessor2_0()
_FUSED = FusedAttnProcessor2_0()
_ADDED = AttnAddedKVProcessor2_0()
_UNSCALED = AttnProcessor()


class Reading:
    """What a forward pass says about a layer's tokens; read once per pass from the model's real input.

    Attributes:
        grid: of the picture tokens in row-major order, see `flatten_diffusion.mixers.Grid`.
        starts: [B], the sequence position of each sample's first picture token, where samples differ in it.
        key_mask: bool [B, M] over the whole sequence, True where a key counts for the picture's queries; for models
            that hand their attention an N x N mask made of it.
        softmax: why every call of this pass stays softmax; None otherwise.
        keys: number of keys of the calls that hold the picture; calls with another number are those of other tokens
            alone (a causal prompt, say) and stay softmax. None where every call holds it.
    """

    def __init__(
        self,
        grid: Grid | None,
        starts: torch.Tensor | None = None,
        key_mask: torch.Tensor | None = None,
        softmax: str | None = None,
        keys: int | None = None,
    ) -> None:
        self.grid = grid
        self.starts = starts
        self.key_mask = key_mask
        self.softmax = softmax
        self.keys = keys


class ConvertedLayer:
    """The state of one converted attention module, apart from its parameters.

    A plain class: torch.compile traces reads and writes of its attributes and recompiles when they change.

    Attributes:
        name: path of the attention module in its model.
        native: the processor object that the conversion replaced.
        min_tokens: calls with fewer picture tokens stay softmax.
        auto: `min_tokens` is a measured crossover, kept to the device and dtype of each pass by a `CrossoverHook`.
        split: each call holds this process's rows of the picture only, see `Mixer.group`.
        place: where the picture's tokens stand in the layer's sequence.
        reading: of the running forward pass, None before the first.
        enabled: False while the adapter is disabled.
        observed: the reading is kept also while disabled, for whoever compares the two.
        merged: the projection deltas are inside the base weights at the moment.
        tap: while disabled, is handed the native product [B, N, H, D] of rebound layers.
        masked: a call had a mask that linear attention cannot honour, and stayed softmax.
    """

    def __init__(self, name: str, native: Any, min_tokens: int, place: Place = "alone") -> None:
        self.name = name
        self.native = native
        self.min_tokens = min_tokens
        self.auto = False
        self.split = False
        self.place = place
        self.reading: Reading | None = None
        self.enabled = True
        self.observed = False
        self.merged = False
        self.tap: Callable[[torch.Tensor], object] | None = None
        self.masked = False

    @property
    def grid(self) -> Grid | None:
        """Of the picture tokens of the running forward pass; None before the first."""
        return None if self.reading is None else self.reading.grid

    def grid_of(self, tokens: int) -> Grid:
        """The grid of a call with `tokens` picture tokens. Raises RuntimeError when it is unknown or does not fit."""
        grid = self.grid
        if grid is None:
            raise RuntimeError(
                f"{self.name}: the token grid is unknown: call the whole model, or linearize with kernel_size=0."
            )
        if count_tokens(grid) != tokens and not self.split:
            raise RuntimeError(
                f"{self.name}: {tokens} tokens do not fill the {describe_grid(grid)} grid of this forward pass: "
                "undo what changes the token sequence, or linearize with kernel_size=0."
            )
        return grid

    def intercepts(self, hidden_states: torch.Tensor) -> bool:
        """Whether a rebound layer's product is ours in this call, or the native processor runs untouched.

        Raises RuntimeError where it would have to, with the adapter merged into its weights.
        """
        if not self.enabled:
            return self.tap is not None
        if self.reading is not None and self.reading.softmax is not None:
            if self.merged:
                raise RuntimeError(
                    f"{self.name} stays softmax in this pass ({self.reading.softmax}), which needs the base weights: "
                    "call unmerge() first."
                )
            return False
        tokens = hidden_states.shape[1] if self.grid is None else count_tokens(self.grid)
        return tokens >= self.min_tokens


def native_processor(attn: Attention) -> Any:
    """The softmax processor that diffusers itself would run on `attn`."""
    if attn.added_kv_proj_dim is not None:
        return _ADDED
    if getattr(attn, "fused_projections", False):
        return _FUSED
    return _PLAIN if attn.scale_qk else _UNSCALED
