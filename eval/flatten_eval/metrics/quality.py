"""Distances of one or two sets of images, or of crops of them, to the real one: what `flatten-eval fid` computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ..errors import InputError, RefusedComparison
from ..features import Crops, Extractor, TransformerExtractor, is_published_fid, require_same
from ..features.featurise import featurise
from ..files import shown_name
from ..images import ImageReader, ImageSet, check_headers, load_captions, open_images, require_one_size
from ..processes import Processes
from .frechet import frechet_distance, frechet_infinity
from .kernel import cmmd, kernel_distance
from .manifold import manifold_metrics
from .statistics import Statistics, load_statistics

METRICS = ("kid", "prdc", "cmmd", "clip-score", "fid-infinity")
# These need every feature row, so saved statistics cannot give them.
_NEED_ROWS = ("kid", "prdc", "fid-infinity")
Source: TypeAlias = ImageSet | Statistics
CROP = "crop_"
"""Begins the name of every number that was taken of crops."""
_LABELS = {
    "fid": "FID",
    "frechet_infinity": "Fréchet distance, N to infinity",
    "kid": "KID",
    "kid_std": "KID, deviation over subsets",
    "cmmd": "CMMD",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "clip_score": "CLIP score",
}


def labels(extractor: str, of: str = "") -> dict[str, str]:
    """What tables call each number, in their order: those of whole pictures, then those of crops.

    Args:
        extractor: name of that of the Fréchet distance.
        of: said after its name.
    """
    named = {"frechet_distance": f"Fréchet distance ({extractor}){of}"} | _LABELS
    return named | {CROP + key: f"{label}, crops" for key, label in named.items()}


@dataclass(frozen=True)
class QualityOptions:
    """How to compute, not what.

    Attributes:
        metrics: any of METRICS, beside the Fréchet distance.
        seed: of the random subsets.
        batch_size, workers, resume_folder: see `featurise`.
        captions: JSON lines for the CLIP score; None looks beside the images.
    """

    metrics: tuple[str, ...] = ()
    seed: int = 0
    batch_size: int = 32
    workers: int = 2
    resume_folder: Path | None = None
    captions: Path | None = None


@dataclass
class Evaluated:
    """One set after its passes.

    Attributes:
        statistics: of the extractor's features.
        rows: those features, [N, d], where a metric needs them.
        clip_rows: CLIP's, [N, d], where a metric needs them.
    """

    source: Source
    statistics: Statistics
    rows: torch.Tensor | None = None
    clip_rows: torch.Tensor | None = None


def open_source(path: Path, max_images: int | None = None) -> Source:
    """Images, or saved statistics for a path that ends in .npz."""
    if path.suffix == ".npz" and not path.is_dir():
        if not path.is_file():
            raise InputError(f"{path}: does not exist; give a folder of images, a zip file or saved statistics (.npz)")
        return load_statistics(path)
    return open_images(path).limited(max_images)


def check_sources(
    sources: Sequence[Source],
    options: QualityOptions,
    extractor: Extractor | None,
    clip: TransformerExtractor | None = None,
) -> None:
    """Everything that can be known to be wrong before the first image is decoded.

    Raises:
        InputError: statistics where images are needed, unreadable headers, mixed sizes, images smaller than their
            crops, missing captions.
        RefusedComparison: statistics of another extractor, weights, resize or crops.
    """
    for source in sources:
        if isinstance(source, Statistics):
            for metric in options.metrics:
                if metric in _NEED_ROWS or metric == "cmmd" or (metric == "clip-score" and source is not sources[0]):
                    raise InputError(f"{source.source}: saved statistics cannot give {metric}; give the images")
            if source.identity is not None and extractor is not None:
                require_same(source.identity, source.source, extractor.identity, "this run")
            elif extractor is not None and extractor.crops is not None:
                raise RefusedComparison(
                    f"{source.source}: does not say that it was made of crops, this run takes them; make it with "
                    "flatten-eval statistics --crops"
                )
            continue
        sizes = check_headers(source)
        if extractor is not None and extractor.needs_one_size:
            require_one_size(source, sizes, "give --resize-to SIZE")
        for one in (extractor, clip):
            if one is not None and one.crops is not None:
                one.crops.require_fit(source.path, sizes)
        if "clip-score" in options.metrics and source is not sources[0]:
            load_captions(source, options.captions)


def evaluate_quality(
    real: Source | Evaluated,
    candidate: Source,
    baseline: Source | None,
    extractor: Extractor,
    processes: Processes,
    options: QualityOptions,
    clip: TransformerExtractor | None = None,
) -> dict[str, Any]:
    """The Fréchet distance and the asked-for metrics of the candidate (and the baseline) to the real images.

    Args:
        real: the reference, or what `evaluate_source` made of it.
        clip: the CLIP extractor for CMMD and CLIP score, of crops where `extractor` is.

    Returns:
        JSON-ready: the candidate's numbers, `baseline` with the same keys (or None), `real`, `extractor`, `warnings`.
        What was taken of crops begins with CROP; `clip` then says what CLIP saw.

    Raises:
        InputError, RefusedComparison: see `check_sources`, `featurise` and the metrics.
    """
    others = [candidate] + ([baseline] if baseline is not None else [])
    check_sources([real.source if isinstance(real, Evaluated) else real, *others], options, extractor, clip)
    evaluated = [
        source if isinstance(source, Evaluated) else evaluate_source(source, extractor, processes, options, clip)
        for source in (real, *others)
    ]
    results = [_compare(evaluated[0], other, extractor, options, clip) for other in evaluated[1:]]
    crops = {"clip": clip.identity.as_dict()} if clip is not None and clip.crops is not None else {}
    return (
        results[0]
        | crops
        | {
            "extractor": dict(extractor.identity.as_dict()),
            "real": _describe(evaluated[0]),
            "baseline": results[1] if baseline is not None else None,
            "warnings": _warnings(evaluated, extractor),
        }
    )


def source_statistics(
    source: Source, extractor: Extractor, processes: Processes, options: QualityOptions
) -> Statistics:
    """Statistics of a set: computed from images, or as loaded."""
    return evaluate_source(source, extractor, processes, options, None).statistics


def evaluate_source(
    source: Source,
    extractor: Extractor,
    processes: Processes,
    options: QualityOptions,
    clip: TransformerExtractor | None,
) -> Evaluated:
    """The passes over one set; see `evaluate_quality`."""
    if isinstance(source, Statistics):
        return Evaluated(source, source)
    how: dict[str, Any] = {name: getattr(options, name) for name in ("batch_size", "workers", "resume_folder")}
    keep = any(metric in _NEED_ROWS for metric in options.metrics) or clip is extractor
    features = featurise(source, extractor, processes, keep_features=keep, **how)
    moments = features.moments
    pictures = None if extractor.crops is None else len(source)
    statistics = Statistics(
        moments.mean(), moments.covariance(), moments.count, extractor.identity, str(source.path), pictures
    )
    own = features
    if clip is not None and clip is not extractor:
        own = featurise(source, clip, processes, keep_features=True, **how)
    return Evaluated(source, statistics, features.features, own.features if clip is not None else None)


def _compare(
    real: Evaluated,
    other: Evaluated,
    extractor: Extractor,
    options: QualityOptions,
    clip: TransformerExtractor | None,
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    distance = frechet_distance(
        real.statistics.mean, real.statistics.covariance, other.statistics.mean, other.statistics.covariance
    )
    result["frechet_distance"] = distance
    known = real.statistics.identity is not None and other.statistics.identity is not None
    if known and is_published_fid(extractor.identity):
        result["fid"] = distance
    generator = torch.Generator().manual_seed(options.seed)
    if "kid" in options.metrics and real.rows is not None and other.rows is not None:
        result["kid"], result["kid_std"], result["kid_subset_size"] = kernel_distance(real.rows, other.rows, generator)
    if "prdc" in options.metrics and real.rows is not None and other.rows is not None:
        result |= vars(manifold_metrics(real.rows, other.rows))
    if "fid-infinity" in options.metrics and other.rows is not None:
        result["frechet_infinity"] = frechet_infinity(
            real.statistics.mean, real.statistics.covariance, other.rows, generator
        )
    if "cmmd" in options.metrics and real.clip_rows is not None and other.clip_rows is not None:
        result["cmmd"] = cmmd(real.clip_rows, other.clip_rows)
    if "clip-score" in options.metrics and clip is not None and other.clip_rows is not None:
        # 100 * max(cos, 0) over images and their captions (Hessel et al., EMNLP 2021, without its factor 2.5).
        assert isinstance(other.source, ImageSet)  # only these have rows
        text = clip.extract_text(load_captions(other.source, options.captions))
        if clip.crops is not None:
            text = text.repeat_interleave(torch.tensor(crop_numbers(other.source, clip.crops)), dim=0)
        result["clip_score"] = float(100 * (other.clip_rows.double() * text.double()).sum(1).clamp(min=0).mean())
    return _describe(other) | {(CROP if extractor.crops is not None else "") + key: one for key, one in result.items()}


def crop_numbers(images: ImageSet, crops: Crops) -> list[int]:
    """How many crops each image of a set gives, in its order."""
    if crops.count is not None:
        return [crops.count] * len(images)
    with ImageReader(images) as reader:
        sizes = [reader.size(name) for name in images.names]
    return [crops.number(height, width) for width, height in sizes]


def _describe(evaluated: Evaluated) -> dict[str, Any]:
    source, statistics = evaluated.source, evaluated.statistics
    path = shown_name(source.source if isinstance(source, Statistics) else source.path)
    if statistics.pictures is None:
        return {"path": path, "count": statistics.count}
    return {"path": path, "count": statistics.pictures, "crop_count": statistics.count}


def _warnings(evaluated: list[Evaluated], extractor: Extractor) -> list[str]:
    warnings: list[str] = []
    kind = "image" if extractor.crops is None else "crop"
    counts = {item.statistics.count for item in evaluated if item.statistics.count is not None}
    for item in evaluated:
        name = _describe(item)["path"]
        dim = len(item.statistics.mean)
        count = item.statistics.count
        if item.statistics.identity is None:
            warnings.append(
                f"{name}: does not say which extractor and resize it was made with; comparable only if they were "
                f"{extractor.identity.name}, {extractor.identity.resize}"
            )
        if count is not None and count <= dim:
            warnings.append(
                f"{name}: {count} {kind}s for {dim} features: the covariance has not full rank and the Fréchet "
                "distance is biased; compare only equal counts"
            )
    if len(counts) > 1:
        shown = ", ".join(str(count) for count in sorted(counts))
        warnings.append(f"{kind} counts differ ({shown}): the Fréchet distance depends on them; use equal counts")
    for item in evaluated[1:]:
        if isinstance(item.source, ImageSet):
            lossy = sum(name.lower().endswith((".jpg", ".jpeg")) for name in item.source.names)
            if lossy:
                warnings.append(f"{item.source.path.name}: {lossy} JPEG files: compression moves the distance; use PNG")
    return warnings
