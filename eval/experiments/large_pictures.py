"""Quality and speed in one table: the embedded pipeline, original, converted without training, and distilled, by size.

    python -m eval.experiments.large_pictures --sizes 128:200 512:100 1024:8 --json eval/results/large_pictures.json

Each size draws so many captions that training never saw, with each attention from the same noise, and reports: the
share of stated facts that hold (all, and by kind), the Fréchet distance to real renderings of the same captions (edge
and colour features), how like the original's the pictures are (SSIM), the seconds of a whole picture end to end, text
to pixels, timed in turn, and the peak of the process's memory. Pictures stay in --output, and are drawn only where
they are missing: the same command goes on after an interruption. --picture writes rows of
pictures of the last size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from flatten_diffusion import linearize, load_adapter, restore
from flatten_diffusion.files import atomic_path
from flatten_diffusion.scenes.check import check_folder
from flatten_diffusion.scenes.grammar import sample_captions
from flatten_diffusion.scenes.pipeline import ADAPTER_DIR, load_scenes_pipeline
from flatten_diffusion.scenes.render import render_folder
from flatten_eval.features import load_extractor
from flatten_eval.files import write_json
from flatten_eval.generate import GenerationSettings, Job, generate, make_jobs, run_batch
from flatten_eval.metrics.paired import measure_pairs, summarise
from flatten_eval.metrics.quality import QualityOptions, evaluate_quality, open_source
from flatten_eval.pipelines import adapter_sha256, pipeline_sha256
from flatten_eval.processes import join_processes
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

    @property
    def captions(self) -> list[str]:
        return sample_captions(self.count, seed=1, held_out=True, size=min(self.width, self.height))


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


def settings_of(args: argparse.Namespace, size: Size, variant: str) -> GenerationSettings:
    """What decides the pictures of one variant and size."""
    named = {ORIGINAL: None, UNTRAINED: UNTRAINED, DISTILLED: Path(args.adapter).name}[variant]
    return GenerationSettings(
        pipeline="scenes",
        pipeline_sha256=pipeline_sha256("scenes"),
        adapter=named,
        adapter_sha256=adapter_sha256(args.adapter) if variant == DISTILLED else None,
        height=size.height,
        width=size.width,
        steps=args.steps,
        guidance=args.guidance,
    )


def quality(args: argparse.Namespace, pipeline: Any, size: Size) -> dict[str, dict[str, Any]]:
    """Facts, Fréchet distance and likeness to the original of every variant."""
    processes = join_processes(args.device)
    folder, jobs = args.output / size.name, make_jobs(size.captions, [0])
    if not (folder / "real" / "metadata.jsonl").is_file():
        render_folder(size.captions, folder / "real", (size.width, size.height))
    extractor = load_extractor(EXTRACTOR, device=processes.device)
    rows: dict[str, dict[str, Any]] = {}
    for variant in args.variants:
        with attention(pipeline, variant, args.adapter):
            generate(pipeline, settings_of(args, size, variant), jobs, folder / variant, processes)
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
    job = Job(0, size.captions[0], 0)
    candidates = {
        variant: Candidate(
            partial(run_batch, pipeline, settings_of(args, size, variant), [job]),
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
    jobs = make_jobs(args.sizes[-1].captions[: args.shown], [0])
    sheet = Image.new(
        "RGB", (len(jobs) * (side + margin) + margin, len(args.variants) * (side + label) + margin), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for row, variant in enumerate(args.variants):
        pen.text((margin, row * (side + label) + 6), variant, fill="black", font_size=16)
        for column, job in enumerate(jobs):
            with Image.open(folder / variant / job.file) as drawn:
                drawn.thumbnail((side, side), Image.Resampling.LANCZOS)
                sheet.paste(drawn, (margin + column * (side + margin), row * (side + label) + label))
    with atomic_path(path) as partial_path:
        sheet.save(partial_path, format="PNG")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 when done."""
    args = parse_arguments(arguments)
    pipeline = load_scenes_pipeline().to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    results: dict[str, Any] = {}
    for size in args.sizes:
        timed = speed(args, pipeline, size) if args.rounds else {}
        results[size.name] = {"quality": quality(args, pipeline, size), "speed": timed}
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
                "settings": {"steps": args.steps, "guidance": args.guidance, "extractor": EXTRACTOR},
                "sizes": results,
            },
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
