"""Options that several commands share: which extractor, and how to run it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..features import RESIZE_MODES, Extractor, ResizeMode, TransformerExtractor, cache_folder, load_extractor
from ..quality import METRICS, QualityOptions


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


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
        "--resize-to", type=positive, metavar="PIXELS", help="square input size of a custom extractor (default: as is)"
    )
    group.add_argument("--batch-size", type=positive, default=32, metavar="N", help="images at once (default 32)")
    group.add_argument("--num-workers", type=positive, default=2, metavar="N", help="decoding threads (default 2)")
    group.add_argument("--no-resume", action="store_true", help="keep no unfinished passes and continue none")


def add_metric_arguments(parser: argparse.ArgumentParser) -> None:
    """--metrics and what belongs to them."""
    group = parser.add_argument_group("beside the Fréchet distance")
    group.add_argument("--metrics", nargs="+", choices=METRICS, default=[], help="further metrics")
    group.add_argument("--captions", type=Path, metavar="PATH", help="JSON lines (file_name, text) for clip-score")
    group.add_argument("--clip-model", metavar="ID", help="CLIP for cmmd and clip-score: local folder or hub id")


def extractor_from(arguments: argparse.Namespace, device: torch.device) -> Extractor:
    """The extractor the options name."""
    return load_extractor(
        arguments.extractor,
        device=device,
        resize=arguments.resize,
        resize_to=arguments.resize_to,
        weights=arguments.weights,
        weights_sha256=arguments.weights_sha256,
        model=arguments.model,
        offline=arguments.offline,
    )


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
