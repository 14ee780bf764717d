"""What a converted attention module carries, and which native processor an attention module stands for."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
)

LAYER = "flatten_layer"
"""Attribute of a converted attention module: its `ConvertedLayer`."""
MIXER = "flatten_mixer"
"""Submodule of a converted attention module: its `Mixer`, so that parameters follow `.to`, hooks and state_dict."""

_PLAIN = AttnProcessor2_0()
_FUSED = FusedAttnProcessor2_0()
_ADDED = AttnAddedKVProcessor2_0()
_UNSCALED = AttnProcessor()


class ConvertedLayer:
    """The state of one converted attention module, apart from its parameters.

    A plain class: torch.compile traces reads and writes of its attributes and recompiles when they change.

    Attributes:
        name: path of the attention module in its model.
        native: the processor object that the conversion replaced.
        min_tokens: calls with fewer tokens stay softmax.
        grid: (height, width) of the tokens of the running forward pass, None before the first.
        enabled: False while the adapter is disabled.
        observed: the grid is kept also while disabled, for whoever compares the two.
        merged: the projection deltas are inside the base weights at the moment.
    """

    def __init__(self, name: str, native: Any, min_tokens: int) -> None:
        self.name = name
        self.native = native
        self.min_tokens = min_tokens
        self.grid: tuple[int, int] | None = None
        self.enabled = True
        self.observed = False
        self.merged = False

    def grid_of(self, tokens: int) -> tuple[int, int]:
        """The grid of a call with `tokens` tokens. Raises RuntimeError when it is unknown or does not fit."""
        grid = self.grid
        if grid is None:
            raise RuntimeError(
                f"{self.name}: the token grid is unknown: call the whole model, or linearize with kernel_size=0."
            )
        if grid[0] * grid[1] != tokens:
            raise RuntimeError(
                f"{self.name}: {tokens} tokens do not fill the {grid[0]}x{grid[1]} grid of this forward pass: "
                "undo what changes the token sequence, or linearize with kernel_size=0."
            )
        return grid


def native_processor(attn: Attention) -> Any:
    """The softmax processor that diffusers itself would run on `attn`."""
    if attn.added_kv_proj_dim is not None:
        return _ADDED
    if getattr(attn, "fused_projections", False):
        return _FUSED
    return _PLAIN if attn.scale_qk else _UNSCALED
