"""Projection deltas folded into the base weights, for inference without their extra products, and taken out again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..mixers import ProjectionDelta
from ..models import LAYER, MIXER, Projection, find_projection
from .handle import Adapter

Originals = list[tuple[Any, torch.Tensor, torch.Tensor | None]]
"""(projection, its weight, its bias) before the merge; the very tensors, so that taking them back is exact."""


def merge(adapter: Adapter) -> Originals:
    """See `Adapter.merge`. Everything is checked before the first weight changes."""
    found: list[tuple[nn.Linear, Projection, ProjectionDelta]] = []
    for name, attn in adapter.attention_modules():
        if getattr(attn, LAYER).auto or getattr(attn, LAYER).min_tokens:
            raise ValueError(f"{name} stays softmax on small calls (min_tokens), and they need the base weights.")
        if getattr(attn, "fused_projections", False):
            raise ValueError(f"{name} has fused projections: call unfuse_qkv_projections() before merge().")
        for key, delta in getattr(attn, MIXER).deltas.items():
            projection = find_projection(attn, key)
            assert projection is not None
            linear = projection.base(attn)
            if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
                raise ValueError(f"{name}: its {key} projection is {type(linear).__name__}: only nn.Linear merges.")
            found.append((linear, projection, delta))
    if not found:
        raise ValueError("This adapter has no projection deltas: there is nothing to merge.")
    originals: Originals = []
    for linear, projection, delta in found:
        weight = linear.weight.data
        bias: torch.Tensor | None = None if linear.bias is None else linear.bias.data
        originals.append((linear, weight, bias))
        rows, columns = slice(*projection.rows or (None,)), slice(*projection.columns or (None,))
        merged = weight.float().clone()
        merged[rows, columns] += delta.matrix().detach().to(weight.device, torch.float32)
        linear.weight.data = merged.to(weight.dtype)
        shifted = torch.zeros_like(merged[:, 0]) if bias is None else bias.float().clone()
        shifted[rows] += delta.bias.detach().to(weight.device, torch.float32)
        if bias is None:
            linear.bias = nn.Parameter(shifted.to(weight.dtype), requires_grad=False)
        else:
            linear.bias.data = shifted.to(weight.dtype)
    for _, attn in adapter.attention_modules():
        getattr(attn, LAYER).merged = True
    return originals


def unmerge(adapter: Adapter, originals: Originals) -> None:
    """See `Adapter.unmerge`."""
    for projection, weight, bias in reversed(originals):  # several deltas may have gone into one fused projection
        projection.weight.data = weight.to(projection.weight.device)
        if bias is None:
            projection.bias = None
        else:
            projection.bias.data = bias.to(projection.bias.device)
    for _, attn in adapter.attention_modules():
        getattr(attn, LAYER).merged = False
