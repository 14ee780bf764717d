"""`flatten-diffusion convert`: what a conversion does to a pipeline, and an adapter of it to load, train or share."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from flatten_diffusion import AdapterConfig, linearize, list_mixers

from ..errors import InputError, first_line
from ..files import require_writable, shown_name
from ..pipelines import DTYPES, load_pipeline
from .options import Outcome, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Pipeline, mixer and settings, output."""
    parser.add_argument("pipeline", metavar="PIPELINE", help="hub id, local folder, or scenes (the embedded one)")
    parser.add_argument("--mixer", choices=list_mixers(), default="focused_linear", help="(default focused_linear)")
    parser.add_argument(
        "--set", nargs="+", type=setting, default=[], metavar="KEY=VALUE", help="settings of the mixer, see `mixers`"
    )
    parser.add_argument("--training-free", action="store_true", help="the pyramid where measured to be faster")
    parser.add_argument("--window", type=whole(0, 64), default=0, help="side of windows that stay softmax beside it")
    parser.add_argument("--min-tokens", type=tokens, default=0, metavar="N|auto", help="fewer tokens stay softmax")
    parser.add_argument("--exclude", nargs="*", default=(), help="patterns of layers to leave alone")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="(default float32)")
    parser.add_argument("--revision", help="hub revision of the pipeline")
    parser.add_argument("--variant", help="weight file variant, such as fp16")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write the adapter here, for load_adapter")


def setting(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value as JSON has it or as text; for argparse."""
    key, found, value = text.partition("=")
    if not found or not key:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value


def tokens(text: str) -> int | str:
    """A number of tokens, or auto; for argparse."""
    return text if text == "auto" else whole(0, 2**30)(text)


def config_from(arguments: argparse.Namespace) -> AdapterConfig | str:
    """The conversion that the options name; raises InputError for settings that the mixer does not have."""
    if arguments.training_free:
        given = arguments.set or arguments.window or arguments.min_tokens or arguments.exclude
        if given or arguments.mixer != "focused_linear":
            raise InputError("--training-free is a whole choice: leave out --mixer, --set and the others")
        return "training-free"
    try:
        return AdapterConfig(
            mixer={"name": arguments.mixer, **dict(arguments.set)},
            window=arguments.window,
            min_tokens=arguments.min_tokens,
            exclude=tuple(arguments.exclude),
        )
    except (TypeError, ValueError) as error:
        raise InputError(first_line(error)) from error


def run(arguments: argparse.Namespace) -> Outcome:
    """Converts, reports layer by layer, and writes the adapter where --output says so."""
    config = config_from(arguments)
    if arguments.output is not None:
        require_writable(arguments.output, folder=True)
    device = torch.device("cpu" if arguments.device == "auto" else arguments.device)
    named = {name: getattr(arguments, name) for name in ("revision", "variant")}
    pipeline = load_pipeline(
        arguments.pipeline, dtype=arguments.dtype, device=device, offline=arguments.offline, **named
    )
    try:
        adapter = linearize(pipeline, config)
    except ValueError as error:
        raise InputError(first_line(error)) from error
    lines = [str(adapter.report())]
    if arguments.output is not None:
        adapter.save_pretrained(arguments.output)
        lines += ["", f"adapter: {arguments.output}"]
    result = {
        "command": "convert",
        "pipeline": shown_name(arguments.pipeline),
        "config": adapter.config.to_dict(),
        "layers": list(adapter.layers),
        "parameters": sum(parameter.numel() for parameter in adapter.parameters()),
        "output": None if arguments.output is None else arguments.output.name,
    }
    return Outcome("\n".join(lines), result)
