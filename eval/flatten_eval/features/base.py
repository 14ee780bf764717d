"""What an extractor is, and the identity that statistics carry."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Protocol

import torch

from ..errors import RefusedComparison
from ..images import Pixels


@dataclass(frozen=True)
class ExtractorIdentity:
    """Everything a feature depends on besides the image. Two sets may be compared only where these agree.

    Attributes:
        name: `inception`, `dinov2`, `clip`, a TorchScript file's name or `module:function`.
        weights_sha256: of the weights (of the source file, for a function); None where nothing could be hashed.
        resize: resizer and size in pixels, such as `clean-299`, or `none`.
        variant: which output and normalisation.
    """

    name: str
    weights_sha256: str | None
    resize: str
    variant: str = ""

    def as_dict(self) -> dict[str, str | None]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: object) -> ExtractorIdentity:
        """What `as_dict` gave. Raises ValueError for anything else."""
        texts = {"weights_sha256": None} | value if isinstance(value, dict) else {}
        known = set(texts) == set(cls.__dataclass_fields__)
        if not known or not all(isinstance(text, str | None) for text in texts.values()) or texts["name"] is None:
            raise ValueError("it does not say which extractor")
        return cls(**texts)


class Extractor(Protocol):
    """Maps images to feature vectors in two steps, so that decoding threads can do the first."""

    identity: ExtractorIdentity
    needs_one_size: bool

    def prepare(self, pixels: Pixels) -> torch.Tensor:
        """uint8 [H, W, 3] to the network's input, [3, h, w], on the CPU."""
        ...

    def extract(self, batch: torch.Tensor) -> torch.Tensor:
        """[N, 3, h, w] on the CPU to features, float [N, d], on the CPU."""
        ...


def require_same(first: ExtractorIdentity, first_name: str, second: ExtractorIdentity, second_name: str) -> None:
    """Raises RefusedComparison, naming the first difference, where two identities differ."""
    for field, one in first.as_dict().items():
        other = second.as_dict()[field]
        if one != other:
            raise RefusedComparison(
                f"{first_name} and {second_name} are not comparable: {field} is {one or 'unknown'} in one and "
                f"{other or 'unknown'} in the other; compute both the same way"
            )
