"""Bipartite matching of tokens that are alike (ToMe): which are merged into which."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .pooling import at_least_float, without_masked

BLOCK = 2048
"""Sources whose similarities are held at once."""


def destinations(
    height: int, width: int, cell: tuple[int, int], choice: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the destinations, one in each whole cell, and of the sources, all other tokens, both ascending.

    choice: [height // rows, width // columns], the destination's number within its cell; None: the upper left one.
    """
    rows, columns = cell
    down, across = (torch.arange(n, device=device) for n in (height // rows, width // columns))
    inside = torch.zeros((), dtype=torch.long, device=device) if choice is None else choice.to(device)
    y = down[:, None] * rows + inside.div(columns, rounding_mode="floor")
    x = across[None, :] * columns + inside % columns
    chosen = (y * width + x).flatten().sort().values
    count = height * width - chosen.numel()
    is_chosen = torch.zeros(height * width, dtype=torch.long, device=device).index_fill(0, chosen, 1)
    return chosen, is_chosen.argsort(stable=True)[:count]


@torch.no_grad()
def match(
    metric: torch.Tensor,
    grid: tuple[int, int],
    cell: tuple[int, int],
    count: int,
    mask: torch.Tensor | None = None,
    choice: torch.Tensor | None = None,
) -> tuple[torch.Tensor, int]:
    """Merges the `count` sources most like a destination into it: (group [B, N] int64, number of groups).

    Every source has the destination of the largest cosine; no more than all sources are merged. Gradients do not pass.

    Args:
        metric: [B, N, C], what is compared.
        grid: (height, width). cell: (rows, columns), of which each whole one has a destination.
        mask: bool [B, N]; where it is False the metric is not read and counts as zeros.
        choice: see `destinations`.
    """
    metric = F.normalize(without_masked(metric, mask).to(at_least_float(metric.dtype)), dim=-1)
    chosen, sources = destinations(*grid, cell, choice, metric.device)
    count = min(count, sources.numel()) if chosen.numel() else 0
    kept, groups = sources.numel() - count, metric.shape[1] - count
    group = torch.empty(metric.shape[:2], dtype=torch.long, device=metric.device)
    group[:, chosen] = torch.arange(kept, groups, device=metric.device)
    if not count:
        group[:, sources] = torch.arange(kept, device=metric.device)
        return group, groups
    targets = metric[:, chosen].transpose(1, 2)
    nearest = [(metric[:, part] @ targets).max(dim=-1) for part in sources.split(BLOCK)]
    similarity, match = (torch.cat(parts, dim=1) for parts in zip(*nearest, strict=True))
    order = similarity.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(sources.numel(), device=metric.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, ranks)
    group[:, sources] = torch.where(rank < count, kept + match, rank - count)
    return group, groups
