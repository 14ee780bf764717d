"""Benchmarks, run from the checkout's root with the package installed (`pip install -e .`):

    python -m eval.benchmarks cpu --json eval/results/cpu.json
    python -m eval.benchmarks conversion --json eval/results/conversion.json
    python -m eval.benchmarks recipes --json eval/results/recipes.json

Every round runs each variant once, in turn, so that a busy machine slows all of them alike; medians and ratios count.
The operator at other shapes, and other models, are timed by `flatten-eval throughput`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from flatten_eval.errors import InputError
from flatten_eval.files import write_json
from flatten_eval.versions import environment

from . import conversion, cpu, recipes

BENCHMARKS: dict[str, ModuleType] = {"cpu": cpu, "conversion": conversion, "recipes": recipes}
"""Of each: `add_arguments`, `check` (the first thing wrong with them, or None), `run` (the result's parts; prints)."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m eval.benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    subparsers = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, module in BENCHMARKS.items():
        lines = str(module.__doc__)
        sub = subparsers.add_parser(name, help=lines.splitlines()[0], description=lines)
        sub.formatter_class = parser.formatter_class
        module.add_arguments(sub)
        sub.add_argument("--threads", type=int, default=2 if name == "cpu" else None, help="(default: torch's)")
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--json", type=Path, help="write the result there")
    options = parser.parse_args(arguments)
    wrong = BENCHMARKS[options.benchmark].check(options)
    if wrong is not None:
        parser.error(wrong)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0 done, 2 wrong input."""
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    given = " ".join(sys.argv[1:] if arguments is None else arguments)
    made_with = environment(torch.device("cpu")) | {"load_before": list(os.getloadavg())}
    try:
        result = {"command": f"python -m eval.benchmarks {given}", "environment": made_with}
        result |= BENCHMARKS[options.benchmark].run(options)
        if options.json:
            write_json(options.json, result)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
