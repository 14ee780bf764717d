"""How near a conversion is to its original before anything is trained, and after calibration alone.

    python -m eval.experiments.training_free --json eval/results/training_free.json

Each embedded pipeline draws captions of its grammar; every prediction on the way is asked of the original and of each
conversion of all its layers, on the original's own latents, so that nothing accumulates. Reported is the squared
distance between the two predictions relative to the variance of the original's, and, with --calibrate, the same after
the closed form solution on other captions. Prints one table per pipeline, writes JSON.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flatten_diffusion import AdapterConfig, FocusedLinearConfig, linearize, restore
from flatten_diffusion.adapter import resolve_model
from flatten_diffusion.distill import CalibrationSettings, calibrate
from flatten_diffusion.mixers import PyramidConfig
from flatten_diffusion.ops.pyramid import keys_per_query
from flatten_diffusion.scenes.grammar import sample_captions
from flatten_diffusion.scenes.pipeline import PIPELINES, load_embedded
from flatten_eval.files import write_json
from flatten_eval.versions import environment

VARIANTS = {
    "focused": AdapterConfig(mixer=FocusedLinearConfig()),
    "windows + focused": AdapterConfig(mixer=FocusedLinearConfig(), window=8),
    "pyramid, none opened": AdapterConfig(mixer=PyramidConfig(opened=())),
    "pyramid, none opened, 256 far cells": AdapterConfig(mixer=PyramidConfig(budget=256, opened=())),
    "pyramid": AdapterConfig(mixer=PyramidConfig()),
    "pyramid, 32 and 31 cells opened": AdapterConfig(mixer=PyramidConfig(opened=(32, 31))),
    "pyramid + convolution": AdapterConfig(mixer=PyramidConfig(kernel_size=3)),
}
Call = dict[str, Any]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipelines", nargs="+", choices=sorted(PIPELINES), default=sorted(PIPELINES))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels, a multiple of 32")
    parser.add_argument("--captions", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--calibrate", type=int, default=0, help="captions that calibration sees; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(arguments)
    if args.size < 64 or args.size > 1024 or args.size % 32:
        parser.error(f"--size {args.size} must be a multiple of 32 from 64 to 1024")
    for name in ("captions", "steps"):
        if not 1 <= getattr(args, name) <= 1000:
            parser.error(f"--{name} must be from 1 to 1000")
    if args.json is not None and not args.json.resolve().parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.parent}")
    return args


@torch.no_grad()
def record(pipeline: Any, model: Any, captions: Sequence[str], args: argparse.Namespace, seed: int) -> list[Call]:
    """What the denoiser is given while the pipeline draws `captions`, call by call."""
    calls: list[Call] = []
    names = list(inspect.signature(type(model).forward).parameters)[1:]

    def keep(module: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append({**dict(zip(names, positional, strict=False)), **named})

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        pipeline(
            list(captions),
            height=args.size,
            width=args.size,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
            generator=[torch.Generator().manual_seed(seed + index) for index in range(len(captions))],
            output_type="latent",
        )
    finally:
        handle.remove()
    return calls


def predict(model: Any, call: Call) -> torch.Tensor:
    """The prediction of one call."""
    prediction: torch.Tensor = model(**{**call, "return_dict": False})[0]
    return prediction


@torch.no_grad()
def distance(run: Callable[[Call], torch.Tensor], calls: Sequence[Call], wanted: Sequence[torch.Tensor]) -> float:
    """Squared distance to the original's predictions, relative to their variance."""
    error = sum(float((run(call) - answer).double().square().sum()) for call, answer in zip(calls, wanted, strict=True))
    return (
        error
        / float(torch.cat([answer.double().flatten() for answer in wanted]).var(correction=0))
        / sum(answer.numel() for answer in wanted)
    )


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All variants of one pipeline."""
    pipeline = load_embedded(name, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    model = resolve_model(pipeline)
    run = partial(predict, model)
    unseen = sample_captions(args.captions, seed=args.seed, held_out=True, different=False)
    calls = record(pipeline, model, unseen, args, args.seed)
    with torch.no_grad():
        wanted = [run(call) for call in calls]
    fitted: list[Call] = []
    if args.calibrate:
        seen = sample_captions(args.calibrate, seed=args.seed + 1, held_out=False, different=False)
        fitted = record(pipeline, model, seen, args, args.seed + 1000)
    rows: dict[str, Any] = {}
    for variant in args.variants:
        adapter = linearize(model, VARIANTS[variant])
        row: dict[str, Any] = {"untrained": distance(run, calls, wanted), "layers": len(adapter.layers)}
        if fitted:
            started = time.perf_counter()
            # The last two passes judge: layers that they find worse stay as they were.
            runs = [partial(run, call) for call in fitted]
            calibrate(adapter, runs[:-2] or runs, CalibrationSettings(), held_out=runs[-2:])
            row |= {"calibration_seconds": time.perf_counter() - started, "calibrated": distance(run, calls, wanted)}
        restore(model)
        rows[variant] = row
        print(f"{name}: {variant}: {row}", file=sys.stderr)
    return rows


def closed(rows: dict[str, Any], variant: str, stage: str) -> float | None:
    """The share of the raw focused swap's distance that is gone."""
    raw = rows.get("focused", {}).get("untrained")
    return None if raw is None or stage not in rows[variant] else 1 - rows[variant][stage] / raw


def table(name: str, rows: dict[str, Any], args: argparse.Namespace) -> str:
    """One pipeline's rows in markdown."""
    stages = ["untrained", *(["calibrated"] if args.calibrate else [])]
    lines = [f"{name}, {args.size}x{args.size}: distance to the original's prediction (share of focused's closed)", ""]
    lines += ["| | " + " | ".join(stages) + " |", "|---" * (len(stages) + 1) + "|"]
    for variant, row in rows.items():
        shares = [closed(rows, variant, stage) for stage in stages]
        cells = [
            f"{row[stage]:.5f}" + ("" if share is None else f" ({share:.1%})")
            for stage, share in zip(stages, shares, strict=True)
        ]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 when done."""
    args = parse_arguments(arguments)
    results = {name: measure(name, args) for name in args.pipelines}
    for name, rows in results.items():
        print(table(name, rows, args), end="\n\n")
    if args.json is not None:
        keys = {
            variant: {side: keys_per_query([(1, side, side)], config.mixer) for side in (32, 64, 128)}
            for variant, config in VARIANTS.items()
            if isinstance(config.mixer, PyramidConfig)
        }
        command = "python -m eval.experiments.training_free " + " ".join(
            sys.argv[1:] if arguments is None else arguments
        )
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        write_json(
            args.json,
            {
                "command": command.strip(),
                "environment": environment(torch.device("cpu")),
                "settings": settings,
                "keys_per_query": keys,
            }
            | {"pipelines": results},
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
