"""The contract: what a mixer is told about its layer and about a call, what it answers, and what it declares."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import nn

from .grid import Grid

if TYPE_CHECKING:
    from .calibration import CalibratedLayer, Statistic, Sums

Calibration = Generator["Statistic", "Sums", Any]
"""Yields what it wants measured, is sent the sums over batches and processes, and returns what it chose (or None)."""

FEATURES = frozenset({"mask", "frames", "images", "text", "window", "split", "compile"})
"""What a mixer may declare in `supports`: key masks, several frames, several images in a sequence, text keys beside it
(under one normaliser), windows of exact softmax beside it, tokens split over processes, torch.compile."""


class LayerShape(NamedTuple):
    """Of one attention layer: heads, head_dim, and the channels of its input."""

    heads: int
    head_dim: int
    channels: int


class Context(NamedTuple):
    """What one call knows beside query, key and value.

    Attributes:
        grid: of the query's tokens; None where the mixer does not need it. With a `group`, the whole image's.
        key_mask: bool [B, M], True where a key counts; None for all.
        scale: of the softmax that the layer was trained with; None means D ** -0.5.
        hidden_states: [B, N, C], the layer's input, where the mixer needs it.
        group: a `torch.distributed` process group whose processes each hold some rows of the image's tokens; None for
            one process that holds them all.
    """

    grid: Grid | None = None
    key_mask: torch.Tensor | None = None
    scale: float | None = None
    hidden_states: torch.Tensor | None = None
    group: Any = None

    def softmax_scale(self, query: torch.Tensor) -> float:
        """`scale`, or what None means for this query [B, N, H, D]."""
        scale: float = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        return scale


class Mixed(NamedTuple):
    """A mixer's answer: output [B, N, H, D] in the query's dtype, and, where the mixer knows it exactly, the log of the
    sum over keys of exp(scale q.k), [B, N, H] in at least float32."""

    output: torch.Tensor
    log_partition: torch.Tensor | None = None


@dataclass(frozen=True)
class MixerConfig:
    """Base of a mechanism's settings: validates itself, goes to JSON types and back, and is hashable.

    `name` is the registered name of the mechanism, set by `register_mixer`.
    """

    name: ClassVar[str] = ""

    def to_dict(self) -> dict[str, Any]:
        """{"name": ..., setting: value}, in JSON types: a tuple is a list."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"name": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def timed(self) -> MixerConfig:
        """The settings that are timed in place of these for `min_tokens="auto"`: those of one cost share a timing."""
        return self

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MixerConfig:
        """The inverse of `to_dict`, without "name". Raises ValueError for unknown or bad settings."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            names = ", ".join(known) or "none"
            raise ValueError(f"Unknown setting {unknown[0][:80]!r} of mixer {cls.name}: known ones are {names}.")
        return cls(**values)


class Mixer(nn.Module):
    """Stands in for the attention product of one layer: query, key and value come in as the projections leave them.

    A mixer is one file: a config, this module, a plain `reference`, and its own calibration. It holds only what the
    mechanism adds to a layer, and starts where that adds nothing or where the mechanism's paper starts. It must be
    called through `__call__`, so that offloading and sharding hooks see it. A call that needs what `supports` lacks
    never reaches it. See docs/adding-a-mixer.md.

    Class attributes:
        Config: the dataclass of its settings. `examples`: configs that the contract tests run.
        summary: one line for `list_mixers`; `cost` in tokens, `source`: the paper.
        needs: out of "grid" and "hidden_states"; may depend on the config, then set in `__init__`.
        supports: out of `FEATURES`.
        exact_partition: whether `Mixed.log_partition` is given.
        CalibrationSettings: the class of what `calibrate` and `refine` take as settings.
    """

    Config: ClassVar[type[MixerConfig]] = MixerConfig
    examples: ClassVar[tuple[MixerConfig, ...]] = ()
    summary: ClassVar[str] = ""
    cost: ClassVar[str] = "O(N)"
    source: ClassVar[str] = ""
    needs: frozenset[str] = frozenset()
    supports: frozenset[str] = frozenset()
    exact_partition: bool = False
    CalibrationSettings: ClassVar[type] = type(None)

    def __init__(self, config: MixerConfig, layer: LayerShape) -> None:
        super().__init__()
        self.config: Any = config
        self.layer = layer
        self.backend = "auto"

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """Mix the values: query [B, N, H, D], key and value [B, M, H, D]."""
        raise NotImplementedError

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """The same in plain torch, as the paper has it: the judge of `forward`, in any dtype."""
        raise NotImplementedError

    def calibrate(self, layer: CalibratedLayer, settings: Any) -> Calibration:
        """Solve without gradients for what is learned, towards the softmax's own product; once, before `refine`.

        Args:
            layer: what surrounds the mixer, see `CalibratedLayer`.
            settings: an instance of the class's own calibration settings, None for its defaults.
        """
        return None
        yield

    def refine(self, layer: CalibratedLayer, settings: Any) -> Calibration:
        """As `calibrate`, in turn with the solution for the layer's output projection, several times."""
        return None
        yield

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config.to_dict().items() if name != "name")
