"""What became of every attention layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..mixers import Grid, describe_grid


@dataclass(frozen=True)
class LayerReport:
    """One attention layer.

    Attributes:
        name: path of the attention module.
        converted: whether its self-attention runs linear.
        reason: where its token grid comes from, or why it stays softmax.
        heads, head_dim: of the attention module; None where it does not say.
        grid: in tokens at the last converted forward pass: (height, width), (frames, height, width) for videos, or
            one triple per picture where there are several; None before, or where the attention receives a picture and
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
