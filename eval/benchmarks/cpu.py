"""The speed table for two CPU cores, about six minutes idle.

Operator: query, key and value of 8 heads of 40 in float32 (and bfloat16), 4,096 and 16,384 tokens, against
`scaled_dot_product_attention`; with the 5x5 convolution of a converted layer, and without any. Model: one forward pass
of a UNet of Stable Diffusion 1.5's shape with random weights, converted with `min_tokens="auto"`, against the same
model unconverted and against the floor, which leaves the attention product out.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import Any

import torch

from flatten_diffusion import AdapterConfig
from flatten_eval.speed.architectures import build_model
from flatten_eval.speed.model import ThroughputOptions, measure_model
from flatten_eval.speed.operator import OperatorSettings, measure_operator, operator_candidates
from flatten_eval.speed.timing import measure, ratio

CPU = torch.device("cpu")
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", default="sd15", help="of the model rows, see flatten_eval/speed/architectures.py")
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 512, 1024], help="pixels; none: no model rows")
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 16384], help="none: no operator rows")
    parser.add_argument("--rounds", type=int, default=9, help="of the operator")
    parser.add_argument("--model_rounds", type=int, nargs="*", default=[9, 5, 3], help="one number for each size")
    parser.add_argument("--no_compile", action="store_true", help="leave the compiled operator out")


def check(options: argparse.Namespace) -> str | None:
    if len(options.model_rounds) != len(options.sizes):
        return f"--model_rounds: one number for each of --sizes, {len(options.sizes)} in all"
    return None


def run(options: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for kernel_size in (5, 0):
        settings = OperatorSettings(
            kernel_size=kernel_size, compiled=not options.no_compile, all_backends=False, seed=options.seed
        )
        how: dict[str, Any] = {"rounds": options.rounds, "warmup": 2, "memory": False}
        rows += [{"kernel_size": kernel_size} | measure_operator(n, CPU, settings, **how) for n in options.tokens]
    result: dict[str, Any] = {
        "operator": rows,
        "bfloat16": [bfloat16_row(tokens, options) for tokens in options.tokens],
        "model": model_rows(options) if options.sizes else [],
    }
    result["verdicts"] = verdicts(result)
    print(table(result))
    return result


def model_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per size; nothing warms the largest up but the smaller ones before it: it takes long."""
    model, rows = build_model(options.arch, CPU, torch.float32), []
    for size, rounds in zip(options.sizes, options.model_rounds, strict=True):
        how = ThroughputOptions(
            guidance_batches=1, rounds=rounds, warmup=int(size <= 512), seconds=math.inf, all_backends=False,
            memory=False, seed=options.seed,
        )  # fmt: skip
        rows += measure_model(model, [(size, size)], CPU, how, AdapterConfig(min_tokens="auto"))
    return rows


def bfloat16_row(tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """The operator in float32 and in bfloat16, side by side."""
    candidates = {
        str(dtype).removeprefix("torch."): operator_candidates(
            tokens, CPU, OperatorSettings(dtype=dtype, softmax=False, all_backends=False, seed=options.seed)
        )["linear:eager"]
        for dtype in (torch.float32, torch.bfloat16)
    }
    found = measure(candidates, CPU, rounds=2 * options.rounds, warmup=2, label="bfloat16", memory=False)
    variants = {name: measurement.as_dict() for name, measurement in found.items()}
    share = ratio(found, "float32", "bfloat16")
    return {"tokens": tokens, "variants": variants, "float32_over_bfloat16": share}


def verdicts(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each row must reach beside what it reached, for the rows that were measured."""
    reached: dict[str, float | None] = {}
    for row in result["operator"]:
        for variant, name in (("linear:eager", "operator"), ("linear (compiled)", "operator compiled")):
            if row["kernel_size"] and variant in row["variants"]:
                reached[f"{name}, {row['tokens']} tokens"] = row["variants"][variant]["speedup_over_sdpa"]
    for row in result["model"]:
        size, converted = f"unet {row['width']}x{row['height']}", row["variants"]["linear:eager"]
        reached[f"{size} against sdpa"] = converted["speedup_over_sdpa"]
        reached[f"{size} against the floor"] = 1 / converted["ratio_to_floor"] if converted["ratio_to_floor"] else None
    for row in result["bfloat16"]:
        reached[f"bfloat16 against float32, {row['tokens']} tokens"] = row["float32_over_bfloat16"]
    return [
        {"row": name, "ratio": found, "at_least": least, "aim": aim, "met": found >= least}
        for name, least, aim in REQUIRED
        if (found := reached.get(name)) is not None
    ]


def table(result: Mapping[str, Any]) -> str:
    """Every median, then the verdicts."""
    lines = []
    for row in [*result["operator"], *result["model"]]:
        what = f"{row['tokens']} tokens, kernel {row['kernel_size']}" if "tokens" in row else f"{row['width']} pixels"
        for name, found in row["variants"].items():
            shown = found["failure"] or f"{found['median'] * 1e3:12.3f} ms"
            lines.append(f"{what:<24} {name:<24} {shown}")
    for verdict in result["verdicts"]:
        met = "met" if verdict["met"] else "MISSED"
        lines.append(f"{verdict['row']:<42} {verdict['ratio']:8.2f}  at least {verdict['at_least']:.2f}  {met}")
    return "\n".join(lines)
