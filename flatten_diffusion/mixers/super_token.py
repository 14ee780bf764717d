"""Super tokens: tokens lend themselves to the cells around them, which attend to each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .base import Context, Mixed, Mixer, MixerConfig
from .parts.pooling import at_least_float, cells_of, one_image, tokens_of, without_masked
from .registry import register_mixer


@dataclass(frozen=True)
class SuperTokenConfig(MixerConfig):
    """Settings of `SuperTokenAttention`.

    Args:
        rows, columns: of the cells, 1 to 64.
        rounds: how often cells and tokens find each other, 1 to 8.
        beyond: whether cells outside the image keep a share of the tokens at its borders, which is lost, as in the
            authors' code. Without, all that a token gives stays inside.

    Raises:
        ValueError: a value out of range.
    """

    rows: int = 4
    columns: int = 4
    rounds: int = 1
    beyond: bool = False

    def __post_init__(self) -> None:
        for name, most in (("rows", 64), ("columns", 64), ("rounds", 8)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name} is {value!r:.60}: pass 1 to {most}.")
        if not isinstance(self.beyond, bool):
            raise ValueError(f"beyond is {self.beyond!r:.60}: pass True or False.")


@register_mixer("super-token")
class SuperTokenAttention(Mixer):
    """With x the layer's input [N, C] and T_s its mean over cell s at first, for the 3 x 3 cells around token n

        A_ns = softmax_s(C^-1/2 x_n . T_s),    T_s = sum_n A_ns x_n / (sum_n A_ns + 1e-12)   (for the next round),

    and with the last A (a constant to gradients) and z_s = sum_n A_ns z_n / (sum_n A_ns + 1e-12), per head

        out_n = sum_s A_ns sum_t softmax_t(s q_s . k_t) v_t.

    Nothing is learned. With cells of one token it is the softmax, as in the paper. Cells at the right and the bottom
    hold fewer tokens where the grid is no multiple.

    Source: Huang et al., "Vision Transformer with Super Token Sampling", CVPR 2023.
    """

    Config = SuperTokenConfig
    examples = (
        SuperTokenConfig(),
        SuperTokenConfig(rows=2, rounds=3, beyond=True),
        SuperTokenConfig(rows=1, columns=3),
    )
    summary = "softmax between cells, which tokens join by likeness and read from; nothing is learned"
    cost = "O(9N + (N / cell)^2)"
    source = "Huang et al., Vision Transformer with Super Token Sampling, CVPR 2023"
    needs = frozenset({"grid", "hidden_states"})
    supports = frozenset({"mask", "text", "window", "compile"})

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """See `Mixer.forward`. Raises ValueError unless the grid is of one image that the tokens fill."""
        grid, mask, scale = (
            one_image(context, query.shape[1], "Super tokens"),
            context.key_mask,
            context.softmax_scale(query),
        )
        dtype, cell = at_least_float(query.dtype), (self.config.rows, self.config.columns)
        keys, values = (without_masked(x, mask) for x in (key, value))
        if self.config.rows * self.config.columns == 1:
            bias = None if mask is None else (mask | ~mask.any(dim=1, keepdim=True))[:, None, None]
            return Mixed(_softmax(query, keys, values, bias, scale))
        ones = query.new_ones(query.shape[:2], dtype=dtype) if mask is None else mask.to(dtype)
        counted = cells_of(ones[..., None], grid, cell)  # [B, S, T, 1]
        near, inside = self._neighbours(grid, query.device)
        assert context.hidden_states is not None, "its needs say so"
        with torch.no_grad():
            hidden = cells_of(without_masked(context.hidden_states, mask).to(dtype), grid, cell)
            shares = self._associate(hidden, counted, near, inside)
        tokens = torch.cat([x.flatten(2) for x in (query, keys, values)], dim=-1)
        pooled, weight = _gather(shares * counted, cells_of(tokens.to(dtype), grid, cell), near, inside)
        queries, keys, values = (x.unflatten(-1, query.shape[2:]).to(query.dtype) for x in pooled.chunk(3, dim=-1))
        alive = weight[..., 0] > 0
        bias = None if mask is None else (alive | ~alive.any(dim=1, keepdim=True))[:, None, None]
        attended = _softmax(queries, keys, values, bias, scale).flatten(2).to(dtype)
        around = attended[:, near.flatten()].unflatten(1, near.shape)  # [B, S, 9, H D]
        out = tokens_of((shares * inside[:, None]) @ around, grid, cell)
        return Mixed(out.unflatten(-1, query.shape[2:]).to(query.dtype))

    def _associate(
        self, hidden: torch.Tensor, counted: torch.Tensor, near: torch.Tensor, inside: torch.Tensor
    ) -> torch.Tensor:
        """A, [B, S, T, 9]: of the tokens [B, S, T, C] of each cell to the cells around."""
        alive = counted.sum(2)[..., 0] > 0
        cells = hidden.sum(2) / counted.sum(2).clamp(min=1.0)
        own = torch.arange(9, device=hidden.device) == 4
        here = (alive[:, near.flatten()].unflatten(1, near.shape) & inside) | own  # [B, S, 9]
        lost = torch.zeros_like(inside) if not self.config.beyond else ~inside
        for step in range(self.config.rounds):
            around = cells[:, near.flatten()].unflatten(1, near.shape)
            logits = hidden @ around.transpose(2, 3) * hidden.shape[-1] ** -0.5
            logits = logits.masked_fill(~here[:, :, None], -torch.inf).masked_fill(lost[:, None], 0.0)
            shares = logits.softmax(-1)
            if step + 1 < self.config.rounds:
                cells, _ = _gather(shares * counted, hidden, near, inside)
        return shares

    def _shape(self, grid: tuple[int, int]) -> tuple[int, int]:
        return -(-grid[0] // self.config.rows), -(-grid[1] // self.config.columns)

    def _neighbours(self, grid: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """[S, 9] each: the cells around every cell, row by row, and whether they are on the grid (else number 0)."""
        down, across = self._shape(grid)
        step = torch.arange(-1, 2, device=device)
        y = (torch.arange(down, device=device)[:, None] + step)[:, None, :, None]
        x = (torch.arange(across, device=device)[:, None] + step)[None, :, None, :]
        inside = (y >= 0) & (y < down) & (x >= 0) & (x < across)
        return (y * across + x).where(inside, 0).reshape(-1, 9), inside.reshape(-1, 9)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """With the whole matrix of tokens and cells."""
        (height, width), mask = one_image(context, query.shape[1], "Super tokens"), context.key_mask
        rows, columns, dtype = self.config.rows, self.config.columns, at_least_float(query.dtype)
        assert context.hidden_states is not None, "its needs say so"
        key, value, hidden = (without_masked(x, mask) for x in (key, value, context.hidden_states.detach()))
        queries, key, value, hidden = (x.to(dtype) for x in (query, key, value, hidden))
        counted = query.new_ones(query.shape[:2], dtype=dtype) if mask is None else mask.to(dtype)
        down, across = self._shape((height, width))
        y, x = (
            t.flatten()
            for t in torch.meshgrid(torch.arange(height) // rows, torch.arange(width) // columns, indexing="ij")
        )
        cell_y, cell_x = (t.flatten() for t in torch.meshgrid(torch.arange(down), torch.arange(across), indexing="ij"))
        apart = torch.maximum((y[:, None] - cell_y).abs(), (x[:, None] - cell_x).abs()).to(query.device)  # [N, S]
        first = (apart == 0).to(dtype) * counted[..., None]  # [B, N, S]
        alive = first.sum(1, keepdim=True) > 0
        missing = (9 - (apart <= 1).sum(1, keepdim=True)).to(dtype).log()  # as many logits of zero
        missing = missing if self.config.beyond else torch.full_like(missing, -torch.inf)
        weights = first
        if rows * columns == 1:
            shares = (apart == 0).to(dtype).expand_as(first)
        else:
            for _ in range(self.config.rounds):
                cells = weights.transpose(1, 2) @ hidden / (weights.sum(1)[..., None] + 1e-12)
                logits = hidden @ cells.transpose(1, 2) * hidden.shape[-1] ** -0.5
                logits = logits.masked_fill((apart > 1) | ~(alive | (apart == 0)), -torch.inf)
                shares = torch.cat([logits, missing.expand(len(query), -1, -1)], dim=-1).softmax(-1)[..., :-1]
                weights = shares * counted[..., None]
        mean = weights / (weights.sum(1, keepdim=True) + 1e-12)
        q, k, v = (torch.einsum("bns,bnhd->bhsd", mean, z) for z in (queries, key, value))
        scores = q @ k.transpose(2, 3) * context.softmax_scale(query)
        scores = scores.masked_fill(~(alive | ~alive.any(-1, keepdim=True))[:, None], -torch.inf)
        return Mixed(torch.einsum("bns,bhsd->bnhd", shares, scores.softmax(-1) @ v).to(query.dtype))


def _gather(
    weights: torch.Tensor, tokens: torch.Tensor, near: torch.Tensor, inside: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means [B, S, C] of tokens [B, S, T, C] by weights [B, S, T, 9] towards the cells around, and their sums."""
    weights = weights * inside[:, None]
    given = (weights.transpose(2, 3) @ tokens).flatten(1, 2)
    sums = tokens.new_zeros(len(tokens), len(near), tokens.shape[-1]).index_add(1, near.flatten(), given)
    total = weights.new_zeros(len(tokens), len(near)).index_add(1, near.flatten(), weights.sum(2).flatten(1, 2))
    return sums / (total[..., None] + 1e-12), total[..., None]


def _softmax(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keep: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """[B, N, H, D] from tokens-first tensors; keep: bool, broadcast to [B, H, N, M]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, keep, scale=scale).transpose(1, 2)
