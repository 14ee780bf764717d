"""Linear-angular attention of Castling-ViT: the angle between query and key to first order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .base import Calibration, Context, LayerShape, Mixed, Mixer, MixerConfig
from .calibration import CalibratedLayer, LayerCall, MixerInputs, Statistic
from .parts.least_squares import check_finite, in_full_precision
from .parts.linear import fit_gain, hide, wide
from .registry import register_mixer

_TINY = 1e-12
"""Least norm that is divided by, so that zeros stay zeros."""


@dataclass(frozen=True)
class AngularConfig(MixerConfig):
    """Settings of `AngularAttention`.

    Args:
        taps: of the filter along the sequence of values, odd, at most 63; 9 is the paper's, 0 leaves it out.

    Raises:
        ValueError: a value out of range.
    """

    taps: int = 9

    def __post_init__(self) -> None:
        taps = self.taps
        if isinstance(taps, bool) or not isinstance(taps, int) or not 0 <= taps <= 63 or (taps and taps % 2 == 0):
            raise ValueError(f"taps is {taps!r:.60}: pass an odd number up to 63, or 0 for no filter.")


@register_mixer("angular")
class AngularAttention(Mixer):
    """With u_i = q_i / |q_i| and w_j = k_j / |k_j|, per head

        y_i = v_i / 2 + u_i [sum_j w_j^T v_j] / pi,    out_i = c_h y_i / |y_i| + sum_t a_ht v_{i+t},

    where the filter runs along the sequence of tokens, rows one after another, as in the authors' code; so is v_i / 2,
    the constant of the token's own value alone. What the paper adds while training (the largest entries of the softmax)
    needs every pair, and is left out.

    Parameters:
        gain: [heads], c_h, ones, which is the paper's; calibration finds the length that softmax gives.
        filter: [heads, taps], a_h, zeros. Absent when `taps` is 0.

    Source: You et al., "Castling-ViT: Compressing Self-Attention via Switching Towards Linear-Angular Attention at
    Vision Transformer Inference", CVPR 2023.
    """

    Config = AngularConfig
    examples = (AngularConfig(), AngularConfig(taps=0))
    summary = "values weighed by the angle of query and key, to first order, at unit length"
    source = "You et al., Castling-ViT, CVPR 2023"
    supports = frozenset({"mask", "text", "window", "compile"})

    def __init__(self, config: AngularConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        self.gain = nn.Parameter(torch.ones(layer.heads))
        self.filter = nn.Parameter(torch.zeros(layer.heads, config.taps)) if config.taps else None

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """See `Mixer.forward`."""
        value = hide(value, context.key_mask)
        mixed = wide(self.gain)[:, None] * self._directions(query, key, value, context)
        if self.filter is not None:
            mixed = mixed + self._filtered(wide(value))
        return Mixed(mixed.to(query.dtype))

    def _directions(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context
    ) -> torch.Tensor:
        """y_i / |y_i| [B, N, H, D], at least float32; masked values are zeros."""
        with torch.autocast(query.device.type, enabled=False):
            query, value = F.normalize(wide(query), dim=-1, eps=_TINY), wide(value)
            key = F.normalize(wide(hide(key, context.key_mask)), dim=-1, eps=_TINY)
            state = torch.einsum("bmhd,bmhe->bhde", key, value)
            mixed = value / 2 + torch.einsum("bnhd,bhde->bnhe", query, state) / math.pi
            return F.normalize(mixed, dim=-1, eps=_TINY)

    def _filtered(self, value: torch.Tensor) -> torch.Tensor:
        """The filter along the tokens, [B, N, H, D]; one for all channels of a head."""
        assert self.filter is not None
        batch, tokens, heads, dim = value.shape
        lines = value.permute(0, 3, 2, 1).reshape(batch * dim, heads, tokens)
        weight = self.filter.to(value.dtype)[:, None]
        with torch.autocast(value.device.type, enabled=False):
            lines = F.conv1d(lines, weight, padding=self.config.taps // 2, groups=heads)
        return lines.reshape(batch, dim, heads, tokens).permute(0, 3, 2, 1)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """The weights of all pairs as a matrix, and the filter tap by tap."""
        key, value = hide(key, context.key_mask), hide(value, context.key_mask)
        query, key = (F.normalize(x, dim=-1, eps=_TINY) for x in (query, key))
        weights = torch.einsum("bnhd,bmhd->bnhm", query, key) / math.pi
        mixed = value / 2 + torch.einsum("bnhm,bmhd->bnhd", weights, value)
        mixed = self.gain.to(mixed.dtype)[:, None] * F.normalize(mixed, dim=-1, eps=_TINY)
        if self.filter is not None:
            for tap, shifted in enumerate(_shifted(value, self.config.taps)):
                mixed = mixed + self.filter[:, tap, None].to(mixed.dtype) * shifted
        return Mixed(mixed)

    def calibrate(self, layer: CalibratedLayer, settings: None) -> Calibration:
        """Each head's length, by least squares. Returns them."""

        def parts(inputs: MixerInputs) -> tuple[torch.Tensor, torch.Tensor]:
            value = hide(inputs.value, inputs.context.key_mask)
            local = torch.zeros_like(value) if self.filter is None else self._filtered(wide(value))
            return local, self._directions(inputs.query, inputs.key, value, inputs.context)

        return (yield from fit_gain(self.gain, parts, layer))

    @torch.no_grad()
    def _solve(self, name: str, moments: torch.Tensor) -> None:
        assert self.filter is not None
        check_finite(name, moments)
        gram, cross = moments[..., :-1], moments[..., -1]
        penalty = 1e-4 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + 1e-30
        self.filter.copy_(torch.linalg.solve(gram + penalty * torch.eye(gram.shape[-1], dtype=gram.dtype), cross))

    def refine(self, layer: CalibratedLayer, settings: None) -> Calibration:
        """The filter: least squares on what the directions miss of the softmax, over all channels of a head."""
        if self.filter is None:
            return

        @in_full_precision
        def measure(call: LayerCall) -> torch.Tensor:
            inputs = call.inputs
            value = hide(inputs.value, inputs.context.key_mask).float()
            directions = self._directions(inputs.query, inputs.key, value, inputs.context)
            missing = call.target() - inputs.join(wide(self.gain)[:, None] * directions).float()
            rows = [inputs.shared(x) for x in _shifted(value, self.config.taps)]
            stacked = torch.stack([*rows, missing]) * call.weights.roots(missing)[..., None]
            by_head = stacked.permute(3, 0, 1, 2, 4).flatten(2)  # [H, taps + 1, B N D]
            return (by_head[:, :-1] @ by_head.transpose(1, 2)).double().cpu()

        (moments,) = yield Statistic(measure)
        self._solve(layer.name, moments)


def _shifted(value: torch.Tensor, taps: int) -> list[torch.Tensor]:
    """The values [B, N, H, D] of the tokens at every offset of the filter, zeros beyond the ends."""
    padded = F.pad(value, (0, 0, 0, 0, taps // 2, taps // 2))
    return [padded[:, tap : tap + value.shape[1]] for tap in range(taps)]
