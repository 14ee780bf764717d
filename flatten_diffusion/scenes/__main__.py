"""The scenes from a shell, to make prompts and real pictures and to check drawn ones.

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
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from .check import check
from .grammar import parse, sample_captions
from .render import render

# Where `flatten-eval generate` keeps a picture's prompt and settings.
_SETTINGS_KEY = "flatten_eval"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flatten_diffusion.scenes", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    captions = commands.add_parser("captions", help="print random captions, one per line")
    captions.add_argument("--count", type=int, default=200)
    captions.add_argument("--seed", type=int, default=0)
    captions.add_argument("--held-out", action="store_true", help="only captions that training never sees")
    drawn = commands.add_parser("render", help="draw captions")
    drawn.add_argument("captions", type=Path, help="text file, one caption per line")
    drawn.add_argument("output", type=Path, help="folder, made if needed")
    drawn.add_argument("--size", type=int, default=128)
    drawn.add_argument("--seed", type=int, default=0)
    checked = commands.add_parser("check", help="the share of stated facts that pictures show")
    checked.add_argument("folder", type=Path, help="pictures and metadata.jsonl (file_name, text)")
    checked.add_argument("--json", type=Path, help="write the result here too")
    return parser


def _render(captions: Path, output: Path, size: int, seed: int) -> None:
    texts = [line.strip() for line in captions.read_text(encoding="utf-8").splitlines() if line.strip()]
    for text in texts:
        parse(text)  # every caption is good before the first picture is drawn
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, text in enumerate(tqdm(texts, desc="render")):
        name = f"{index:06d}-{seed}.png"
        render(text, size, seed + index).save(output / name)
        rows.append(json.dumps({"file_name": name, "text": text}))
    (output / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def _captioned(folder: Path) -> list[tuple[Path, str]]:
    """(picture, caption) from metadata.jsonl, or from the settings that `flatten-eval generate` leaves in its PNGs."""
    metadata = folder / "metadata.jsonl"
    if metadata.is_file():
        rows = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [(folder / row["file_name"], row["text"]) for row in rows]
    pairs = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            settings = json.loads(image.info.get(_SETTINGS_KEY, "{}"))
        if not settings.get("prompt"):
            raise ValueError(f"{path} carries no caption: give a folder with metadata.jsonl (file_name, text)")
        pairs.append((path, settings["prompt"]))
    if not pairs:
        raise ValueError(f"{folder} holds no pictures: give a folder made by `render` or by `flatten-eval generate`")
    return pairs


def _check(folder: Path) -> dict[str, object]:
    kinds: dict[str, list[bool]] = defaultdict(list)
    shares = []
    for path, caption in tqdm(_captioned(folder), desc="check"):
        with Image.open(path) as image:
            facts = check(image, caption)
        shares.append(sum(fact.holds for fact in facts) / len(facts))
        for fact in facts:
            kinds[fact.name.split(": ")[-1].split()[0]].append(fact.holds)
    by_kind = {kind: sum(held) / len(held) for kind, held in sorted(kinds.items())}
    accuracy = sum(shares) / len(shares)
    return {"folder": folder.name, "count": len(shares), "fact_accuracy": accuracy, "by_kind": by_kind}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 2 wrong input."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "captions":
            held_out = True if args.held_out else None
            print("\n".join(sample_captions(args.count, args.seed, held_out=held_out)))
        elif args.command == "render":
            _render(args.captions, args.output, args.size, args.seed)
        else:
            result = _check(args.folder)
            print(json.dumps(result, indent=2))
            if args.json:
                args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
