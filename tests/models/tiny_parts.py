"""What a tiny model of the rebound families is, and how several of them are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from flatten_diffusion.mixers import Grid

R, T = torch.randn, torch.tensor


@dataclass
class TinyWrapped:
    """A model, a call of it, the changes that turn its image on its side, and what a conversion must find."""

    model: nn.Module
    inputs: dict[str, Any]
    turn: dict[str, Any]
    grid: Grid
    turned_grid: Grid
    converted: int
    total: int
    joint: int = 0
    include: list[str] | None = field(default=None)
    batch: int = 2

    def __call__(self, model: nn.Module | None = None, **changes: Any) -> torch.Tensor:
        """All outputs of one call, flat."""
        output = (self.model if model is None else model)(**{**self.inputs, **changes})
        parts = list(output) if isinstance(output, tuple) else list(output.values())
        parts = [p for part in parts for p in (part if isinstance(part, (list, tuple)) else [part]) if p is not None]
        return torch.cat([part.flatten() for part in parts])


def turn(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(-1, -2).contiguous()


def picture(model: nn.Module, counts: tuple[int, int, int], grid: Grid = (4, 6), **inputs: Any) -> TinyWrapped:
    """A model that is given `hidden_states` as an image or video."""
    turned = {"hidden_states": turn(inputs["hidden_states"])}
    return TinyWrapped(model, inputs, turned, grid, (*grid[:-2], grid[-1], grid[-2]), *counts)


def position_ids(height: int, width: int, picture: int = 0, columns: int = 3) -> torch.Tensor:
    """[height * width, columns]: (image, row, column, 0...)."""
    ids = torch.zeros(height, width, columns)
    ids[..., 0] = picture
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None]
    return ids.reshape(height * width, columns)


def flux_like(model: nn.Module, columns: int = 3, **more: Any) -> TinyWrapped:
    inputs = {
        "hidden_states": R(2, 24, 4),
        "encoder_hidden_states": R(2, 7, 24),
        "timestep": T([0.5, 0.5]),
        "img_ids": position_ids(4, 6, columns=columns),
        "txt_ids": torch.zeros(7, columns),
        **more,
    }
    return TinyWrapped(model, inputs, {"img_ids": position_ids(6, 4, columns=columns)}, (4, 6), (6, 4), 2, 2, 2)


def text_mask() -> torch.Tensor:
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 5:] = False
    return mask


def wake(model: nn.Module) -> nn.Module:
    """The model with its zero parameters made random: gates and output layers that start at zero hide everything."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model
