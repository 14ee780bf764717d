"""What an extractor is, and the identity that statistics carry."""

from __future__ import annotations

from copy import copy
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, TypeVar

import torch

from ..errors import RefusedComparison
from ..images import Pixels
from .crops import CropRequest, Crops


@dataclass(frozen=True)
class ExtractorIdentity:
    """Everything a feature depends on besides the image. Two sets may be compared only where these agree.

    Attributes:
        name: `inception`, `dinov2`, `clip`, a TorchScript file's name or `module:function`.
        weights_sha256: of the weights (of the source file, for a function); None where nothing could be hashed.
        resize: resizer and size in pixels, such as `clean-299`, or `none`.
        variant: which output and normalisation.
        crops: how pictures are cut, as `Crops.described`; empty for whole pictures.
    """

    name: str
    weights_sha256: str | None
    resize: str
    variant: str = ""
    crops: str = ""

    def as_dict(self) -> dict[str, str | None]:
        """JSON-ready; without `crops` for whole pictures."""
        return {name: value for name, value in asdict(self).items() if name != "crops" or value}

    @classmethod
    def from_dict(cls, value: object) -> ExtractorIdentity:
        """What `as_dict` gave. Raises ValueError for anything else."""
        texts: dict[str, Any] = {"weights_sha256": None, "crops": ""} | value if isinstance(value, dict) else {}
        known = set(texts) == set(cls.__dataclass_fields__)
        if not known or not all(isinstance(text, str | None) for text in texts.values()) or texts["name"] is None:
            raise ValueError("it does not say which extractor")
        return cls(**texts)


class Extractor(Protocol):
    """Maps images to feature vectors in two steps, so that decoding threads can do the first.

    Attributes:
        needs_one_size: whether the pictures of a set must have one size.
        input_size: side in pixels of the square input; None where it takes any.
        crops: how pictures are cut before the first step; None for whole ones. See `cropped`.
    """

    identity: ExtractorIdentity
    needs_one_size: bool
    input_size: int | None
    crops: Crops | None

    def prepare(self, pixels: Pixels) -> torch.Tensor:
        """uint8 [H, W, 3] to the network's input, [3, h, w], on the CPU."""
        ...

    def extract(self, batch: torch.Tensor) -> torch.Tensor:
        """[N, 3, h, w] on the CPU to features, float [N, d], on the CPU."""
        ...


E = TypeVar("E", bound=Extractor)


def cropped(extractor: E, request: CropRequest) -> E:
    """The same extractor, its network shared, of crops instead of whole pictures; its identity says so.

    Raises:
        InputError: neither the request nor the extractor says their size.
    """
    crops = request.of(extractor.input_size, extractor.identity.name)
    other = copy(extractor)
    other.crops = crops
    other.identity = replace(extractor.identity, crops=crops.described)
    other.needs_one_size = False
    return other


def require_same(first: ExtractorIdentity, first_name: str, second: ExtractorIdentity, second_name: str) -> None:
    """Raises RefusedComparison, naming the first difference, where two identities differ."""
    for field, one in asdict(first).items():
        other = asdict(second)[field]
        if one != other:
            unknown = "none, whole pictures," if field == "crops" else "unknown"
            raise RefusedComparison(
                f"{first_name} and {second_name} are not comparable: {field} is {one or unknown} in one and "
                f"{other or unknown} in the other; compute both the same way"
            )
