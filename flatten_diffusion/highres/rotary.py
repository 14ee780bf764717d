"""NTK-aware scaling of rotary embeddings: a larger base, so that far positions turn no further than in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def check_rotary(model: nn.Module) -> None:
    """Raise ValueError unless `model` has a `FluxPosEmbed` whose rows and columns have as many channels."""
    embedding: Any = getattr(model, "pos_embed", None)
    axes: list[int] = list(getattr(embedding, "axes_dim", ()))
    if type(embedding).__name__ != "FluxPosEmbed" or len(axes) != 3 or axes[1] != axes[2] or axes[1] <= 2:
        raise ValueError(
            f"{type(model).__name__} has no rotary embeddings that can be scaled: leave rotary_scaling out."
        )


@contextmanager
def ntk_rotary(model: nn.Module, factor: float) -> Iterator[None]:
    """Inside, positions of `model` reach `factor` times as far: theta becomes theta * factor ** (d / (d - 2)).

    d is the channels of one axis. The slowest channel is then interpolated and the fastest left as it is. Rows and
    columns share the base; text and the axis that counts images stand at position 0 and do not turn.

    Args:
        model: a transformer of Flux's (`FluxPosEmbed`).
        factor: how many times the trained side the longer side is; 1 changes nothing.

    Raises:
        ValueError: a model of another kind. Nothing is changed then.

    Source: bloc97, "NTK-aware scaled RoPE", 2023; for pictures Du et al., "I-Max", arXiv 2410.07536.
    """
    check_rotary(model)
    embedding: Any = model.pos_embed
    theta, channels = embedding.theta, embedding.axes_dim[1]
    try:
        embedding.theta = theta * factor ** (channels / (channels - 2))
        yield
    finally:
        embedding.theta = theta
