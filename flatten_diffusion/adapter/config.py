"""What a conversion is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ..mixers import PROJECTIONS, MixerConfig, mixer_config
from ..models import AUTO


@dataclass(frozen=True)
class AdapterConfig:
    """Settings of `linearize`; saved beside the weights.

    Args:
        mixer: what takes the place of softmax: a config such as `FocusedLinearConfig(kernel_size=3)`, or the name of
            one of `list_mixers()` for its defaults.
        overrides: attention path -> the config of a layer that has its own.
        window: side, in tokens, of the windows within which attention stays softmax, joined with the mixer under one
            normaliser (see `flatten_diffusion.mixers.WindowAttention`): time and memory still grow linearly with the
            image, several times faster than without; for layers that look at their neighbours by content. At most 128;
            0, the default, leaves it out.
        min_tokens: a call with fewer tokens stays softmax, decided at each call from its real size. The default 0
            converts every size. "auto": below what is measured, so that no size is slower than the original: each mixer
            is timed against softmax once per device, dtype and layer shape (a few seconds, at `linearize`,
            `load_adapter` or the first pass on another device or in another dtype), and what was found is kept in
            $FLATTEN_DIFFUSION_CACHE, else $XDG_CACHE_HOME/flatten_diffusion, else ~/.cache/flatten_diffusion. Layers
            whose loaded weights are trained stay converted at every size all the same, unless `load_adapter` is passed
            `min_tokens`; `Adapter.report` says what that costs. Every process decides for itself: pass a number where
            several must agree (sharded training).
        include: shell-style patterns over attention paths ("down_blocks.*"); None means every layer that can be
            converted.
        exclude: patterns of layers to leave alone; wins over `include`.
        deltas: projections of each converted layer that learn an addition, out of "q", "k", "v", "out";
            none of them changes a base weight.
        delta_rank: rank of those additions, kept as LoRA factors; None means full matrices.

    Raises:
        ValueError: a value out of range, or an unknown mixer.
    """

    mixer: MixerConfig | str | Mapping[str, Any] = "focused_linear"
    overrides: Mapping[str, MixerConfig | Mapping[str, Any]] = field(default_factory=dict)
    window: int = 0
    min_tokens: int | Literal["auto"] = 0
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    deltas: tuple[str, ...] = ()
    delta_rank: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "mixer", mixer_config(self.mixer))
        overrides = self.overrides
        if not isinstance(overrides, Mapping) or not all(isinstance(name, str) and name for name in overrides):
            raise ValueError(f"overrides is {_short(overrides)}: pass attention paths with the config of a mixer.")
        object.__setattr__(self, "overrides", {name: mixer_config(value) for name, value in overrides.items()})
        if not isinstance(self.deltas, (list, tuple)) or not all(name in PROJECTIONS for name in self.deltas):
            raise ValueError(f"deltas is {_short(self.deltas)}: choose out of {', '.join(PROJECTIONS)}.")
        object.__setattr__(self, "deltas", tuple(name for name in PROJECTIONS if name in self.deltas))
        if self.delta_rank is not None and (not _is_count(self.delta_rank) or not 0 < self.delta_rank <= 65536):
            raise ValueError(f"delta_rank is {_short(self.delta_rank)}: pass 1 to 65536, or None for full matrices.")
        if not _is_count(self.window) or self.window == 1 or self.window > 128:
            raise ValueError(f"window is {_short(self.window)}: pass a whole number from 2 to 128, or 0 for none.")
        if self.min_tokens != AUTO and not _is_count(self.min_tokens):
            raise ValueError(f"min_tokens is {_short(self.min_tokens)}: pass a whole number, 0 or more, or 'auto'.")
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if patterns is None and name == "include":
                continue
            if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) and p for p in patterns):
                raise ValueError(f"{name} is {_short(patterns)}: pass a list of patterns such as ['down_blocks.*'].")
            object.__setattr__(self, name, tuple(patterns))

    def mixer_of(self, layer: str) -> MixerConfig:
        """The config of one layer's mixer."""
        return mixer_config(self.overrides.get(layer, self.mixer))

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types; `from_dict` is its inverse."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["mixer"] = mixer_config(self.mixer).to_dict()
        values["overrides"] = {name: mixer_config(value).to_dict() for name, value in self.overrides.items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """Settings from JSON types; absent ones take their defaults. Raises ValueError for unknown or bad ones."""
        if not isinstance(values, Mapping):
            raise ValueError(f"An adapter's config is {type(values).__name__}: it must be an object of settings.")
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"Unknown setting {unknown[0][:80]!r}: known ones are {', '.join(known)}.")
        return cls(**values)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _short(value: object) -> str:
    return f"{value!r:.80}"


PRESETS: dict[str, AdapterConfig] = {
    "training-free": AdapterConfig(mixer="pyramid", min_tokens="auto"),
}
"""Configs by name, for `linearize`: "training-free" keeps near keys exact and pools far ones, which needs no training,
wherever that is measured to be faster than softmax."""


def resolve_config(config: AdapterConfig | str | None) -> AdapterConfig:
    """The config of a `linearize` call. Raises TypeError and ValueError for what is none."""
    if config is None:
        return AdapterConfig()
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(f"Unknown preset {_short(config)}: choose one of {', '.join(PRESETS)}.")
        return PRESETS[config]
    if not isinstance(config, AdapterConfig):
        raise TypeError(f"config is {type(config).__name__}: pass an AdapterConfig, or one of {', '.join(PRESETS)}.")
    return config
