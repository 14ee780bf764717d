"""The speed plot: seconds per step against picture size."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import atomic_path


def require_matplotlib() -> None:
    """Raises InputError before a long run where plots cannot be made."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("--plot needs matplotlib; install the eval extra") from error


def throughput_png(results: Sequence[dict[str, Any]], title: str) -> bytes:
    """A PNG of seconds per step over the side of the picture, both logarithmic, one line per variant."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = sorted({name for row in results for name in row["variants"]}, key=_order)
    for name in names:
        points = [
            (math.sqrt(row["height"] * row["width"]), row["variants"][name]["median"])
            for row in results
            if row["variants"].get(name, {}).get("median") is not None
        ]
        if points:
            style = "--" if name.startswith("floor") else "-"
            width = 2.0 if name.startswith(("linear", "floor")) or name == "sdpa" else 1.0
            axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, linewidth=width, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sides = sorted({round(math.sqrt(row["height"] * row["width"])) for row in results})
    axes.set_xticks(sides, [str(side) for side in sides])
    axes.set_xlabel("picture side (pixels)")
    axes.set_ylabel("seconds per step")
    axes.set_title(title)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def write_plot(path: Path, picture: bytes) -> None:
    """Writes the PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(picture)


def _order(name: str) -> tuple[int, str]:
    return (0 if name.startswith("sdpa") else 1 if name.startswith("linear") else 2, name)
