"""`flatten-eval generate`: the images to evaluate."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ..errors import InputError
from ..generate import GenerationSettings, check_settings, generate, make_jobs
from ..pipelines import DTYPES, adapter_sha256, apply_adapter, load_pipeline
from ..processes import join_processes
from ..prompts import read_prompts
from ..versions import environment
from .options import positive
from .outcome import Outcome


def size(text: str) -> tuple[int, int]:
    """(height, width) in pixels of `512` or of `WIDTHxHEIGHT`, for argparse."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None or int(match[1]) < 1 or int(match[2] or 1) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not PIXELS or WIDTHxHEIGHT")
    width = int(match[1])
    return int(match[2]) if match[2] else width, width


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    """What is drawn and how; shared with compare."""
    group = parser.add_argument_group("pipeline")
    group.add_argument("pipeline", metavar="PIPELINE", help="hub id, local folder, or scenes (the embedded one)")
    group.add_argument("--adapter", metavar="PATH", help="convert with this saved adapter (folder or hub id)")
    group.add_argument("--revision", help="hub revision of the pipeline")
    group.add_argument("--variant", help="weight file variant, such as fp16")
    group.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="(default float32)")
    group = parser.add_argument_group("images")
    group.add_argument("--prompts", type=Path, metavar="FILE", help="one per line, or JSON lines with text")
    group.add_argument("--num-images", type=positive, metavar="N", help="for a pipeline without prompts")
    group.add_argument("--max-prompts", type=positive, metavar="N", help="use the first N prompts")
    group.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="images per prompt (default: --seed)")
    group.add_argument("--size", type=size, metavar="PIXELS|WxH", help="(default: the pipeline's own)")
    group.add_argument("--steps", type=positive, metavar="N", help="denoising steps (default: the pipeline's own)")
    group.add_argument("--guidance", type=float, metavar="SCALE", help="(default: the pipeline's own)")
    group.add_argument("--negative-prompt", metavar="TEXT")
    group.add_argument("--generation-batch-size", "--batch", type=positive, default=1, metavar="N", help="(default 1)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Pipeline, images, output."""
    add_pipeline_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the PNG files")


def settings_from(arguments: argparse.Namespace, adapter: str | None) -> GenerationSettings:
    """The settings the options name, with the given adapter."""
    height, width = arguments.size if arguments.size is not None else (None, None)
    return GenerationSettings(
        pipeline=arguments.pipeline,
        revision=arguments.revision,
        variant=arguments.variant,
        adapter=adapter,
        adapter_sha256=adapter_sha256(adapter),
        height=height,
        width=width,
        steps=arguments.steps,
        guidance=arguments.guidance,
        negative_prompt=arguments.negative_prompt,
        dtype=arguments.dtype,
    )


def prompts_from(arguments: argparse.Namespace) -> list[str] | None:
    """The prompts the options name; None for a pipeline without."""
    if arguments.prompts is None:
        if arguments.max_prompts is not None:
            raise InputError("--max-prompts needs --prompts")
        return None
    if arguments.num_images is not None:
        raise InputError("--num-images and --prompts exclude each other")
    prompts = read_prompts(arguments.prompts)
    return prompts[: arguments.max_prompts]


def run(arguments: argparse.Namespace) -> Outcome | None:
    """Generates what is missing; helper processes return None."""
    prompts = prompts_from(arguments)
    jobs = make_jobs(prompts, arguments.seeds or [arguments.seed], arguments.num_images)
    settings = settings_from(arguments, arguments.adapter)
    if arguments.output.exists() and not arguments.output.is_dir():
        raise InputError(f"{arguments.output}: not a folder; choose another --output")
    processes = join_processes(arguments.device)
    pipeline = load_pipeline(
        arguments.pipeline,
        dtype=arguments.dtype,
        device=processes.device,
        offline=arguments.offline,
        revision=arguments.revision,
        variant=arguments.variant,
    )
    check_settings(pipeline, settings, prompts)
    if arguments.adapter is not None:
        apply_adapter(pipeline, arguments.adapter, arguments.offline)
    made = generate(pipeline, settings, jobs, arguments.output, processes, arguments.generation_batch_size)
    total = sum(processes.gather(made))
    if not processes.is_main:
        return None
    result = {
        "command": "generate",
        "output": str(arguments.output),
        "count": len(jobs),
        "made": total,
        "settings": vars(settings),
        "environment": environment(processes.device),
    }
    return Outcome(f"{arguments.output}: {len(jobs)} images, {total} made now", result)
