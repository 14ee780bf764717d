"""The operator alone, beside SDPA and beside a copy of as many bytes.

`x SDPA` is the fastest softmax's time over the variant's; `of copy` the time of reading query, key and value and
writing the output once, at the copy's speed, over the variant's. On CUDA, `public:...` is the nearest Triton linear
attention on the package index, where installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from flatten_eval.pipelines import DTYPES
from flatten_eval.speed.operator import OperatorSettings, measure_operator

DEFAULTS: dict[str, Any] = {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=40)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--kernel_size", type=int, default=0, help="depthwise convolution; 0 leaves it out")
    parser.add_argument("--focusing_factor", type=float, default=3.0)
    parser.add_argument("--feature_maps", action="store_true", help="also time the operator with maps of query and key")
    parser.add_argument("--window", type=int, default=0, help="also time the operator joined with windows of this side")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--backward", action="store_true", help="time forward and backward together")
    parser.add_argument("--compile", action="store_true", help="also time the operator under torch.compile")
    parser.add_argument("--graphs", action="store_true", help="CUDA: replay captured graphs (no launch cost)")
    parser.add_argument("--no_sdpa", action="store_true")
    parser.add_argument("--no_public", action="store_true", help="leave out Triton linear attentions of other packages")


def check(options: argparse.Namespace) -> str | None:
    if options.graphs and (torch.device(options.device).type != "cuda" or options.backward or options.warmup < 1):
        return "--graphs needs a CUDA device, a --warmup and no --backward"
    if options.kernel_size < 0 or (options.kernel_size and options.kernel_size % 2 == 0):
        return "--kernel_size must be odd, or 0"
    return "--window must be at least 2, or 0" if options.window < 0 or options.window == 1 else None


def settings_of(options: argparse.Namespace) -> OperatorSettings:
    """What the options name."""
    return OperatorSettings(
        options.batch, options.heads, options.head_dim, DTYPES[options.dtype], options.kernel_size,
        options.focusing_factor, options.feature_maps, options.window, options.backward, options.compile,
        options.graphs, softmax=not options.no_sdpa, all_backends=False, public=not options.no_public,
        seed=options.seed,
    )  # fmt: skip


def run(options: argparse.Namespace) -> dict[str, Any]:
    device, settings = torch.device(options.device), settings_of(options)
    how = {"rounds": options.rounds, "warmup": options.warmup, "memory": False}
    rows = [measure_operator(tokens, device, settings, **how) for tokens in options.tokens]
    print(table(rows))
    kept = {name: value for name, value in vars(options).items() if name not in ("json", "benchmark")}
    return {"settings": kept, "operator": rows}


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'tokens':>8} {'variant':<24} {'ms':>10} {'x SDPA':>8} {'of copy':>8}"]
    for row in rows:
        for name, found in row["variants"].items():
            start = f"{row['tokens']:>8} {name:<24} "
            if found["failure"] is not None:
                lines.append(start + found["failure"])
                continue
            speedup, share = found["speedup_over_sdpa"], found["of_copy_bandwidth"]
            shown = "-" if speedup is None else f"{speedup:.2f}", "-" if share is None else f"{share:.0%}"
            lines.append(f"{start}{found['median'] * 1e3:>10.3f} {shown[0]:>8} {shown[1]:>8}")
    return "\n".join(lines)
