"""The main job: large pictures with a pipeline's own attention and with linear attention, quality and speed in a table.

    python examples/quickstart.py

Draws four captions at 512×512 with both from the same seeds, times every whole picture from text to pixels, counts the
captions' facts that the pictures show, times one denoising step of both at 1024×1024, prints one table and writes one
image. Nothing is downloaded. Takes about two minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import diffusers
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

from flatten_diffusion import load_adapter
from flatten_diffusion.adapter import Adapter
from flatten_diffusion.models.timing import device_name
from flatten_diffusion.scenes import fact_accuracy, load_scenes_pipeline
from flatten_diffusion.scenes.pipeline import ADAPTER_DIR

CAPTIONS = (
    "a striped red circle left of a blue star on a white background",
    "a row of five dotted yellow rings on a navy background",
    "a distant pair of checkered crescents on a mist background",
    "a grid of three by three green diamonds on a dusk background",
)
ORIGINAL, CONVERTED = "original", "converted"


@dataclass
class Side:
    """What was seen of one attention: seconds of each picture and each step, share of facts that hold."""

    pictures: list[Image.Image] = field(default_factory=list)
    picture_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    facts: list[float] = field(default_factory=list)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart.png"), help="where the image goes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=512, help="side in pixels of the pictures drawn")
    parser.add_argument("--large", type=int, default=1024, help="side in pixels at which one step is timed")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=2, help="large steps of each kind, timed in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the table's numbers here too")
    args = parser.parse_args()
    if not args.output.parent.is_dir():
        parser.error(f"--output: there is no folder {args.output.parent}")
    for name in ("size", "large"):
        side = getattr(args, name)
        if side < 64 or side % 32:
            parser.error(f"--{name} {side} must be a multiple of 32, at least 64")
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats} must be at least 1")
    return args


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def in_turn(adapter: Adapter) -> dict[str, Callable[[], AbstractContextManager[object]]]:
    """Each attention and how to be within it."""
    return {ORIGINAL: adapter.disabled, CONVERTED: nullcontext}


def draw(pipe: StableDiffusionPipeline, adapter: Adapter, args: argparse.Namespace) -> dict[str, Side]:
    """Every caption with both attentions from the same seed, each whole picture timed."""
    sides = {name: Side() for name in in_turn(adapter)}
    for number, caption in enumerate(CAPTIONS):
        for name, around in in_turn(adapter).items():

            def call(caption: str = caption, name: str = name, seed: int = args.seed + number) -> None:
                sides[name].pictures += pipe(
                    caption,
                    height=args.size,
                    width=args.size,
                    num_inference_steps=args.num_inference_steps,
                    guidance_scale=args.guidance_scale,
                    generator=torch.Generator().manual_seed(seed),
                ).images

            with around():
                sides[name].picture_seconds.append(seconds_of(call, torch.device(args.device)))
            sides[name].facts.append(fact_accuracy(sides[name].pictures[-1], caption))
    return sides


def time_steps(
    pipe: StableDiffusionPipeline, adapter: Adapter, sides: dict[str, Side], args: argparse.Namespace
) -> None:
    """Guided denoising steps (two samples) of the large size, in turn; the first of each is not counted."""
    latent = args.large // pipe.vae_scale_factor
    latents = torch.randn((2, pipe.unet.config.in_channels, latent, latent), device=pipe.device, dtype=pipe.dtype)
    prompt = torch.cat(pipe.encode_prompt(CAPTIONS[0], pipe.device, 1, True))

    @torch.inference_mode()
    def step() -> torch.Tensor:
        return pipe.unet(latents, 500, encoder_hidden_states=prompt).sample

    for repeat in range(args.repeats + 1):
        for name, around in in_turn(adapter).items():
            with around():
                seconds = seconds_of(step, torch.device(args.device))
            if repeat:
                sides[name].step_seconds.append(seconds)


def two_rows(sides: dict[str, Side], labels: dict[str, str]) -> Image.Image:
    """The pictures of both, one row each."""
    side, margin, label = 256, 8, 26
    sheet = Image.new("RGB", (len(CAPTIONS) * (side + margin) + margin, 2 * (side + label) + margin), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, seen) in enumerate(sides.items()):
        top = row * (side + label)
        pen.text((margin, top + 6), labels[name], fill="black", font_size=15)
        for column, image in enumerate(seen.pictures):
            scaled = image.resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(scaled, (margin + column * (side + margin), top + label))
    return sheet


def table(sides: dict[str, Side], args: argparse.Namespace) -> str:
    """What was measured, in lines."""
    before, after = sides[ORIGINAL], sides[CONVERTED]
    whole = f"whole picture at {args.size}x{args.size}, seconds"
    step = f"one step at {args.large}x{args.large}, seconds"
    lines = [f"{'':<40} {'original':>10} {'converted':>10} {'':>7}"]
    for label, one, other in (
        (whole, before.picture_seconds, after.picture_seconds),
        (step, before.step_seconds, after.step_seconds),
    ):
        a, b = statistics.median(one), statistics.median(other)
        lines.append(f"{label:<40} {a:>10.2f} {b:>10.2f} {a / b:>6.2f}x")
    facts = [statistics.mean(seen.facts) for seen in (before, after)]
    label = f"stated facts that {len(CAPTIONS)} pictures show"
    lines.append(f"{label:<40} {facts[0]:>10.1%} {facts[1]:>10.1%}")
    return "\n".join(lines)


def result(sides: dict[str, Side], layers: list[str], args: argparse.Namespace) -> dict[str, object]:
    """The same, JSON-ready."""
    measured = {
        name: {key: value for key, value in vars(seen).items() if key != "pictures"} for name, seen in sides.items()
    }
    return {
        "command": "python examples/quickstart.py --json quickstart.json",
        "converted_layers": layers,
        "size": args.size,
        "large": args.large,
        "steps": args.num_inference_steps,
        "measured": measured,
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "hardware": hardware(torch.device(args.device)),
        "processor": device_name(torch.device("cpu")),
        "date": date.today().isoformat(),
    }


def hardware(device: torch.device) -> str:
    return device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


def main() -> None:
    args = parse_args()
    pipe = load_scenes_pipeline().to(args.device)
    pipe.set_progress_bar_config(disable=True)
    adapter = load_adapter(pipe, ADAPTER_DIR)
    print(
        f"Drawing {len(CAPTIONS)} captions twice at {args.size}x{args.size}, {args.num_inference_steps} steps each ...",
        flush=True,
    )
    sides = draw(pipe, adapter, args)
    labels = {ORIGINAL: "original: softmax attention", CONVERTED: "converted: linear attention"}
    two_rows(sides, labels).save(args.output)
    print(f"Timing one guided step at {args.large}x{args.large} ...", flush=True)
    time_steps(pipe, adapter, sides, args)
    print(
        f"\ntorch {torch.__version__}, {platform.machine()}, {hardware(torch.device(args.device))}; "
        "medians, taken in turn"
    )
    print(table(sides, args))
    print(f"\nBoth rows of pictures: {args.output.resolve()}")
    if args.json:
        args.json.write_text(json.dumps(result(sides, list(adapter.layers), args), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
