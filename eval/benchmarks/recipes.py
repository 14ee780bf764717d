"""What distilling a model at full size asks of memory, from its shapes alone (meta device, no weights).

Per architecture: bytes of the model's bfloat16 weights, the parameters that distillation learns (the mixer's own, and
factors and bias of every projection's low-rank change), and the bytes of their training state: weight, gradient, two
Adam moments and an average, in float32. Activations, text encoders and the autoencoder come on top.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flatten_diffusion import AdapterConfig, linearize
from flatten_eval.speed.architectures import ARCHITECTURES, build_meta_model

from .conversion import ARCHS, tensor_bytes

# Weight, gradient, two moments, average.
_COPIES, _FLOAT32 = 5, 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--archs", nargs="+", choices=tuple(ARCHITECTURES), default=list(ARCHS), metavar="NAME")
    parser.add_argument("--window", type=int, default=8, help="side of the windows of transformers; UNets have none")
    parser.add_argument("--rank", type=int, default=16, help="of the projections' LoRA factors")


def check(options: argparse.Namespace) -> str | None:
    return "--window must be 0 or more, --rank 1 or more" if options.window < 0 or options.rank < 1 else None


def run(options: argparse.Namespace) -> dict[str, Any]:
    rows = [measure(name, options.window, options.rank) for name in options.archs]
    print(table(rows))
    return {"dtype": "bfloat16", "window": options.window, "rank": options.rank, "recipes": rows}


def measure(name: str, window: int, rank: int) -> dict[str, Any]:
    """One row; see above."""
    model = build_meta_model(name, torch.bfloat16)
    weights = tensor_bytes(model)
    unet = type(model).__name__.startswith("UNet")
    adapter = linearize(model, AdapterConfig(window=0 if unet else window))
    adapter.add_deltas(("q", "k", "v", "out"), rank=rank)
    learned = sum(parameter.numel() for parameter in adapter.parameters())
    state = learned * _COPIES * _FLOAT32
    return {
        "arch": name,
        "model_bytes": weights,
        "layers": len(adapter.layers),
        "learned": learned,
        "state_bytes": state,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(
        f"{row['arch']:<7} {row['model_bytes'] / 2**30:6.2f} GiB weights, {row['layers']:3d} layers, "
        f"{row['learned'] / 1e6:6.2f} M learned, {row['state_bytes'] / 2**30:5.2f} GiB training state"
        for row in rows
    )
