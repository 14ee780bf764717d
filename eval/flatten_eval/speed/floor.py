"""The attention-free floor: the converted model with the attention product left out, everything around it kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from flatten_diffusion.mixers import Grid, Mixer
from flatten_diffusion.models import MIXER


@torch.library.custom_op("flatten_eval::keep_projections", mutates_args=("value",))
def _keep_projections(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Does nothing, opaquely: a compiler must compute query and key although the result is the value."""


@_keep_projections.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    return None


class AttentionFree(Mixer):
    """Hands the values on: no attention can be faster."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        grid: Grid | None = None,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        _keep_projections(query, key, value)
        return value


@contextmanager
def attention_free(adapter: Any) -> Iterator[None]:
    """Inside, the adapter's layers hand their values on instead of mixing them."""
    kept = [(attention, getattr(attention, MIXER)) for _, attention in adapter.attention_modules()]
    for attention, mixer in kept:
        setattr(attention, MIXER, AttentionFree(replace(mixer.spec, joint=None)))
    try:
        yield
    finally:
        for attention, mixer in kept:
            setattr(attention, MIXER, mixer)
