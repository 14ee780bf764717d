"""The comparison as one HTML file (no network, no other files, readable on a phone), and the plot of speed."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from .errors import InputError
from .metrics.paired import Pair
from .summary import CONVERTED, ORIGINAL, Comparison, SizeComparison, show, shown_size, summary_columns, summary_rows

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--accent:#0a7d5a}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1100px;padding:1rem;overflow-wrap:anywhere;font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0}h2{font-size:1.15rem;margin:2rem 0 .5rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{padding:.35rem .6rem;border-bottom:1px solid var(--line);text-align:right;font-variant-numeric:tabular-nums}
th:first-child,td:first-child{text-align:left}
.warning{border-left:4px solid #c80;padding:.3rem .8rem;margin:.4rem 0}
.plots img{max-width:100%;height:auto;background:#fff}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:1.25rem}
figure{margin:0}.slide{position:relative;line-height:0;--cut:50%}
.slide img{width:100%;height:auto;display:block}
.slide img+img{position:absolute;inset:0;clip-path:inset(0 0 0 var(--cut))}
.slide::after{content:"";position:absolute;top:0;bottom:0;left:var(--cut);width:2px;background:#fff;
box-shadow:0 0 3px #000;pointer-events:none}
.slide input{position:absolute;inset:0;width:100%;height:100%;margin:0;opacity:0;cursor:ew-resize;touch-action:pan-y}
.slide input:focus-visible{opacity:.4}
.ends{display:flex;justify-content:space-between;font-size:.8rem;opacity:.75}
figcaption{font-size:.85rem;overflow-wrap:anywhere}
pre{overflow-x:auto;font-size:.8rem;padding:.6rem;border:1px solid var(--line)}
"""
_SCRIPT = """
for(const slide of document.querySelectorAll('.slide')){
const input=slide.querySelector('input');
input.addEventListener('input',()=>slide.style.setProperty('--cut',input.value+'%'));}
document.documentElement.dataset.sliders=document.querySelectorAll('.slide input').length;
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def worst_first(pairs: list[Pair]) -> list[Pair]:
    """Pairs by falling LPIPS where it was measured, else by rising SSIM."""
    return sorted(pairs, key=lambda pair: (-pair.lpips if pair.lpips is not None else pair.ssim, pair.name))


def render_report(comparison: Comparison, max_pairs: int) -> str:
    """The page.

    Args:
        max_pairs: how many pairs of each size are shown, worst first.
    """
    several = len(comparison.sizes) > 1
    first = comparison.sizes[0].settings
    title = f"{first['pipeline']}: original and converted"
    settings = {shown_size(one.size): one.settings for one in comparison.sizes} if several else first
    made_with = {"settings": settings, "environment": comparison.environment}
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_text(title)}</h1>",
        f"<p>Adapter <b>{_text(first['adapter'])}</b>; same prompts, same noise.</p>",
        *(f"<p class='warning'>{_text(warning)}</p>" for warning in comparison.warnings),
        "<h2>Summary</h2>",
        _summary(comparison),
        _plots(comparison),
        *(part for one in comparison.sizes for part in _pairs(one, comparison, max_pairs)),
        "<h2>Settings and versions</h2>",
        f"<pre>{_text(json.dumps(made_with, indent=2, default=str))}</pre>",
        "<details><summary>Attention layers</summary>",
        f"<pre>{_text(comparison.layers)}</pre></details>",
        f"<script>{_SCRIPT}</script></body></html>",
    ]
    return "\n".join(parts)


def _pairs(one: SizeComparison, comparison: Comparison, max_pairs: int) -> list[str]:
    shown = worst_first(one.pairs)[:max_pairs]
    at = f" at {shown_size(one.size)}" if len(comparison.sizes) > 1 else ""
    return [
        f"<h2>Pairs{at}, worst first ({len(shown)} of {len(one.pairs)})</h2>",
        "<p>Drag across an image: the original lies left of the line, the converted one right of it.</p>",
        "<div class='pairs'>",
        *(_pair(pair, one.folder, comparison.captions.get(pair.name, "")) for pair in shown),
        "</div>",
    ]


def _summary(comparison: Comparison) -> str:
    body = "".join(
        f"<tr><td>{_text(label)}</td>{''.join(f'<td>{_text(show(cell))}</td>' for side in sides for cell in side)}</tr>"
        for label, sides in summary_rows(comparison)
    )
    columns = summary_columns(comparison)
    above = "".join(f"<th colspan='2' scope='colgroup'>{_text(column)}</th>" for column in columns)
    above = f"<tr><th></th>{above}</tr>" if len(columns) > 1 else ""
    names = "<th>original</th><th>converted</th>" * len(columns)
    reason = comparison.sizes[0].paired["lpips_not_available"]
    note = f"<p><small>LPIPS: {_text(reason)}.</small></p>" if reason else ""
    return (
        f"<div class='scroll'><table><thead>{above}<tr><th></th>{names}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>{note}"
    )


def require_matplotlib() -> None:
    """Raises InputError before a long run where plots cannot be made."""
    if find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib; install the eval extra")


def _plots(comparison: Comparison) -> str:
    if find_spec("matplotlib") is None:
        return "<p>No plots: matplotlib is not installed (extra eval).</p>"
    plots = [(_pairs_png(comparison.sizes), "SSIM of every pair, sorted")]
    if comparison.speed:
        plots.insert(0, (throughput_png(comparison.speed, "Seconds per step"), "Seconds per step against size"))
    images = "".join(f"<img alt='{_text(label)}' src='{_url('png', data)}'>" for data, label in plots)
    return f"<h2>Plots</h2><div class='plots'>{images}</div>"


def throughput_png(results: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """A PNG of seconds per step over the side of the image, both logarithmic, one line per variant."""
    figure, axes = _figure(7, 4.5, "image side (pixels)", "seconds per step")
    names = {name for row in results for name in row["variants"]}
    for name in sorted(names, key=lambda name: (not name.startswith("sdpa"), not name.startswith("linear"), name)):
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
    axes.set_title(title)
    axes.legend(fontsize=8)
    return _png(figure)


def _pairs_png(sizes: Sequence[SizeComparison]) -> bytes:
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(7, 3, "pair, worst first", "SSIM")
    for one in sizes:
        values = sorted(pair.ssim for pair in one.pairs)
        axes.plot(range(1, len(values) + 1), values, marker=".", linewidth=1, label=shown_size(one.size))
    if len(sizes) > 1:
        axes.legend(fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _png(figure)


def _figure(width: float, height: float, across: str, up: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(True, which="both", alpha=0.25)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _pair(pair: Pair, folder: Path, caption: str) -> str:
    original, converted = (_data_url(folder / side / pair.name) for side in (ORIGINAL, CONVERTED))
    decibels = f"{pair.psnr:.1f} dB" if math.isfinite(pair.psnr) else "identical"
    numbers = f"SSIM {pair.ssim:.3f} · PSNR {decibels}"
    if pair.lpips is not None:
        numbers += f" · LPIPS {pair.lpips:.3f}"
    return (
        "<figure><div class='slide'>"
        f"<img alt='original' src='{original}'><img alt='converted' src='{converted}'>"
        f"<input type='range' min='0' max='100' value='50' aria-label='{_text(pair.name)}: cut between the two'></div>"
        "<div class='ends'><span>original</span><span>converted</span></div>"
        f"<figcaption>{_text(caption)}<br>{numbers}<br><small>{_text(pair.name)}</small></figcaption></figure>"
    )


def _data_url(path: Path) -> str:
    buffer = io.BytesIO()
    with Image.open(path) as image:
        # The exact PNGs stay in the folder; here the page's size matters.
        image.convert("RGB").save(buffer, format="JPEG", quality=92, subsampling=0)
    return _url("jpeg", buffer.getvalue())


def _url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)
