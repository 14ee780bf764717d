"""What `linearize` itself costs at full size: seconds, and memory beside the model's own.

Per architecture: seconds of `linearize(model)` with the default config, in rounds with `restore` between them, and the
memory it adds, as a share of the model's own. `added_bytes` are the new parameters and buffers. `peak_bytes` is how far
the process's resident memory rose during the first round (null where the system does not tell); the shapes run one
after another, so only the first finds everything cold: name one in --archs to see it alone. Weights are random, or on
the meta device where they would take more than 80 % of the free memory: there the new parameters take no memory either,
so `extra_bytes` is the sum of both numbers instead of the larger one. A row meets its target with every round under
10 seconds and `extra_bytes` under 2 % of the model.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flatten_diffusion import linearize, restore
from flatten_eval.pipelines import DTYPES
from flatten_eval.speed.architectures import ARCHITECTURES, build_meta_model, build_model, free_memory
from flatten_eval.speed.timing import reset_peak_resident, resident

ARCHS = ("sd15", "sdxl", "pixart", "sd3", "flux")
SECONDS = 10.0
SHARE = 0.02
# Of free memory; the rest is for what else runs.
_USABLE = 0.8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--archs", nargs="+", choices=tuple(ARCHITECTURES), default=list(ARCHS), metavar="NAME")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)


def check(options: argparse.Namespace) -> str | None:
    return f"--rounds {options.rounds}: at least 1" if options.rounds < 1 else None


def run(options: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for name in options.archs:
        rows.append(measure(name, DTYPES[options.dtype], options.rounds))
        gc.collect()  # the model's own reference cycles would keep it beside the next one
        print(table(rows[-1:]), flush=True)
    return {"dtype": options.dtype, "at_most": {"seconds": SECONDS, "share": SHARE}, "conversion": rows}


def tensor_bytes(model: torch.nn.Module) -> int:
    """Of all parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def build(name: str, dtype: torch.dtype) -> tuple[torch.nn.Module, str]:
    """The architecture on the CPU, "random", or, where it does not fit, on the meta device, "meta"."""
    shapes, cpu = build_meta_model(name, dtype), torch.device("cpu")
    free = free_memory(cpu)
    if free is not None and tensor_bytes(shapes) > _USABLE * free:
        return shapes, "meta"
    return build_model(name, cpu, dtype), "random"


def measure(name: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """One row; see above."""
    model, weights = build(name, dtype)
    gc.collect()
    model_bytes = tensor_bytes(model)
    seconds = []
    layers, added, peak = 0, 0, None
    for number in range(rounds):
        before = resident("VmRSS") if reset_peak_resident() else None
        started = time.perf_counter()
        adapter = linearize(model)
        seconds.append(time.perf_counter() - started)
        if number == 0:
            highest = None if before is None else resident("VmHWM")
            peak = None if before is None or highest is None else max(0, highest - before)
            layers, added = len(adapter.report().converted), tensor_bytes(model) - model_bytes
        del adapter
        restore(model)
    return {
        "arch": name,
        "class": type(model).__name__,
        "weights": weights,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "model_bytes": model_bytes,
        "layers": layers,
        "seconds": seconds,
        "added_bytes": added,
        "peak_bytes": peak,
    } | judge(model_bytes, weights, seconds, added, peak)


def judge(model_bytes: int, weights: str, seconds: list[float], added: int, peak: int | None) -> dict[str, Any]:
    """The memory that counts, its share of the model, and whether the row meets its target."""
    extra = added + (peak or 0) if weights == "meta" else max(added, peak or 0)
    share = extra / model_bytes
    return {"extra_bytes": extra, "share": share, "met": max(seconds) < SECONDS and share < SHARE}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
        lines.append(
            f"{row['arch']:<7} {row['model_bytes'] / 2**30:6.2f} GiB {row['weights']:<6} {row['layers']:4d} layers: "
            f"first {row['seconds'][0]:.3f} s, slowest {max(row['seconds']):.3f} s; added "
            f"{row['added_bytes'] / 2**20:.2f} MiB, peak {peak} MiB, {row['share']:.3%}  "
            + ("met" if row["met"] else "MISSED")
        )
    return "\n".join(lines)
