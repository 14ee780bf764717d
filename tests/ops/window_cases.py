"""Inputs of `join_windows`, for the interpreter's tests and the GPU's."""

from __future__ import annotations

import math

import torch

from flatten_diffusion.ops.windows import join_windows

CASES = [
    # (batch, heads, head_dim), images, size, masked
    ((2, 3, 40), ((1, 11, 9),), 4, False),
    ((1, 2, 64), ((1, 16, 8),), 8, True),
    ((2, 1, 20), ((2, 5, 7), (1, 3, 4)), 3, True),
    ((1, 1, 128), ((1, 9, 10),), 8, False),
]


def make_windows(sizes, pictures, masked, dtype, device="cpu"):
    """Query, key, value and mixed as views of one tensor, a mask, gain and bias."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, head_dim = sizes
    tokens = sum(math.prod(picture) for picture in pictures)
    tensors = torch.randn(batch, tokens, 4, heads, head_dim, generator=generator).to(dtype).to(device).unbind(2)
    mask = (torch.rand(batch, tokens, generator=generator) > 0.3).to(device) if masked else None
    gain, bias = (torch.randn(n, generator=generator).to(device) * 0.3 for n in ((heads, 2), heads))
    return tensors, mask, gain, bias


def run_windows(tensors, pictures, size, mask, gain, bias, backend):
    query, key, value, mixed = tensors
    return join_windows(mixed, query, key, value, pictures, size, mask, 0.2, gain, bias, backend)
