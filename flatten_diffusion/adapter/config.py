"""What a conversion is asked to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ..mixers import PROJECTIONS, list_joints, list_mixers


@dataclass(frozen=True)
class AdapterConfig:
    """Settings of `linearize`; saved beside the weights.

    Args:
        mixer: one of `list_mixers()`.
        focusing_factor: power of the focused map, positive. 3 is the paper's choice; 1 leaves the map unfocused.
        kernel_size: side of the depthwise convolution on the token grid, odd; 0 leaves it out, and with it the need
            for a grid.
        min_tokens: a call with fewer tokens stays softmax, decided at each call from its real size. The default 0
            converts every size. "auto": below what is measured, so that no size is slower than the original: linear
            is timed against softmax once per device, dtype, head size and kernel size (a few seconds, at `linearize`,
            `load_adapter` or the first pass on another device or in another dtype), and what was found is kept in
            $FLATTEN_DIFFUSION_CACHE, else $XDG_CACHE_HOME/flatten_diffusion, else ~/.cache/flatten_diffusion. Layers
            whose loaded weights are trained stay linear at every size all the same, unless `load_adapter` is passed
            `min_tokens`; `Adapter.report` says what that costs. Every process decides for itself: pass a number where
            several must agree (sharded training).
        include: shell-style patterns over attention paths ("down_blocks.*"); None means every layer that can be
            converted.
        exclude: patterns of layers to leave alone; wins over `include`.
        focusing_factors: attention path -> power, where a layer has its own (calibration chooses them).
        deltas: projections of each converted layer that learn an addition, out of "q", "k", "v", "out";
            none of them changes a base weight.
        delta_rank: rank of those additions, kept as LoRA factors; None means full matrices.
        joint: how layers over picture and text together share a picture query's attention between the two, one of
            `flatten_diffusion.mixers.list_joints()`: "shared_normalizer" (in proportion to the softmax's own
            partition, which is estimated for the picture) or "gated_branches" (one learned share per head).
        feature_maps: attention paths of the layers whose queries and keys learn a map behind norms and rotary
            embeddings, inside the mixer (calibration chooses them).
        window: side, in tokens, of the windows within which attention stays softmax, joined with the linear part
            under one normaliser (see `flatten_diffusion.mixers.WindowAttention`): time and memory still grow linearly
            with the picture, several times faster than without; for layers that look at their neighbours by content.
            0, the default, leaves it out.

    Raises:
        ValueError: a value out of range, or an unknown mixer.
    """

    mixer: str = "focused_linear"
    focusing_factor: float = 3.0
    kernel_size: int = 5
    min_tokens: int | Literal["auto"] = 0
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    focusing_factors: Mapping[str, float] = field(default_factory=dict)
    deltas: tuple[str, ...] = ()
    delta_rank: int | None = None
    joint: str = "shared_normalizer"
    feature_maps: tuple[str, ...] = ()
    window: int = 0

    def __post_init__(self) -> None:
        if self.mixer not in list_mixers():
            raise ValueError(f"Unknown mixer {self.mixer!r}: choose one of {', '.join(list_mixers())}.")
        if self.joint not in list_joints():
            raise ValueError(f"Unknown joint {self.joint!r}: choose one of {', '.join(list_joints())}.")
        if not _is_power(self.focusing_factor):
            raise ValueError(f"focusing_factor is {self.focusing_factor!r}: pass a positive, finite number.")
        powers = self.focusing_factors
        if not isinstance(powers, Mapping) or not all(isinstance(n, str) and _is_power(p) for n, p in powers.items()):
            raise ValueError(f"focusing_factors is {powers!r}: pass attention paths with positive, finite numbers.")
        object.__setattr__(self, "focusing_factors", dict(powers))
        if not isinstance(self.deltas, (list, tuple)) or not set(self.deltas) <= set(PROJECTIONS):
            raise ValueError(f"deltas is {self.deltas!r}: choose out of {', '.join(PROJECTIONS)}.")
        object.__setattr__(self, "deltas", tuple(name for name in PROJECTIONS if name in self.deltas))
        if self.delta_rank is not None and (not _is_count(self.delta_rank) or self.delta_rank == 0):
            raise ValueError(f"delta_rank is {self.delta_rank!r}: pass a whole number from 1, or None for full.")
        if not _is_count(self.kernel_size) or (self.kernel_size != 0 and self.kernel_size % 2 == 0):
            raise ValueError(f"kernel_size is {self.kernel_size!r}: pass an odd number, or 0 for no convolution.")
        if not _is_count(self.window) or self.window == 1:
            raise ValueError(f"window is {self.window!r}: pass a whole number from 2, or 0 for no windows.")
        if self.min_tokens != "auto" and not _is_count(self.min_tokens):
            raise ValueError(f"min_tokens is {self.min_tokens!r}: pass a whole number, 0 or more, or 'auto'.")
        for name in ("include", "exclude", "feature_maps"):
            patterns = getattr(self, name)
            if patterns is None and name == "include":
                continue
            if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) and p for p in patterns):
                raise ValueError(f"{name} is {patterns!r}: pass a list of patterns such as ['down_blocks.*'].")
            object.__setattr__(self, name, tuple(patterns))

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types; `from_dict` is its inverse."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["focusing_factors"] = dict(self.focusing_factors)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """Settings from JSON types; absent ones take their defaults. Raises ValueError for unknown or bad ones."""
        if not isinstance(values, Mapping):
            raise ValueError(f"An adapter's config is {type(values).__name__}: it must be an object of settings.")
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"Unknown setting {', '.join(map(repr, unknown))}: known ones are {', '.join(known)}.")
        return cls(**values)


def _is_power(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
