"""What a comparison found, and its table: one pair of columns, or one for every size side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from .metrics.paired import Pair
from .metrics.quality import labels

ORIGINAL = "original"
CONVERTED = "converted"
Cell: TypeAlias = float | int | str | None
Sides: TypeAlias = tuple[Cell, Cell]
"""The original's and the converted pipeline's."""


@dataclass(frozen=True)
class SizeComparison:
    """One size. `quality` has the original as its baseline where real images were given.

    Attributes:
        size: (height, width) in pixels; None for the pipeline's own.
        folder: holds the two folders of images.
        facts: share of stated facts that hold, by side, for an embedded pipeline.
    """

    size: tuple[int, int] | None
    folder: Path
    settings: dict[str, Any]
    quality: dict[str, Any]
    pairs: list[Pair]
    paired: dict[str, Any]
    facts: dict[str, float] | None


@dataclass(frozen=True)
class Comparison:
    """Everything the report shows.

    Attributes:
        sizes: what was drawn; several have their `size`.
        speed: what was timed, see `speed.model.measure_model`.
        layers: the adapter's report.
        captions: text per image name.
    """

    sizes: list[SizeComparison]
    speed: list[dict[str, Any]]
    layers: str
    captions: dict[str, str]
    environment: dict[str, Any]

    @property
    def warnings(self) -> list[str]:
        """Of every size, which is named where there are several."""
        return [
            warning if len(self.sizes) == 1 else f"{shown_size(one.size)}: {warning}"
            for one in self.sizes
            for warning in one.quality["warnings"]
        ]


def shown_size(size: tuple[int, int] | None) -> str:
    """WIDTHxHEIGHT of (height, width)."""
    return "own size" if size is None else f"{size[1]}x{size[0]}"


def summary_columns(comparison: Comparison) -> list[str]:
    """What stands above each pair of columns: nothing for one size; else the sizes drawn or timed, smallest first."""
    if len(comparison.sizes) == 1:
        return [""]
    sizes = {one.size for one in comparison.sizes if one.size is not None}
    sizes |= {(row["height"], row["width"]) for row in comparison.speed}
    return [shown_size(size) for size in sorted(sizes, key=lambda size: (math.prod(size), size))]


def summary_rows(comparison: Comparison) -> list[tuple[str, list[Sides]]]:
    """(what, original and converted per column) for the table; None prints as a dash."""
    columns: list[dict[str, Sides]]
    if len(comparison.sizes) == 1:
        timed = [_speed(row, f", {row['width']}x{row['height']}") for row in comparison.speed]
        columns = [_quality(comparison.sizes[0])]
        columns[0].update(entry for row in timed for entry in row.items())
    else:
        found: dict[str, dict[str, Sides]] = {name: {} for name in summary_columns(comparison)}
        for one in comparison.sizes:
            found[shown_size(one.size)] |= _quality(one)
        for row in comparison.speed:
            found[shown_size((row["height"], row["width"]))] |= _speed(row, "")
        columns = list(found.values())
    # In the order in which they first come; those of speed, which a size may have alone, last.
    order = dict.fromkeys(label for column in sorted(columns, key=len, reverse=True) for label in column)
    return [(label, [column.get(label, (None, None)) for column in columns]) for label in order]


def _quality(one: SizeComparison) -> dict[str, Sides]:
    quality, paired = one.quality, one.paired
    baseline = quality["baseline"] or {}
    named = labels(quality["extractor"]["name"], "" if baseline else " to the original's images")
    rows: dict[str, Sides] = {"images": (baseline.get("count", quality["count"]), quality["count"])}
    rows |= {label: (baseline.get(key), quality[key]) for key, label in named.items() if key in quality}
    if one.facts is not None:
        rows["stated facts that hold"] = (one.facts[ORIGINAL], one.facts[CONVERTED])
    rows["PSNR to the original, dB"] = (None, paired["psnr"] if paired["psnr"] is not None else "identical")
    rows["SSIM to the original"] = (None, paired["ssim"])
    rows["LPIPS to the original"] = (None, paired["lpips"] if paired["lpips"] is not None else "not available")
    return rows


def _speed(row: Mapping[str, Any], at: str) -> dict[str, Sides]:
    """SDPA's numbers, and those of the fastest backend of the conversion."""
    linear = [variant for name, variant in row["variants"].items() if name.startswith("linear")]
    linear.sort(key=lambda variant: variant.get("seconds_per_step") or math.inf)
    sides = (row["variants"].get("sdpa", {}), linear[0] if linear else {})
    rows: dict[str, Sides] = {}
    for label, key, scale in (("seconds per step", "seconds_per_step", 1.0), ("peak MiB", "peak_bytes", 2.0**-20)):
        values = [side[key] * scale if side.get(key) is not None else side.get("failure") for side in sides]
        rows[f"{label}{at}"] = (values[0], values[1])
    return rows


def show(value: Cell) -> str:
    """A table cell."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
