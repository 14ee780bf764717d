"""What calibration measures while the teacher runs: what samples count, errors of layers, and second moments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F

from ..adapter import Adapter
from ..mixers import Grid, pictures_of
from ..models import find_projection
from ..ops import focused_linear_attention
from .record import LayerCall, MixerInputs, watch_teacher

Reduce = Callable[[torch.Tensor], torch.Tensor]
"""Sum of a tensor over all processes."""


_Function = TypeVar("_Function", bound=Callable[..., Any])


def in_full_precision(function: _Function) -> _Function:
    """Decorator: no autocast inside, which would take sums of products in half precision where the teacher runs so."""

    @wraps(function)
    def exact(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return cast(_Function, exact)


@dataclass(frozen=True)
class Batch:
    """One forward pass, and what each of its samples counts, [B]."""

    run: Callable[[], torch.Tensor]
    weights: torch.Tensor

    def roots(self, rows: torch.Tensor) -> torch.Tensor:
        """[B', 1, 1], the weights' roots for tokens [B', ...], where B' may hold several frames of each sample."""
        roots = self.weights.sqrt()
        if len(rows) % len(roots):
            return roots.new_ones(len(rows), 1, 1).to(rows.device)
        return roots.repeat_interleave(len(rows) // len(roots))[:, None, None].to(rows.device)

    def token_roots(self, rows: torch.Tensor) -> torch.Tensor:
        """[B' N, 1], the same for every token of [B', N, ...]."""
        return self.roots(rows).expand(-1, rows.shape[1], -1).flatten(0, 1)


@torch.no_grad()
def weigh(adapter: Adapter, runs: Sequence[Callable[[], torch.Tensor]], reduce: Reduce) -> list[Batch]:
    """Per sample, the squared change of the prediction by the squared errors of the layers; 1 on average."""
    ratios: list[torch.Tensor] = []
    for run in runs:
        errors: list[torch.Tensor] = []

        def consume(call: LayerCall, errors: list[torch.Tensor] = errors) -> None:
            rows = call.student_rows()
            if rows is not None:
                missing = project(call, call.rows.float() - rows.float())
                errors.append(missing.square().flatten(1).sum(1).double().cpu())

        with watch_teacher(adapter, consume):
            wanted = run()
        moved = (run().float() - wanted.float()).square().flatten(1).sum(1).double().cpu()
        fitting = [error.reshape(len(moved), -1).sum(1) for error in errors if len(error) % len(moved) == 0]
        missed = torch.stack(fitting).sum(0) if fitting else torch.ones_like(moved)
        ratio = moved / missed
        # A prediction that did not move, or half precision that ran over, says nothing.
        ratios.append(torch.where(ratio.isfinite() & (ratio > 0), ratio, torch.nan))
    said = torch.cat(ratios).nan_to_num(0.0)
    total = reduce(torch.stack([said.sum(), (said > 0).sum().double()]))
    mean = total[0] / total[1].clamp(min=1)
    return [Batch(run, (ratio / mean).nan_to_num(1.0).float()) for run, ratio in zip(runs, ratios, strict=True)]


def watch(adapter: Adapter, batches: Sequence[Batch], consume: Callable[[LayerCall, Batch], None]) -> None:
    """Run the teacher on each batch, without gradients, and hand over every call of a converted layer."""
    for batch in batches:

        def consume_call(call: LayerCall, batch: Batch = batch) -> None:
            consume(call, batch)

        with torch.no_grad(), watch_teacher(adapter, consume_call):
            batch.run()


@in_full_precision
def second_moments(features: torch.Tensor, targets: torch.Tensor, roots: torch.Tensor) -> torch.Tensor:
    """[..., F + 1 + T, F + 1 + T] in float64 on CPU of features [..., R, F], 1 and targets [..., R, T], all times the
    roots [R, 1] of what the rows count: all that a regression needs."""
    ones = torch.ones_like(targets[..., :1], dtype=torch.float32)
    rows = torch.cat([features.float(), ones, targets.float()], dim=-1) * roots
    return (rows.transpose(-1, -2) @ rows).double().cpu()


def solve_ridge(second: torch.Tensor, features: int, ridge: float) -> torch.Tensor:
    """[..., T, F + 1] from `second_moments`: the regression's matrix and, in the last column, its intercept, which the
    penalty (`ridge` times the features' mean square) leaves alone."""
    size = features + 1
    gram, cross = second[..., :size, :size], second[..., :size, size:]
    penalty = ridge * gram.diagonal(dim1=-2, dim2=-1)[..., :-1].mean(-1, keepdim=True) + 1e-30
    penalty = torch.cat([penalty.expand(*penalty.shape[:-1], features), torch.zeros_like(penalty)], dim=-1)
    return torch.linalg.solve(gram + penalty.diag_embed(), cross).transpose(-1, -2)


def squared_errors(second: torch.Tensor, solution: torch.Tensor) -> torch.Tensor:
    """[...]: sums of squared errors of solutions [..., T, F + 1]."""
    eye = torch.eye(solution.shape[-2], dtype=solution.dtype).expand(*solution.shape[:-1], -1)
    rows = torch.cat([-solution, eye], dim=-1)
    return (rows @ second * rows).sum((-2, -1))


@in_full_precision
def linear_part(inputs: MixerInputs, power: float, scale: torch.Tensor) -> torch.Tensor:
    """The focused linear part alone, [B, N, H, D] in float32."""
    query, key, value = (x.float() for x in (inputs.query, inputs.key, inputs.value))
    return focused_linear_attention(
        query, key, value, focusing_factor=power, scale=scale.float(), key_mask=inputs.key_mask
    )


def shared_part(inputs: MixerInputs, feature: torch.Tensor) -> torch.Tensor:
    """A part of the mixer's output as it counts in the layer's product, [B, N, H, D]."""
    return feature if inputs.share is None else inputs.share.float() * feature


def frames_of(tokens: torch.Tensor, grid: Grid) -> list[torch.Tensor]:
    """[B, N, H, D] -> for each picture [B * frames * H, D, height, width], in float32."""
    batch, _, heads, head_dim = tokens.shape
    pictures = pictures_of(grid)
    parts = tokens.float().split([frames * height * width for frames, height, width in pictures], dim=1)
    return [
        part.reshape(batch * frames, height * width, heads, head_dim)
        .permute(0, 2, 3, 1)
        .reshape(batch * frames * heads, head_dim, height, width)
        for part, (frames, height, width) in zip(parts, pictures, strict=True)
    ]


@in_full_precision
def patch_moments(inputs: MixerInputs, missing: torch.Tensor, kernel_size: int, batch: Batch) -> torch.Tensor:
    """[H, D, K * K + 1, K * K + 2] in float64: per channel, the normal equations of the kernel and bias."""
    assert inputs.grid is not None
    heads, head_dim, taps = *missing.shape[-2:], kernel_size * kernel_size
    total = torch.zeros(heads, head_dim, taps + 1, taps + 2, dtype=torch.float64)
    roots = batch.roots(missing)[..., None]
    missing = missing * roots
    shares = roots * (torch.ones_like(missing[..., :1]) if inputs.share is None else inputs.share)
    pictures = zip(*(frames_of(tokens, inputs.grid) for tokens in (inputs.value, missing, shares)), strict=True)
    for picture in pictures:
        for head in range(heads):
            parts = (tokens[head::heads].split(32) for tokens in picture)  # bounds the patches
            for values, targets, weights in zip(*parts, strict=True):
                patches = F.unfold(values, kernel_size, padding=kernel_size // 2)
                patches = patches.reshape(len(values), head_dim, taps, -1).permute(1, 2, 0, 3).flatten(2)
                patches = torch.cat([patches, patches.new_ones(head_dim, 1, patches.shape[-1])], dim=1)  # [D, taps, N]
                patches = patches * weights.reshape(1, 1, -1)
                wanted = targets.permute(1, 0, 2, 3).reshape(head_dim, 1, -1)
                total[head] += (patches @ torch.cat([patches, wanted], dim=1).transpose(1, 2)).double().cpu()
    return total


@in_full_precision
def project(call: LayerCall, mixed: torch.Tensor) -> torch.Tensor:
    """The base output projection without its bias, in float32; nothing where the layer has none of its own."""
    projection = find_projection(call.attn, "out")
    return mixed.float() if projection is None else F.linear(mixed.float(), projection.weight(call.attn).float())


def output_error(call: LayerCall, student: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[2]: squared error of the projected output, and the variance of the teacher's, summed."""
    roots = batch.roots(student)
    wanted = project(call, call.rows)
    error = (project(call, call.rows.float() - student.float()) * roots).square().sum()
    spread = ((wanted - wanted.mean((0, 1), keepdim=True)) * roots).square().sum()
    return torch.stack([error, spread]).double().cpu()


def share_missed(error: torch.Tensor) -> float:
    """The error of `output_error`'s sums as a share of the variance."""
    return float(error[0] / error[1])


def check_finite(name: str, moments: torch.Tensor) -> None:
    """Raise ValueError, naming the layer, unless all of its moments are finite."""
    if not moments.isfinite().all():
        raise ValueError(f"{name}: the teacher's activations are not finite: run calibration in float32 or bfloat16.")
