"""`flatten-eval generate`: the images to evaluate."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..generate import check_settings, generate, jobs_from, settings_from
from ..pipelines import apply_adapter
from ..processes import join_processes
from ..versions import environment
from .options import Outcome, add_pipeline_arguments, pipeline_from, prompts_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Pipeline, images, output."""
    add_pipeline_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the PNG files")


def run(arguments: argparse.Namespace) -> Outcome | None:
    """Generates what is missing; helper processes return None."""
    prompts = prompts_from(arguments)
    jobs, settings = jobs_from(arguments, prompts), settings_from(arguments)
    processes = join_processes(arguments.device)
    pipeline = pipeline_from(arguments, processes.device)
    check_settings(pipeline, settings, prompts)
    if arguments.adapter is not None:
        apply_adapter(pipeline, arguments.adapter, arguments.offline)
    made = generate(pipeline, settings, jobs, arguments.output, processes, arguments.generation_batch_size)
    total = sum(processes.gather(made))
    if not processes.is_main:
        return None
    result = {
        "command": "generate",
        "output": arguments.output.name,
        "count": len(jobs),
        "made": total,
        "settings": vars(settings),
        "environment": environment(processes.device),
    }
    return Outcome(f"{arguments.output}: {len(jobs)} images, {total} made now", result)
