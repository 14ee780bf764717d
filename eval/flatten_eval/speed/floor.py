"""The attention-free floor: the converted model with the attention product left out, everything around it kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from flatten_diffusion.mixers import Context, LayerMixer, Mixed, Mixer
from flatten_diffusion.mixers.base import FEATURES
from flatten_diffusion.models import MIXER


@torch.library.custom_op("flatten_eval::keep_projections", mutates_args=("value",))
def _keep_projections(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Does nothing, opaquely: a compiler must compute query and key although the result is the value."""


@_keep_projections.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    return None


class AttentionFree(Mixer):
    """Hands the values on: no attention can be faster."""

    supports = FEATURES

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        _keep_projections(query, key, value)
        return Mixed(value)


@contextmanager
def attention_free(adapter: Any) -> Iterator[None]:
    """Inside, the adapter's layers hand their values on instead of mixing them."""
    kept = [(attention, getattr(attention, MIXER)) for _, attention in adapter.attention_modules()]
    for attention, mixer in kept:
        # Neither windows nor the join with text: only what surrounds attention, and what was added to the projections.
        shape = mixer.mixer.layer
        floor = LayerMixer(AttentionFree(mixer.mixer.config, shape), shape)
        floor.deltas = mixer.deltas
        setattr(attention, MIXER, floor)
    try:
        yield
    finally:
        for attention, mixer in kept:
            setattr(attention, MIXER, mixer)
