"""The main job: a trained text-to-image pipeline with its own attention and with focused linear attention.

    python examples/quickstart.py

Draws four captions with both from the same seeds, times a denoising step of both at the native size and at 1024×1024,
prints one table and writes one image. Nothing is downloaded. Takes a few minutes on two CPU cores.
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
from contextlib import nullcontext
from datetime import date
from pathlib import Path

import diffusers
import psutil
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

from flatten_diffusion import linearize, load_adapter
from flatten_diffusion.models.timing import device_name
from flatten_diffusion.scenes import load_scenes_pipeline
from flatten_diffusion.scenes.pipeline import ADAPTER_DIR

CAPTIONS = (
    "a striped red circle left of a blue star on a white background",
    "four dotted yellow rings on a navy background",
    "a mirrored pair of green crescents on a mist background",
    "a checkered purple diamond above an orange cross on a dusk background",
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart.png"), help="where the image goes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--large", type=int, default=1024, help="side in pixels of the large timing")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each kind, taken in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the table's numbers here too")
    args = parser.parse_args()
    if not args.output.parent.is_dir():
        parser.error(f"--output: there is no folder {args.output.parent}")
    if args.large <= 0 or args.large % 32:
        parser.error(f"--large {args.large} must be a positive multiple of 32")
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


def one_step(pipe: StableDiffusionPipeline, side: int) -> Callable[[], torch.Tensor]:
    """A guided denoising step (two UNet samples) at `side` pixels."""
    shape = (2, pipe.unet.config.in_channels, side // pipe.vae_scale_factor, side // pipe.vae_scale_factor)
    latents = torch.randn(shape, device=pipe.device, dtype=pipe.dtype)
    positive, negative = pipe.encode_prompt(CAPTIONS[0], pipe.device, 1, True)
    prompt = torch.cat([negative, positive])

    @torch.inference_mode()
    def step() -> torch.Tensor:
        return pipe.unet(latents, 500, encoder_hidden_states=prompt).sample

    return step


def timed(step: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def draw_all(pipe: StableDiffusionPipeline, args: argparse.Namespace) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(args.seed + index) for index in range(len(CAPTIONS))]
    return pipe(
        list(CAPTIONS),
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=generators,
    ).images


def two_rows(above: list[Image.Image], below: list[Image.Image], labels: tuple[str, str]) -> Image.Image:
    side, margin, label = 256, 8, 26
    sheet = Image.new("RGB", (len(above) * (side + margin) + margin, 2 * (side + label) + margin), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (images, text) in enumerate(zip((above, below), labels, strict=True)):
        top = row * (side + label)
        pen.text((margin, top + 6), text, fill="black", font_size=15)
        for column, image in enumerate(images):
            scaled = image.resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(scaled, (margin + column * (side + margin), top + label))
    return sheet


def main() -> None:
    args = parse_args()
    device = torch.device(args.device)
    pipe = load_scenes_pipeline().to(device)
    pipe.set_progress_bar_config(disable=True)
    distilled = (ADAPTER_DIR / "adapter_config.json").is_file()
    adapter = load_adapter(pipe, ADAPTER_DIR) if distilled else linearize(pipe)

    print(f"Drawing {len(CAPTIONS)} captions twice, {args.num_inference_steps} steps each ...", flush=True)
    with adapter.disabled():
        original = draw_all(pipe, args)
    converted = draw_all(pipe, args)
    least = adapter.config.min_tokens
    sizes = f"of {least} tokens and more" if least else "of every size"
    labels = ("original: softmax attention", f"converted: self-attention {sizes} linear")
    two_rows(original, converted, labels).save(args.output)

    native = pipe.unet.config.sample_size * pipe.vae_scale_factor
    print(f"Timing one guided step at {native}x{native} and {args.large}x{args.large} ...", flush=True)
    rows = []
    for side in (native, args.large):
        step = one_step(pipe, side)
        seconds: dict[str, list[float]] = {"original": [], "converted": []}
        memory: dict[str, float] = {}
        for repeat in range(args.repeats + 1):
            for name in seconds:
                with adapter.disabled() if name == "original" else nullcontext():
                    if repeat == 0:  # warm-up, and the one whose memory is watched
                        with PeakMemory(device) as watched:
                            step()
                        memory[name] = watched.peak
                    else:
                        seconds[name].append(timed(step, device))
        rows.append((side, {name: statistics.median(values) for name, values in seconds.items()}, memory))

    where = device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"\ntorch {torch.__version__}, {platform.machine()}, {where}; medians of {args.repeats} steps taken in turn")
    print(f"{'size':>11} {'tokens':>7} | {'seconds per step':^21} | {'':>6} | {'extra memory, MiB':^21}")
    print(f"{'':>11} {'':>7} | {'original':>10} {'converted':>10} | {'ratio':>6} | {'original':>10} {'converted':>10}")
    for side, seconds_of, memory in rows:
        tokens = (side // pipe.vae_scale_factor) ** 2
        before, after = seconds_of["original"], seconds_of["converted"]
        print(
            f"{f'{side}x{side}':>11} {tokens:>7} | {before:>10.3f} {after:>10.3f} | {before / after:>5.2f}x | "
            f"{memory['original']:>10.0f} {memory['converted']:>10.0f}"
        )
    print(f"\nBoth rows of images: {args.output.resolve()}")
    if args.json:
        table = [
            {"pixels": side, "seconds_per_step": seconds_of, "extra_memory_mib": memory}
            for side, seconds_of, memory in rows
        ]
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
        result = {
            "command": "python examples/quickstart.py --json quickstart.json",
            "converted_layers": adapter.layers,
            "distilled": distilled,
            "rows": table,
            "versions": versions,
            "hardware": where,
            "processor": device_name(torch.device("cpu")),
            "date": date.today().isoformat(),
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
