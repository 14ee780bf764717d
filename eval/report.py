"""The comparison as one HTML file: no network, no other files, readable on a phone."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from pathlib import Path
from typing import Any

from PIL import Image

from .compare import CONVERTED, ORIGINAL, Comparison, summary_rows
from .paired import Pair
from .plot import throughput_png

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


def render_report(
    comparison: Comparison, folder: Path, environment: dict[str, Any], captions: dict[str, str], max_pairs: int
) -> str:
    """The page.

    Args:
        folder: holds the two folders of pictures.
        captions: text per picture name.
        max_pairs: how many pairs are shown, worst first.
    """
    settings = comparison.settings
    shown = worst_first(comparison.pairs)[:max_pairs]
    # A local folder's last part; a hub id whole.
    source = Path(str(settings["pipeline"]))
    name = source.name if source.is_dir() else str(settings["pipeline"])
    title = f"{name}: original and converted"
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_text(title)}</h1>",
        f"<p>Adapter <b>{_text(str(settings['adapter']))}</b>; same prompts, same noise.</p>",
        *(f"<p class='warning'>{_text(warning)}</p>" for warning in comparison.warnings),
        "<h2>Summary</h2>",
        _summary(comparison),
        _plots(comparison),
        f"<h2>Pairs, worst first ({len(shown)} of {len(comparison.pairs)})</h2>",
        "<p>Drag across a picture: the original lies left of the line, the converted one right of it.</p>",
        "<div class='pairs'>",
        *(_pair(pair, folder, captions.get(pair.name, "")) for pair in shown),
        "</div>",
        "<h2>Settings and versions</h2>",
        f"<pre>{_text(json.dumps({'settings': settings, 'environment': environment}, indent=2, default=str))}</pre>",
        "<details><summary>Attention layers</summary>",
        f"<pre>{_text(comparison.layers)}</pre></details>",
        f"<script>{_SCRIPT}</script></body></html>",
    ]
    return "\n".join(parts)


def _summary(comparison: Comparison) -> str:
    body = "".join(
        f"<tr><td>{_text(label)}</td><td>{_text(show(original))}</td><td>{_text(show(converted))}</td></tr>"
        for label, original, converted in summary_rows(comparison)
    )
    return (
        "<div class='scroll'><table><thead><tr><th></th><th>original</th><th>converted</th></tr></thead>"
        f"<tbody>{body}</tbody></table></div>{_lpips_note(comparison)}"
    )


def _lpips_note(comparison: Comparison) -> str:
    reason = comparison.paired["lpips_not_available"]
    return f"<p><small>LPIPS: {_text(reason)}.</small></p>" if reason else ""


def show(value: float | int | str | None) -> str:
    """A table cell."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plots(comparison: Comparison) -> str:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "<p>No plots: matplotlib is not installed (extra eval).</p>"
    pictures = [(_pairs_png(comparison.pairs), "SSIM of every pair, sorted")]
    if comparison.speed:
        pictures.insert(0, (throughput_png(comparison.speed, "Seconds per step"), "Seconds per step against size"))
    images = "".join(
        f"<img alt='{_text(label)}' src='data:image/png;base64,{base64.b64encode(data).decode()}'>"
        for data, label in pictures
    )
    return f"<h2>Plots</h2><div class='plots'>{images}</div>"


def _pairs_png(pairs: list[Pair]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 3), layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(range(1, len(pairs) + 1), sorted(pair.ssim for pair in pairs), marker=".", linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("pair, worst first")
    axes.set_ylabel("SSIM")
    axes.grid(True, alpha=0.25)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
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
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _text(value: str) -> str:
    return html.escape(value, quote=True)
