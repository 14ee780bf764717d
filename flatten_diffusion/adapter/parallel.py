"""One image's tokens over several processes, for a whole converted transformer: see `Adapter.token_parallel`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ..mixers import images_of
from ..models import ARCHITECTURES, find_attention_layers
from ..ops import even_rows
from .handle import AdapterHandle

_BETWEEN = {row.owner: row.between for row in ARCHITECTURES if row.between is not None}


@contextmanager
def token_parallel(handle: AdapterHandle, group: Any) -> Iterator[nn.Module]:
    """See `Adapter.token_parallel`."""
    model = handle.model
    first, last = _check(handle)
    if not dist.is_initialized():
        raise RuntimeError("token_parallel needs torch.distributed: start with torchrun and init_process_group first.")
    processes: Any = dist.group.WORLD if group is None else group
    layers = [layer for _, layer, _ in handle.converted_layers()]
    if any(layer.group is not None for layer in layers):
        raise RuntimeError("token_parallel() does not nest.")

    def rows() -> tuple[int, ...]:
        grid = layers[0].grid
        assert grid is not None, "the grid hook ran before"
        return even_rows(images_of(grid)[0][1], dist.get_world_size(processes))

    def take(module: nn.Module, args: Any, tokens: torch.Tensor) -> torch.Tensor:
        return _own_rows(tokens, rows(), dist.get_rank(processes))

    def gather(module: nn.Module, args: Any, tokens: torch.Tensor) -> torch.Tensor:
        return _all_rows(tokens, rows(), processes)

    kept = [(layer, layer.min_tokens) for layer in layers]
    hooks = [model.get_submodule(first).register_forward_hook(take)]
    hooks.append(model.get_submodule(last).register_forward_hook(gather))
    for layer in layers:
        layer.group, layer.min_tokens = processes, 0
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()
        for layer, min_tokens in kept:
            layer.group, layer.min_tokens = None, min_tokens


def _check(handle: AdapterHandle) -> tuple[str, str]:
    model = handle.model
    name = next((cls.__name__ for cls in type(model).__mro__ if cls.__name__ in _BETWEEN), None)
    if name is None:
        raise ValueError(f"token_parallel knows {', '.join(_BETWEEN)} only, not {type(model).__name__}.")
    for path, mixer in handle.layer_mixers():
        if mixer.window is not None:
            raise ValueError(f"{path}: windows cannot be split over processes: convert with window=0.")
        if "split" not in mixer.mixer.supports:
            raise ValueError(f"{path}: {mixer.mixer.config.name} cannot be split over processes: choose another mixer.")
    left = [row.name for row in find_attention_layers(model) if row.reason is None and row.name not in handle.layers]
    if left:
        raise ValueError(f"{left[0]} stayed softmax, which needs every token in one process: convert every layer.")
    return _BETWEEN[name]


def _own_rows(tokens: torch.Tensor, rows: tuple[int, ...], rank: int) -> torch.Tensor:
    """[B, h * w, C] -> this process's rows of it."""
    width = tokens.shape[1] // sum(rows)
    return tokens.narrow(1, sum(rows[:rank]) * width, rows[rank] * width)


def _all_rows(tokens: torch.Tensor, rows: tuple[int, ...], group: Any) -> torch.Tensor:
    """The inverse of `_own_rows`, on every process."""
    if torch.is_grad_enabled() and tokens.requires_grad:
        raise RuntimeError("token_parallel is for inference: call the model under torch.no_grad or inference_mode.")
    rank = dist.get_rank(group)
    width = tokens.shape[1] // rows[rank]
    longest = max(rows) * width
    # Collectives want equal sizes: shorter shares are padded, and cut again.
    padded = F.pad(tokens, (0, 0, 0, longest - tokens.shape[1])).contiguous()
    parts = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:, : count * width] for part, count in zip(parts, rows, strict=True)], dim=1)
