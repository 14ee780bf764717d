"""What every mixer is, and the registry that finds one by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn


@dataclass(frozen=True)
class MixerSpec:
    """The shape of one attention layer and the choices a conversion makes for it.

    `heads` and `head_dim` are the layer's own; `focusing_factor` is the power of the focused map; `kernel_size` the
    side of the depthwise convolution on the token grid, odd, 0 for none.
    """

    heads: int
    head_dim: int
    focusing_factor: float = 3.0
    kernel_size: int = 5


class Mixer(nn.Module):
    """Stands in for the attention product of one layer: query, key and value come in as the projections leave them.

    A mixer holds only what the conversion adds to a layer. It must be called through `__call__`, so that offloading
    and sharding hooks see it. `deltas` holds what distillation adds to the layer's projections (a `ProjectionDelta`
    by the name of its projection, see `PROJECTIONS`); the processor applies them around the mixer.
    """

    uses_grid: bool = False
    """Whether `forward` needs the (height, width) of the tokens."""

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.backend = "auto"
        self.deltas = nn.ModuleDict()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mix the values.

        Args:
            query: [B, N, H, D].
            key, value: [B, M, H, D].
            grid: (height, width) of the query's tokens, row-major; height * width == N.
            key_mask: bool [B, M], True where a key counts.

        Returns:
            [B, N, H, D] in the query's dtype.
        """
        raise NotImplementedError


_REGISTRY: dict[str, type[Mixer]] = {}
_MixerType = TypeVar("_MixerType", bound=type[Mixer])


def register_mixer(name: str) -> Callable[[_MixerType], _MixerType]:
    """Class decorator: makes a mixer available under `name`. Raises ValueError when the name is taken."""

    def register(cls: _MixerType) -> _MixerType:
        if name in _REGISTRY:
            raise ValueError(f"Mixer {name!r} is taken by {_REGISTRY[name].__name__}: choose another name.")
        _REGISTRY[name] = cls
        return cls

    return register


def list_mixers() -> list[str]:
    """Names that `AdapterConfig(mixer=...)` accepts, sorted."""
    return sorted(_REGISTRY)


def create_mixer(
    name: str, spec: MixerSpec, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Mixer:
    """A new mixer that computes the mechanism's parameter-free form: what it learns adds nothing yet.

    Raises:
        ValueError: `name` is not one of `list_mixers()`.
    """
    if name not in _REGISTRY:
        raise ValueError(f"Unknown mixer {name!r}: choose one of {', '.join(list_mixers())}.")
    return _REGISTRY[name](spec).to(device=device, dtype=dtype)
