"""A depthwise convolution on the token grid: frame by frame, image by image, and solved for by least squares."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...ops.focused_linear.reference import depthwise_convolution
from ..calibration import MixerInputs, Weights
from ..grid import Grid, images_of
from .least_squares import check_finite, in_full_precision


def convolve(
    value: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    grid: Grid,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """The convolution of every frame of every image by itself, [B, N, H, D].

    value [B, N, H, D], weight [H * D, 1, K, K], bias [H * D] or None, key_mask bool [B, N] or None: masked values count
    as zeros.
    """
    pictures = images_of(grid)
    batch, _, heads, head_dim = value.shape
    if key_mask is not None:
        value = value.masked_fill(~key_mask[:, :, None, None], 0.0)
    parts = []
    sizes = [frames * height * width for frames, height, width in pictures]
    for part, (frames, height, width) in zip(value.split(sizes, dim=1), pictures, strict=True):
        folded = part.reshape(batch * frames, height * width, heads, head_dim)
        parts.append(depthwise_convolution(folded, weight, bias, (height, width)).reshape(part.shape))
    local = torch.cat(parts, dim=1)
    return local if key_mask is None else local * key_mask.any(dim=1)[:, None, None, None]


def frames_of(tokens: torch.Tensor, grid: Grid) -> list[torch.Tensor]:
    """[B, N, H, D] -> for each image [B * frames * H, D, height, width], in float32."""
    batch, _, heads, head_dim = tokens.shape
    pictures = images_of(grid)
    parts = tokens.float().split([frames * height * width for frames, height, width in pictures], dim=1)
    return [
        part.reshape(batch * frames, height * width, heads, head_dim)
        .permute(0, 2, 3, 1)
        .reshape(batch * frames * heads, head_dim, height, width)
        for part, (frames, height, width) in zip(parts, pictures, strict=True)
    ]


@in_full_precision
def patch_moments(inputs: MixerInputs, missing: torch.Tensor, kernel_size: int, weights: Weights) -> torch.Tensor:
    """[H, D, K * K + 1, K * K + 2] in float64: per channel, the normal equations of the kernel and bias that, convolved
    with the values, give what is `missing` [B, N, H, D] of the layer's product."""
    grid = inputs.context.grid
    assert grid is not None, "a mixer with a convolution needs the grid"
    heads, head_dim, taps = *missing.shape[-2:], kernel_size * kernel_size
    total = torch.zeros(heads, head_dim, taps + 1, taps + 2, dtype=torch.float64)
    roots = weights.roots(missing)[..., None]
    missing = missing * roots
    shares = roots * (torch.ones_like(missing[..., :1]) if inputs.share is None else inputs.share)
    for picture in zip(*(frames_of(tokens, grid) for tokens in (inputs.value, missing, shares)), strict=True):
        for head in range(heads):
            parts = (tokens[head::heads].split(32) for tokens in picture)  # bounds the patches
            for values, targets, share in zip(*parts, strict=True):
                patches = F.unfold(values, kernel_size, padding=kernel_size // 2)
                patches = patches.reshape(len(values), head_dim, taps, -1).permute(1, 2, 0, 3).flatten(2)
                patches = torch.cat([patches, patches.new_ones(head_dim, 1, patches.shape[-1])], dim=1)  # [D, taps, N]
                patches = patches * share.reshape(1, 1, -1)
                wanted = targets.permute(1, 0, 2, 3).reshape(head_dim, 1, -1)
                total[head] += (patches @ torch.cat([patches, wanted], dim=1).transpose(1, 2)).double().cpu()
    return total


@torch.no_grad()
def solve_convolution(name: str, moments: torch.Tensor, weight: nn.Parameter, bias: nn.Parameter, ridge: float) -> None:
    """The kernel and bias that `patch_moments` ask for, in place. Raises ValueError unless finite."""
    gram, cross = moments[..., :-1], moments[..., -1:]
    check_finite(name, moments)
    penalty = ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    solution = torch.linalg.solve(gram + penalty * torch.eye(gram.shape[-1], dtype=gram.dtype), cross)[..., 0]
    weight.copy_(solution[..., :-1].reshape(weight.shape))
    bias.copy_(solution[..., -1].flatten())
