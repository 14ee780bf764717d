"""One denoising step converted with `min_tokens="auto"` beside the original: `python -m eval.bench_models --arch sd15`.

Random weights of the named architecture. `auto` must not be slower than `sdpa` at any size; `floor`, timed at the
largest size, leaves the attention product out. Every round runs each variant once, in turn; medians count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from flatten_diffusion import AdapterConfig, linearize, restore
from flatten_diffusion.models.timing import device_name

from . import bench_operator
from .architectures import ARCHITECTURES, build_model, make_inputs
from .files import write_json
from .floor import attention_free
from .timing import rotated, seconds_of
from .versions import environment

Variants = Mapping[str, tuple[Callable[[], object], Callable[[], AbstractContextManager[Any]]]]
"""name -> what to time, and the context it is timed in."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=tuple(ARCHITECTURES), default="sd15")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024], help="pixels along one side")
    parser.add_argument("--rounds", type=int, nargs="+", default=[10], help="for all sizes, or one number for each")
    parser.add_argument("--warmup", type=int, nargs="+", default=[1], help="untimed rounds, likewise")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=bench_operator.DTYPES, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result there")
    options = parser.parse_args(arguments)
    for name in ("rounds", "warmup"):
        counts = getattr(options, name)
        if len(counts) not in (1, len(options.sizes)):
            parser.error(f"--{name}: one number for all sizes, or one for each, {len(options.sizes)} in all")
        setattr(options, name, counts * len(options.sizes) if len(counts) == 1 else counts)
    return options


def interleaved(
    variants: Variants, rounds: int, warmup: int, label: str, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every variant in every round, in an order that rotates from round to round."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in tqdm(range(warmup + rounds), desc=label, unit="round", leave=False, disable=None):
        for name in rotated(list(variants), number):
            run, around = variants[name]
            with around(), torch.inference_mode():
                elapsed = seconds_of(run, device)
            if number >= warmup:
                times[name].append(elapsed)
    return times


def summary(times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Per variant: median, fastest, and how many rounds."""
    return {
        name: {"seconds": statistics.median(values), "fastest_seconds": min(values), "rounds": len(values)}
        for name, values in times.items()
    }


def ratio(rows: Mapping[str, Any], numerator: str, denominator: str) -> float:
    """Of two medians."""
    return float(rows[numerator]["seconds"] / rows[denominator]["seconds"])


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per size: medians, their ratios, and what `report` says of every converted layer at that size."""
    device = torch.device(options.device)
    model = build_model(options.arch, device, bench_operator.DTYPES[options.dtype])
    adapter = linearize(model, AdapterConfig(min_tokens="auto"))
    rows = []
    for size, rounds, warmup in zip(options.sizes, options.rounds, options.warmup, strict=True):
        inputs = make_inputs(model, size, size, options.batch, options.seed)

        def run(inputs: dict[str, Any] = inputs) -> object:
            return model(**inputs, return_dict=False)

        variants: dict[str, Any] = {"sdpa": (run, adapter.disabled), "auto": (run, nullcontext)}
        if size == max(options.sizes):
            variants["floor"] = (run, lambda: attention_free(adapter))
        times = interleaved(variants, rounds, warmup, f"{size}x{size}", device)
        measured = summary(times)
        pairs = zip(times["sdpa"], times["auto"], strict=True)
        row: dict[str, Any] = {
            "arch": options.arch,
            "size": size,
            "variants": measured,
            "sdpa_over_auto": ratio(measured, "sdpa", "auto"),
            "sdpa_over_auto_by_round": statistics.median(sdpa / auto for sdpa, auto in pairs),
            "layers": {layer.name: layer.reason for layer in adapter.report().converted},
        }
        if "floor" in measured:
            row["floor_over_auto"] = ratio(measured, "floor", "auto")
        rows.append(row)
    restore(model)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        shown = ", ".join(f"{name} {entry['seconds']:.4f} s" for name, entry in row["variants"].items())
        floor = f", floor / auto {row['floor_over_auto']:.3f}" if "floor_over_auto" in row else ""
        speedup = f"sdpa / auto {row['sdpa_over_auto']:.3f}"
        lines.append(f"{row['arch']} {row['size']}x{row['size']}: {shown}, {speedup}{floor}")
    return "\n".join(lines)


def header(module: str, given: list[str], device: torch.device) -> dict[str, Any]:
    """How a result was made: command, versions, hardware, date and the load the machine had before."""
    extra = {"cpu": device_name(torch.device("cpu")), "load_before": list(os.getloadavg())}
    return {"command": " ".join([f"python -m {module}", *given]), "environment": environment(device) | extra}


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    given = sys.argv[1:] if arguments is None else arguments
    result = header("eval.bench_models", given, torch.device(options.device)) | {"model": measure(options)}
    print(table(result["model"]))
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
