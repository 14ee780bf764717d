"""`flatten-eval compare`: everything about one pipeline and adapter, in a table, a JSON file and an HTML report."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from flatten_diffusion.scenes.check import check_folder
from flatten_diffusion.scenes.grammar import parse

from ..errors import InputError, first_line
from ..files import write_json, write_text
from ..generate import check_settings, generate, jobs_from, settings_from
from ..metrics.paired import load_lpips, measure_pairs, require_torchmetrics, summarise
from ..metrics.quality import check_sources, evaluate_quality, open_source
from ..pipelines import PIPELINES, apply_adapter, denoiser
from ..processes import join_processes
from ..report import CONVERTED, ORIGINAL, Comparison, render_report, show, summary_rows
from ..speed.architectures import check_size
from ..speed.model import ThroughputOptions, measure_model
from ..versions import environment
from .options import (
    Outcome,
    add_extractor_arguments,
    add_metric_arguments,
    add_pipeline_arguments,
    clip_from,
    extractor_from,
    pipeline_from,
    prompts_from,
    quality_options,
    size,
    small,
    table,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Pipeline, adapter, what to measure, where to write."""
    add_pipeline_arguments(parser)
    add_extractor_arguments(parser, default="pixels")
    add_metric_arguments(parser)
    group = parser.add_argument_group("comparison")
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="images, compare.json, report.html")
    group.add_argument("--real", type=Path, metavar="PATH", help="real images or statistics to take the distance to")
    group.add_argument(
        "--speed-sizes", type=size, nargs="*", metavar="PIXELS|WxH", help="sizes to time (default: the size drawn)"
    )
    group.add_argument("--rounds", type=small, default=5, metavar="N", help="timed rounds per size (default 5)")
    group.add_argument("--report-pairs", type=small, default=24, metavar="N", help="pairs shown (default 24)")


def run(arguments: argparse.Namespace) -> Outcome | None:
    """Draws every job twice from the same noise, without and with the adapter, measures both, and writes.

    Images go to `original` and `converted` in --output, and are reused where they are already there. Helper processes
    return None.
    """
    if arguments.adapter is None:
        raise InputError("compare needs --adapter: it sets the original beside the converted pipeline")
    require_torchmetrics()
    prompts, output = prompts_from(arguments), arguments.output
    jobs = jobs_from(arguments, prompts)
    real = open_source(arguments.real) if arguments.real is not None else None
    settings = settings_from(arguments)
    outside = _outside(prompts) if arguments.pipeline in PIPELINES else None
    processes = join_processes(arguments.device)
    extractor = extractor_from(arguments, processes.device)
    clip = clip_from(arguments, extractor, processes.device)
    pipeline = pipeline_from(arguments, processes.device)
    check_settings(pipeline, settings, prompts)
    model, compression = denoiser(pipeline), int(getattr(pipeline, "vae_scale_factor", 8))
    sizes = _speed_sizes(arguments, model, compression)
    for height, width in sizes:
        check_size(model, height, width, compression)
    quality = quality_options(arguments)
    if real is not None:
        check_sources([real], replace(quality, metrics=()), extractor)
    # Before the originals, so that a wrong adapter costs no drawing; disabled, it changes no bit of them.
    adapter = apply_adapter(pipeline, arguments.adapter, arguments.offline)
    with adapter.disabled():
        unconverted = replace(settings, adapter=None, adapter_sha256=None)
        generate(pipeline, unconverted, jobs, output / ORIGINAL, processes, arguments.generation_batch_size)
    generate(pipeline, settings, jobs, output / CONVERTED, processes, arguments.generation_batch_size)
    original, converted = open_source(output / ORIGINAL), open_source(output / CONVERTED)
    reference, baseline = (original, None) if real is None else (real, original)
    measured = evaluate_quality(reference, converted, baseline, extractor, processes, quality, clip)
    if not processes.is_main:
        return None
    lpips, missing = load_lpips(processes.device, arguments.offline)
    pairs = measure_pairs(output / ORIGINAL, output / CONVERTED, lpips)
    speed = ThroughputOptions(
        rounds=arguments.rounds, warmup=1, steps=arguments.steps or 50, all_backends=False, compression=compression,
        seed=arguments.seed,
    )  # fmt: skip
    facts = None
    if arguments.pipeline in PIPELINES and outside is None:
        facts = {side: float(check_folder(output / side)["fact_accuracy"]) for side in (ORIGINAL, CONVERTED)}
    elif outside is not None:
        measured["warnings"].append(f"the share of stated facts that hold is left out: {outside}")
    comparison = Comparison(
        settings=dict(vars(settings)),
        quality=measured,
        pairs=pairs,
        paired=summarise(pairs, missing),
        speed=measure_model(model, sizes, processes.device, speed, adapter=adapter) if sizes else [],
        facts=facts,
        layers=str(adapter.report()),
        captions={job.file: job.prompt or "" for job in jobs},
        environment=environment(processes.device),
    )
    return _write(comparison, output, arguments.report_pairs)


def _speed_sizes(arguments: argparse.Namespace, model: Any, compression: int) -> list[tuple[int, int]]:
    if arguments.speed_sizes is not None:
        return sorted(arguments.speed_sizes, key=math.prod)
    if arguments.size is not None:
        return [arguments.size]
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
    write_text(report, render_report(comparison, output, report_pairs))
    result: dict[str, Any] = {
        "command": "compare",
        "settings": comparison.settings,
        "quality": comparison.quality,
        "facts": comparison.facts,
        "paired": comparison.paired,
        "pairs": [vars(pair) | {"psnr": pair.psnr if math.isfinite(pair.psnr) else None} for pair in comparison.pairs],
        "speed": comparison.speed,
        "warnings": comparison.quality["warnings"],
        "report": report.name,
        "environment": comparison.environment,
    }
    write_json(output / "compare.json", result)
    rows = [[label, show(before), show(after)] for label, before, after in summary_rows(comparison)]
    lines = [table(["", "original", "converted"], rows), "", f"report: {report}"]
    lines += [f"warning: {warning}" for warning in comparison.quality["warnings"]]
    return Outcome("\n".join(lines), result)
