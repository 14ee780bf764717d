"""Projection deltas folded into the base weights, for inference without their extra products, and taken out again."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers.utils import logging
from torch import nn

from ..mixers import ProjectionDelta
from ..models import Projection, find_projection
from .handle import AdapterHandle

logger = logging.get_logger(__name__)


class Merged(NamedTuple):
    """One linear module before the merge.

    Attributes:
        name: of the layer and its projection.
        linear: the module; weight, bias: its very tensors, so that putting them back is exact.
        parts: (projection, its delta, the delta's parameter versions) of every delta that went in.
    """

    name: str
    linear: nn.Linear
    weight: torch.Tensor
    bias: torch.Tensor | None
    parts: list[tuple[Projection, ProjectionDelta, tuple[int, ...]]]

    def merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias with the deltas inside, in the weight's dtype."""
        weight, bias = added_to(self.weight, self.bias, self.parts, 1.0)
        return weight.to(self.weight.dtype), bias.to(self.weight.dtype)


def merge(handle: AdapterHandle) -> list[Merged]:
    """See `Adapter.merge`. Everything is checked and computed before the first weight changes."""
    found: dict[int, Merged] = {}
    for (name, attn), (_, layer, mixer) in zip(handle.attention_modules(), handle.converted_layers(), strict=True):
        if layer.auto or layer.min_tokens:
            raise ValueError(f"{name} stays softmax on small calls (min_tokens), and they need the base weights.")
        if getattr(attn, "fused_projections", False):
            raise ValueError(f"{name} has fused projections: call unfuse_qkv_projections() before merge().")
        for key, delta in mixer.deltas.items():
            projection = find_projection(attn, key)
            assert projection is not None and isinstance(delta, ProjectionDelta)
            linear = projection.base(attn)
            _check(f"{name}.{key}", linear, projection.module(attn))
            bias = None if linear.bias is None else linear.bias.data
            entry = found.setdefault(id(linear), Merged(f"{name}.{key}", linear, linear.weight.data, bias, []))
            entry.parts.append((projection, delta, _versions(delta)))
    if not found:
        raise ValueError("This adapter has no projection deltas: there is nothing to merge.")
    computed = [(entry, *entry.merged()) for entry in found.values()]
    try:
        for entry, weight, bias in computed:
            entry.linear.weight.data = weight
            if entry.bias is None:
                entry.linear.bias = nn.Parameter(bias, requires_grad=False)
            else:
                entry.linear.bias.data = bias
    except BaseException:
        for entry in found.values():
            _put(entry, entry.weight, entry.bias)
        raise
    for _, layer, _ in handle.converted_layers():
        layer.merged = True
    return list(found.values())


def unmerge(handle: AdapterHandle, merged: list[Merged]) -> None:
    """See `Adapter.unmerge`. Everything is checked and computed before the first weight changes."""
    changed: list[str] = []
    computed = [(entry, *_unmerged(entry, changed)) for entry in merged]
    for entry, weight, bias in computed:
        _put(entry, weight, bias)
    for _, layer, _ in handle.converted_layers():
        layer.merged = False
    if changed:
        logger.warning(
            f"{len(changed)} weights changed while the adapter was merged ({changed[0]}, ...): its additions were "
            "subtracted from them, which is exact up to rounding."
        )


def _unmerged(entry: Merged, changed: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias without the deltas: the originals, or, where something else changed the merged ones since, those
    with the deltas subtracted."""
    linear = entry.linear
    _check(entry.name, linear, linear)
    weight, bias = linear.weight.data, linear.bias.data
    expected, expected_bias = (part.to(weight.device, weight.dtype) for part in entry.merged())
    if torch.equal(expected, weight) and torch.equal(expected_bias, bias):
        original = None if entry.bias is None else entry.bias.to(bias.device, bias.dtype)
        return entry.weight.to(weight.device, weight.dtype), original
    if any(_versions(delta) != versions for _, delta, versions in entry.parts):
        raise ValueError(f"{entry.name}: weight and addition both changed since merge(): reload the base model.")
    changed.append(entry.name)
    without, without_bias = added_to(weight, bias, entry.parts, -1.0)
    kept = entry.bias is not None or not torch.equal(expected_bias, bias)
    return without.to(weight.dtype), without_bias.to(bias.dtype) if kept else None


def added_to(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    parts: list[tuple[Projection, ProjectionDelta, tuple[int, ...]]],
    sign: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias, with the deltas of `parts` added `sign` times, in float32 at least."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    whole = weight.to(dtype, copy=True)
    shifted = torch.zeros_like(whole[:, 0]) if bias is None else bias.to(dtype, copy=True)
    for projection, delta, _ in parts:
        rows, columns = slice(*projection.rows or (None,)), slice(*projection.columns or (None,))
        whole[rows, columns] += sign * delta.matrix().detach().to(weight.device, dtype)
        shifted[rows] += sign * delta.bias.detach().to(weight.device, dtype)
    return whole, shifted


def _check(name: str, linear: Any, module: Any) -> None:
    """Raise ValueError unless this is an ordinary linear module whose weight is here to be changed."""
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"{name} is {type(linear).__name__}: only nn.Linear merges and unmerges.")
    for parameter in (linear.weight, linear.bias):
        if parameter is None:
            continue
        if type(parameter.data) is not torch.Tensor or not parameter.is_floating_point():
            raise ValueError(
                f"{name} holds {type(parameter.data).__name__}: quantised and sharded weights do not merge."
            )
        if parameter.is_meta:
            raise ValueError(
                f"{name} is on the meta device (offloaded): call remove_all_hooks() on the pipeline first."
            )
    if any(getattr(getattr(part, "_hf_hook", None), "offload", False) for part in (linear, module)):
        raise ValueError(f"{name} is offloaded: call remove_all_hooks() on the pipeline before merge() and unmerge().")


def _versions(delta: ProjectionDelta) -> tuple[int, ...]:
    return tuple(parameter._version for parameter in delta.parameters())


def _put(entry: Merged, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    entry.linear.weight.data = weight
    if bias is None:
        entry.linear.register_parameter("bias", None)
    else:
        entry.linear.bias.data = bias
