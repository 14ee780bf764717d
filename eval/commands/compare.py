"""`flatten-eval compare`: everything about one pipeline and adapter, in a table, a JSON file and an HTML report."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from ..compare import Comparison, compare, summary_rows
from ..errors import InputError
from ..files import write_json, write_text
from ..generate import make_jobs
from ..images import load_captions, open_images
from ..pipelines import load_pipeline
from ..processes import join_processes
from ..quality import open_source
from ..report import render_report, show
from ..throughput import ThroughputOptions
from ..versions import environment
from .generate import add_pipeline_arguments, prompts_from, settings_from, size
from .options import (
    add_extractor_arguments,
    add_metric_arguments,
    clip_from,
    extractor_from,
    positive,
    quality_options,
)
from .outcome import Outcome, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Pipeline, adapter, what to measure, where to write."""
    add_pipeline_arguments(parser)
    add_extractor_arguments(parser, default="pixels")
    add_metric_arguments(parser)
    group = parser.add_argument_group("comparison")
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="pictures, compare.json, report.html")
    group.add_argument("--real", type=Path, metavar="PATH", help="real images or statistics to take the distance to")
    group.add_argument(
        "--speed-sizes", type=size, nargs="*", metavar="PIXELS|WxH", help="sizes to time (default: the size drawn)"
    )
    group.add_argument("--rounds", type=positive, default=5, metavar="N", help="timed rounds per size (default 5)")
    group.add_argument("--report-pairs", type=positive, default=24, metavar="N", help="pairs shown (default 24)")


def run(arguments: argparse.Namespace) -> Outcome | None:
    """Draws, measures and writes; helper processes return None."""
    if arguments.adapter is None:
        raise InputError("compare needs --adapter: it sets the original beside the converted pipeline")
    prompts = prompts_from(arguments)
    jobs = make_jobs(prompts, arguments.seeds or [arguments.seed], arguments.num_images)
    real = open_source(arguments.real) if arguments.real is not None else None
    if arguments.output.exists() and not arguments.output.is_dir():
        raise InputError(f"{arguments.output}: not a folder; choose another --output")
    settings = settings_from(arguments, arguments.adapter)
    processes = join_processes(arguments.device)
    extractor = extractor_from(arguments, processes.device)
    clip = clip_from(arguments, extractor, processes.device)
    pipeline = load_pipeline(
        arguments.pipeline,
        dtype=arguments.dtype,
        device=processes.device,
        offline=arguments.offline,
        revision=arguments.revision,
        variant=arguments.variant,
    )
    speed = ThroughputOptions(
        rounds=arguments.rounds,
        warmup=1,
        steps=arguments.steps or 50,
        all_backends=False,
        compression=int(getattr(pipeline, "vae_scale_factor", 8)),
        seed=arguments.seed,
    )
    comparison = compare(
        pipeline,
        settings,
        jobs,
        arguments.output,
        processes,
        real=real,
        extractor=extractor,
        clip=clip,
        quality=quality_options(arguments),
        speed=speed,
        sizes=_speed_sizes(arguments, pipeline),
        batch_size=arguments.generation_batch_size,
        offline=arguments.offline,
    )
    return None if comparison is None else _write(arguments, comparison, environment(processes.device))


def _speed_sizes(arguments: argparse.Namespace, pipeline: Any) -> list[tuple[int, int]]:
    if arguments.speed_sizes is not None:
        return sorted(arguments.speed_sizes, key=lambda pair: pair[0] * pair[1])
    if arguments.size is not None:
        return [arguments.size]
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    latents = getattr(getattr(denoiser, "config", None), "sample_size", None)
    if not isinstance(latents, int):
        return []
    side = latents * int(getattr(pipeline, "vae_scale_factor", 8))
    return [(side, side)]


def _write(arguments: argparse.Namespace, comparison: Comparison, made_with: dict[str, Any]) -> Outcome:
    original = open_images(arguments.output / "original")
    has_captions = (original.path / "metadata.jsonl").is_file()
    captions = dict(zip(original.names, load_captions(original, None), strict=True)) if has_captions else {}
    report = arguments.output / "report.html"
    write_text(report, render_report(comparison, arguments.output, made_with, captions, arguments.report_pairs))
    result: dict[str, Any] = {
        "command": "compare",
        "settings": comparison.settings,
        "quality": comparison.quality,
        "facts": comparison.facts,
        "paired": comparison.paired,
        "pairs": [vars(pair) | {"psnr": pair.psnr if math.isfinite(pair.psnr) else None} for pair in comparison.pairs],
        "speed": comparison.speed,
        "warnings": comparison.warnings,
        "report": str(report),
        "environment": made_with,
    }
    write_json(arguments.output / "compare.json", json.loads(json.dumps(result)))
    rows = [[label, show(before), show(after)] for label, before, after in summary_rows(comparison)]
    lines = [table(["", "original", "converted"], rows), "", f"report: {report}"]
    lines += [f"warning: {warning}" for warning in comparison.warnings]
    return Outcome("\n".join(lines), result)
