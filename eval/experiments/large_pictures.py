"""Quality and speed in one table: the embedded pipeline, original, converted without training, and distilled, by size.

    python -m eval.experiments.large_pictures --sizes 128:200 512:100 1024:8 --json eval/results/large_pictures.json

Each size draws so many captions that training never saw, with each attention from the same noise: at the pipeline's
native size first, then in stages of twice the side (`flatten_diffusion.highres`), or, with --direct, at once. Reported
are the share of stated facts that hold (all, and by kind), the Fréchet distance to real renderings of the same captions
(edge and colour features), how like the original's the pictures are (SSIM), the seconds of a whole picture end to end,
text to pixels, timed in turn, and the peak of the process's memory. Pictures stay in --output, and are drawn only where
they are missing: the same command goes on after an interruption. --picture writes rows of pictures of the last size.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from flatten_diffusion import linearize, load_adapter, restore
from flatten_diffusion.files import atomic_path, write_text
from flatten_diffusion.highres import HighRes, generate_large
from flatten_diffusion.scenes.check import check_folder
from flatten_diffusion.scenes.grammar import sample_captions
from flatten_diffusion.scenes.pipeline import ADAPTER_DIR, load_scenes_pipeline
from flatten_diffusion.scenes.render import render_folder
from flatten_eval.errors import InputError, first_line
from flatten_eval.features import load_extractor
from flatten_eval.files import write_json
from flatten_eval.metrics.paired import measure_pairs, summarise
from flatten_eval.metrics.quality import QualityOptions, evaluate_quality, open_source
from flatten_eval.pipelines import adapter_sha256, pipeline_sha256
from flatten_eval.processes import join_processes, resolve_device
from flatten_eval.speed.timing import Candidate, measure
from flatten_eval.versions import environment

ORIGINAL, UNTRAINED, DISTILLED = "original", "training-free", "distilled"
VARIANTS = (ORIGINAL, UNTRAINED, DISTILLED)
EXTRACTOR = "flatten_eval.features.pixels:edges"


@dataclass(frozen=True)
class Size:
    """Pixels, and how many captions are drawn of them."""

    width: int
    height: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """From WIDTH[xHEIGHT]:COUNT; raises ArgumentTypeError."""
        pixels, _, count = text.partition(":")
        sides = pixels.split("x")
        try:
            width, height, many = int(sides[0]), int(sides[-1]), int(count)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not WIDTH[xHEIGHT]:COUNT") from error
        if len(sides) > 2 or width % 32 or height % 32 or not min(width, height) >= 64 or max(width, height) > 4096:
            raise argparse.ArgumentTypeError(f"{text!r}: sides must be multiples of 32 from 64 to 4096")
        if many < 2:
            raise argparse.ArgumentTypeError(f"{text!r}: at least 2 captions make a distance")
        return cls(width, height, many)

    @property
    def name(self) -> str:
        return f"{self.width}x{self.height}"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=Size.parse, required=True, metavar="WIDTH[xHEIGHT]:COUNT")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        "--adapter", default=str(ADAPTER_DIR), help="of the distilled variant (default: the one shipped)"
    )
    parser.add_argument("--output", type=Path, default=Path("large-pictures"), help="folder of all pictures")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--native", type=int, default=128, help="side in pixels up to which pictures are drawn at once")
    parser.add_argument("--strength", type=float, default=0.4, help="how far later stages are noised again")
    parser.add_argument("--direct", action="store_true", help="draw every size at once instead of in stages")
    parser.add_argument("--rounds", type=int, default=3, help="whole pictures timed per variant and size; 0 for none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--picture", type=Path, default=None, help="rows of pictures, one per variant")
    parser.add_argument("--shown", type=int, default=4, help="pictures in each of its rows, of the last size")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(arguments)
    for path in (args.json, args.picture):
        if path is not None and not path.resolve().parent.is_dir():
            parser.error(f"there is no folder {path.parent}")
    if ORIGINAL not in args.variants:
        parser.error(f"--variants: {ORIGINAL} is what the others are compared with")
    if DISTILLED in args.variants and not (Path(args.adapter) / "adapter_config.json").is_file():
        parser.error(f"--adapter {args.adapter}: no adapter there (no adapter_config.json)")
    if args.rounds < 0 or args.shown < 1:
        parser.error("--rounds must be 0 or more, --shown 1 or more")
    try:
        resolve_device(args.device)
        for size in args.sizes:
            stages_of(args, size)
    except (InputError, ValueError) as error:
        parser.error(first_line(error))
    return args


@contextmanager
def attention(pipeline: Any, variant: str, adapter: str) -> Iterator[None]:
    """The pipeline with the attention of one variant; the original's again afterwards."""
    if variant == UNTRAINED:
        linearize(pipeline, "training-free")
    elif variant == DISTILLED:
        load_adapter(pipeline, adapter)
    try:
        yield
    finally:
        if variant != ORIGINAL:
            restore(pipeline)


def captioned_size(args: argparse.Namespace, size: Size) -> int:
    """The size that captions are drawn for: in stages the native one, which decides what stands where."""
    return min(size.width, size.height) if args.direct else args.native


def captions_of(args: argparse.Namespace, size: Size) -> list[str]:
    """Captions that training never saw."""
    return sample_captions(size.count, seed=1, held_out=True, size=captioned_size(args, size))


def stages_of(args: argparse.Namespace, size: Size) -> HighRes:
    """How a picture of one size is drawn."""
    whole = (size.height, size.width)
    direct = args.direct or math.prod(whole) <= args.native**2
    named: dict[str, Any] = {"sizes": [whole]} if direct else {"target": whole}
    return HighRes(**named, steps=args.steps, strength=args.strength, tiled_vae=False)


def draw(args: argparse.Namespace, pipeline: Any, size: Size, caption: str, seed: int) -> Image.Image:
    """One picture, text to pixels."""
    return generate_large(pipeline, caption, stages_of(args, size), guidance_scale=args.guidance, seed=seed)


def claim(folder: Path, made_with: dict[str, Any]) -> None:
    """Make `folder` for pictures of these settings; one that holds pictures of others is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "made_with.json"
    if not record.is_file():
        write_json(record, made_with)
    elif json.loads(record.read_text(encoding="utf-8")) != json.loads(json.dumps(made_with)):
        raise SystemExit(f"error: {folder} holds pictures made with other settings: choose another --output")


def draw_all(args: argparse.Namespace, pipeline: Any, size: Size, folder: Path) -> None:
    """Every caption of a size into `folder`, as far as it is missing there."""
    rows = []
    for seed, caption in enumerate(tqdm(captions_of(args, size), desc=f"{size.name} {folder.name}")):
        path = folder / f"{seed:06d}.png"
        rows.append(json.dumps({"file_name": path.name, "text": caption}))
        if not path.is_file():
            with atomic_path(path) as partial_path:
                draw(args, pipeline, size, caption, seed).save(partial_path, format="PNG")
    write_text(folder / "metadata.jsonl", "\n".join(rows) + "\n")


def quality(args: argparse.Namespace, pipeline: Any, size: Size) -> dict[str, dict[str, Any]]:
    """Facts, Fréchet distance and likeness to the original of every variant."""
    processes, folder = join_processes(args.device), args.output / size.name
    captions = {"count": size.count, "of_size": captioned_size(args, size)}
    claim(folder / "real", captions)
    if not (folder / "real" / "metadata.jsonl").is_file():
        render_folder(captions_of(args, size), folder / "real", (size.width, size.height))
    extractor = load_extractor(EXTRACTOR, device=processes.device)
    rows: dict[str, dict[str, Any]] = {}
    for variant in args.variants:
        made_with = {
            "pipeline": pipeline_sha256("scenes"),
            "adapter": adapter_sha256(args.adapter) if variant == DISTILLED else variant,
            "guidance": args.guidance,
            **captions,
            **stages_of(args, size).to_dict(),
        }
        claim(folder / variant, made_with)
        with attention(pipeline, variant, args.adapter):
            draw_all(args, pipeline, size, folder / variant)
        measured = evaluate_quality(
            open_source(folder / "real"), open_source(folder / variant), None, extractor, processes, QualityOptions()
        )
        facts = check_folder(folder / variant)
        rows[variant] = {key: facts[key] for key in ("count", "fact_accuracy", "by_kind")}
        rows[variant]["frechet_distance"] = measured["frechet_distance"]
        if variant != ORIGINAL:
            paired = summarise(measure_pairs(folder / ORIGINAL, folder / variant), None)
            rows[variant] |= {key: paired[key] for key in ("ssim", "psnr")}
    return rows


def speed(args: argparse.Namespace, pipeline: Any, size: Size) -> dict[str, Any]:
    """Seconds and peak memory of a whole picture with each attention, timed in turn."""
    candidates = {
        variant: Candidate(
            partial(draw, args, pipeline, size, captions_of(args, size)[0], 0),
            partial(attention, pipeline, variant, args.adapter),
        )
        for variant in args.variants
    }
    measured = measure(candidates, torch.device(args.device), rounds=args.rounds, warmup=1, label=size.name)
    return {variant: found.as_dict() for variant, found in measured.items()}


def table(results: dict[str, Any]) -> str:
    """All sizes and variants in markdown."""
    lines = ["| | | facts | Fréchet | SSIM | seconds | | peak memory |", "|---" * 8 + "|"]
    for size, result in results.items():
        before = (result["speed"].get(ORIGINAL) or {}).get("median")
        for variant, row in result["quality"].items():
            timed = result["speed"].get(variant) or {}
            median, peak = timed.get("median"), timed.get("peak_bytes")
            cells = [
                size if variant == ORIGINAL else "",
                variant,
                f"{row['fact_accuracy']:.3f}",
                f"{row['frechet_distance']:.3f}",
                f"{row['ssim']:.3f}" if "ssim" in row else "",
                f"{median:.1f}" if median else "",
                f"{before / median:.2f}x" if before and median and variant != ORIGINAL else "",
                f"{peak / 2**20:.0f} MiB" if peak else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(args: argparse.Namespace, path: Path) -> None:
    """The first pictures of the last size, a row per variant."""
    folder, side, margin, label = args.output / args.sizes[-1].name, 384, 8, 28
    files = [f"{number:06d}.png" for number in range(min(args.shown, args.sizes[-1].count))]
    sheet = Image.new(
        "RGB", (len(files) * (side + margin) + margin, len(args.variants) * (side + label) + margin), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for row, variant in enumerate(args.variants):
        pen.text((margin, row * (side + label) + 6), variant, fill="black", font_size=16)
        for column, name in enumerate(files):
            with Image.open(folder / variant / name) as drawn:
                drawn.thumbnail((side, side), Image.Resampling.LANCZOS)
                sheet.paste(drawn, (margin + column * (side + margin), row * (side + label) + label))
    with atomic_path(path) as partial_path:
        sheet.save(partial_path, format="PNG")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 when done."""
    args = parse_arguments(arguments)
    pipeline = load_scenes_pipeline().to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    # Times first: they want a machine that does nothing else, the pictures may be drawn beside other work.
    timed = {size.name: speed(args, pipeline, size) if args.rounds else {} for size in args.sizes}
    results: dict[str, Any] = {}
    for size in args.sizes:
        results[size.name] = {"quality": quality(args, pipeline, size), "speed": timed[size.name]}
        print(table({size.name: results[size.name]}), file=sys.stderr)
    print(table(results))
    if args.picture is not None:
        picture(args, args.picture)
    if args.json is not None:
        given = " ".join(sys.argv[1:] if arguments is None else arguments)
        write_json(
            args.json,
            {
                "command": f"python -m eval.experiments.large_pictures {given}",
                "environment": environment(torch.device(args.device)),
                "settings": {
                    name: getattr(args, name) for name in ("steps", "guidance", "native", "strength", "direct")
                }
                | {"extractor": EXTRACTOR},
                "sizes": results,
            },
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
