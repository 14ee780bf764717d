"""Mean and covariance of features: streaming float64 sums that merge exactly, and the .npz file they are kept in."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError
from ..features.base import ExtractorIdentity
from ..files import replacing

FORMAT = 1


class Moments:
    """Count, sum and sum of outer products of rows, in pairs of float64 (value and its rounding error).

    The pair makes the order of additions irrelevant to far below float64's own resolution, so any split of the rows'
    blocks over processes gives the same result.

    Attributes:
        count: rows so far.
        total: [2, d], the sum and its error term.
        outer: [2, d, d], likewise.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.total = torch.zeros(2, dim, dtype=torch.float64)
        self.outer = torch.zeros(2, dim, dim, dtype=torch.float64)

    @property
    def dim(self) -> int:
        return self.total.shape[1]

    def update(self, rows: torch.Tensor) -> None:
        """Adds rows [n, d].

        Raises:
            InputError: a row is not finite; one NaN would silently poison every distance.
        """
        rows = rows.to(torch.float64)
        if not torch.isfinite(rows).all():
            raise InputError("the extractor returned NaN or infinite features; check its input range and precision")
        self.count += len(rows)
        _add_exactly(self.total, rows.sum(0))
        _add_exactly(self.outer, rows.T @ rows)

    def merge(self, other: Moments) -> None:
        """Adds the sums of `other`, as if its rows had been added here."""
        self.count += other.count
        for mine, theirs in ((self.total, other.total), (self.outer, other.outer)):
            _add_exactly(mine, theirs[0])
            mine[1] += theirs[1]

    def mean(self) -> torch.Tensor:
        """[d], float64."""
        return self.total.sum(0) / self.count

    def covariance(self) -> torch.Tensor:
        """[d, d], float64, unbiased (divided by count - 1).

        Raises:
            InputError: fewer than two rows.
        """
        if self.count < 2:
            raise InputError(f"{self.count} image(s): a covariance needs at least 2")
        mean = self.mean()
        # Rounded to one float64 first: the pair itself depends on the order of additions, its sum does not.
        centred = self.outer.sum(0) - self.count * torch.outer(mean, mean)
        return (centred + centred.T) / (2 * (self.count - 1))


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
        count: number of images; None for a foreign file that does not say.
        identity: the extractor; None for a foreign file.
        source: path it came from, for messages.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int | None
    identity: ExtractorIdentity | None
    source: str


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Writes an .npz with `mu` and `sigma` as pytorch-fid does, plus count, extractor, weights' sha256 and resize."""
    identity = statistics.identity
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            mu=statistics.mean.numpy(),
            sigma=statistics.covariance.numpy(),
            count=np.array(-1 if statistics.count is None else statistics.count),
            extractor=np.array(json.dumps(identity.as_dict() if identity is not None else None)),
            format=np.array(FORMAT),
        )


def load_statistics(path: Path) -> Statistics:
    """Reads an .npz of ours, or a foreign one with only `mu` and `sigma`.

    Raises:
        InputError: not such a file, damaged, of inconsistent shapes, or of a newer format.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            if "mu" not in archive or "sigma" not in archive:
                raise InputError(f"{path}: needs arrays mu and sigma, has {', '.join(archive.files) or 'none'}")
            version = int(archive["format"]) if "format" in archive else 0
            if version > FORMAT:
                raise InputError(f"{path}: written by a newer version (format {version}); update this package")
            mean = torch.from_numpy(archive["mu"].astype(np.float64))
            covariance = torch.from_numpy(archive["sigma"].astype(np.float64))
            count = int(archive["count"]) if "count" in archive else -1
            described = json.loads(str(archive["extractor"])) if "extractor" in archive else None
            identity = ExtractorIdentity(**described) if described is not None else None
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not readable as statistics ({error}); compute them again") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise InputError(f"{path}: mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)} do not fit together")
    if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise InputError(f"{path}: mu or sigma is not finite; compute them again")
    return Statistics(mean, covariance, count if count >= 0 else None, identity, str(path))
