"""What became of every attention layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..mixers import Grid, LayerMixer, count_tokens, describe_grid
from ..models import (
    AUTO,
    LAYER,
    MIXER,
    ConvertedLayer,
    Kind,
    LayerInfo,
    find_attention_layers,
    heads_of,
    inner_dim_of,
    known_ratio,
)
from .handle import OURS, AdapterHandle, place_of


@dataclass(frozen=True)
class LayerReport:
    """One attention layer.

    Attributes:
        name: path of the attention module.
        converted: whether its self-attention runs linear.
        reason: where its token grid comes from, or why it stays softmax.
        heads, head_dim: of the attention module; None where it does not say.
        grid: in tokens at the last converted forward pass: (height, width), (frames, height, width) for videos, or
            one triple per image where there are several; None before, or where the attention receives an image and
            no grid needs keeping.
        time_ratio: time of the linear product over that of softmax at this grid, as measured on this device for
            `min_tokens="auto"`; above 1 where linear is the slower one. None where it was not measured.
    """

    name: str
    converted: bool
    reason: str
    heads: int | None = None
    head_dim: int | None = None
    grid: Grid | None = None
    time_ratio: float | None = None


@dataclass(frozen=True)
class Report:
    """Every attention layer of a model: iterate over it, or print it as a table."""

    model: str
    layers: tuple[LayerReport, ...]

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def converted(self) -> list[LayerReport]:
        """The layers that run linear."""
        return [layer for layer in self.layers if layer.converted]

    @property
    def kept(self) -> list[LayerReport]:
        """The layers that stay softmax."""
        return [layer for layer in self.layers if not layer.converted]

    def __str__(self) -> str:
        header = ("layer", "attention", "heads x dim", "grid", "why")
        table: list[tuple[str, ...]] = [header, *(_cells(layer) for layer in self.layers)]
        widths = [max(len(row[column]) for row in table) for column in range(len(header))]
        table.insert(1, tuple("-" * width for width in widths))
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        return "\n".join([f"{self.model}: {len(self.converted)} of {len(self)} attention layers linear", *lines])


def _cells(layer: LayerReport) -> tuple[str, str, str, str, str]:
    shape = "-" if layer.heads is None else f"{layer.heads} x {layer.head_dim}"
    grid = "-" if layer.grid is None else describe_grid(layer.grid).replace("x", " x ")
    return layer.name, "linear" if layer.converted else "softmax", shape, grid, layer.reason


def report(handle: AdapterHandle) -> Report:
    """See `Adapter.report`."""
    rows = []
    for info in find_attention_layers(handle.model):
        attn: Any = info.attn
        layer: ConvertedLayer | None = getattr(attn, LAYER, None)
        heads, head_dim = _shape(attn)
        rows.append(
            LayerReport(
                name=info.name,
                converted=layer is not None and isinstance(attn.processor, OURS),
                reason=_reason(handle, info, attn, layer),
                heads=heads,
                head_dim=head_dim,
                grid=None if layer is None else layer.last_grid,
                time_ratio=None if layer is None else _time_ratio(attn, layer),
            )
        )
    return Report(type(handle.model).__name__, tuple(rows))


def _shape(attn: Any) -> tuple[int | None, int | None]:
    """Heads and their size, as far as the module says."""
    try:
        heads = heads_of(attn)
        return heads, inner_dim_of(attn) // heads
    except (AssertionError, ValueError):
        return getattr(attn, "heads", None), None


def _reason(handle: AdapterHandle, info: LayerInfo, attn: Any, layer: ConvertedLayer | None) -> str:
    if layer is None:
        return info.reason or info.offered or "not selected by include and exclude"
    if not isinstance(attn.processor, OURS):
        return f"its processor was replaced by {type(attn.processor).__name__} after the conversion"
    mixer: LayerMixer = getattr(attn, MIXER)
    text = mixer.mixer.config.name
    if mixer.window is not None:
        text += f" beyond windows of {mixer.window.size}"
    if mixer.text is not None:
        text += " within the image, softmax to and from other tokens"
    if "grid" in mixer.needs:
        text += f", grid from {info.architecture.owner if info.architecture else ''}"
    if layer.min_tokens:
        text += f", softmax below {layer.min_tokens} tokens" + (" (measured)" if layer.auto else "")
    elif handle.config.min_tokens == AUTO and not layer.auto:
        text += ", converted at every size: its weights are trained for it"
    ratio = _time_ratio(attn, layer)
    if ratio is not None and ratio > 1:
        text += f", {ratio:.2f} times softmax's time at this size"
    if layer.last_softmax is not None:
        text += f", softmax in the last pass: {layer.last_softmax}"
    return text + ("" if layer.enabled else ", disabled at the moment")


def _time_ratio(attn: Any, layer: ConvertedLayer) -> float | None:
    """Of the layer's product to softmax's, where the size of the last pass was converted and ever timed."""
    tokens = 0 if layer.last_grid is None else count_tokens(layer.last_grid)
    if tokens == 0 or tokens < layer.min_tokens:
        return None
    return known_ratio(*place_of(attn), Kind.of(getattr(attn, MIXER)), tokens)
