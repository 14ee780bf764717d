"""The speed table for two CPU cores: `python -m eval.bench_cpu --json eval/results/cpu.json`, about six minutes idle.

Operator: query, key and value of 8 heads of 40 in float32 (and bfloat16), 4,096 and 16,384 tokens, against
`scaled_dot_product_attention`; with the 5x5 convolution of a converted layer, and without any. Model: one forward pass
of a UNet of Stable Diffusion 1.5's shape with random weights, converted with `min_tokens="auto"`, against the same
model unconverted and against the floor, which leaves the attention product out. Every round runs each variant once, in
turn; medians count.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from flatten_diffusion import focused_linear_attention

from . import bench_models, bench_operator
from .files import write_json

# (row, the ratio it must reach, the ratio aimed at)
REQUIRED: tuple[tuple[str, float, float], ...] = (
    ("operator, 4096 tokens", 6.0, 12.0),
    ("operator, 16384 tokens", 50.0, 120.0),
    ("operator compiled, 16384 tokens", 80.0, 150.0),
    ("unet 1024x1024 against sdpa", 1.5, 1.5),
    ("unet 1024x1024 against the floor", 0.0, 1 / 1.05),
    ("unet 512x512 against sdpa", 0.97, 1.0),
    ("unet 256x256 against sdpa", 0.97, 1.0),
    ("bfloat16 against float32, 16384 tokens", 1.0, 1.0),
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arch", default="sd15", help="of the model rows, see eval/architectures.py")
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 512, 1024], help="pixels; none: no model rows")
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 16384], help="none: no operator rows")
    parser.add_argument("--rounds", type=int, default=9, help="of the operator")
    parser.add_argument("--model_rounds", type=int, nargs="*", default=[9, 5, 3], help="one number for each size")
    parser.add_argument("--no_compile", action="store_true", help="leave the compiled operator out")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if len(options.model_rounds) != len(options.sizes):
        parser.error(f"--model_rounds: one number for each of --sizes, {len(options.sizes)} in all")
    return options


def operator_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Against SDPA at every size, with and without the convolution."""
    rows = []
    for kernel_size in (5, 0):
        settings = ["--device", "cpu", "--kernel_size", str(kernel_size), "--rounds", str(options.rounds), "--warmup",
                    "2", "--seed", str(options.seed)]  # fmt: skip
        settings += [] if options.no_compile else ["--compile"]
        measured = bench_operator.parse_arguments(settings)
        for tokens in options.tokens:
            rows.append({"kernel_size": kernel_size} | bench_operator.measure(measured, tokens))
    return rows


def bfloat16_row(tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """The operator in float32 and in bfloat16, side by side."""
    generator = torch.Generator().manual_seed(options.seed)
    query, key, value = (torch.randn(1, tokens, 8, 40, generator=generator) for _ in range(3))
    weight = torch.randn(8 * 40, 1, 5, 5, generator=generator)
    grid = bench_operator.most_square_grid(tokens)
    variants: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(dtype) for x in (query, key, value)]

        def run(inputs: list[torch.Tensor] = inputs) -> torch.Tensor:
            return focused_linear_attention(*inputs, conv_weight=weight.to(inputs[0].dtype), grid=grid)

        variants[str(dtype).removeprefix("torch.")] = (run, nullcontext)
    times = bench_models.interleaved(variants, 2 * options.rounds, 2, "bfloat16", torch.device("cpu"))
    rows = bench_models.summary(times)
    share = bench_models.ratio(rows, "float32", "bfloat16")
    return {"tokens": tokens, "variants": rows, "float32_over_bfloat16": share}


def model_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """See `bench_models.measure`. Nothing warms the largest size up but the smaller ones before it: it takes long."""
    settings = ["--device", "cpu", "--arch", options.arch, "--seed", str(options.seed)]
    settings += ["--sizes", *map(str, options.sizes), "--rounds", *map(str, options.model_rounds)]
    settings += ["--warmup", *("1" if size <= 512 else "0" for size in options.sizes)]
    return bench_models.measure(bench_models.parse_arguments(settings)) if options.sizes else []


def verdicts(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each row must reach beside what it reached, for the rows that were measured."""
    reached: dict[str, float] = {}
    for row in result["operator"]:
        if row["kernel_size"] == 0:
            continue
        for variant, name in (("linear:eager", "operator"), ("linear:compiled", "operator compiled")):
            if variant in row["variants"]:
                reached[f"{name}, {row['tokens']} tokens"] = row["variants"][variant]["ratio_to_sdpa"]
    for row in result["model"]:
        reached[f"unet {row['size']}x{row['size']} against sdpa"] = row["sdpa_over_auto"]
        if "floor_over_auto" in row:
            reached[f"unet {row['size']}x{row['size']} against the floor"] = row["floor_over_auto"]
    for row in result["bfloat16"]:
        reached[f"bfloat16 against float32, {row['tokens']} tokens"] = row["float32_over_bfloat16"]
    return [
        {"row": name, "ratio": reached[name], "at_least": least, "aim": aim, "met": reached[name] >= least}
        for name, least, aim in REQUIRED
        if name in reached
    ]


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    given = sys.argv[1:] if arguments is None else arguments
    result: dict[str, Any] = bench_models.header("eval.bench_cpu", given, torch.device("cpu")) | {
        "operator": operator_rows(options),
        "bfloat16": [bfloat16_row(tokens, options) for tokens in options.tokens],
        "model": model_rows(options),
    }
    result["verdicts"] = verdicts(result)
    for row in result["operator"]:
        print(f"kernel {row['kernel_size']}\n{bench_operator.table([row])}")
    print(bench_models.table(result["model"]))
    for verdict in result["verdicts"]:
        met = "met" if verdict["met"] else "MISSED"
        print(f"{verdict['row']:<42} {verdict['ratio']:8.2f}  at least {verdict['at_least']:.2f}  {met}")
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
