"""What a mixer's calibration is given: the layer around it, and its calls as the original model makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch

from .base import Context, Mixer

Sums = tuple[torch.Tensor, ...]
"""What a statistic measured, summed over calls, batches and processes."""
Reduce = Callable[[torch.Tensor], torch.Tensor]
"""Sum of a tensor over all processes."""


@dataclass(frozen=True)
class Weights:
    """What each sample of a batch counts, [B]."""

    samples: torch.Tensor

    def roots(self, rows: torch.Tensor) -> torch.Tensor:
        """[B', 1, 1], the weights' roots for tokens [B', ...], where B' may hold several frames of each sample."""
        roots = self.samples.sqrt()
        if len(rows) % len(roots):
            return roots.new_ones(len(rows), 1, 1).to(rows.device)
        return roots.repeat_interleave(len(rows) // len(roots))[:, None, None].to(rows.device)

    def token_roots(self, rows: torch.Tensor) -> torch.Tensor:
        """[B' N, 1], the same for every token of [B', N, ...]."""
        return self.roots(rows).expand(-1, rows.shape[1], -1).flatten(0, 1)


NO_CONTEXT = Context()


@dataclass(frozen=True)
class MixerInputs:
    """What a mixer is given in one call, and what becomes of its answer.

    Attributes:
        query, key, value: [B, N, H, D], the layer's own projections and what was added to them.
        context: of the call.
        rest, share: [B, N, H, D] and [B, N, H, 1]: beside windows or other tokens, the layer's product is
            rest + share * (the mixer's); None where it is the mixer's own.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    context: Context = NO_CONTEXT
    rest: torch.Tensor | None = None
    share: torch.Tensor | None = None

    def mix(self, mixer: Mixer) -> torch.Tensor:
        """The mixer's output, [B, N, H, D]."""
        output: torch.Tensor = mixer(self.query, self.key, self.value, self.context).output
        return output

    def join(self, mixed: torch.Tensor) -> torch.Tensor:
        """The layer's product from the mixer's, both [B, N, H, D]."""
        return mixed if self.rest is None or self.share is None else self.rest + self.share * mixed

    def shared(self, feature: torch.Tensor) -> torch.Tensor:
        """A part of the mixer's output as it counts in the layer's product, [B, N, H, D]."""
        return feature if self.share is None else self.share.float() * feature

    def with_tokens(self, query: torch.Tensor, key: torch.Tensor) -> MixerInputs:
        """The same with other queries and keys."""
        return replace(self, query=query, key=key)


class LayerCall(Protocol):
    """One call of a layer during a pass of the original model."""

    weights: Weights

    @property
    def inputs(self) -> MixerInputs:
        """What the mixer would be given."""

    @property
    def product(self) -> torch.Tensor:
        """[B, N, H, D], float32: what the original's softmax gives at the image's queries."""

    def target(self) -> torch.Tensor:
        """[B, N, H, D], float32: the product that, behind the output's addition as it is now, would give what the
        original gives; `product` while there is none."""


class Statistic(NamedTuple):
    """What calibration wants measured.

    Attributes:
        measure: a call -> a tensor, or several, to be summed; run without gradients.
        batches: which of the calibration's batches it is measured on.
    """

    measure: Callable[[Any], torch.Tensor | Sums]
    batches: slice = slice(None)


class CalibratedLayer(Protocol):
    """What surrounds a mixer.

    Attributes:
        name: path of the attention module.
        selection: the first few batches, for choices between candidates; solutions use all.
    """

    name: str
    selection: slice

    @property
    def head_weights(self) -> torch.Tensor:
        """[H], the mean square that the output projection makes of a head's errors."""

    @property
    def can_fold(self) -> bool:
        """Whether maps of query and key can be folded into their projections."""

    @property
    def full_rank(self) -> bool:
        """Whether what is folded is kept as full matrices."""

    def fold(self, query_map: tuple[torch.Tensor, torch.Tensor], key_map: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Make the query and key projections give what they gave, x, as x @ matrix + shift; [H, D, D] and [H, D]."""
