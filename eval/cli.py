"""The command line: `flatten-eval fid | statistics | generate | throughput | compare`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .commands import COMMANDS, load_command
from .errors import InputError, RefusedComparison
from .files import write_json

EXIT_DONE = 0
EXIT_INPUT = 2
EXIT_REFUSED = 3


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of every subcommand's name, and of the arguments of the one that `argv` starts with."""
    parser = argparse.ArgumentParser(
        prog="flatten-eval",
        description="How good and how fast a converted diffusion model is, against the original.",
        epilog="Exit codes: 0 done, 2 wrong use or input, 3 refused comparison.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, line in COMMANDS.items():
        sub = subparsers.add_parser(name, help=line, description=line)
        if name not in argv[:1]:
            continue
        load_command(name).add_arguments(sub)
        shared = sub.add_argument_group("everywhere")
        shared.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (default)")
        shared.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
        shared.add_argument(
            "--json", nargs="?", const="-", metavar="PATH", help="write the result as JSON (without PATH: print it)"
        )
        shared.add_argument("--offline", action="store_true", help="never reach for the network")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code (argparse itself exits with 2 on wrong use)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = build_parser(argv).parse_args(argv)
    try:
        outcome = load_command(arguments.command).run(arguments)
        if outcome is not None:
            _emit(outcome.text, outcome.result, arguments.json)
        return EXIT_DONE
    except InputError as error:
        print(f"flatten-eval: error: {error}", file=sys.stderr)
        return EXIT_INPUT
    except RefusedComparison as error:
        print(f"flatten-eval: refused: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        print("flatten-eval: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130


def _emit(text: str, result: dict[str, Any], target: str | None) -> None:
    if target == "-":
        print(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False))
        return
    print(text)
    if target is not None:
        write_json(Path(target), result)
