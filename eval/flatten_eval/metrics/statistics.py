"""Mean and covariance of features: exact whatever the split over processes, and the .npz file they are kept in."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flatten_diffusion.files import parse_json

from ..errors import InputError, first_line
from ..features.base import ExtractorIdentity
from ..files import replacing

FORMAT = 2
"""Of files of crops, which an older version would take for whole pictures; files of those are still of format 1."""
# Of the largest eigenvalue: what rounding to float32 leaves of symmetry and of zero eigenvalues is far below.
_TOLERANCE = 1e-5


class Moments:
    """Count, and mean and covariance, of rows that come in blocks.

    Each block is centred on its own mean, so that a large mean cancels nothing; what lies between the blocks is added
    at the end. Neither depends on the order of the blocks, so any split of them over processes gives the same result.

    Attributes:
        blocks: (rows, mean [d]) of each block.
        scatter: [2, d, d], the sum of the blocks' own outer products, and its rounding error.
    """

    def __init__(self, dim: int) -> None:
        self.blocks: list[tuple[int, torch.Tensor]] = []
        self.scatter = torch.zeros(2, dim, dim, dtype=torch.float64)

    @property
    def dim(self) -> int:
        return self.scatter.shape[1]

    @property
    def count(self) -> int:
        return sum(rows for rows, _ in self.blocks)

    def update(self, rows: torch.Tensor) -> None:
        """Adds a block of rows [n, d].

        Raises:
            InputError: a row is not finite; one NaN would silently poison every distance.
        """
        rows = rows.to(torch.float64)
        if not torch.isfinite(rows).all():
            raise InputError("the extractor returned NaN or infinite features; check its input range and precision")
        mean = rows.mean(0)
        centred = rows - mean
        self.blocks.append((len(rows), mean))
        _add_exactly(self.scatter, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Adds the blocks of `other`, as if they had been added here."""
        self.blocks += other.blocks
        _add_exactly(self.scatter, other.scatter[0])
        self.scatter[1] += other.scatter[1]

    def mean(self) -> torch.Tensor:
        """[d], float64."""
        columns = torch.stack([rows * mean for rows, mean in self.blocks], dim=1).tolist()
        # Rounded once, so the order of the blocks does not matter.
        return torch.tensor([math.fsum(column) for column in columns], dtype=torch.float64) / self.count

    def covariance(self) -> torch.Tensor:
        """[d, d], float64, unbiased (divided by count - 1).

        Raises:
            InputError: fewer than two rows.
        """
        if self.count < 2:
            raise InputError(f"{self.count} image(s): a covariance needs at least 2")
        mean = self.mean()
        # In an order of their own, so that it is not that of their arrival.
        offsets = sorted((math.sqrt(rows) * (block - mean)).tolist() for rows, block in self.blocks)
        between = torch.tensor(offsets, dtype=torch.float64)
        total = self.scatter.sum(0) + between.T @ between
        return (total + total.T) / (2 * (self.count - 1))


def _add_exactly(pair: torch.Tensor, addend: torch.Tensor) -> None:
    """Knuth's two-sum: pair[0] + addend, with what rounding dropped kept in pair[1]."""
    value, error = pair[0], pair[1]
    result = value + addend
    virtual = result - value
    error += (value - (result - virtual)) + (addend - virtual)
    pair[0] = result


@dataclass
class Statistics:
    """What a Fréchet distance needs of one set.

    Attributes:
        mean: [d], float64.
        covariance: [d, d], float64.
        count: number of images, or of crops; None for a foreign file that does not say.
        identity: the extractor; None for a foreign file.
        source: path it came from, for messages.
        pictures: number of images that crops were cut from; None for whole pictures.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int | None
    identity: ExtractorIdentity | None
    source: str
    pictures: int | None = None


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Writes an .npz with `mu` and `sigma` as pytorch-fid does, plus count, extractor, weights' sha256, resize and
    crops."""
    identity = statistics.identity
    pictures: dict[str, Any] = {} if statistics.pictures is None else {"pictures": np.array(statistics.pictures)}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            mu=statistics.mean.numpy(),
            sigma=statistics.covariance.numpy(),
            count=np.array(-1 if statistics.count is None else statistics.count),
            extractor=np.array(json.dumps(identity.as_dict() if identity is not None else None)),
            format=np.array(FORMAT if identity is not None and identity.crops else 1),
            **pictures,
        )


def load_statistics(path: Path) -> Statistics:
    """Reads an .npz of ours, or a foreign one with only `mu` and `sigma`.

    Raises:
        InputError: not such a file, damaged, of a newer format, or `sigma` is no covariance.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            if "mu" not in archive or "sigma" not in archive:
                raise InputError(f"{path}: needs arrays mu and sigma, has {', '.join(archive.files) or 'none'}")
            version = int(archive["format"]) if "format" in archive else 0
            if version > FORMAT:
                raise InputError(f"{path}: written by a newer version (format {version}); update this package")
            mean, covariance = (torch.from_numpy(archive[name].astype(np.float64)) for name in ("mu", "sigma"))
            count = int(archive["count"]) if "count" in archive else -1
            pictures = int(archive["pictures"]) if "pictures" in archive else None
            text = str(archive["extractor"]) if "extractor" in archive else "null"
        described = parse_json(text, "extractor")
        identity = None if described is None else ExtractorIdentity.from_dict(described)
    except InputError:
        raise
    except Exception as error:  # damage raises many kinds: zipfile's, zlib's, struct's, numpy's, MemoryError
        raise InputError(f"{path}: not readable as statistics ({first_line(error)}); compute them again") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not len(mean):
        raise InputError(f"{path}: mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)} do not fit together")
    if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise InputError(f"{path}: mu or sigma is not finite; compute them again")
    values, largest = torch.linalg.eigvalsh(covariance), float(covariance.abs().max())
    if float((covariance - covariance.T).abs().max()) > _TOLERANCE * largest or values[0] < -_TOLERANCE * values[-1]:
        raise InputError(f"{path}: sigma is no covariance (not symmetric, or of negative variance); compute it again")
    return Statistics(mean, covariance, count if count >= 0 else None, identity, str(path), pictures)
