"""How far a converted model's pictures are from the original's of the same prompts and seeds, as CLEAR reports it (Liu
et al., arXiv 2412.16112): what `flatten-eval teacher` computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..features import Extractor, TransformerExtractor
from ..features.featurise import featurise
from ..images import ImageSet, Pixels
from ..processes import Processes
from .paired import read_pairs
from .quality import CROP, QualityOptions, check_sources, crop_numbers, evaluate_quality

TEACHER_METRICS = ("fid", "lpips", "clip-i", "dino", "ssim", "psnr")


@dataclass(frozen=True)
class TeacherMeasures:
    """What is measured; what is left out is not.

    Attributes:
        frechet: of the distance between the two sets as distributions.
        similarities: by name (`clip_i`, `dino`): the cosine of the features of a pair, -1 to 1 (CLIP-I and DINO of
            Ruiz et al., DreamBooth, CVPR 2023; CLEAR's tables have them times 100).
        pixels: by name (`lpips`, `ssim`, `psnr`): functions of the two pictures, uint8 [H, W, 3].
    """

    frechet: Extractor | None = None
    similarities: Mapping[str, TransformerExtractor] = field(default_factory=dict)
    pixels: Mapping[str, Callable[[Pixels, Pixels], float]] = field(default_factory=dict)


def teacher_distances(
    original: ImageSet,
    converted: ImageSet,
    measures: TeacherMeasures,
    processes: Processes,
    options: QualityOptions,
) -> dict[str, Any]:
    """The numbers of two sets that `pairing.require_pairs` lets pass.

    Returns:
        JSON-ready: every number under its name (of crops, with CROP before it), means over pairs but for the Fréchet
        distance; PSNR over the pairs that differ, None where none does; `pair_values` with each pair's own,
        `extractors` and `warnings`. What pixels say is there on the main process alone.

    Raises:
        InputError: see `featurise` and `read_pairs`; crops larger than the pictures.
    """
    for extractor in (measures.frechet, *measures.similarities.values()):
        check_sources([original, converted], options, extractor)
    result: dict[str, Any] = {}
    extractors: dict[str, Any] = {}
    warnings: list[str] = []
    values: dict[str, list[float]] = {}
    if measures.frechet is not None:
        found = evaluate_quality(original, converted, None, measures.frechet, processes, options)
        extractors["frechet"], warnings = found["extractor"], found["warnings"]
        result |= {key: value for key, value in found.items() if key.endswith(("frechet_distance", "fid"))}
    for name, similar in measures.similarities.items():
        key = name if similar.crops is None else CROP + name
        values[key] = cosines(original, converted, similar, processes, options)
        extractors[name] = similar.identity.as_dict()
    if measures.pixels and processes.is_main:
        values |= {name: [] for name in measures.pixels}
        for _, first, second in read_pairs(original, converted):
            for name, measure in measures.pixels.items():
                values[name].append(measure(first, second))
    for name, numbers in values.items():
        finite = [number for number in numbers if math.isfinite(number)]
        result[name] = float(np.mean(finite)) if finite else None
    if "psnr" in values:
        result["identical_pairs"] = sum(math.isinf(number) for number in values["psnr"])
    pairs = [
        {"name": name} | {key: own[index] if math.isfinite(own[index]) else None for key, own in values.items()}
        for index, name in enumerate(original.names)
    ]
    return result | {"extractors": extractors, "warnings": warnings, "pair_values": pairs if values else []}


def cosines(
    original: ImageSet,
    converted: ImageSet,
    extractor: TransformerExtractor,
    processes: Processes,
    options: QualityOptions,
) -> list[float]:
    """Of each pair, the cosine of its two features, averaged over its crops where the extractor takes them."""
    rows = [
        featurise(
            images, extractor, processes, batch_size=options.batch_size, workers=options.workers, keep_features=True,
            resume_folder=options.resume_folder,
        ).features
        for images in (original, converted)
    ]  # fmt: skip
    assert rows[0] is not None and rows[1] is not None  # asked for
    each: torch.Tensor = F.cosine_similarity(rows[0].double(), rows[1].double())
    numbers = [1] * len(original) if extractor.crops is None else crop_numbers(original, extractor.crops)
    return [float(own.mean()) for own in each.split(numbers)]
