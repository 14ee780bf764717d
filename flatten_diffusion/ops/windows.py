"""Softmax within windows of a picture, joined with attention to all that lies beyond them, without gradients.

The tokens go through in blocks of whole windows, small enough for scores and copies to stay in cache: main memory sees
query, key, value, what is joined, and the output. `flatten_diffusion.mixers.WindowAttention` has the formulas, and the
same in differentiable torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from .focused_linear.dispatch import resolve_backend
from .focused_linear.eager import ACCELERATOR_BLOCK_ELEMENTS, CPU_BLOCK_ELEMENTS
from .focused_linear.reference import compute_dtype

Picture = tuple[int, int, int]
"""(frames, height, width) of tokens in row-major order."""

NO_KEY = 1e-4
"""What counts as the number of keys beyond a window that leaves none out: next to nothing, yet its logarithm is finite
and of the size of scores."""


class KeyMoments(NamedTuple):
    """Of a layer's keys, over those that count: number [B], mean [B, H, D] and covariance [B, H, D, D]."""

    number: torch.Tensor
    mean: torch.Tensor
    covariance: torch.Tensor


@torch.no_grad()
def key_moments(key: torch.Tensor, key_mask: torch.Tensor | None) -> KeyMoments:
    """`KeyMoments` of key [B, M, H, D], key_mask bool [B, M] or None; float32 (float64 for float64).

    Masked keys may hold anything. A sample without any key has zero moments and counts one.
    """
    batch, tokens, heads, head_dim = key.shape
    dtype = compute_dtype(key.dtype)
    mean = key.new_zeros((batch, heads, head_dim), dtype=dtype)
    covariance = key.new_zeros((batch, heads, head_dim, head_dim), dtype=dtype)
    if key_mask is None:
        count = key.new_full((batch,), tokens, dtype=dtype)
    else:
        count = key_mask.sum(dim=1, dtype=dtype).clamp(min=1)
    step = max(_block_elements(key) // (heads * head_dim), 1)
    for sample in range(batch):
        for pass_over in ("mean", "covariance"):
            for start in range(0, tokens, step):
                rows = key[sample, start : start + step].to(dtype)
                if key_mask is not None:
                    rows = rows.masked_fill(~key_mask[sample, start : start + step, None, None], 0.0)
                if pass_over == "mean":
                    mean[sample] += rows.sum(dim=0)
                    continue
                # Centred before the product: nothing is lost beside a large mean.
                rows = (rows - mean[sample]).transpose(0, 1)
                if key_mask is not None:
                    rows = rows * key_mask[sample, start : start + step, None]
                covariance[sample].baddbmm_(rows.transpose(1, 2), rows)
            if pass_over == "mean":
                mean[sample] /= count[sample]
        covariance[sample] /= count[sample]
    return KeyMoments(count, mean, covariance)


@torch.no_grad()
def score_moments(
    query: torch.Tensor, moments: KeyMoments, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log of the number of keys [B, 1, 1], mean and spread of each query's scores, [B, N, H] each: see
    `flatten_diffusion.mixers.joint.estimate_log_mass`."""
    batch, tokens, heads, head_dim = query.shape
    dtype = moments.mean.dtype
    log_count = moments.number.log()
    average, spread = (query.new_empty((batch, tokens, heads), dtype=dtype) for _ in range(2))
    step = max(_block_elements(query) // (heads * head_dim), 1)
    for sample in range(batch):
        for start in range(0, tokens, step):
            rows = query[sample, start : start + step].to(dtype).transpose(0, 1) * scale
            parts = _score_moments(rows, moments.mean[sample], moments.covariance[sample], log_count[sample])
            for whole, part in zip((average, spread), parts, strict=True):
                whole[sample, start : start + step] = part.T
    return log_count[:, None, None], average, spread


def _score_moments(
    query: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor, log_count: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and spread of the scores of scaled queries [H, n, D], [H, n] each."""
    variance = (torch.bmm(query, covariance) * query).sum(dim=-1).clamp_(min=1e-12)
    return torch.bmm(query, mean.unsqueeze(-1)).squeeze(-1), spread_of(variance, log_count)


def spread_of(variance: torch.Tensor, log_count: torch.Tensor) -> torch.Tensor:
    """b of `SharedNormalizer`: what scores of this variance add to the log of their mean exponential."""
    frozen = (2 * variance * log_count).clamp(min=1e-12).sqrt()
    return torch.where(variance < 2 * log_count, variance / 2, frozen - log_count)


@torch.no_grad()
def join_windows(
    mixed: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pictures: Sequence[Picture],
    size: int,
    key_mask: torch.Tensor | None,
    scale: float,
    gain: torch.Tensor,
    bias: torch.Tensor,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `WindowAttention` gives for the mixer's output `mixed`: [B, N, H, D], and log masses [B, N, H].

    query, key, value and mixed are [B, N, H, D] with any strides; gain [H, 2]; bias [H]; key_mask bool [B, N] or None;
    backend as for `focused_linear_attention`.
    """
    dtype = compute_dtype(query.dtype)
    moments = key_moments(key, key_mask)
    gain, bias = 1 + gain.to(dtype), bias.to(dtype)
    if resolve_backend(backend, query.device, query.dtype, query.shape[3]) == "triton":
        from . import windows_triton  # a machine without triton never needs it

        if windows_triton.fits_kernel(query, size):
            return windows_triton.join(
                mixed, query, key, value, pictures, size, key_mask, scale, gain, bias, moments, NO_KEY
            )
    log_count = moments.number.log()
    output = query.new_empty(query.shape)
    log_mass = query.new_empty(query.shape[:3], dtype=dtype)
    for sample in range(query.shape[0]):
        for block in _blocks(pictures, size, query):
            queries = block.take(query, sample, dtype).mul_(scale)
            keys, values = (block.take(x, sample, dtype) for x in (key, value))
            rows = queries.flatten(1, 2)
            average, spread = _score_moments(rows, moments.mean[sample], moments.covariance[sample], log_count[sample])
            log_far = average.mul_(gain[:, :1]).addcmul_(spread, gain[:, 1:]).add_(bias[:, None])
            log_far = log_far.view(queries.shape[:3])
            keep = None
            if key_mask is not None:
                keep = block.take(key_mask[..., None, None], sample, torch.bool)[0, ..., 0]  # [W, t]
                keys, values = (x.masked_fill_(~keep[..., None], 0.0) for x in (keys, values))
            near = keys.shape[2] if keep is None else keep.sum(dim=1, keepdim=True)
            log_far += (moments.number[sample] - near).clamp(min=NO_KEY).log()
            attended, mass = _attend(queries, keys, values, keep, log_far, block.take(mixed, sample, dtype))
            block.put(output, sample, attended)
            block.put(log_mass.unsqueeze(-1), sample, mass)
    return output, log_mass


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: torch.Tensor | None,
    log_far: torch.Tensor,
    mixed: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query, key, value, mixed [H, W, t, D], keep [W, t], log_far [H, W, t] -> output [H, W, t, D], its log mass."""
    shape = query.shape
    scores = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)).view(*shape[:3], shape[2])
    if keep is not None:
        scores.masked_fill_(~keep[:, None], -torch.inf)
    largest = torch.maximum(scores.amax(dim=-1), log_far)
    weights = scores.sub_(largest.unsqueeze(-1)).exp_()
    far = (log_far - largest).exp_()
    total = weights.sum(dim=-1).add_(far)
    far.div_(total)
    weights.div_(total.unsqueeze(-1))
    mixed = mixed.mul_(far.unsqueeze(-1)).flatten(0, 1)
    output = mixed.baddbmm_(weights.flatten(0, 1), value.flatten(0, 1)).view(shape)
    return output, largest.add_(total.log_()).unsqueeze(-1)


class _Block(NamedTuple):
    """Windows of one size side by side: tokens first .. first + height * width are the frame they are cut from."""

    first: int
    height: int
    width: int
    rows: slice
    columns: slice
    down: int
    across: int

    def _view(self, x: torch.Tensor, sample: int) -> torch.Tensor:
        """[H, window rows, window columns, down, across, D], a view."""
        frame = x[sample, self.first : self.first + self.height * self.width].unflatten(0, (self.height, self.width))
        part = frame[self.rows, self.columns].unflatten(1, (-1, self.across)).unflatten(0, (-1, self.down))
        return part.permute(4, 0, 2, 1, 3, 5)

    def take(self, x: torch.Tensor, sample: int, dtype: torch.dtype) -> torch.Tensor:
        """[B, N, H, D] -> a copy of the block's tokens, [H, W, t, D]."""
        view = self._view(x, sample)
        copy = torch.empty(view.shape, dtype=dtype, device=x.device).copy_(view)
        return copy.flatten(3, 4).flatten(1, 2)

    def put(self, x: torch.Tensor, sample: int, part: torch.Tensor) -> None:
        """The inverse of `take`, into x."""
        view = self._view(x, sample)
        view.copy_(part.view(view.shape))


def _blocks(pictures: Sequence[Picture], size: int, x: torch.Tensor) -> Iterator[_Block]:
    """All windows, the smaller ones at the lower and right edges too, in blocks that fit the cache."""
    limit = max(_block_elements(x) // (x.shape[2] * max(x.shape[3], size * size)), 1)
    first = 0
    for frames, height, width in pictures:
        for _ in range(frames):
            for top, bottom, down in _spans(height, size):
                for left, right, across in _spans(width, size):
                    wide = max(limit // (down * across), 1) * across
                    for column in range(left, right, wide):
                        columns = slice(column, min(column + wide, right))
                        high = max(limit // (down * (columns.stop - column)), 1) * down
                        for row in range(top, bottom, high):
                            rows = slice(row, min(row + high, bottom))
                            yield _Block(first, height, width, rows, columns, down, across)
            first += height * width


def _spans(length: int, size: int) -> list[tuple[int, int, int]]:
    """(start, stop, size of a window): the whole windows of a side, then what is left."""
    whole = length // size * size
    spans = [(0, whole, size), (whole, length, length - whole)]
    return [span for span in spans if span[0] < span[1]]


def _block_elements(x: torch.Tensor) -> int:
    return CPU_BLOCK_ELEMENTS * torch.get_num_threads() if x.device.type == "cpu" else ACCELERATOR_BLOCK_ELEMENTS


def windows_of(tokens: torch.Tensor, pictures: Sequence[Picture], size: int) -> list[torch.Tensor]:
    """[B, N, ...] -> for each picture [B * windows, tokens of a window, ...]; missing ones at the edges are zero."""
    rest = tokens.shape[2:]
    windows = []
    for part, picture in zip(tokens.split([math.prod(p) for p in pictures], dim=1), pictures, strict=True):
        _, height, width = picture
        (rows, columns), (down, across) = _cut(picture, size)
        x = part.reshape(-1, height, width, *rest)
        if not fits(picture, size):
            padding = (*[0] * 2 * len(rest), 0, columns * across - width, 0, rows * down - height)
            x = torch.nn.functional.pad(x, padding)
        x = x.reshape(-1, rows, down, columns, across, *rest).transpose(2, 3)
        windows.append(x.reshape(-1, down * across, *rest))
    return windows


def from_windows(windows: Sequence[torch.Tensor], pictures: Sequence[Picture], size: int) -> torch.Tensor:
    """The inverse of `windows_of`."""
    parts = []
    for part, picture in zip(windows, pictures, strict=True):
        frames, height, width = picture
        (rows, columns), (down, across) = _cut(picture, size)
        rest = part.shape[2:]
        x = part.reshape(-1, rows, columns, down, across, *rest).transpose(2, 3)
        x = x.reshape(-1, rows * down, columns * across, *rest)[:, :height, :width]
        parts.append(x.reshape(-1, frames * height * width, *rest))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def window_indices(pictures: Sequence[Picture], size: int, device: torch.device) -> torch.Tensor:
    """[N]: which window each token is in, counted from 0."""
    count, indices = 0, []
    tokens = sum(math.prod(picture) for picture in pictures)
    for part in windows_of(torch.zeros(1, tokens, device=device), pictures, size):
        indices.append(torch.arange(count, count + len(part), device=device)[:, None].expand(part.shape))
        count += len(part)
    return from_windows(indices, pictures, size)[0]


def fits(picture: Picture, size: int) -> bool:
    """Whether windows fill the frames without going beyond."""
    (rows, columns), (down, across) = _cut(picture, size)
    return picture[1:] == (rows * down, columns * across)


def _cut(picture: Picture, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Windows down and across a frame, and tokens down and across a window."""
    _, height, width = picture
    down, across = min(size, height), min(size, width)
    return (-(-height // down), -(-width // across)), (down, across)
