"""Distances of one or two sets of images to the real one: what `flatten-eval fid` computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from .distances.fid_infinity import frechet_infinity
from .distances.frechet import frechet_distance
from .distances.kernel import cmmd, kernel_distance
from .distances.manifold import manifold_metrics
from .errors import InputError
from .features import Extractor, TransformerExtractor, is_published_fid, require_same
from .featurise import FeatureSet, featurise
from .images import ImageSet, check_headers, load_captions, open_images, require_one_size
from .processes import Processes
from .statistics import Statistics, load_statistics

METRICS = ("kid", "prdc", "cmmd", "clip-score", "fid-infinity")
# These need every feature row, so saved statistics cannot give them.
_NEED_ROWS = ("kid", "prdc", "fid-infinity")
Source: TypeAlias = ImageSet | Statistics


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
class _Evaluated:
    """One set after its passes."""

    source: Source
    statistics: Statistics
    rows: torch.Tensor | None
    clip_rows: torch.Tensor | None = None


@dataclass
class QualityReport:
    """Result for the candidate, the baseline if there was one, and everything the reader must know beside them."""

    real: dict[str, Any]
    extractor: dict[str, Any]
    candidate: dict[str, Any]
    baseline: dict[str, Any] | None
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The candidate's numbers at the top, `baseline` with the same keys inside."""
        return self.candidate | {
            "extractor": self.extractor,
            "real": self.real,
            "baseline": self.baseline,
            "warnings": self.warnings,
        }


def open_source(path: Path, max_images: int | None = None) -> Source:
    """Images, or saved statistics for a path that ends in .npz."""
    if path.suffix == ".npz":
        if not path.is_file():
            raise InputError(f"{path}: does not exist; give a folder of images, a zip file or saved statistics (.npz)")
        return load_statistics(path)
    return open_images(path).limited(max_images)


def check_sources(sources: Sequence[Source], options: QualityOptions, extractor: Extractor | None) -> None:
    """Everything that can be known to be wrong before the first image is decoded.

    Raises:
        InputError: statistics where images are needed, unreadable headers, mixed sizes, missing captions.
        RefusedComparison: statistics of another extractor, weights or resize.
    """
    for source in sources:
        if isinstance(source, Statistics):
            for metric in options.metrics:
                if metric in _NEED_ROWS or metric == "cmmd" or (metric == "clip-score" and source is not sources[0]):
                    raise InputError(f"{source.source}: saved statistics cannot give {metric}; give the images")
            if source.identity is not None and extractor is not None:
                require_same(source.identity, source.source, extractor.identity, "this run")
            continue
        sizes = check_headers(source)
        if extractor is not None and extractor.needs_one_size:
            require_one_size(source, sizes, "give --resize-to SIZE")
        if "clip-score" in options.metrics and source is not sources[0]:
            load_captions(source, options.captions)


def evaluate_quality(
    real: Source,
    candidate: Source,
    baseline: Source | None,
    extractor: Extractor,
    processes: Processes,
    options: QualityOptions,
    clip: TransformerExtractor | None = None,
) -> QualityReport:
    """Computes the Fréchet distance and the asked-for metrics of the candidate (and the baseline) to the real images.

    Args:
        clip: the CLIP extractor for CMMD and CLIP score.

    Raises:
        InputError, RefusedComparison: see `check_sources`, `featurise` and the metrics.
    """
    sources = [real, candidate] + ([baseline] if baseline is not None else [])
    check_sources(sources, options, extractor)
    evaluated = [_evaluate(source, extractor, processes, options, clip) for source in sources]
    warnings = _warnings(evaluated, extractor)
    results = [_compare(evaluated[0], other, extractor, options, clip) for other in evaluated[1:]]
    return QualityReport(
        real=_describe(evaluated[0]),
        extractor=dict(extractor.identity.as_dict()),
        candidate=results[0],
        baseline=results[1] if baseline is not None else None,
        warnings=warnings,
    )


def source_statistics(
    source: Source, extractor: Extractor, processes: Processes, options: QualityOptions
) -> Statistics:
    """Statistics of a set: computed from images, or as loaded."""
    return _evaluate(source, extractor, processes, options, None).statistics


def _evaluate(
    source: Source,
    extractor: Extractor,
    processes: Processes,
    options: QualityOptions,
    clip: TransformerExtractor | None,
) -> _Evaluated:
    if isinstance(source, Statistics):
        return _Evaluated(source, source, None)
    needs_clip = clip is not None and any(metric in ("cmmd", "clip-score") for metric in options.metrics)
    shared = clip is extractor
    keep = any(metric in _NEED_ROWS for metric in options.metrics) or (needs_clip and shared)
    features = _pass(source, extractor, processes, options, keep)
    moments = features.moments
    statistics = Statistics(moments.mean(), moments.covariance(), moments.count, extractor.identity, str(source.path))
    evaluated = _Evaluated(source, statistics, features.features)
    if needs_clip and clip is not None:
        own = features if shared else _pass(source, clip, processes, options, keep_features=True)
        evaluated.clip_rows = own.features
    return evaluated


def _pass(
    images: ImageSet, extractor: Extractor, processes: Processes, options: QualityOptions, keep_features: bool
) -> FeatureSet:
    return featurise(
        images,
        extractor,
        processes,
        batch_size=options.batch_size,
        workers=options.workers,
        keep_features=keep_features,
        resume_folder=options.resume_folder,
    )


def _compare(
    real: _Evaluated,
    other: _Evaluated,
    extractor: Extractor,
    options: QualityOptions,
    clip: TransformerExtractor | None,
) -> dict[str, Any]:
    result = _describe(other)
    distance = frechet_distance(
        real.statistics.mean, real.statistics.covariance, other.statistics.mean, other.statistics.covariance
    )
    result["frechet_distance"] = distance
    if _is_fid(real, other, extractor):
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
    if "clip-score" in options.metrics and clip is not None:
        if isinstance(other.source, ImageSet) and other.clip_rows is not None:
            result["clip_score"] = _clip_score(other.source, other.clip_rows, clip, options)
    return result


def _clip_score(images: ImageSet, rows: torch.Tensor, clip: TransformerExtractor, options: QualityOptions) -> float:
    """100 * max(cos, 0) averaged over images and their captions (Hessel et al., EMNLP 2021, without its factor 2.5)."""
    text = clip.extract_text(load_captions(images, options.captions))
    cosine = (rows.double() * text.double()).sum(1)
    return float(100 * cosine.clamp(min=0).mean())


def _is_fid(real: _Evaluated, other: _Evaluated, extractor: Extractor) -> bool:
    known = all(item.statistics.identity is not None for item in (real, other))
    return known and is_published_fid(extractor.identity)


def _describe(evaluated: _Evaluated) -> dict[str, Any]:
    source = evaluated.source
    path = source.source if isinstance(source, Statistics) else str(source.path)
    return {"path": path, "count": evaluated.statistics.count}


def _warnings(evaluated: list[_Evaluated], extractor: Extractor) -> list[str]:
    warnings: list[str] = []
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
                f"{name}: {count} images for {dim} features: the covariance has not full rank and the Fréchet "
                "distance is biased; compare only equal counts"
            )
    if len(counts) > 1:
        shown = ", ".join(str(count) for count in sorted(counts))
        warnings.append(f"image counts differ ({shown}): the Fréchet distance depends on them; use equal counts")
    for item in evaluated[1:]:
        if isinstance(item.source, ImageSet):
            lossy = sum(name.lower().endswith((".jpg", ".jpeg")) for name in item.source.names)
            if lossy:
                warnings.append(f"{item.source.path}: {lossy} JPEG files: compression moves the distance; use PNG")
    return warnings
