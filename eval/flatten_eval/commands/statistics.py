"""`flatten-eval statistics`: saves a set's mean and covariance for later comparisons."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import InputError
from ..files import require_space, require_writable
from ..images import open_images
from ..metrics.quality import check_sources, source_statistics
from ..metrics.statistics import save_statistics
from ..processes import join_processes
from ..versions import environment
from .options import Outcome, add_extractor_arguments, crops_from, cut, extractor_from, positive, quality_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Images in, file out, extractor."""
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder or zip file")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="file to write, .npz")
    parser.add_argument("--max-images", type=positive, metavar="N", help="use the first N images, by name")
    add_extractor_arguments(parser)


def run(arguments: argparse.Namespace) -> Outcome | None:
    """Computes and writes; helper processes return None."""
    if arguments.output.suffix != ".npz":
        raise InputError(f"{arguments.output}: statistics are written as .npz")
    require_writable(arguments.output)
    images = open_images(arguments.images).limited(arguments.max_images)
    # 2048 features in float64, the largest usual file, is 32 MiB.
    require_space(arguments.output.parent, 64 * 2**20)
    crops = crops_from(arguments)
    processes = join_processes(arguments.device)
    extractor, _ = cut(crops, extractor_from(arguments, processes.device), None)
    options = quality_options(arguments)
    check_sources([images], options, extractor)
    statistics = source_statistics(images, extractor, processes, options)
    if not processes.is_main:
        return None
    save_statistics(arguments.output, statistics)
    counts = {"count": statistics.count}
    if statistics.pictures is not None:
        counts = {"count": statistics.pictures, "crop_count": statistics.count}
    shown = ", ".join(f"{count} {'crops' if name == 'crop_count' else 'images'}" for name, count in counts.items())
    text = f"{arguments.output}: {shown}, {len(statistics.mean)} features"
    result = {
        "command": "statistics",
        "path": arguments.output.name,
        **counts,
        "features": len(statistics.mean),
        "extractor": extractor.identity.as_dict(),
        "environment": environment(processes.device),
    }
    return Outcome(text, result)
