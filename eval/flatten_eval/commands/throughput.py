"""`flatten-eval throughput`: how fast, against softmax and against no attention at all."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from flatten_diffusion import AdapterConfig, FocusedLinearConfig

from ..errors import InputError
from ..files import require_writable, shown_name, write_bytes
from ..pipelines import DTYPES, apply_adapter, denoiser
from ..processes import resolve_device
from ..report import require_matplotlib, throughput_png
from ..speed.architectures import ARCHITECTURES, build_model
from ..speed.model import COMPILED, ThroughputOptions, crossover, measure_model
from ..speed.operator import OperatorSettings, measure_operator
from ..versions import environment
from .options import Outcome, finite, number, pipeline_from, positive, size, small, table, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, where and how long."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--arch", choices=tuple(ARCHITECTURES), help="full size, random weights, no download")
    source.add_argument("--pipeline", metavar="ID", help="the denoiser of this pipeline (hub id, folder, or scenes)")
    source.add_argument("--op", action="store_true", help="the operator alone, with bytes moved over copy bandwidth")
    parser.add_argument("--adapter", metavar="PATH", help="saved adapter for --pipeline (default: a fresh conversion)")
    parser.add_argument(
        "--sizes", type=size, nargs="+", metavar="PIXELS|WxH", default=[(512, 512), (1024, 1024)], help="(512 1024)"
    )
    parser.add_argument("--batch-size", type=small, default=1, metavar="N", help="images at once (default 1)")
    parser.add_argument("--no-guidance", action="store_true", help="one forward sample per image, not two")
    parser.add_argument("--steps", type=small, metavar="N", help="for seconds per image (default: the authors')")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="(default float32)")
    parser.add_argument(
        "--kernel-size", type=whole(0, 63), default=5, metavar="K", help="of the convolution (default 5)"
    )
    parser.add_argument("--window", type=whole(0, 256), default=0, metavar="W", help="side of softmax windows (none)")
    parser.add_argument(
        "--min-tokens", type=tokens, default=0, metavar="N|auto", help="calls with fewer stay softmax (0)"
    )
    parser.add_argument("--compile", action="store_true", help="also under torch.compile")
    parser.add_argument("--fewer", action="store_true", help="default SDPA and the fast backends only")
    parser.add_argument("--rounds", type=small, default=10, metavar="N", help="interleaved rounds (default 10)")
    parser.add_argument(
        "--warmup", type=whole(0, 1000), default=1, metavar="N", help="untimed calls of each (default 1)"
    )
    parser.add_argument("--seconds", type=finite, default=120.0, metavar="S", help="of rounds per size (default 120)")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="write a PNG plot")
    group = parser.add_argument_group("with --op")
    group.add_argument("--tokens", type=positive, nargs="+", default=[1024, 4096, 16384], metavar="N")
    group.add_argument("--heads", type=small, default=8, metavar="H", help="(default 8)")
    group.add_argument("--head-dim", type=small, default=40, metavar="D", help="(default 40)")
    group.add_argument("--focusing-factor", type=finite, default=3.0, metavar="P", help="(default 3)")
    group.add_argument("--feature-maps", action="store_true", help="also with maps of query and key")
    group.add_argument("--backward", action="store_true", help="forward and backward together")
    group.add_argument("--graphs", action="store_true", help="CUDA: replay captured graphs (no launch cost)")
    group.add_argument("--no-sdpa", action="store_true", help="leave softmax out")
    group.add_argument("--public", action="store_true", help="CUDA: also the nearest kernel of another package")


def tokens(text: str) -> int | str:
    """`auto`, or a whole number, for argparse."""
    return text if text == "auto" else whole(0, 2**31)(text)


def run(arguments: argparse.Namespace) -> Outcome:
    """Measures and formats."""
    if arguments.plot is not None:
        require_matplotlib()
        require_writable(arguments.plot)
        if arguments.op:
            raise InputError("--plot draws seconds per step; it does not go with --op")
    if arguments.adapter is not None and arguments.pipeline is None:
        raise InputError("--adapter belongs to --pipeline; --arch and --op have random weights")
    if arguments.kernel_size and arguments.kernel_size % 2 == 0:
        raise InputError(f"--kernel-size {arguments.kernel_size}: needs an odd number, or 0 for no convolution")
    if arguments.window == 1:
        raise InputError(f"--window {arguments.window}: needs a whole number from 2, or 0 for no windows")
    device = resolve_device(arguments.device)
    if arguments.graphs and (device.type != "cuda" or arguments.backward or not arguments.warmup):
        raise InputError("--graphs needs a CUDA device, a --warmup and no --backward")
    torch.manual_seed(arguments.seed)
    return _run_operator(arguments, device) if arguments.op else _run_model(arguments, device)


def _run_model(arguments: argparse.Namespace, device: torch.device) -> Outcome:
    model, adapter, options = _subject(arguments, device)
    mixer = FocusedLinearConfig(kernel_size=arguments.kernel_size)
    config = AdapterConfig(mixer=mixer, window=arguments.window, min_tokens=arguments.min_tokens)
    results = measure_model(model, sorted(arguments.sizes, key=math.prod), device, options, config, adapter)
    if all(variant["median"] is None for row in results for variant in row["variants"].values()):
        first = next(iter(results[0]["variants"].values()))["failure"]
        raise InputError(f"nothing could be measured: {first}")
    crossovers = {"eager": crossover(results)}
    if options.compiled:
        crossovers["compiled"] = crossover(results, COMPILED)
    name, made_with = arguments.arch or shown_name(arguments.pipeline), environment(device)
    if arguments.plot is not None:
        title = f"{name}, {arguments.dtype}, batch {options.batch}, {made_with['device_name']}"
        write_bytes(arguments.plot, throughput_png(results, title))
    result: dict[str, Any] = {
        "command": "throughput",
        "subject": name,
        "dtype": arguments.dtype,
        "batch": options.batch,
        "guidance_batches": options.guidance_batches,
        "steps": options.steps,
        "kernel_size": arguments.kernel_size,
        "window": arguments.window,
        "min_tokens": arguments.min_tokens,
        "sizes": results,
        "crossover": crossovers,
        "environment": made_with,
    }
    return Outcome(format_throughput(result), result)


def _subject(arguments: argparse.Namespace, device: torch.device) -> tuple[torch.nn.Module, Any, ThroughputOptions]:
    adapter: Any = None
    steps, guidance, compression = 50, 2, 8
    if arguments.arch is not None:
        architecture = ARCHITECTURES[arguments.arch]
        steps, guidance = architecture.steps, architecture.guidance_batches
        model = build_model(arguments.arch, device, DTYPES[arguments.dtype])
    else:
        pipeline = pipeline_from(arguments, device)
        model = denoiser(pipeline)
        compression = int(getattr(pipeline, "vae_scale_factor", compression))
        if arguments.adapter is not None:
            adapter = apply_adapter(pipeline, arguments.adapter, arguments.offline)
    options = ThroughputOptions(
        batch=arguments.batch_size,
        guidance_batches=1 if arguments.no_guidance else guidance,
        steps=arguments.steps or steps,
        rounds=arguments.rounds,
        warmup=arguments.warmup,
        seconds=arguments.seconds,
        compiled=arguments.compile,
        all_backends=not arguments.fewer,
        compression=compression,
        seed=arguments.seed,
    )
    return model, adapter, options


def _run_operator(arguments: argparse.Namespace, device: torch.device) -> Outcome:
    same = ("heads", "head_dim", "kernel_size", "focusing_factor", "feature_maps", "window", "backward", "graphs")
    settings = OperatorSettings(
        batch=arguments.batch_size,
        dtype=DTYPES[arguments.dtype],
        compiled=arguments.compile,
        softmax=not arguments.no_sdpa,
        all_backends=not arguments.fewer,
        **{name: getattr(arguments, name) for name in (*same, "public", "seed")},
    )
    how = {name: getattr(arguments, name) for name in ("rounds", "warmup", "seconds")}
    measured = [measure_operator(tokens, device, settings, **how) for tokens in arguments.tokens]
    bandwidth = max((row["copy_bytes_per_second"] or 0.0) for row in measured)
    result = {
        "command": "throughput",
        "subject": "operator",
        "dtype": arguments.dtype,
        "batch": settings.batch,
        **{name: getattr(settings, name) for name in same},
        "copy_bytes_per_second": bandwidth,
        "tokens": measured,
        "environment": environment(device),
    }
    rows = [
        [
            f"{row['tokens']}  {name}",
            variant["failure"][:60] if variant["failure"] else number(variant["median"], 4, 1e3),
            number(variant.get("speedup_over_sdpa"), 3),
            number(variant.get("of_copy_bandwidth"), 3, 100),
        ]
        for row in measured
        for name, variant in row["variants"].items()
    ]
    text = table(["tokens  variant", "ms", "x over sdpa", "% of copy"], rows)
    return Outcome(f"{text}\n\ncopy bandwidth: {bandwidth / 1e9:.1f} GB/s", result)


def format_throughput(result: dict[str, Any]) -> str:
    """One table over sizes and variants, and the crossover."""
    rows = [
        [
            f"{row['width']}x{row['height']}  {name}",
            number(variant["seconds_per_step"], 4) if variant["failure"] is None else variant["failure"][:60],
            number(variant["seconds_per_image"], 4),
            number(variant["speedup_over_sdpa"], 3),
            number(variant["ratio_to_floor"], 3),
            number(variant["peak_bytes"], 5, 2.0**-20),
        ]
        for row in result["sizes"]
        for name, variant in row["variants"].items()
    ]
    lines = [
        table(["size  variant", "s/step", "s/image", "x over sdpa", "x floor", "peak MiB"], rows),
        "",
        f"{result['subject']}, {result['dtype']}, batch {result['batch']} x {result['guidance_batches']}, "
        f"{result['steps']} steps, {result['environment']['device_name']} (the denoiser alone)",
    ]
    lines += [f"crossover ({mode}): {entry['verdict']}" for mode, entry in result["crossover"].items()]
    return "\n".join(lines)
