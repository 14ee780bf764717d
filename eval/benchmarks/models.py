"""One denoising step converted with `min_tokens="auto"` beside the original.

Random weights of the named architecture. `auto` must not be slower than `sdpa` at any size; `floor`, timed at the
largest size, leaves the attention product out.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from flatten_diffusion import AdapterConfig, linearize, restore
from flatten_eval.pipelines import DTYPES
from flatten_eval.speed.architectures import ARCHITECTURES, build_model, make_inputs
from flatten_eval.speed.floor import attention_free
from flatten_eval.speed.timing import Candidate, measure, ratio

DEFAULTS: dict[str, Any] = {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", choices=tuple(ARCHITECTURES), default="sd15")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024], help="pixels along one side")
    parser.add_argument("--rounds", type=int, nargs="+", default=[10], help="for all sizes, or one number for each")
    parser.add_argument("--warmup", type=int, nargs="+", default=[1], help="untimed rounds, likewise")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def check(options: argparse.Namespace) -> str | None:
    for name in ("rounds", "warmup"):
        if len(getattr(options, name)) not in (1, len(options.sizes)):
            return f"--{name}: one number for all sizes, or one for each, {len(options.sizes)} in all"
    return None


def run(options: argparse.Namespace) -> dict[str, Any]:
    count = len(options.sizes)
    rounds, warmup = ((given * count)[:count] for given in (options.rounds, options.warmup))
    sizes = list(zip(options.sizes, rounds, warmup, strict=True))
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    rows = measure_models(options.arch, sizes, device, dtype, options.batch, options.seed)
    print(table(rows))
    return {"model": rows}


def measure_models(
    arch: str,
    sizes: Sequence[tuple[int, int, int]],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A row per (size, rounds, warmup): medians, their ratios, and what `report` says of every converted layer."""
    model = build_model(arch, device, dtype)
    adapter = linearize(model, AdapterConfig(min_tokens="auto"))
    rows = []
    for size, rounds, warmup in sizes:
        inputs = make_inputs(model, size, size, batch, seed)

        @torch.inference_mode()
        def forward(inputs: dict[str, Any] = inputs) -> object:
            return model(**inputs, return_dict=False)

        candidates = {"sdpa": Candidate(forward, adapter.disabled), "auto": Candidate(forward)}
        if size == max(size for size, *_ in sizes):
            candidates["floor"] = Candidate(forward, lambda: attention_free(adapter))
        found = measure(candidates, device, rounds=rounds, warmup=warmup, label=f"{size}x{size}", memory=False)
        pairs = list(zip(found["sdpa"].samples, found["auto"].samples, strict=False))
        row: dict[str, Any] = {
            "arch": arch,
            "size": size,
            "variants": {name: measurement.as_dict() for name, measurement in found.items()},
            "sdpa_over_auto": ratio(found, "sdpa", "auto"),
            "sdpa_over_auto_by_round": statistics.median(sdpa / auto for sdpa, auto in pairs) if pairs else None,
            "layers": {layer.name: layer.reason for layer in adapter.report().converted},
        }
        if "floor" in found:
            row["floor_over_auto"] = ratio(found, "floor", "auto")
        rows.append(row)
    restore(model)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        found = row["variants"].items()
        shown = [
            f"{name} {entry['median']:.4f} s" if entry["median"] else f"{name} {entry['failure']}"
            for name, entry in found
        ]
        shown += [
            f"{name.replace('_over_', ' / ')} {row[name]:.3f}"
            for name in ("sdpa_over_auto", "floor_over_auto")
            if row.get(name) is not None
        ]
        lines.append(f"{row['arch']} {row['size']}x{row['size']}: {', '.join(shown)}")
    return "\n".join(lines)
