"""The main job: large pictures with a pipeline's own attention and with linear attention, quality and speed in a table.

    python examples/quickstart.py

Draws two captions at 1024×1024 with both from the same seeds, in stages from the pipeline's native size, measures every
whole picture from text to pixels, counts the captions' facts that the pictures show, prints one table and writes one
image. Nothing is downloaded. Takes about two minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import diffusers
import psutil
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

from flatten_diffusion import load_adapter
from flatten_diffusion.adapter import Adapter
from flatten_diffusion.highres import HighRes, generate_large
from flatten_diffusion.models.timing import device_name
from flatten_diffusion.scenes import fact_accuracy, load_scenes_pipeline
from flatten_diffusion.scenes.pipeline import ADAPTER_DIR

CAPTIONS = (
    "a striped red circle left of a blue star on a white background",
    "three yellow diamonds on a navy background",
)
ORIGINAL, CONVERTED = "original", "converted"


@dataclass
class Side:
    """What was seen of one attention: seconds and extra memory of each picture, share of its facts that hold."""

    pictures: list[Image.Image] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    mebibytes: list[float] = field(default_factory=list)
    facts: list[float] = field(default_factory=list)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart.png"), help="where the image goes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=1024, help="side in pixels of the pictures drawn")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument(
        "--strength", type=float, default=0.4, help="how far each stage after the first is noised again"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the table's numbers here too")
    args = parser.parse_args()
    if not args.output.parent.is_dir():
        parser.error(f"--output: there is no folder {args.output.parent}")
    if args.size < 128 or args.size % 32:
        parser.error(f"--size {args.size} must be a multiple of 32, at least 128")
    try:
        # Whole, not in tiles: this autoencoder's normalisation tells a tile from a picture, and 1024 pixels fit.
        args.stages = HighRes(
            target=(args.size,) * 2, steps=args.num_inference_steps, strength=args.strength, tiled_vae=False
        )
    except ValueError as error:
        parser.error(str(error))
    return args


class PeakMemory:
    """Most memory a call needs beyond what was in use before it, in MiB: CUDA's own count, or resident set sampled."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak = 0.0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        _return_free_memory()
        self._process, self._stop = psutil.Process(), threading.Event()
        self._before = self._most = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._most = max(self._most, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self._most = torch.cuda.max_memory_allocated(self.device)
        else:
            self._stop.set()
            self._thread.join()
        self.peak = (self._most - self._before) / 2**20


def _return_free_memory() -> None:
    """Let glibc hand freed pages back, so that the next call's needs show in the resident set."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if platform.system() == "Linux" else None
    if trim is not None:
        trim(0)


def in_turn(adapter: Adapter) -> dict[str, Callable[[], AbstractContextManager[object]]]:
    """Each attention and how to be within it."""
    return {ORIGINAL: adapter.disabled, CONVERTED: nullcontext}


def draw(pipe: StableDiffusionPipeline, adapter: Adapter, args: argparse.Namespace) -> dict[str, Side]:
    """Every caption with both attentions from the same seed, one after the other, each whole picture measured."""
    sides = {name: Side() for name in in_turn(adapter)}
    for number, caption in enumerate(CAPTIONS):
        for name, around in in_turn(adapter).items():
            side = sides[name]
            with around(), PeakMemory(pipe.device) as watched:
                start = time.perf_counter()
                side.pictures.append(
                    generate_large(
                        pipe, caption, args.stages, guidance_scale=args.guidance_scale, seed=args.seed + number
                    )
                )
                side.seconds.append(time.perf_counter() - start)
            side.mebibytes.append(watched.peak)
            side.facts.append(fact_accuracy(side.pictures[-1], caption))
    return sides


def two_rows(sides: dict[str, Side], labels: dict[str, str]) -> Image.Image:
    """The pictures of both, one row each."""
    side, margin, label = 512, 8, 26
    sheet = Image.new("RGB", (len(CAPTIONS) * (side + margin) + margin, 2 * (side + label) + margin), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, seen) in enumerate(sides.items()):
        top = row * (side + label)
        pen.text((margin, top + 6), labels[name], fill="black", font_size=15)
        for column, image in enumerate(seen.pictures):
            scaled = image.resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(scaled, (margin + column * (side + margin), top + label))
    return sheet


def table(sides: dict[str, Side], size: int) -> str:
    """What was measured, in lines."""
    before, after = sides[ORIGINAL], sides[CONVERTED]
    seconds = [statistics.median(side.seconds) for side in (before, after)]
    memory = [max(side.mebibytes) for side in (before, after)]
    facts = [statistics.mean(side.facts) for side in (before, after)]
    return "\n".join(
        [
            f"{f'a picture of {size}x{size}, text to pixels':<40} {'original':>10} {'converted':>10}",
            f"{'seconds':<40} {seconds[0]:>10.1f} {seconds[1]:>10.1f} {seconds[0] / seconds[1]:>6.2f}x",
            f"{'extra memory, MiB':<40} {memory[0]:>10.0f} {memory[1]:>10.0f}",
            f"{'stated facts that hold':<40} {facts[0]:>10.1%} {facts[1]:>10.1%}",
        ]
    )


def result(sides: dict[str, Side], adapter: Adapter, args: argparse.Namespace) -> dict[str, object]:
    """The same, JSON-ready."""
    measured = {
        name: {key: values for key, values in vars(side).items() if key != "pictures"} for name, side in sides.items()
    }
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    return {
        "command": "python examples/quickstart.py --json quickstart.json",
        "converted_layers": list(adapter.layers),
        "stages": args.stages.to_dict(),
        "captions": CAPTIONS,
        "measured": measured,
        "versions": versions,
        "hardware": hardware(torch.device(args.device)),
        "processor": device_name(torch.device("cpu")),
        "date": date.today().isoformat(),
    }


def hardware(device: torch.device) -> str:
    return device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


def main() -> None:
    args = parse_args()
    pipe = load_scenes_pipeline().to(args.device)
    pipe.set_progress_bar_config(disable=None)
    adapter = load_adapter(pipe, ADAPTER_DIR)
    print(f"Drawing {len(CAPTIONS)} captions twice at {args.size}x{args.size} ...", flush=True)
    sides = draw(pipe, adapter, args)
    labels = {ORIGINAL: "original: softmax attention", CONVERTED: "converted: linear attention"}
    two_rows(sides, labels).save(args.output)
    where = hardware(torch.device(args.device))
    print(f"\ntorch {torch.__version__}, {platform.machine()}, {where}; drawn in turn")
    print(table(sides, args.size))
    print(f"\nBoth rows of pictures: {args.output.resolve()}")
    if args.json:
        args.json.write_text(json.dumps(result(sides, adapter, args), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
