"""What every mixer is, and the registry that finds one by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, Union

import torch
from torch import nn

from .joint import JointAttention, create_joint

Grid = Union[tuple[int, int], tuple[int, int, int], tuple[tuple[int, int, int], ...]]  # noqa: UP007 (an alias, 3.10)
"""How tokens in row-major order fill a picture: (height, width), (frames, height, width), or one such triple for each
of several pictures that follow one another (reference images)."""


def pictures_of(grid: Grid) -> list[tuple[int, int, int]]:
    """(frames, height, width) of each picture of a grid."""
    if isinstance(grid[0], int):
        frames, height, width = (1, *grid) if len(grid) == 2 else grid
        return [(frames, height, width)]
    return list(grid)


def count_tokens(grid: Grid) -> int:
    """How many tokens fill the grid."""
    return sum(math.prod(picture) for picture in pictures_of(grid))


def describe_grid(grid: Grid) -> str:
    """As text: 4x6, 2x4x6 (frames first), or 4x6 + 3x3."""
    return " + ".join("x".join(map(str, picture[0 if picture[0] > 1 else 1 :])) for picture in pictures_of(grid))


@dataclass(frozen=True)
class MixerSpec:
    """The shape of one attention layer and the choices a conversion makes for it.

    `heads` and `head_dim` are the layer's own; `focusing_factor` is the power of the focused map; `kernel_size` the
    side of the depthwise convolution on the token grid, odd, 0 for none; `joint` how a layer whose sequence holds
    other tokens too joins the two (see `list_joints`), None for layers over the picture alone; `feature_maps` whether
    query and key pass learned maps inside the mixer, where their projections cannot carry them.
    """

    heads: int
    head_dim: int
    focusing_factor: float = 3.0
    kernel_size: int = 5
    joint: str | None = None
    feature_maps: bool = False


class Mixer(nn.Module):
    """Stands in for the attention product of one layer: query, key and value come in as the projections leave them.

    A mixer holds only what the conversion adds to a layer. It must be called through `__call__`, so that offloading
    and sharding hooks see it. `deltas` holds what distillation adds to the layer's projections (a `ProjectionDelta`
    by the name of its projection, see `PROJECTIONS`); the processor applies them around the mixer. `group` is a
    `torch.distributed` process group whose processes each hold some rows of the picture's tokens, None for one process
    that holds them all: see `flatten_diffusion.ops.split_focused_linear_attention`. `joint` is what a
    layer over picture and text together needs to join the mixer's output with the softmax over the text.
    """

    uses_grid: bool = False
    """Whether `forward` needs the grid of the tokens."""

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.backend = "auto"
        self.group: Any = None
        self.deltas = nn.ModuleDict()
        self.joint: JointAttention | None = None if spec.joint is None else create_joint(spec.joint, spec.heads)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        grid: Grid | None = None,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mix the values.

        Args:
            query: [B, N, H, D].
            key, value: [B, M, H, D].
            grid: of the query's tokens, see `Grid`; it holds N tokens. With a `group`, the whole picture's.
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
