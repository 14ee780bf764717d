"""`flatten-eval teacher`: how far converted pictures are from the original's of the same prompts and seeds."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..features import ResizeMode, TransformerExtractor, cropped
from ..files import shown_name
from ..images import Pixels, open_images
from ..metrics.paired import SSIM_WINDOW, load_lpips, psnr, require_torchmetrics, ssim
from ..metrics.pairing import require_pairs
from ..metrics.perceptual import SMALLEST, LpipsMeasure
from ..metrics.quality import CROP, labels
from ..metrics.teacher import TEACHER_METRICS, TeacherMeasures, teacher_distances
from ..processes import join_processes
from ..versions import environment
from .options import (
    Outcome,
    add_extractor_arguments,
    add_lpips_argument,
    crops_from,
    extractor_from,
    number,
    positive,
    quality_options,
    table,
)

_SIMILARITIES = {"clip_i": "CLIP-I", "dino": "DINO similarity"}
_PIXELS = {"lpips": "LPIPS (AlexNet)", "ssim": "SSIM", "psnr": "PSNR, dB"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two sets, metrics, and the networks they need."""
    parser.add_argument("original", type=Path, metavar="ORIGINAL", help="the original's images: folder or zip file")
    parser.add_argument("converted", type=Path, metavar="CONVERTED", help="the converted model's, of the same names")
    parser.add_argument("--max-images", type=positive, metavar="N", help="use the first N images of each set, by name")
    group = parser.add_argument_group("distances")
    group.add_argument(
        "--metrics", dest="distances", nargs="+", choices=TEACHER_METRICS,
        help="(default: all, lpips where --lpips-weights is given)",
    )  # fmt: skip
    group.add_argument("--clip-model", metavar="ID", help="CLIP for clip-i: local folder or hub id")
    group.add_argument(
        "--dino-model", metavar="ID", help="DINO or DINOv2 for dino: local folder or hub id (facebook/dinov2-large)"
    )
    add_lpips_argument(group)
    add_extractor_arguments(parser)


def run(arguments: argparse.Namespace) -> Outcome | None:
    """Computes and formats; helper processes return None."""
    metrics = _metrics(arguments)
    crops = crops_from(arguments)
    if crops is not None and not {"fid", "clip-i", "dino"} & set(metrics):
        raise InputError("--crops belongs to fid, clip-i and dino; ssim, psnr and lpips see whole pictures")
    if "ssim" in metrics:
        require_torchmetrics()
    paths = (arguments.original, arguments.converted)
    original, converted = (open_images(path).limited(arguments.max_images) for path in paths)
    smallest = max(SMALLEST if "lpips" in metrics else 1, SSIM_WINDOW if "ssim" in metrics else 1)
    warnings = require_pairs(original, converted, smallest)
    processes = join_processes(arguments.device)
    measures = _measures(arguments, metrics, processes.device)
    found = teacher_distances(original, converted, measures, processes, quality_options(arguments))
    if not processes.is_main:
        return None
    lpips = measures.pixels.get("lpips")
    if isinstance(lpips, LpipsMeasure):
        found["extractors"]["lpips"] = {"name": "alexnet", "weights_sha256": lpips.weights_sha256}
    result: dict[str, Any] = {
        "command": "teacher",
        "original": {"path": shown_name(original.path), "count": len(original)},
        "converted": {"path": shown_name(converted.path), "count": len(converted)},
        **found,
        "warnings": warnings + found["warnings"],
        "seed": arguments.seed,
    }
    return Outcome(format_teacher(result), result | {"environment": environment(processes.device)})


def _metrics(arguments: argparse.Namespace) -> tuple[str, ...]:
    wanted = arguments.distances
    if wanted is None:
        wanted = [name for name in TEACHER_METRICS if name != "lpips" or arguments.lpips_weights is not None]
    for name in ("lpips-weights", "clip-model", "dino-model"):
        metric = {"lpips-weights": "lpips", "clip-model": "clip-i", "dino-model": "dino"}[name]
        if getattr(arguments, name.replace("-", "_")) is not None and metric not in wanted:
            raise InputError(f"--{name} belongs to {metric}; add {metric} to --metrics")
    return tuple(wanted)


def _measures(arguments: argparse.Namespace, metrics: tuple[str, ...], device: torch.device) -> TeacherMeasures:
    crops = crops_from(arguments)
    mode: ResizeMode = "clean" if arguments.resize == "none" else arguments.resize
    frechet = extractor_from(arguments, device) if "fid" in metrics else None
    similarities: dict[str, TransformerExtractor] = {}
    if "clip-i" in metrics:
        similarities["clip_i"] = TransformerExtractor("clip", arguments.clip_model, mode, device, arguments.offline)
    if "dino" in metrics:
        similarities["dino"] = TransformerExtractor("dino", arguments.dino_model, mode, device, arguments.offline)
    if crops is not None:
        frechet = cropped(frechet, crops) if frechet is not None else None
        similarities = {name: cropped(one, crops) for name, one in similarities.items()}
    pixels: dict[str, Callable[[Pixels, Pixels], float]] = {}
    if "lpips" in metrics:
        lpips, missing = load_lpips(device, arguments.offline, arguments.lpips_weights)
        if lpips is None:
            raise InputError(f"LPIPS is not available: {missing}; give --lpips-weights PATH or leave lpips out")
        pixels["lpips"] = lpips
    pixels |= {name: measure for name, measure in (("ssim", ssim), ("psnr", psnr)) if name in metrics}
    return TeacherMeasures(frechet, similarities, pixels)


def format_teacher(result: dict[str, Any]) -> str:
    """The table of a result, with N and every warning."""
    extractors = result["extractors"]
    named = labels(extractors["frechet"]["name"], " between the two sets") if "frechet" in extractors else {}
    for name, label in _SIMILARITIES.items():
        if name in extractors:
            named |= {name: f"{label} ({extractors[name]['name']})"}
            named |= {CROP + name: f"{named[name]}, crops"}
    rows = [["pairs", number(result["original"]["count"])]]
    rows += [[label, number(result[key], 6)] for key, label in (named | _PIXELS).items() if key in result]
    if result.get("identical_pairs"):
        rows.append(["identical pairs", number(result["identical_pairs"])])
    lines = [table(["", "to the original"], rows)]
    return "\n".join(lines + [f"warning: {warning}" for warning in result["warnings"]])
