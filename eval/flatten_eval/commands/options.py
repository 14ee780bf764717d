"""What several commands share: option types, groups of options, what they name, and how a result is shown."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..features import (
    RESIZE_MODES,
    CropRequest,
    Extractor,
    ResizeMode,
    TransformerExtractor,
    cache_folder,
    cropped,
    load_extractor,
)
from ..metrics.quality import METRICS, QualityOptions
from ..pipelines import DTYPES, load_pipeline, read_prompts

LARGEST_SIDE = 32_768
"""Pixels."""


@dataclass(frozen=True)
class Outcome:
    """What a command hands back: text for the terminal and a JSON-ready dictionary."""

    text: str
    result: dict[str, Any]


def whole(low: int, high: int) -> Callable[[str], int]:
    """A type for argparse: a whole number in bounds, so that no slip of the finger starts days of work."""

    def number(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text[:40]} is not from {low} to {high}")
        return value

    return number


positive = whole(1, 10**7)
small = whole(1, 10_000)
seed = whole(-(2**63), 2**63 - 1)


def finite(text: str) -> float:
    """A finite number, for argparse."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text[:40]} is not finite")
    return value


def size(text: str) -> tuple[int, int]:
    """(height, width) in pixels of `512` or of `WIDTHxHEIGHT`, for argparse."""
    match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", text)
    sides = (int(match[2] or match[1]), int(match[1])) if match is not None else (0, 0)
    if not all(1 <= side <= LARGEST_SIDE for side in sides):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not PIXELS or WIDTHxHEIGHT of 1 to {LARGEST_SIDE} each")
    return sides


def crop_count(text: str) -> int | str:
    """A number of crops, or `grid`, for argparse."""
    return text if text == "grid" else small(text)


def add_extractor_arguments(parser: argparse.ArgumentParser, default: str = "inception") -> None:
    """--extractor and what belongs to it."""
    group = parser.add_argument_group("features")
    group.add_argument(
        "--extractor", default=default, metavar="NAME", help="inception, dinov2, clip, pixels, a TorchScript file, "
        f"module:function or file.py:function (default {default}); uint8 [N, 3, H, W] in, float [N, d] out",
    )  # fmt: skip
    group.add_argument("--weights", type=Path, metavar="PATH", help="of inception: .pth, .pt or .safetensors")
    group.add_argument(
        "--weights-sha256", metavar="HEX", help="accept a --weights file that is not a published one; not called FID"
    )
    group.add_argument("--model", metavar="ID", help="of dinov2 or clip: local folder or hub id")
    group.add_argument(
        "--resize", choices=RESIZE_MODES, default="clean", help="clean: Pillow bicubic in float (default); legacy: "
        "TensorFlow 1 bilinear of published FID; legacy-pytorch: that of pytorch-fid",
    )  # fmt: skip
    group.add_argument(
        "--resize-to",
        type=small,
        metavar="PIXELS",
        help="square input size of a custom extractor (default: as is)",
    )
    group.add_argument(
        "--crops", type=crop_count, metavar="N|grid", help="of each picture take N random crops, or all that fit side "
        "by side, at full resolution (FID_c, KID_c; reported as crop_...); default: whole pictures, shrunk",
    )  # fmt: skip
    group.add_argument(
        "--crop-size", "--crop_size", type=small, metavar="PIXELS", help="side of a crop (the extractor's input size)"
    )
    group.add_argument("--batch-size", type=small, default=32, metavar="N", help="images at once (default 32)")
    group.add_argument("--num-workers", type=small, default=2, metavar="N", help="decoding threads (default 2)")
    group.add_argument("--no-resume", action="store_true", help="keep no unfinished passes and continue none")


def add_metric_arguments(parser: argparse.ArgumentParser) -> None:
    """--metrics and what belongs to them."""
    group = parser.add_argument_group("beside the Fréchet distance")
    group.add_argument("--metrics", nargs="+", choices=METRICS, default=[], help="further metrics")
    group.add_argument("--captions", type=Path, metavar="PATH", help="JSON lines (file_name, text) for clip-score")
    group.add_argument("--clip-model", metavar="ID", help="CLIP for cmmd and clip-score: local folder or hub id")


def add_lpips_argument(group: argparse._ArgumentGroup) -> None:
    """--lpips-weights."""
    group.add_argument(
        "--lpips-weights", type=Path, metavar="PATH", help="for LPIPS without torchvision: its AlexNet (.pth or "
        ".safetensors), alone or with the linear layers",
    )  # fmt: skip


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    """What is drawn and how."""
    group = parser.add_argument_group("pipeline")
    group.add_argument("pipeline", metavar="PIPELINE", help="hub id, local folder, or scenes (the embedded one)")
    group.add_argument("--adapter", metavar="PATH", help="convert with this saved adapter (folder or hub id)")
    group.add_argument("--revision", help="hub revision of the pipeline")
    group.add_argument("--variant", help="weight file variant, such as fp16")
    group.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="(default float32)")
    group = parser.add_argument_group("images")
    group.add_argument("--prompts", type=Path, metavar="FILE", help="one per line, or JSON lines with text")
    group.add_argument("--num-images", type=positive, metavar="N", help="for a pipeline without prompts")
    group.add_argument("--max-prompts", type=positive, metavar="N", help="use the first N prompts")
    group.add_argument("--seeds", type=seed, nargs="+", metavar="SEED", help="images per prompt (default: --seed)")
    group.add_argument("--size", type=size, metavar="PIXELS|WxH", help="(default: the pipeline's own)")
    group.add_argument("--steps", type=small, metavar="N", help="denoising steps (default: the pipeline's own)")
    group.add_argument("--guidance", type=finite, metavar="SCALE", help="(default: the pipeline's own)")
    group.add_argument("--negative-prompt", metavar="TEXT")
    group.add_argument("--generation-batch-size", "--batch", type=small, default=1, metavar="N", help="(default 1)")


def prompts_from(arguments: argparse.Namespace) -> list[str] | None:
    """The prompts the options name; None for a pipeline without."""
    if arguments.prompts is None:
        if arguments.max_prompts is not None:
            raise InputError("--max-prompts needs --prompts")
        return None
    if arguments.num_images is not None:
        raise InputError("--num-images and --prompts exclude each other")
    return read_prompts(arguments.prompts)[: arguments.max_prompts]


def pipeline_from(arguments: argparse.Namespace, device: torch.device) -> Any:
    """The pipeline the options name, on the device."""
    named = {name: getattr(arguments, name, None) for name in ("revision", "variant")}
    return load_pipeline(arguments.pipeline, dtype=arguments.dtype, device=device, offline=arguments.offline, **named)


def crops_from(arguments: argparse.Namespace) -> CropRequest | None:
    """The crops the options name; None for whole pictures."""
    if arguments.crops is None:
        if arguments.crop_size is not None:
            raise InputError("--crop-size needs --crops")
        return None
    return CropRequest(None if arguments.crops == "grid" else arguments.crops, arguments.crop_size, arguments.seed)


def cut(
    request: CropRequest | None, extractor: Extractor, clip: TransformerExtractor | None
) -> tuple[Extractor, TransformerExtractor | None]:
    """Both extractors of crops where some are asked for, still one where they are one."""
    if request is None:
        return extractor, clip
    if clip is None or clip is not extractor:
        return cropped(extractor, request), None if clip is None else cropped(clip, request)
    clip = cropped(clip, request)
    return clip, clip


def extractor_from(arguments: argparse.Namespace, device: torch.device) -> Extractor:
    """The extractor the options name."""
    named = {name: getattr(arguments, name) for name in ("resize", "resize_to", "weights", "weights_sha256", "model")}
    return load_extractor(arguments.extractor, device=device, offline=arguments.offline, **named)


def clip_from(arguments: argparse.Namespace, extractor: Extractor, device: torch.device) -> TransformerExtractor | None:
    """The CLIP model for CMMD and CLIP score: the extractor itself where it is one, None where not needed."""
    if not {"cmmd", "clip-score"} & set(arguments.metrics):
        return None
    if isinstance(extractor, TransformerExtractor) and extractor.kind == "clip" and arguments.clip_model is None:
        return extractor
    mode: ResizeMode = "clean" if arguments.resize == "none" else arguments.resize
    return TransformerExtractor("clip", arguments.clip_model, mode, device, arguments.offline)


def quality_options(arguments: argparse.Namespace) -> QualityOptions:
    """How to compute, from the options."""
    return QualityOptions(
        metrics=tuple(getattr(arguments, "metrics", ())),
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        workers=arguments.num_workers,
        resume_folder=None if arguments.no_resume else cache_folder() / "unfinished",
        captions=getattr(arguments, "captions", None),
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table; the first column is left-aligned, the others right."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *rest]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def number(value: float | int | None, digits: int = 4, scale: float = 1) -> str:
    """A number times `scale` in `digits` significant digits, a dash for None."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) and scale == 1 else f"{value * scale:.{digits}g}"
