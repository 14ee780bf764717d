"""`flatten-eval compare`: everything about one pipeline and adapter, in a table, a JSON file and an HTML report."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from flatten_diffusion.scenes.check import check_folder
from flatten_diffusion.scenes.grammar import parse

from ..errors import InputError, first_line
from ..features import Extractor, TransformerExtractor
from ..files import write_json, write_text
from ..generate import check_settings, generate, jobs_from, settings_from
from ..metrics.paired import load_lpips, measure_pairs, require_torchmetrics, summarise
from ..metrics.quality import (
    CROP,
    Evaluated,
    QualityOptions,
    Source,
    check_sources,
    evaluate_quality,
    evaluate_source,
    open_source,
)
from ..metrics.statistics import Statistics
from ..pipelines import PIPELINES, apply_adapter, denoiser
from ..processes import Processes, join_processes
from ..report import render_report
from ..speed.architectures import check_size
from ..speed.model import ThroughputOptions, measure_model
from ..summary import (
    CONVERTED,
    ORIGINAL,
    Comparison,
    SizeComparison,
    show,
    shown_size,
    summary_columns,
    summary_rows,
)
from ..versions import environment
from .options import (
    Outcome,
    add_extractor_arguments,
    add_lpips_argument,
    add_metric_arguments,
    add_pipeline_arguments,
    clip_from,
    crops_from,
    cut,
    extractor_from,
    pipeline_from,
    prompts_from,
    quality_options,
    size,
    small,
    table,
)

Look: TypeAlias = tuple[Extractor, TransformerExtractor | None]
"""The extractor of the Fréchet distance and its company, and CLIP where a metric needs it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Pipeline, adapter, what to measure, where to write."""
    add_pipeline_arguments(parser)
    add_extractor_arguments(parser, default="pixels")
    add_metric_arguments(parser)
    group = parser.add_argument_group("comparison")
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="images, compare.json, report.html")
    group.add_argument("--real", type=Path, metavar="PATH", help="real images or statistics to take the distance to")
    group.add_argument(
        "--sizes", type=size, nargs="+", metavar="PIXELS|WxH", help="draw at each of these, shown side by side"
    )
    add_lpips_argument(group)
    group.add_argument(
        "--speed-sizes", type=size, nargs="*", metavar="PIXELS|WxH", help="sizes to time (default: those drawn)"
    )
    group.add_argument("--rounds", type=small, default=5, metavar="N", help="timed rounds per size (default 5)")
    group.add_argument("--report-pairs", type=small, default=24, metavar="N", help="pairs shown (default 24)")


def run(arguments: argparse.Namespace) -> Outcome | None:
    """Draws every job twice from the same noise, without and with the adapter, measures both, and writes.

    Images go to `original` and `converted` in --output, or in a folder per size there, and are reused where they are
    already there. Helper processes return None.
    """
    if arguments.adapter is None:
        raise InputError("compare needs --adapter: it sets the original beside the converted pipeline")
    require_torchmetrics()
    prompts, drawn = prompts_from(arguments), _drawn_sizes(arguments)
    jobs = jobs_from(arguments, prompts)
    real = open_source(arguments.real) if arguments.real is not None else None
    common = settings_from(arguments)
    settings = [replace(common, height=one[0], width=one[1]) if one is not None else common for one in drawn]
    outside = _outside(prompts) if arguments.pipeline in PIPELINES else None
    processes = join_processes(arguments.device)
    quality, looks = quality_options(arguments), _looks(arguments, processes.device)
    _check_looks(looks, real, quality, drawn, arguments.output)
    lpips, missing = load_lpips(processes.device, arguments.offline, arguments.lpips_weights)
    pipeline = pipeline_from(arguments, processes.device)
    for one in settings:
        check_settings(pipeline, one, prompts)
    model, compression = denoiser(pipeline), int(getattr(pipeline, "vae_scale_factor", 8))
    timed = _speed_sizes(arguments, drawn, model, compression)
    for height, width in timed:
        check_size(model, height, width, compression)
    # Before the originals, so that a wrong adapter costs no drawing; disabled, it changes no bit of them.
    adapter = apply_adapter(pipeline, arguments.adapter, arguments.offline)
    folders = [arguments.output / shown_size(one) if len(drawn) > 1 else arguments.output for one in drawn]
    for one, folder in zip(settings, folders, strict=True):
        plain, batch_size = replace(one, adapter=None, adapter_sha256=None), arguments.generation_batch_size
        with adapter.disabled():
            generate(pipeline, plain, jobs, folder / ORIGINAL, processes, batch_size)
        generate(pipeline, one, jobs, folder / CONVERTED, processes, batch_size)
    references = [evaluate_source(real, look[0], processes, quality, look[1]) for look in looks if real is not None]
    measured = [_measure(folder, references, looks, processes, quality) for folder in folders]
    if not processes.is_main:
        return None
    sizes: list[SizeComparison] = []
    for drawn_size, folder, one, found in zip(drawn, folders, settings, measured, strict=True):
        facts = None
        if arguments.pipeline in PIPELINES and outside is None:
            facts = {side: float(check_folder(folder / side)["fact_accuracy"]) for side in (ORIGINAL, CONVERTED)}
        elif outside is not None:
            found["warnings"].append(f"the share of stated facts that hold is left out: {outside}")
        pairs = measure_pairs(folder / ORIGINAL, folder / CONVERTED, lpips)
        paired = summarise(pairs, missing)
        sizes.append(SizeComparison(drawn_size, folder, dict(vars(one)), found, pairs, paired, facts))
    speed = ThroughputOptions(
        rounds=arguments.rounds, warmup=1, steps=arguments.steps or 50, all_backends=False, compression=compression,
        seed=arguments.seed,
    )  # fmt: skip
    comparison = Comparison(
        sizes=sizes,
        speed=measure_model(model, timed, processes.device, speed, adapter=adapter) if timed else [],
        layers=str(adapter.report()),
        captions={job.file: job.prompt or "" for job in jobs},
        environment=environment(processes.device),
    )
    return _write(comparison, arguments.output, arguments.report_pairs)


def _drawn_sizes(arguments: argparse.Namespace) -> list[tuple[int, int] | None]:
    """(height, width) of every size to draw, smallest first; None for the pipeline's own."""
    if arguments.sizes is None:
        return [arguments.size]
    if arguments.size is not None:
        raise InputError("--size and --sizes exclude each other")
    if len(set(arguments.sizes)) != len(arguments.sizes):
        raise InputError("--sizes: a size is given twice; each is drawn once")
    return sorted(arguments.sizes, key=math.prod)


def _looks(arguments: argparse.Namespace, device: torch.device) -> list[Look]:
    """The extractors of whole pictures and, where crops are asked for, those of crops."""
    extractor = extractor_from(arguments, device)
    whole = (extractor, clip_from(arguments, extractor, device))
    crops = crops_from(arguments)
    return [whole] if crops is None else [whole, cut(crops, *whole)]


def _check_looks(
    looks: Sequence[Look],
    real: Source | None,
    options: QualityOptions,
    drawn: Sequence[tuple[int, int] | None],
    output: Path,
) -> None:
    """Raises InputError or RefusedComparison before anything is drawn; see `check_sources`."""
    if len(looks) > 1 and isinstance(real, Statistics):
        raise InputError(f"{real.source}: saved statistics hold no crops beside whole pictures; give the images")
    known = [(one[1], one[0]) for one in drawn if one is not None]
    for look in looks:
        if real is not None:
            check_sources([real], options, *look)
        for extractor in look:
            if extractor is not None and extractor.crops is not None:
                extractor.crops.require_fit(output, known)


def _measure(
    folder: Path,
    references: Sequence[Evaluated],
    looks: Sequence[Look],
    processes: Processes,
    options: QualityOptions,
) -> dict[str, Any]:
    """The quality of one size, of whole pictures and, where there is a second look, of crops."""
    original, converted = open_source(folder / ORIGINAL), open_source(folder / CONVERTED)
    found = []
    for index, (extractor, clip) in enumerate(looks):
        reference, baseline = (references[index], original) if references else (original, None)
        found.append(evaluate_quality(reference, converted, baseline, extractor, processes, options, clip))
    whole = found[0]
    for cropped in found[1:]:
        whole |= {key: value for key, value in cropped.items() if key.startswith(CROP)}
        if whole["baseline"] is not None:
            whole["baseline"] |= {k: value for k, value in cropped["baseline"].items() if k.startswith(CROP)}
        whole |= {CROP + key: cropped[key] for key in ("extractor", "clip") if key in cropped}
        whole["warnings"] = list(dict.fromkeys(whole["warnings"] + cropped["warnings"]))
    return whole


def _speed_sizes(
    arguments: argparse.Namespace, drawn: Sequence[tuple[int, int] | None], model: Any, compression: int
) -> list[tuple[int, int]]:
    if arguments.speed_sizes is not None:
        return sorted(arguments.speed_sizes, key=math.prod)
    known = [size for size in drawn if size is not None]
    if known:
        return known
    latents = getattr(model.config, "sample_size", None)
    return [(latents * compression, latents * compression)] if isinstance(latents, int) else []


def _outside(prompts: list[str] | None) -> str | None:
    """Why the first prompt that is no caption of the scene grammar is none."""
    for prompt in prompts or ():
        try:
            parse(prompt)
        except ValueError as error:
            return first_line(error)
    return None


def _write(comparison: Comparison, output: Path, report_pairs: int) -> Outcome:
    report = output / "report.html"
    write_text(report, render_report(comparison, report_pairs))
    several = len(comparison.sizes) > 1
    found = [_result(one) for one in comparison.sizes]
    result: dict[str, Any] = {
        "command": "compare",
        **({"sizes": found} if several else found[0]),
        "speed": comparison.speed,
        "warnings": comparison.warnings,
        "report": report.name,
        "environment": comparison.environment,
    }
    write_json(output / "compare.json", result)
    names = [f"{side} {column}".strip() for column in summary_columns(comparison) for side in (ORIGINAL, CONVERTED)]
    rows = [[label, *[show(cell) for side in sides for cell in side]] for label, sides in summary_rows(comparison)]
    lines = [table(["", *names], rows), "", f"report: {report}"]
    lines += [f"warning: {warning}" for warning in comparison.warnings]
    return Outcome("\n".join(lines), result)


def _result(one: SizeComparison) -> dict[str, Any]:
    return {
        "settings": one.settings,
        "quality": one.quality,
        "facts": one.facts,
        "paired": one.paired,
        "pairs": [vars(pair) | {"psnr": pair.psnr if math.isfinite(pair.psnr) else None} for pair in one.pairs],
    }
