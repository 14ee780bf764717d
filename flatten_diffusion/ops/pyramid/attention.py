"""Near keys exactly, far ones as means: softmax attention whose cost grows linearly with the tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from ..focused_linear.arguments import FocusedArguments
from ..focused_linear.dispatch import call_dtype
from ..focused_linear.reference import compute_dtype
from ..transforms import needs_plain_torch
from ..windows import ImageSize
from .layout import Cells, cell_sides, number_of_cells
from .operator import attend_in_blocks, attend_plainly, no_key, pyramid


def pyramid_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    images: Sequence[ImageSize],
    cells: Cells | None = None,
    *,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of images to themselves, over keys that are pooled the more the farther they are.

    A query sees the keys of its own window (`size` x `size` tokens, from the upper left corner, smaller at the lower
    and right edges), the means of small cells of the eight windows around, and the means of larger cells of all else:
    of its frame, of every other frame, and of the other images. With c a token or a cell, n_c the number of its keys
    that count, and means over these,

        out_i = sum_c w_ic mean(v)_c,   w_ic = n_c exp(scale q_i . mean(k)_c) / Z_i,   log Z_i = log-sum-exp.

    Every key is in exactly one c. A far cell that would reach into the ring is halved until it does not. Where all
    cells are of side 1, or one window holds all tokens, this is the softmax itself. What pooling c loses of the output
    is, to first order, w_ic scale Cov_c(v, k) q_i, at most in proportion to w_ic std_c(k) std_c(v): in each head and
    window the cells where this is largest for the mean query are cut into four, as `Cells.opened` says.

    Related: Yang et al., "Focal Self-attention for Local-Global Interactions in Vision Transformers", NeurIPS 2021;
    Tang et al., "QuadTree Attention for Vision Transformers", ICLR 2022 (cells opened by weight).

    Args:
        query, key, value: [B, N, H, D], of the same tokens; one dtype and device.
        images: (frames, height, width) of each image, in the order of its tokens.
        cells: see `Cells`; None for its defaults.
        key_mask: bool [B, N], True where a key counts. Masked keys and values are never read, whatever they hold.
        scale: of the scores; None means D ** -0.5.

    Returns:
        [B, N, H, D] in the query's dtype, and log Z [B, N, H] in float32 (float64 for float64), exact over the pooled
        keys. A sample without any key gives zeros and a very low log Z (below -1e4). Accumulation is float32 (float64
        for float64); under autocast, query, key and value are first cast to its dtype. Differentiable in query, key and
        value through both results; forward-mode, second and torch.func's derivatives in plain torch, at its speed.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or images that do not hold N tokens.
    """
    cells = Cells() if cells is None else cells
    FocusedArguments(query, key, value, None, None, None, None, None, key_mask, 1.0, None).check()
    sizes = tuple((int(frames), int(height), int(width)) for frames, height, width in images)
    held = sum(math.prod(size) for size in sizes)
    if not sizes or min(min(size) for size in sizes) < 1 or not query.shape[1] == key.shape[1] == held:
        raise ValueError(
            f"The images {sizes} hold {held} tokens, query {query.shape[1]} and key {key.shape[1]}: "
            "make them equal, and every side at least 1."
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (x.to(call_dtype(query)) for x in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        sides, opened = cell_sides(sizes, cells).pooled(), sorted(cell_sides(sizes, cells).opened)
        # The CPU's kernels are fast in float32 only; an accelerator's take the dtype as it is.
        dtype = compute_dtype(query.dtype) if query.device.type == "cpu" else query.dtype
        if key_mask is not None:
            key, value = (x.masked_fill(~key_mask[:, :, None, None], 0.0) for x in (key, value))
        bias, share = _counts(key, key_mask, sizes, sides, no_key(dtype))
        keys, values = (_table(x.to(dtype), sizes, sides, share) for x in (key, value))
        with torch.no_grad():
            spread = _spread(key, keys, sizes, opened, share) + _spread(value, values, sizes, opened, share)
        numbers = [number for size in sizes for number in size]
        settings = [cells.window, cells.ring, cells.far, cells.budget, *cells.opened]
        call = query, keys, values, bias.to(dtype), spread.to(dtype), numbers, settings, scale
        if needs_plain_torch():
            return attend_in_blocks(*call, attend_plainly)
        output: tuple[torch.Tensor, torch.Tensor] = pyramid(*call)
    return output


def _table(
    x: torch.Tensor, images: Sequence[ImageSize], sides: Sequence[int], share: torch.Tensor | None
) -> torch.Tensor:
    """[B, N, H, D] -> [B, H, R, D]: the tokens, the means of the cells of each side, and a row of zeros; `share`
    [B, cells] is that of a cell's tokens that count."""
    batch, _, heads, head_dim = x.shape
    parts = [x]
    for side in sides:
        means = [F.avg_pool2d(image, side, ceil_mode=True, count_include_pad=False) for image in _frames(x, images)]
        parts += [mean.permute(0, 2, 3, 1).reshape(batch, -1, heads, head_dim) for mean in means]
    if share is not None and sides:
        pooled = torch.cat(parts[1:], dim=1)
        parts = [x, (pooled / share[..., None, None]).to(x.dtype)]
    return torch.cat([*parts, x.new_zeros(batch, 1, heads, head_dim)], dim=1).transpose(1, 2).contiguous()


def _spread(
    x: torch.Tensor, table: torch.Tensor, images: Sequence[ImageSize], sides: Sequence[int], share: torch.Tensor | None
) -> torch.Tensor:
    """Log of the standard deviation of x [B, N, H, D] within the cells of each side, the last of its table; 0 for the
    row that is no key: [B, H, n + 1], [B, H, 0] without sides. `share` as `_table` takes it."""
    if not sides:
        return table.new_zeros(*table.shape[:2], 0)
    cells = number_of_cells(images, sides)
    squares = x.to(compute_dtype(x.dtype)).square().sum(dim=-1, keepdim=True)
    share = None if share is None else share[:, -cells:]
    mean_squares = _table(squares, images, sides, share)[:, :, -cells - 1 : -1, 0]
    means = table[:, :, -cells - 1 : -1].to(squares.dtype)
    return F.pad((mean_squares - means.square().sum(dim=-1)).clamp(min=1e-12).log() / 2, (0, 1))


def _counts(
    key: torch.Tensor, key_mask: torch.Tensor | None, images: Sequence[ImageSize], sides: Sequence[int], low: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log of the number of keys of each row of the table, [B or 1, R], `low` for none; and the share of a cell's tokens
    that count [B, cells], None without a mask."""
    dtype = compute_dtype(key.dtype)
    every = torch.ones(1, key.shape[1], 1, 1, dtype=dtype, device=key.device)
    whole = _numbers(every, images, sides)
    number = whole if key_mask is None else _numbers(key_mask[:, :, None, None].to(dtype), images, sides)
    bias = F.pad(number.log().clamp(min=low), (0, 1), value=low)
    tokens = key.shape[1]
    return bias, None if key_mask is None else (number.clamp(min=1) / whole)[:, tokens:]


def _numbers(keep: torch.Tensor, images: Sequence[ImageSize], sides: Sequence[int]) -> torch.Tensor:
    """[B, N, 1, 1] -> sums over tokens and the cells of each side, [B, R - 1]."""
    parts = [keep.flatten(1)]
    for side in sides:
        for image in _frames(keep, images):
            parts.append(F.avg_pool2d(image, side, ceil_mode=True, divisor_override=1).reshape(len(keep), -1))
    return torch.cat(parts, dim=1)


def _frames(x: torch.Tensor, images: Sequence[ImageSize]) -> Iterator[torch.Tensor]:
    """[B, N, H, D] -> for each image [B * frames, H * D, height, width], a view."""
    for part, (_, height, width) in zip(x.split([math.prod(size) for size in images], dim=1), images, strict=True):
        yield part.flatten(2).reshape(-1, height, width, x.shape[2] * x.shape[3]).permute(0, 3, 1, 2)
