"""Projection deltas folded into the base weights, for inference without their extra products, and taken out again."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from diffusers.utils import logging
from torch import nn

from ..mixers import ProjectionDelta
from ..models import ConvertedLayer, Projection, find_projection
from .handle import AdapterHandle
from .offloading import is_offloaded, is_offloaded_in_groups

logger = logging.get_logger(__name__)


class Part(NamedTuple):
    """One delta as it went in.

    Attributes:
        attn, projection: the attention module, and what of it the delta is added to.
        bias, factors: the delta's own tensors at the merge; they stay what they were when the model changes its dtype.
        versions: of these at the merge.
    """

    attn: Any
    projection: Projection
    bias: torch.Tensor
    factors: tuple[torch.Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, attn: Any, projection: Projection, delta: ProjectionDelta) -> Part:
        """Of a delta, now."""
        factors = tuple(p.detach() for p in ((delta.up, delta.down) if delta.rank else (delta.weight,)))
        bias = delta.bias.detach()
        return cls(attn, projection, bias, factors, tuple(tensor._version for tensor in (bias, *factors)))

    def matrix(self) -> torch.Tensor:
        """The map as [out_features, in_features]."""
        return functools.reduce(torch.matmul, self.factors)

    @property
    def unchanged(self) -> bool:
        """Whether the delta's tensors hold what they held at the merge."""
        return self.versions == tuple(tensor._version for tensor in (self.bias, *self.factors))


class Merged(NamedTuple):
    """One linear module before the merge.

    Attributes:
        name: of the layer and its projection.
        linear: the module; weight, bias: its very tensors, so that putting them back is exact.
        parts: every delta that went in.
    """

    name: str
    linear: nn.Linear
    weight: torch.Tensor
    bias: torch.Tensor | None
    parts: list[Part]

    def merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias with the deltas inside, in the weight's dtype."""
        weight, bias = _added_to(self.weight, self.bias, self.parts, 1.0)
        return weight.to(self.weight.dtype), bias.to(self.weight.dtype)


def merge(handle: AdapterHandle, merged: list[Merged]) -> None:
    """See `Adapter.merge`; `merged` will say what is. All is checked and computed before the first weight changes."""
    found: dict[int, Merged] = {}
    _check_in_place(handle)
    for (name, attn), (_, layer, mixer) in zip(handle.attention_modules(), handle.converted_layers(), strict=True):
        if layer.auto or layer.min_tokens:
            raise ValueError(f"{name} stays softmax on small calls (min_tokens), and they need the base weights.")
        # Attention leaves its flag up when it is unfused: its processor tells.
        flag = getattr(attn, "fused_projections", False) and hasattr(attn, "unfuse_projections")
        if flag or "Fused" in type(layer.native).__name__:
            raise ValueError(f"{name} has fused projections: call unfuse_qkv_projections() before merge().")
        for key, delta in mixer.deltas.items():
            projection = find_projection(attn, key)
            assert projection is not None and isinstance(delta, ProjectionDelta)
            linear = projection.base(attn)
            _check(f"{name}.{key}", linear, projection.module(attn))
            _check_additive(f"{name}.{key}", linear, projection.module(attn))
            entry = found.setdefault(id(linear), Merged(f"{name}.{key}", linear, *_held(linear), []))
            entry.parts.append(Part.of(attn, projection, delta))
    if not found:
        raise ValueError("This adapter has no projection deltas: there is nothing to merge.")
    _exchange(handle, merged, list(found.values()), [(entry.linear, *entry.merged()) for entry in found.values()])


def unmerge(handle: AdapterHandle, merged: list[Merged]) -> None:
    """See `Adapter.unmerge`. Everything is checked and computed before the first weight changes."""
    changed: list[str] = []
    _check_in_place(handle)
    _exchange(handle, merged, [], [(entry.linear, *_unmerged(entry, changed)) for entry in merged])
    if changed:
        logger.warning(
            f"{len(changed)} weights changed while the adapter was merged ({changed[0]}, ...): its additions were "
            "subtracted from them, which is exact up to rounding."
        )


def _exchange(
    handle: AdapterHandle,
    merged: list[Merged],
    now: list[Merged],
    tensors: list[tuple[nn.Linear, torch.Tensor, torch.Tensor | None]],
) -> None:
    """Weights and biases into their modules, and `now` into `merged`; all as it was where that is interrupted."""
    before, earlier = [(linear, *_held(linear)) for linear, _, _ in tensors], list(merged)
    layers = [layer for _, layer, _ in handle.converted_layers()]
    try:
        _put(tensors, layers, merged, now)
    except BaseException:
        _put(before, layers, merged, earlier)
        raise


def _put(
    tensors: list[tuple[nn.Linear, torch.Tensor, torch.Tensor | None]],
    layers: list[ConvertedLayer],
    merged: list[Merged],
    now: list[Merged],
) -> None:
    for linear, weight, bias in tensors:
        linear.weight.data = weight
        if bias is None:
            linear.register_parameter("bias", None)
        elif linear.bias is None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        else:
            linear.bias.data = bias
    for layer in layers:
        layer.merged = bool(now)
    merged[:] = now


def _held(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The very tensors of a module."""
    return linear.weight.data, None if linear.bias is None else linear.bias.data


def _unmerged(entry: Merged, changed: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias without the deltas: the originals, or, where something else changed the merged ones since, those
    with the deltas subtracted."""
    for part in entry.parts:
        module = part.projection.module(part.attn)
        base = part.projection.base(part.attn)
        if base is not entry.linear:
            raise ValueError(
                f"{entry.name} was replaced by {type(base).__name__} since merge(): unmerge before that, or reload the "
                "base model."
            )
        _check(entry.name, base, module)
    weight, bias = _held(entry.linear)
    merged_weight, merged_bias = entry.merged()
    weight_known = _is_known(weight, merged_weight, entry.weight)
    bias_known = bias is None or _is_known(bias, merged_bias, entry.bias)
    original_bias = None if bias is None or entry.bias is None else entry.bias.to(bias)
    if weight_known and bias_known:
        return entry.weight.to(weight), original_bias
    if not all(part.unchanged for part in entry.parts):
        raise ValueError(f"{entry.name}: weight and addition both changed since merge(): reload the base model.")
    changed.append(entry.name)
    without, without_bias = (x.to(weight.dtype) for x in _added_to(weight, bias, entry.parts, -1.0))
    return entry.weight.to(weight) if weight_known else without, original_bias if bias_known else without_bias


def _is_known(now: torch.Tensor, *known: torch.Tensor | None) -> bool:
    """Whether a tensor is one of those, in the dtype that the model has by now: what the merge made, or the original,
    loaded again."""
    return any(tensor is not None and torch.equal(tensor.to(now), now) for tensor in known)


def _added_to(
    weight: torch.Tensor, bias: torch.Tensor | None, parts: list[Part], sign: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias, with the deltas of `parts` added `sign` times, in float32 at least."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    whole = weight.to(dtype, copy=True)
    shifted = torch.zeros_like(whole[:, 0]) if bias is None else bias.to(dtype, copy=True)
    for part in parts:
        rows, columns = slice(*part.projection.rows or (None,)), slice(*part.projection.columns or (None,))
        whole[rows, columns] += sign * part.matrix().to(weight.device, dtype)
        shifted[rows] += sign * part.bias.to(weight.device, dtype)
    return whole, shifted


def _check_in_place(handle: AdapterHandle) -> None:
    """Raise ValueError where groups of modules are moved in and out: a stream writes back the weights that it kept."""
    if is_offloaded_in_groups(handle.model):
        raise ValueError("The model is offloaded in groups: merge() and unmerge() before enabling group offload.")


def _check_additive(name: str, linear: nn.Linear, module: Any) -> None:
    """Raise ValueError where an adapter of peft does not only add to what the weight gives."""
    plain = hasattr(module, "lora_A") and len(getattr(module, "lora_magnitude_vector", ())) == 0
    if module is not linear and not plain:
        raise ValueError(
            f"{name} carries an adapter that scales the weight (DoRA, IA3), and would scale the addition too: delete "
            "it before merge()."
        )


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
    if is_offloaded(linear) or is_offloaded(module):
        raise ValueError(f"{name} is offloaded: call remove_all_hooks() on the pipeline before merge() and unmerge().")
