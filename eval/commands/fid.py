"""`flatten-eval fid`: how far generated images are from real ones."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..processes import join_processes
from ..quality import evaluate_quality, open_source
from ..versions import environment
from .options import (
    add_extractor_arguments,
    add_metric_arguments,
    clip_from,
    extractor_from,
    positive,
    quality_options,
)
from .outcome import Outcome, number, table

_ROWS = (
    ("fid", "FID"),
    ("frechet_infinity", "Fréchet distance, N to infinity"),
    ("kid", "KID"),
    ("kid_std", "KID, deviation over subsets"),
    ("cmmd", "CMMD"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("density", "density"),
    ("coverage", "coverage"),
    ("clip_score", "CLIP score"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sets of images, extractor and metrics."""
    kinds = "folder, zip file or statistics (.npz)"
    parser.add_argument("real", type=Path, metavar="REAL", help=kinds)
    parser.add_argument("candidate", type=Path, metavar="CANDIDATE", help=kinds)
    parser.add_argument("--baseline", type=Path, metavar="DIR", help=f"the original's images, shown beside: {kinds}")
    parser.add_argument("--max-images", type=positive, metavar="N", help="use the first N images of each set, by name")
    add_extractor_arguments(parser)
    add_metric_arguments(parser)


def run(arguments: argparse.Namespace) -> Outcome | None:
    """Computes and formats; helper processes return None."""
    real = open_source(arguments.real, arguments.max_images)
    candidate = open_source(arguments.candidate, arguments.max_images)
    baseline = open_source(arguments.baseline, arguments.max_images) if arguments.baseline is not None else None
    if arguments.captions is not None and not arguments.captions.is_file():
        raise InputError(f"{arguments.captions}: no such captions file")
    processes = join_processes(arguments.device)
    extractor = extractor_from(arguments, processes.device)
    clip = clip_from(arguments, extractor, processes.device)
    report = evaluate_quality(real, candidate, baseline, extractor, processes, quality_options(arguments), clip)
    if not processes.is_main:
        return None
    result: dict[str, Any] = {"command": "fid", **report.as_dict(), "seed": arguments.seed}
    return Outcome(format_quality(result), result | {"environment": environment(processes.device)})


def format_quality(result: dict[str, Any]) -> str:
    """The table of a quality result, with N and every warning."""
    baseline = result["baseline"]
    extractor = result["extractor"]
    columns = [result] + ([baseline] if baseline is not None else [])
    rows = [
        ["images", *[number(column["count"]) for column in columns]],
        [f"Fréchet distance ({extractor['name']})", *[number(column["frechet_distance"], 6) for column in columns]],
    ]
    for key, label in _ROWS:
        if any(key in column for column in columns):
            rows.append([label, *[number(column.get(key), 6) for column in columns]])
    lines = [
        table(["", "candidate", *(["baseline"] if baseline is not None else [])], rows),
        "",
        f"real: {result['real']['path']}, {number(result['real']['count'])} images; resize: {extractor['resize']}",
    ]
    lines += [f"warning: {warning}" for warning in result["warnings"]]
    return "\n".join(lines)
