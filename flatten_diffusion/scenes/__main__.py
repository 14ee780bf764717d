"""The scenes from a shell, to make prompts and real images and to check drawn ones.

    python -m flatten_diffusion.scenes captions --count 200 --held-out > captions.txt
    python -m flatten_diffusion.scenes render captions.txt real/ --size 128
    python -m flatten_diffusion.scenes check drawn/ [--json facts.json]

`render` writes one PNG per caption and metadata.jsonl (file_name, text); `check` reads such a
folder, or one of `flatten-eval generate`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .check import check_folder
from .grammar import sample_captions
from .render import render_folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flatten_diffusion.scenes", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    captions = commands.add_parser("captions", help="print random captions, one per line")
    captions.add_argument("--count", type=int, default=200)
    captions.add_argument("--seed", type=int, default=0)
    split = captions.add_mutually_exclusive_group()
    split.add_argument("--held-out", action="store_true", help="only captions that training never sees")
    split.add_argument("--training", action="store_true", help="only the others")
    captions.add_argument("--size", type=int, default=128, help="shorter side of the pictures meant: 256 asks for more")
    captions.add_argument("--repeat", action="store_true", help="the same caption may come twice, as in training")
    drawn = commands.add_parser("render", help="draw captions")
    drawn.add_argument("captions", type=Path, help="text file, one caption per line")
    drawn.add_argument("output", type=Path, help="folder, made if needed")
    drawn.add_argument("--size", type=_size, default=(128, 128), help="WIDTH or WIDTHxHEIGHT in pixels")
    drawn.add_argument("--seed", type=int, default=0)
    checked = commands.add_parser("check", help="the share of stated facts that images show")
    checked.add_argument("folder", type=Path, help="images and metadata.jsonl (file_name, text)")
    checked.add_argument("--json", type=Path, help="write the result here too")
    return parser


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(side) for side in text.split("x")) if "x" in text else (int(text), int(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give WIDTH or WIDTHxHEIGHT in pixels") from error
    return width, height


def _render(captions: Path, output: Path, size: tuple[int, int], seed: int) -> None:
    if not captions.is_file():
        raise ValueError(f"{captions}: no such file: give a text file with one caption per line")
    try:
        lines = [line.strip() for line in captions.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{captions}: not UTF-8 text: give a text file with one caption per line") from error
    render_folder([line for line in lines if line], output, size, seed)


def _described(error: Exception) -> str:
    """One line; a file that cannot be opened is named first."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror.lower()}"
    return str(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 2 wrong input."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "captions":
            held_out = True if args.held_out else False if args.training else None
            different = not args.repeat
            print(
                "\n".join(
                    sample_captions(args.count, args.seed, held_out=held_out, different=different, size=args.size)
                )
            )
        elif args.command == "render":
            _render(args.captions, args.output, args.size, args.seed)
        else:
            result = check_folder(args.folder)
            print(json.dumps(result, indent=2))
            if args.json:
                args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {_described(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
