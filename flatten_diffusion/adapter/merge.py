"""Projection deltas folded into the base weights, for inference without their extra products, and taken out again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..mixers import ProjectionDelta
from ..models import LAYER, MIXER
from .convert import projection_of
from .handle import Adapter

Originals = list[tuple[Any, torch.Tensor, torch.Tensor | None]]
"""(projection, its weight, its bias) before the merge; the very tensors, so that taking them back is exact."""


def merge(adapter: Adapter) -> Originals:
    """See `Adapter.merge`. Everything is checked before the first weight changes."""
    pairs: list[tuple[nn.Module, ProjectionDelta]] = []
    for name, attn in adapter.attention_modules():
        if getattr(attn, LAYER).min_tokens:
            raise ValueError(f"{name} stays softmax on small calls (min_tokens), and they need the base weights.")
        if getattr(attn, "fused_projections", False):
            raise ValueError(f"{name} has fused projections: call unfuse_qkv_projections() before merge().")
        for key, delta in getattr(attn, MIXER).deltas.items():
            projection = projection_of(attn, key)
            projection = getattr(projection, "base_layer", projection)
            if not isinstance(projection, nn.Linear) or not projection.weight.is_floating_point():
                raise ValueError(f"{name}: its {key} projection is {type(projection).__name__}: only nn.Linear merges.")
            pairs.append((projection, delta))
    if not pairs:
        raise ValueError("This adapter has no projection deltas: there is nothing to merge.")
    originals: Originals = []
    for projection, delta in pairs:
        weight: torch.Tensor = projection.weight.data  # type: ignore[assignment]
        bias: torch.Tensor | None = None if projection.bias is None else projection.bias.data  # type: ignore[assignment]
        originals.append((projection, weight, bias))
        matrix = delta.matrix().detach().to(weight.device, torch.float32)
        shift = delta.bias.detach().to(weight.device, torch.float32)
        projection.weight.data = (weight.float() + matrix).to(weight.dtype)
        merged_bias = (shift if bias is None else bias.float() + shift).to(weight.dtype)
        if bias is None:
            projection.bias = nn.Parameter(merged_bias, requires_grad=False)
        else:
            projection.bias.data = merged_bias
    for _, attn in adapter.attention_modules():
        getattr(attn, LAYER).merged = True
    return originals


def unmerge(adapter: Adapter, originals: Originals) -> None:
    """See `Adapter.unmerge`."""
    for projection, weight, bias in originals:
        projection.weight.data = weight.to(projection.weight.device)
        if bias is None:
            projection.bias = None
        else:
            projection.bias.data = bias.to(projection.bias.device)
    for _, attn in adapter.attention_modules():
        getattr(attn, LAYER).merged = False
