"""SOFT: a Gaussian kernel in place of softmax, through landmarks and an inverse by Newton's iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .base import Calibration, Context, LayerShape, Mixed, Mixer, MixerConfig
from .calibration import CalibratedLayer, LayerCall, Statistic
from .parts.convolution import convolve, patch_moments
from .parts.least_squares import check_finite
from .parts.pooling import at_least_float, one_image, without_masked
from .registry import register_mixer


@dataclass(frozen=True)
class SoftConfig(MixerConfig):
    """Settings of `SoftAttention`.

    Args:
        ratio: side of the squares of tokens that have one landmark each, 2 to 32.
        kernel_size: side of the depthwise convolution of the values, odd, at most 31; 0 leaves it out.
        iterations: of Newton's method, 1 to 64.

    Raises:
        ValueError: a value out of range.
    """

    ratio: int = 8
    kernel_size: int = 3
    iterations: int = 20

    def __post_init__(self) -> None:
        for name, least, most in (("ratio", 2, 32), ("kernel_size", 0, 31), ("iterations", 1, 64)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"{name} is {value!r:.60}: pass {least} to {most}.")
        if self.kernel_size and self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}: pass an odd number, or 0 for no convolution.")


RIDGE = 0.01


@register_mixer("soft")
class SoftAttention(Mixer):
    """With q and k times the root of the softmax's scale, and G(a, b) = exp(-|a - b|^2 / 2), per head

        L = gelu(norm(W * (q + k) / 2)),    out = G(q, L) (G(L, L) + 0.01 I)^-1 G(L, k) v + conv(v),

    where W is a convolution of side and stride `ratio`, shared by the heads. The paper has one projection for query and
    key; with that, this is its formula, and a layer that has two keeps both. Rows do not sum to one: there is no
    softmax that it is near, and the layer needs calibration and training. The inverse V is Newton's, V <- 2V - V P V
    from V = aP, and its gradient -V^T dV V^T. Grids that are no multiple of `ratio` repeat their last row and column.

    Parameters:
        landmark_weight: [head_dim, head_dim, ratio, ratio], the mean at the start.
        norm_weight, norm_bias: [head_dim], of the layer norm, ones and zeros.
        conv_weight: [heads, 1, K, K], one kernel for all channels of a head, zeros. Absent when `kernel_size` is 0.

    Source: Lu et al., "SOFT: Softmax-free Transformer with Linear Complexity", NeurIPS 2021.
    """

    Config = SoftConfig
    examples = (SoftConfig(), SoftConfig(ratio=2, kernel_size=0), SoftConfig(ratio=3, kernel_size=5, iterations=4))
    summary = "Gaussian kernel through landmarks (Nystroem), unnormalised: needs training"
    cost = "O(N^2 / ratio^2)"
    source = "Lu et al., SOFT, NeurIPS 2021"
    needs = frozenset({"grid"})
    supports = frozenset({"mask", "compile"})

    def __init__(self, config: SoftConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        size, side, width = config.kernel_size, config.ratio, layer.head_dim
        mean = torch.eye(width)[:, :, None, None].expand(-1, -1, side, side) / side**2
        self.landmark_weight = nn.Parameter(mean.contiguous())
        self.norm_weight = nn.Parameter(torch.ones(width))
        self.norm_bias = nn.Parameter(torch.zeros(width))
        self.conv_weight = nn.Parameter(torch.zeros(layer.heads, 1, size, size)) if size else None

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """See `Mixer.forward`. Raises ValueError unless the grid is of one image that the tokens fill."""
        out = self.attend(query, key, value, context)
        if self.conv_weight is not None:
            out = out + self._convolved(value, context)
        return Mixed(out.to(query.dtype))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        """`forward` without the convolution, [B, N, H, D], at least float32."""
        dtype, root = at_least_float(query.dtype), context.softmax_scale(query) ** 0.5
        keys, values = (without_masked(x, context.key_mask) for x in (key, value))
        q, k, v = (x.to(dtype).transpose(1, 2) for x in (query, keys, values))
        q, k = q * root, k * root
        landmarks = self.landmarks((q + k) / 2, one_image(context, query.shape[1], "SOFT"))
        gathered = _gaussian(landmarks, k) @ v
        out = _gaussian(q, landmarks) @ (self._inverse(_gaussian(landmarks, landmarks)) @ gathered)
        return out.transpose(1, 2)

    def landmarks(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """[B, H, N, D] -> [B, H, n, D]."""
        batch, heads, _, width = tokens.shape
        side, dtype = self.config.ratio, tokens.dtype
        images = tokens.transpose(2, 3).reshape(batch * heads, width, *grid)
        images = F.pad(images, (0, -grid[1] % side, 0, -grid[0] % side), mode="replicate")
        pooled = F.conv2d(images, self.landmark_weight.to(dtype), stride=side).flatten(2).transpose(1, 2)
        normed = F.layer_norm(pooled, (width,), self.norm_weight.to(dtype), self.norm_bias.to(dtype))
        return F.gelu(normed).unflatten(0, (batch, heads))

    def _inverse(self, kernel: torch.Tensor) -> torch.Tensor:
        """Newton's V for kernel + 0.01 I, [..., n, n], with the gradient of an inverse."""
        with torch.no_grad():
            ridged = kernel + RIDGE * torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
            start = 1.8 / kernel.sum(-1).amax(-1)[..., None, None].square()
            inverse = start * ridged
            for _ in range(self.config.iterations):
                inverse = 2 * inverse - inverse @ ridged @ inverse
        # adds zero, whose derivative is the inverse's
        return inverse - inverse @ (kernel - kernel.detach()) @ inverse if kernel.requires_grad else inverse

    def _convolved(self, value: torch.Tensor, context: Context) -> torch.Tensor:
        assert self.conv_weight is not None and context.grid is not None
        weight = self.conv_weight.repeat_interleave(self.layer.head_dim, dim=0)
        return convolve(value, weight, None, context.grid, context.key_mask)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """Head by head, with distances as differences."""
        height, width = one_image(context, query.shape[1], "SOFT")
        dtype, side = at_least_float(query.dtype), self.config.ratio
        key, value = (without_masked(x, context.key_mask) for x in (key, value))
        q, k = (x.to(dtype) * context.softmax_scale(query) ** 0.5 for x in (query, key))
        rows, columns = (torch.arange(-(-n // side) * side).clamp(max=n - 1) for n in (height, width))
        heads = []
        for head in range(query.shape[2]):
            a, b, v = q[:, :, head], k[:, :, head], value[:, :, head].to(dtype)
            image = ((a + b) / 2).unflatten(1, (height, width))[:, rows][:, :, columns]
            squares = image.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # [B, rows, r, columns, r, D]
            pooled = torch.einsum("brycxd,edyx->brce", squares, self.landmark_weight.to(dtype)).flatten(1, 2)
            pooled = (pooled - pooled.mean(-1, keepdim=True)) / (
                pooled.var(-1, correction=0, keepdim=True) + 1e-5
            ).sqrt()
            pooled = F.gelu(pooled * self.norm_weight.to(dtype) + self.norm_bias.to(dtype))
            to_query, to_key, among = (
                (-(x[:, :, None] - pooled[:, None]).square().sum(-1) / 2).exp() for x in (a, b, pooled)
            )
            heads.append(to_query @ self._inverse(among) @ to_key.transpose(1, 2) @ v)
        mixed = torch.stack(heads, dim=2)
        if self.conv_weight is not None:
            mixed = mixed + self._convolved(value, context)
        return Mixed(mixed.to(query.dtype))

    def refine(self, layer: CalibratedLayer, settings: None) -> Calibration:
        """The depthwise kernels: least squares on what the landmarks miss of the softmax."""
        if self.conv_weight is None:
            return

        def measure(call: LayerCall) -> torch.Tensor:
            inputs = call.inputs
            attended = self.attend(inputs.query, inputs.key, inputs.value, inputs.context)
            missing = call.target() - inputs.join(attended).float()
            return patch_moments(inputs, missing, self.config.kernel_size, call.weights).sum(1)

        (moments,) = yield Statistic(measure)
        check_finite(layer.name, moments)
        taps = self.config.kernel_size**2
        gram, cross = moments[:, :taps, :taps], moments[:, :taps, -1:]
        penalty = 1e-4 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + 1e-30
        solution = torch.linalg.solve(gram + penalty * torch.eye(taps, dtype=gram.dtype), cross)
        with torch.no_grad():
            self.conv_weight.copy_(solution.reshape(self.conv_weight.shape))


def _gaussian(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """exp(-|a_i - b_j|^2 / 2), [..., I, J]."""
    squares = a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :]
    return (a @ b.transpose(-1, -2) - squares / 2).exp()
