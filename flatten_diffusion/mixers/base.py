"""What every mixer is, and the registry that finds one by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from .grid import Grid
from .joint import JointAttention, create_joint
from .window import WindowAttention


@dataclass(frozen=True)
class MixerSpec:
    """The shape of one attention layer and the choices a conversion makes for it.

    `heads` and `head_dim` are the layer's own; `focusing_factor` is the power of the focused map; `kernel_size` the
    side of the depthwise convolution on the token grid, odd, 0 for none; `joint` how a layer whose sequence holds
    other tokens too joins the two (see `list_joints`), None for layers over the picture alone; `feature_maps` whether
    query and key pass learned maps inside the mixer, where their projections cannot carry them; `window` the side of
    the windows within which attention stays softmax, 0 for none.
    """

    heads: int
    head_dim: int
    focusing_factor: float = 3.0
    kernel_size: int = 5
    joint: str | None = None
    feature_maps: bool = False
    window: int = 0


class Mixer(nn.Module):
    """Stands in for the attention product of one layer: query, key and value come in as the projections leave them.

    A mixer holds only what the conversion adds to a layer. It must be called through `__call__`, so that offloading
    and sharding hooks see it. `deltas` holds what distillation adds to the layer's projections (a `ProjectionDelta`
    by the name of its projection, see `PROJECTIONS`); the processor applies them around the mixer. `group` is a
    `torch.distributed` process group whose processes each hold some rows of the picture's tokens, None for one process
    that holds them all: see `flatten_diffusion.ops.split_focused_linear_attention`. `joint` is what a
    layer over picture and text together needs to join the mixer's output with the softmax over the text; `window` what
    joins it with the softmax over each query's window.
    """

    uses_grid: bool = False
    """Whether `forward` or `window` need the grid of the tokens."""

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.backend = "auto"
        self.group: Any = None
        self.deltas = nn.ModuleDict()
        self.window: WindowAttention | None = WindowAttention(spec.heads, spec.window) if spec.window else None
        self.uses_grid = spec.window > 0
        self.joint: JointAttention | None = None
        if spec.joint is not None:
            self.joint = create_joint(spec.joint, spec.heads, estimates=self.window is None)

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

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        grid: Grid | None = None,
        key_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of a picture to itself: `forward`, joined with the softmax within windows where there are any.

        Arguments as for `forward`; `scale` of the softmax, None means D ** -0.5. Returns [B, N, H, D], and with windows
        the log of each query's whole mass [B, N, H].
        """
        if self.window is not None and self.group is not None:
            raise ValueError("Windows cannot be split over processes: convert with window=0, or run in one process.")
        mixed = self(query, key, value, grid, key_mask)
        if self.window is None:
            return mixed, None
        joined: tuple[torch.Tensor, torch.Tensor] = self.window(mixed, query, key, value, grid, key_mask, scale)
        return joined


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
