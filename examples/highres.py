"""A large picture in stages: the native size first, then upsampled, noised part of the way and denoised again.

    python examples/highres.py --sizes 128 256 512 --output large
    python examples/highres.py --pretrained_model_name_or_path MODEL --adapter out/adapter --sizes 1024 2048 4096 \
        --feed_forward_chunk 16384 --sequential_guidance --dtype bfloat16 --output large

Every stage stays in --output; the same command goes on where it was stopped. Prints one table: seconds and memory of
every stage. `--baseline` also times one step of the original attention at the last size.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from quickstart import PeakMemory
from torch import nn

from flatten_diffusion import linearize
from flatten_diffusion.highres import HighRes, Stage, generate_stages
from flatten_diffusion.highres.pipelines import denoisers
from flatten_diffusion.scenes.pipeline import PIPELINES
from flatten_eval.errors import InputError
from flatten_eval.pipelines import DTYPES, apply_adapter, load_pipeline

CAPTION = "a striped red circle left of a blue star on a white background"


def parse_args() -> tuple[argparse.Namespace, HighRes]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pretrained_model_name_or_path", default="scenes", help=f"hub id, folder, or {' or '.join(PIPELINES)}"
    )
    parser.add_argument("--adapter", help="a saved adapter: folder or hub id")
    parser.add_argument("--training_free", action="store_true", help="pyramid attention, where it is faster")
    parser.add_argument("--prompt", default=CAPTION)
    parser.add_argument("--negative_prompt")
    parser.add_argument("--sizes", nargs="+", type=size_of, help="sides in pixels, or HEIGHTxWIDTH, of every stage")
    parser.add_argument("--target", type=size_of, help="instead of --sizes: the last one, reached by doubling")
    parser.add_argument("--output", type=Path, default=Path("highres"), help="folder of the stages")
    parser.add_argument("--time_shift", type=float, help="of every later stage of a flow-matching pipeline")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--strength", nargs="+", type=float, default=[0.5], help="one, or one per later stage")
    parser.add_argument("--guidance_scale", type=float, help="the pipeline's own unless given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--upsample", choices=("pixel", "latent"), default="pixel")
    parser.add_argument("--tile", type=int, help="side of the VAE's tiles in pixels")
    parser.add_argument("--feed_forward_chunk", type=int, default=0, help="tokens at a time")
    parser.add_argument("--sequential_guidance", action="store_true")
    parser.add_argument("--proportional_attention", action="store_true")
    parser.add_argument("--rotary_scaling", choices=("ntk",))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--baseline", action="store_true", help="time one step of the original attention, last size")
    parser.add_argument("--json", type=Path, help="write the table's numbers here too")
    args = parser.parse_args()
    converted = args.adapter is not None or args.training_free
    if args.adapter is not None and args.training_free:
        parser.error("--adapter and --training_free convert the same layers: give one of them")
    if args.baseline and not converted:
        parser.error("--baseline compares with the original attention: give --adapter or --training_free too")
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.parent}")
    if args.sizes is None and args.target is None:
        args.sizes = [(128, 128), (256, 256), (512, 512)]
    strength = args.strength[0] if len(args.strength) == 1 else tuple(args.strength)
    names = ("sizes", "target", "upsample", "tile", "feed_forward_chunk", "sequential_guidance")
    shift: Any = "auto" if args.time_shift is None else args.time_shift
    options: dict[str, Any] = {
        name: getattr(args, name) for name in (*names, "proportional_attention", "rotary_scaling")
    }
    try:
        return args, HighRes(steps=args.num_inference_steps, strength=strength, time_shift=shift, **options)
    except ValueError as error:
        parser.error(str(error))


def size_of(text: str) -> tuple[int, int]:
    """(height, width) of "512" or "512x768"."""
    height, _, width = text.partition("x")
    return int(height), int(width or height)


class LastCall:
    """Keeps what the denoiser was last called with, and how often it was called."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.calls = model, 0
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._hook = model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls, self._arguments = self.calls + 1, (args, kwargs)

    def remove(self) -> None:
        self._hook.remove()

    @torch.inference_mode()
    def again(self) -> None:
        assert self._arguments is not None, "checked before"
        args, kwargs = self._arguments
        self.model(*args, **kwargs)


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call, after one that warms up where that is cheap."""
    if device.type == "cuda":
        run()
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def draw(pipe: Any, args: argparse.Namespace, settings: HighRes, device: torch.device) -> tuple[list[Any], LastCall]:
    """Every stage with its peak memory in MiB; and the denoiser's last call."""
    stages = generate_stages(
        pipe,
        args.prompt,
        settings,
        negative_prompt=args.negative_prompt,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
        output_dir=args.output,
    )
    (model, *_) = denoisers(pipe).values()
    rows: list[tuple[Stage, float, int]] = []
    last = LastCall(model)
    try:
        while True:
            last.calls = 0
            with PeakMemory(device) as watched:
                stage: Stage | None = next(stages, None)
            if stage is None:
                return rows, last
            calls = last.calls if last.calls else (rows[-1][2] if rows else 0)
            rows.append((stage, watched.peak, calls))
    finally:
        last.remove()


def main() -> None:
    args, settings = parse_args()
    device = torch.device(args.device)
    try:
        pipe = load_pipeline(args.pretrained_model_name_or_path, dtype=args.dtype, device=device, offline=args.offline)
        adapter = None if args.adapter is None else apply_adapter(pipe, args.adapter, args.offline)
        if args.training_free:
            adapter = linearize(pipe, "training-free")
        pipe.set_progress_bar_config()
        rows, last = draw(pipe, args, settings, device)
    except (InputError, ValueError, TypeError, OSError) as error:
        raise SystemExit(f"highres.py: {error}") from error

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"\ntorch {torch.__version__}, {where}, {args.dtype}")
    print(f"{'stage':>5} {'size':>11} {'steps':>6} {'seconds':>9} {'extra memory, MiB':>18}")
    table = []
    for stage, peak, _ in rows:
        shown = "from disk" if stage.resumed else f"{peak:.0f}"
        size = f"{stage.size[0]}x{stage.size[1]}"
        print(f"{stage.number:>5} {size:>11} {stage.steps:>6} {stage.seconds:>9.1f} {shown:>18}")
        table.append({"size": stage.size, "steps": stage.steps, "seconds": stage.seconds, "extra_memory_mib": peak})
    stage, _, calls = rows[-1]
    result: dict[str, Any] = {"stages": table, "torch": torch.__version__, "hardware": where, "dtype": args.dtype}
    if args.baseline and stage.resumed:
        print("--baseline: the last stage was there already, so there is no step to time; choose another --output.")
    elif args.baseline and adapter is not None:
        per_step = calls / stage.steps
        seconds = {}
        for name in ("converted", "original"):
            with adapter.disabled() if name == "original" else nullcontext():
                seconds[name] = per_step * timed(last.again, device)
        beside = stage.seconds - stage.steps * seconds["converted"]
        total = max(beside, 0.0) + stage.steps * seconds["original"]
        print(
            f"\nOne step at the last size: original attention {seconds['original']:.2f} s, "
            f"converted {seconds['converted']:.2f} s.\nThe last stage with the original attention: {total:.1f} s "
            f"(extrapolated from that one step to {stage.steps}), converted {stage.seconds:.1f} s (measured)."
        )
        result["baseline"] = {"seconds_per_step": seconds, "last_stage_extrapolated": total}
    print(f"\nThe picture: {(stage.folder / 'picture.png').resolve()}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
