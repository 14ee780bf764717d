"""`flatten-eval fid`: how far generated images are from real ones."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..metrics.quality import evaluate_quality, labels, open_source
from ..processes import join_processes
from ..versions import environment
from .options import (
    Outcome,
    add_extractor_arguments,
    add_metric_arguments,
    clip_from,
    crops_from,
    cut,
    extractor_from,
    number,
    positive,
    quality_options,
    table,
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
    crops = crops_from(arguments)
    processes = join_processes(arguments.device)
    whole = extractor_from(arguments, processes.device)
    extractor, clip = cut(crops, whole, clip_from(arguments, whole, processes.device))
    found = evaluate_quality(real, candidate, baseline, extractor, processes, quality_options(arguments), clip)
    if not processes.is_main:
        return None
    result: dict[str, Any] = {"command": "fid", **found, "seed": arguments.seed}
    return Outcome(format_quality(result), result | {"environment": environment(processes.device)})


def format_quality(result: dict[str, Any]) -> str:
    """The table of a quality result, with N and every warning."""
    extractor = result["extractor"]
    columns = {"candidate": result} | ({"baseline": result["baseline"]} if result["baseline"] is not None else {})
    rows = [["images", *[number(column["count"]) for column in columns.values()]]]
    if "crop_count" in result:
        rows.append(["crops", *[number(column["crop_count"]) for column in columns.values()]])
    for key, label in labels(extractor["name"]).items():
        if any(key in column for column in columns.values()):
            rows.append([label, *[number(column.get(key), 6) for column in columns.values()]])
    real = f"real: {result['real']['path']}, {number(result['real']['count'])} images; "
    lines = [table(["", *columns], rows), "", f"{real}resize: {extractor['resize']}"]
    if "crops" in extractor:
        lines[-1] += f"; crops: {extractor['crops']}"
    return "\n".join(lines + [f"warning: {warning}" for warning in result["warnings"]])
