"""GC ViT: one set of queries for the whole image, asked in every window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .base import Context, LayerShape, Mixed, Mixer, MixerConfig
from .parts.pooling import at_least_float, cells_of, one_image, tokens_of, without_masked
from .registry import register_mixer


@dataclass(frozen=True)
class GlobalQueryConfig(MixerConfig):
    """Settings of `GlobalQueryAttention`.

    Args:
        window: side of the windows, and of the grid of queries, 1 to 32.
        steps: of the query generator, 1 to 6.
        pool: whether each step halves the grid by its maxima, as in the paper's early stages.

    Raises:
        ValueError: a value out of range.
    """

    window: int = 7
    steps: int = 1
    pool: bool = False

    def __post_init__(self) -> None:
        for name, most in (("window", 32), ("steps", 6)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name} is {value!r:.60}: pass 1 to {most}.")
        if not isinstance(self.pool, bool):
            raise ValueError(f"pool is {self.pool!r:.60}: pass True or False.")


@register_mixer("global-query")
class GlobalQueryAttention(Mixer):
    """The map t of the layer's queries, [channels, height, width], goes `steps` times through

        t <- t + W SE(gelu(dw(t))),    SE(u) = u sigmoid(W_2 gelu(W_1 mean(u))),

    with dw a depthwise 3 x 3 convolution, and is averaged to the size of a window. With g its queries, one at each
    place p of a window, tokens of every window are, per head,

        out_p = sum over the window of softmax_j(s g_p . k_j + T[place p - place j]) v_j.

    What a token's own query is, it no longer matters by itself: the layer needs training. The paper generates from the
    stage's input; here the inherited query projection comes before. Windows are cut from the upper left corner, smaller
    ones at the edges.

    Parameters:
        depthwise: [steps, C, 1, 3, 3], squeeze: [steps, C // 4, C], excite: [steps, C, C // 4], pointwise:
            [steps, C, C] (the paper's: normal, 0.02; depthwise 1/3), for C = heads * head_dim.
        bias_table: [(2 window - 1)^2, heads], T, zeros.

    Source: Hatamizadeh et al., "Global Context Vision Transformers", ICML 2023.
    """

    Config = GlobalQueryConfig
    examples = (GlobalQueryConfig(), GlobalQueryConfig(window=3, steps=2, pool=True), GlobalQueryConfig(window=4))
    summary = "one set of queries for the whole image, asked in every window: needs training"
    source = "Hatamizadeh et al., Global Context Vision Transformers, ICML 2023"
    needs = frozenset({"grid"})
    supports = frozenset({"mask", "compile"})

    def __init__(self, config: GlobalQueryConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        steps, channels = config.steps, layer.heads * layer.head_dim
        narrow = max(channels // 4, 1)
        self.depthwise = nn.Parameter(torch.randn(steps, channels, 1, 3, 3) / 3)
        self.squeeze = nn.Parameter(torch.randn(steps, narrow, channels) * 0.02)
        self.excite = nn.Parameter(torch.randn(steps, channels, narrow) * 0.02)
        self.pointwise = nn.Parameter(torch.randn(steps, channels, channels) * 0.02)
        self.bias_table = nn.Parameter(torch.zeros((2 * config.window - 1) ** 2, layer.heads))

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """See `Mixer.forward`. Raises ValueError unless the grid is of one image that the tokens fill."""
        grid = one_image(context, query.shape[1], "Global queries")
        return Mixed(self.ask(self.generate(query, grid), key, value, grid, context))

    def generate(self, query: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """[B, N, H, D] -> g, [B, H, window window, D]."""
        dtype = at_least_float(query.dtype)
        t = query.flatten(2).transpose(1, 2).unflatten(2, grid).to(dtype)
        weights = (self.depthwise, self.squeeze, self.excite, self.pointwise)
        for depthwise, squeeze, excite, pointwise in zip(*(w.to(dtype) for w in weights), strict=True):
            u = F.gelu(F.conv2d(t, depthwise, padding=1, groups=t.shape[1]))
            gate = F.linear(F.gelu(F.linear(u.mean((2, 3)), squeeze)), excite).sigmoid()
            t = t + F.conv2d(u * gate[..., None, None], pointwise[..., None, None])
            if self.config.pool:
                t = F.max_pool2d(t, 3, stride=2, padding=1)
        pooled = F.adaptive_avg_pool2d(t, self.config.window).flatten(2)
        return pooled.unflatten(1, query.shape[2:]).transpose(2, 3).to(query.dtype)

    def ask(
        self, asked: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grid: tuple[int, int], context: Context
    ) -> torch.Tensor:
        """out [B, N, H, D] of g [B, H, window window, D] in every window of the tokens."""
        mask, window = context.key_mask, (self.config.window, self.config.window)
        k, v = (
            cells_of(without_masked(x, mask), grid, window).transpose(2, 3) for x in (key, value)
        )  # [B, n, H, w w, D]
        ones = torch.ones(1, key.shape[1], dtype=torch.bool, device=key.device) if mask is None else mask
        keep = cells_of(ones, grid, window)[:, :, None]  # [B, n, 1, w w]
        keep = keep | ~keep.any(-1, keepdim=True)  # without any key, the zeros are averaged
        bias = self._bias().to(asked.dtype)[None, None].masked_fill(~keep[..., None, :], -torch.inf)
        queries = asked[:, None].expand(-1, k.shape[1], -1, -1, -1)
        out = F.scaled_dot_product_attention(queries, k, v, bias, scale=context.softmax_scale(asked))
        return tokens_of(out.transpose(2, 3), grid, window)

    def _bias(self) -> torch.Tensor:
        """[H, window window, window window] from T, by query place minus key place."""
        size, device = self.config.window, self.bias_table.device
        place = torch.arange(size, device=device)
        apart = place[:, None] - place + size - 1
        index = apart[:, None, :, None] * (2 * size - 1) + apart[None, :, None, :]
        return self.bias_table[index.reshape(size**2, size**2)].permute(2, 0, 1)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """Window by window, and bias by bias."""
        grid, mask, size = one_image(context, query.shape[1], "Global queries"), context.key_mask, self.config.window
        asked = self.generate(query, grid)
        key, value = (without_masked(x, mask) for x in (key, value))
        image = torch.arange(query.shape[1]).reshape(grid)
        parts, order = [], []
        for top in range(0, grid[0], size):
            for left in range(0, grid[1], size):
                block = image[top : top + size, left : left + size]
                places = [y * size + x for y in range(block.shape[0]) for x in range(block.shape[1])]
                rows = [
                    [
                        (p // size - j // size + size - 1) * (2 * size - 1) + p % size - j % size + size - 1
                        for j in places
                    ]
                    for p in places
                ]
                tokens = block.flatten()
                scores = torch.einsum("bhpd,bjhd->bhpj", asked[:, :, places], key[:, tokens])
                scores = scores * context.softmax_scale(query) + self.bias_table[torch.tensor(rows)].permute(
                    2, 0, 1
                ).to(scores.dtype)
                if mask is not None:
                    kept = mask[:, tokens]
                    kept = kept | ~kept.any(dim=1, keepdim=True)
                    scores = scores.masked_fill(~kept[:, None, None], -torch.inf)
                parts.append(torch.einsum("bhpj,bjhd->bphd", scores.softmax(-1), value[:, tokens]))
                order.append(tokens)
        return Mixed(torch.cat(parts, dim=1)[:, torch.cat(order).argsort()])
