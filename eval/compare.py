"""The whole comparison of one pipeline with and without its adapter: pictures, quality, pairs, speed, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .alignment import mean_fact_accuracy
from .architectures import check_size
from .errors import InputError
from .features import Extractor, TransformerExtractor
from .generate import GenerationSettings, Job, check_settings, generate
from .paired import Pair, load_lpips, measure_pairs, summarise
from .pipelines import PIPELINES, apply_adapter, denoiser
from .processes import Processes
from .quality import QualityOptions, Source, check_sources, evaluate_quality, open_source
from .throughput import ThroughputOptions, measure_model

ORIGINAL = "original"
CONVERTED = "converted"


@dataclass(frozen=True)
class Comparison:
    """Everything the report shows. `quality` has the original as its baseline; None where it was not asked for."""

    settings: dict[str, Any]
    quality: dict[str, Any] | None
    pairs: list[Pair]
    paired: dict[str, Any]
    speed: list[dict[str, Any]]
    facts: dict[str, float] | None = None
    layers: str = ""
    warnings: list[str] = field(default_factory=list)


def compare(
    pipeline: Any,
    settings: GenerationSettings,
    jobs: Sequence[Job],
    output: Path,
    processes: Processes,
    *,
    real: Source | None,
    extractor: Extractor | None,
    clip: TransformerExtractor | None,
    quality: QualityOptions,
    speed: ThroughputOptions,
    sizes: Sequence[tuple[int, int]],
    batch_size: int,
    offline: bool,
) -> Comparison | None:
    """Draws every job twice from the same noise, without and with `settings.adapter`, and measures both.

    Pictures go to `output/original` and `output/converted`, and are reused when they are already there.

    Args:
        real: what the distance is taken to; None for the original's own pictures.
        extractor: None for no distance.
        sizes: (height, width) to time, empty for none.

    Returns:
        The comparison on the main process, None on the others.

    Raises:
        InputError, RefusedComparison: see the parts.
    """
    if settings.adapter is None:
        raise InputError("compare needs --adapter: it sets the original beside the converted pipeline")
    prompts = [job.prompt for job in jobs if job.prompt is not None] or None
    check_settings(pipeline, settings, prompts)
    for height, width in sizes:
        check_size(denoiser(pipeline), height, width, speed.compression)
    if real is not None:
        check_sources([real], replace(quality, metrics=()), extractor)
    # Before the originals, so that a wrong adapter costs no drawing; disabled, it changes no bit of them.
    adapter = apply_adapter(pipeline, settings.adapter, offline)
    unconverted = replace(settings, adapter=None, adapter_sha256=None)
    with adapter.disabled():
        generate(pipeline, unconverted, jobs, output / ORIGINAL, processes, batch_size)
    generate(pipeline, settings, jobs, output / CONVERTED, processes, batch_size)
    measured = None
    if extractor is not None:
        original, converted = open_source(output / ORIGINAL), open_source(output / CONVERTED)
        reference = real if real is not None else original
        baseline = original if real is not None else None
        measured = evaluate_quality(reference, converted, baseline, extractor, processes, quality, clip).as_dict()
    if not processes.is_main:
        return None
    lpips, missing = load_lpips(processes.device, offline)
    pairs = measure_pairs(output / ORIGINAL, output / CONVERTED, lpips)
    rows = measure_model(denoiser(pipeline), sizes, processes.device, speed, adapter=adapter) if sizes else []
    facts = None
    if settings.pipeline in PIPELINES:
        facts = {name: mean_fact_accuracy(output / name) for name in (ORIGINAL, CONVERTED)}
    return Comparison(
        settings=dict(vars(settings)),
        quality=measured,
        pairs=pairs,
        paired=summarise(pairs, missing),
        speed=rows,
        facts=facts,
        layers=str(adapter.report()),
        warnings=list(measured["warnings"]) if measured is not None else [],
    )


def summary_rows(comparison: Comparison) -> list[tuple[str, float | int | str | None, float | int | str | None]]:
    """(what, original, converted) for the table; None prints as a dash."""
    rows: list[tuple[str, float | int | str | None, float | int | str | None]] = []
    quality = comparison.quality
    if quality is not None:
        baseline = quality["baseline"] or {}
        rows.append(("pictures", baseline.get("count", quality["count"]), quality["count"]))
        name = f"Fréchet distance ({quality['extractor']['name']})"
        if quality["baseline"] is None:
            name += " to the original's pictures"
        rows.append((name, baseline.get("frechet_distance"), quality["frechet_distance"]))
        for key, label in (
            ("fid", "FID"),
            ("kid", "KID"),
            ("cmmd", "CMMD"),
            ("precision", "precision"),
            ("recall", "recall"),
            ("clip_score", "CLIP score"),
        ):
            if key in quality:
                rows.append((label, baseline.get(key), quality[key]))
    if comparison.facts is not None:
        rows.append(("stated facts that hold", comparison.facts[ORIGINAL], comparison.facts[CONVERTED]))
    paired = comparison.paired
    rows.append(("PSNR to the original, dB", None, paired["psnr"] if paired["psnr"] is not None else "identical"))
    rows.append(("SSIM to the original", None, paired["ssim"]))
    rows.append(("LPIPS to the original", None, paired["lpips"] if paired["lpips"] is not None else "not available"))
    for row in comparison.speed:
        size = f"{row['width']}x{row['height']}"
        original, converted = _speed_pair(row)
        for label, key, scale in (("seconds per step", "seconds_per_step", 1.0), ("peak MiB", "peak_bytes", 2.0**-20)):
            before, after = (_scaled(side, key, scale) for side in (original, converted))
            rows.append((f"{label}, {size}", before, after))
    return rows


def _scaled(side: dict[str, Any], key: str, scale: float) -> float | str | None:
    value: float | None = side.get(key)
    return value * scale if value is not None else side.get("failure")


def _speed_pair(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """SDPA's numbers and those of the fastest backend of the conversion."""
    linear = [variant for name, variant in row["variants"].items() if name.startswith("linear")]
    linear.sort(key=lambda variant: variant.get("seconds_per_step") or float("inf"))
    return row["variants"].get("sdpa", {}), linear[0] if linear else {}
