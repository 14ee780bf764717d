"""The join of windows as plain torch over tensors of windows: differentiable in any mode, the judge of the blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..focused_linear.reference import compute_dtype
from .partition import ImageSize, JoinArguments, from_windows, windows_of


def keys_of_windows(
    key: torch.Tensor, key_mask: torch.Tensor | None, pictures: Sequence[ImageSize], size: int
) -> torch.Tensor:
    """How many keys each query's window holds, [B or 1, N], in the compute dtype."""
    keep = key.new_ones(1, key.shape[1]) if key_mask is None else key_mask
    parts = windows_of(keep.to(compute_dtype(key.dtype)), pictures, size)
    return from_windows([part.sum(dim=1, keepdim=True).expand(part.shape) for part in parts], pictures, size)


def join(call: JoinArguments, log_far: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `join_far`."""
    dtype = compute_dtype(call.query.dtype)
    key, value, mask = call.key, call.value, call.key_mask
    if mask is None:
        mask = torch.ones(key.shape[:2], dtype=torch.bool, device=key.device)  # windows at the edges are not full
    else:  # whatever a masked slot holds, NaN included, is never read
        key, value = (x.masked_fill(~mask[:, :, None, None], 0.0) for x in (key, value))
    pictures, size = call.pictures, call.size
    wide = [windows_of(x.to(dtype), pictures, size) for x in (call.mixed, call.query, key, value, log_far)]
    outputs, masses = [], []
    for far, q, k, v, log_mass, keep in zip(*wide, windows_of(mask, pictures, size), strict=True):
        scores = torch.einsum("wnhd,wmhd->whnm", q * call.scale, k).masked_fill(~keep[:, None, None], -torch.inf)
        scores = torch.cat([log_mass.transpose(1, 2).unsqueeze(-1), scores], dim=-1)
        mass = scores.logsumexp(dim=-1, keepdim=True)
        weights = (scores - mass).exp()
        output = torch.einsum("whnm,wmhd->wnhd", weights[..., 1:], v)
        outputs.append(output + weights[..., :1].transpose(1, 2) * far)
        masses.append(mass.squeeze(-1).transpose(1, 2))
    return from_windows(outputs, pictures, size).to(call.query.dtype), from_windows(masses, pictures, size)
