"""The command line `flatten-diffusion`, also known as `flatten-eval`: one subcommand per module of `commands`."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .errors import InputError, RefusedComparison, first_line
from .files import require_writable, to_json, write_json

COMMANDS = {
    "mixers": "what can take the place of softmax: settings, cost, what each supports",
    "convert": "convert a pipeline: every layer and why it was left alone; writes an adapter",
    "fid": "Fréchet distance (FID for Inception), KID, CMMD, precision/recall, CLIP score of images against real ones",
    "statistics": "save statistics of a set of images as .npz (mu, sigma as pytorch-fid; count, extractor, resize)",
    "generate": "images of a pipeline, with or without an adapter: one PNG per (prompt, seed), resumable",
    "throughput": "seconds per step and image of SDPA, the conversion and the attention-free floor, at several sizes",
    "teacher": "converted pictures against the original's of the same prompts and seeds: CLIP-I, DINO, LPIPS, FID",
    "compare": "original beside converted: distance, alignment, pairs, speed, memory, and an HTML report",
}
"""Name and one line of help of every subcommand, a module of `commands`."""
PROGRAMS = ("flatten-eval", "flatten-diffusion")
"""Names that the command goes by."""


def _load(name: str) -> Any:
    # Only the one that runs is imported: some bring diffusers along.
    return import_module(f".commands.{name}", __package__)


def _program() -> str:
    called = Path(sys.argv[0]).stem
    return called if called in PROGRAMS else PROGRAMS[0]


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of every subcommand's name, and of the arguments of the one that `argv` starts with."""
    parser = argparse.ArgumentParser(
        prog=_program(),
        description="Linear attention for diffusers pipelines: convert, and how good and how fast the result is.",
        epilog="Exit codes: 0 done, 2 wrong use or input, 3 refused comparison.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, line in COMMANDS.items():
        sub = subparsers.add_parser(name, help=line, description=line)
        if name not in argv[:1]:
            continue
        _load(name).add_arguments(sub)
        seed = _load("options").seed
        shared = sub.add_argument_group("everywhere")
        shared.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (default)")
        shared.add_argument("--seed", type=seed, default=0, help="of everything random (default 0)")
        shared.add_argument(
            "--json", nargs="?", const="-", metavar="PATH", help="write the result as JSON (without PATH: print it)"
        )
        shared.add_argument("--offline", action="store_true", help="never reach for the network")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code (argparse itself exits with 2 on wrong use)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = build_parser(argv).parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        if arguments.json not in ("-", None):
            require_writable(Path(arguments.json))
        outcome = _load(arguments.command).run(arguments)
        if outcome is not None:
            print(to_json(outcome.result) if arguments.json == "-" else outcome.text)
            if arguments.json not in ("-", None):
                write_json(Path(arguments.json), outcome.result)
        return 0
    except InputError as error:
        return _tell("error", str(error), 2)
    except RefusedComparison as error:
        return _tell("refused", str(error), 3)
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError":  # torch's
            raise
        memory = "out of memory; lower the batch size or the size"
        return _tell("error", first_line(error) if isinstance(error, OSError) else memory, 2)
    except KeyboardInterrupt:
        return _tell("interrupted", "the same command continues where it stopped", 130)


def _tell(kind: str, line: str, code: int) -> int:
    # What the line quotes may be a megabyte long.
    print(f"{_program()}: {kind}: {line if len(line) < 1000 else line[:800] + ' ... ' + line[-200:]}", file=sys.stderr)
    return code
