"""Seconds per denoising step: softmax backends, this project's conversion, and the attention-free floor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.utils.import_utils import is_xformers_available
from torch.nn.attention import sdpa_kernel

from flatten_diffusion import AdapterConfig, linearize, restore
from flatten_diffusion.mixers import count_tokens
from flatten_diffusion.models import LAYER
from flatten_diffusion.ops import available_backends

from ..errors import first_line
from .architectures import free_memory, make_inputs
from .floor import attention_free
from .operator import sdpa_backends
from .timing import Candidate, Measurement, measure, ratio

SDPA = "sdpa"
FLOOR = "floor"
LINEAR = "linear"
COMPILED = " (compiled)"


@dataclass(frozen=True)
class ThroughputOptions:
    """How to measure.

    Attributes:
        batch: images per forward pass, before guidance doubles them.
        guidance_batches: forward samples per image.
        steps: denoising steps, for seconds per image.
        rounds, warmup, seconds: see `timing.measure`; `seconds` is per size.
        compiled: also measure under torch.compile.
        all_backends: every softmax backend and the readable reference, not just the usual ones.
        memory: also look for the peak, with one more call of each.
        compression: pixels per latent, along one side.
    """

    batch: int = 1
    guidance_batches: int = 2
    steps: int = 50
    rounds: int = 10
    warmup: int = 2
    seconds: float = 120.0
    compiled: bool = False
    all_backends: bool = True
    memory: bool = True
    compression: int = 8
    seed: int = 0


def measure_model(
    model: torch.nn.Module,
    sizes: Sequence[tuple[int, int]],
    device: torch.device,
    options: ThroughputOptions,
    config: AdapterConfig | None = None,
    adapter: Any = None,
) -> list[dict[str, Any]]:
    """Measures one denoiser at every size (height, width); the model comes back as it was.

    Args:
        config: of the conversion; None for the defaults.
        adapter: the handle, where the model is converted already.

    Returns:
        One JSON-ready dictionary per size: `height`, `width`, `variants` by name, and under
        `min_tokens="auto"` what became of each of `layers`. A variant that cannot run holds
        its reason under `failure`.
    """
    refusal: str | None = None
    converted_here = adapter is None
    if adapter is None:
        try:
            adapter = linearize(model, config)
        except (ValueError, NotImplementedError, TypeError) as error:
            refusal = first_line(error)
    try:
        return [_measure_size(model, adapter, refusal, size, device, options) for size in sizes]
    finally:
        if adapter is not None and converted_here:
            restore(model)


def _measure_size(
    model: torch.nn.Module,
    adapter: Any,
    refusal: str | None,
    size: tuple[int, int],
    device: torch.device,
    options: ThroughputOptions,
) -> dict[str, Any]:
    failures: dict[str, str] = {}
    measured: dict[str, Measurement] = {}
    samples = options.batch * options.guidance_batches
    try:
        inputs = make_inputs(model, *size, samples, options.seed, options.compression)
    except (torch.OutOfMemoryError, RuntimeError):
        failures[SDPA] = "out of memory"
    else:

        def forward(network: Callable[..., Any] = model) -> object:
            with torch.inference_mode():
                return network(**inputs, return_dict=False)

        candidates = _candidates(model, adapter, forward, device, options)
        if refusal is not None:
            failures |= {LINEAR: refusal, FLOOR: refusal}
        failures |= _too_large(candidates, adapter, size, device, options)
        runnable = {name: candidate for name, candidate in candidates.items() if name not in failures}
        # Variants of one model are recompilations to torch.compile; its default limit would drop later ones to eager.
        settings: Any = torch._dynamo.config
        with settings.patch(recompile_limit=8 * len(runnable) + 8):
            measured = measure(
                runnable, device, rounds=options.rounds, warmup=options.warmup, seconds=options.seconds,
                memory=options.memory, label="{1}x{0}".format(*size),
            )  # fmt: skip
        if options.compiled:
            torch.compiler.reset()
    measured |= {name: Measurement(failure=reason) for name, reason in failures.items()}
    row: dict[str, Any] = {"height": size[0], "width": size[1], "variants": _rates(measured, options)}
    if adapter is not None and adapter.config.min_tokens == "auto":  # then each size has its own
        row["layers"] = {layer.name: layer.reason for layer in adapter.report().converted}
    return row


def _candidates(
    model: torch.nn.Module,
    adapter: Any,
    forward: Callable[..., object],
    device: torch.device,
    options: ThroughputOptions,
) -> dict[str, Candidate]:
    """Every variant by name: sdpa, sdpa:BACKEND, xformers, linear:BACKEND, floor, and each (compiled)."""

    def softmax(*around: Callable[[], AbstractContextManager[Any]]) -> Callable[[], ExitStack]:
        def inside() -> ExitStack:
            stack = ExitStack()
            for context in around if adapter is None else (adapter.disabled, *around):
                stack.enter_context(context())
            return stack

        return inside

    found = {SDPA: Candidate(forward, softmax())}
    if options.all_backends:
        for name, backend in sdpa_backends(device).items():
            found[f"{SDPA}:{name}"] = Candidate(forward, softmax(partial(sdpa_kernel, backend)))
        if device.type == "cuda" and adapter is not None and is_xformers_available():
            found["xformers"] = Candidate(forward, softmax(partial(_xformers, adapter)))
    if adapter is not None:
        for name in available_backends(device):
            if name != "reference" or options.all_backends:
                found[f"{LINEAR}:{name}"] = Candidate(forward, partial(_backend, adapter, name))
        found[FLOOR] = Candidate(forward, partial(attention_free, adapter))
    if options.compiled:
        compiled = partial(forward, torch.compile(model, dynamic=False))
        found[SDPA + COMPILED] = Candidate(compiled, softmax())
        if adapter is not None:
            found[LINEAR + COMPILED] = Candidate(compiled, partial(_backend, adapter, "auto"))
            found[FLOOR + COMPILED] = Candidate(compiled, partial(attention_free, adapter))
    return found


@contextmanager
def _backend(adapter: Any, name: str) -> Iterator[None]:
    adapter.set_backend(name)
    try:
        yield
    finally:
        adapter.set_backend("auto")


@contextmanager
def _xformers(adapter: Any) -> Iterator[None]:
    from diffusers.models.attention_processor import XFormersAttnProcessor

    layers = [getattr(attention, LAYER) for _, attention in adapter.attention_modules()]
    natives = [layer.native for layer in layers]
    for layer in layers:
        layer.native = XFormersAttnProcessor()
    try:
        yield
    finally:
        for layer, native in zip(layers, natives, strict=True):
            layer.native = native


def _too_large(
    candidates: dict[str, Candidate],
    adapter: Any,
    size: tuple[int, int],
    device: torch.device,
    options: ThroughputOptions,
) -> dict[str, str]:
    """Variants whose N x N scores would exceed the CPU's free memory, where the system kills instead of raising."""
    name = f"{SDPA}:math"
    if device.type != "cpu" or adapter is None or name not in candidates:
        return {}
    with candidates[FLOOR].around():
        candidates[FLOOR].call()
    latents = (size[0] // options.compression, size[1] // options.compression)
    # A conversion without convolution tracks no grid: then every latent may be a token.
    grids = [(row.heads or 1, row.grid or latents) for row in adapter.report() if row.converted]
    scores = max(heads * count_tokens(grid) ** 2 for heads, grid in grids)
    # Scores, their softmax and one temporary, in float32.
    needed = 3 * 4 * scores * options.batch * options.guidance_batches
    free = free_memory(device)
    return {name: "out of memory"} if free is not None and needed > free else {}


def _rates(measured: dict[str, Measurement], options: ThroughputOptions) -> dict[str, Any]:
    rates: dict[str, Any] = {}
    for name, measurement in measured.items():
        seconds = measurement.median
        suffix = COMPILED if name.endswith(COMPILED) else ""
        rates[name] = measurement.as_dict() | {
            "seconds_per_step": seconds,
            "seconds_per_image": seconds * options.steps / options.batch if seconds else None,
            "images_per_second": options.batch / (seconds * options.steps) if seconds else None,
            "speedup_over_sdpa": ratio(measured, SDPA + suffix, name),
            "ratio_to_floor": ratio(measured, name, FLOOR + suffix),
        }
    return rates


def crossover(results: Sequence[dict[str, Any]], suffix: str = "") -> dict[str, Any]:
    """The side of an image, in pixels, from which the conversion is faster than SDPA.

    Args:
        results: of `measure_model`.
        suffix: "" for eager, or `COMPILED`.

    Returns:
        `verdict` in words and `pixels`: interpolated (log-log in the number of pixels) between the two sizes around
        it, the side of a square of as many pixels; None where no crossing lies between measured sizes.
    """
    points = sorted(
        (math.log(row["height"] * row["width"]), math.log(speed))
        for row in results
        if (speed := best_linear_speedup(row, suffix)) is not None
    )
    if not points:
        return {"verdict": "no size at which both ran", "pixels": None}
    if all(speed >= 0 for _, speed in points):
        return {"verdict": "faster at every measured size", "pixels": None}
    if all(speed < 0 for _, speed in points):
        return {"verdict": "slower at every measured size", "pixels": None}
    # The last change from slower to faster; timing noise may show earlier ones.
    for (area, speed), (next_area, next_speed) in reversed(list(itertools.pairwise(points))):
        if speed < 0 <= next_speed:
            logarithm = area + (next_area - area) * -speed / (next_speed - speed)
            side = round(math.sqrt(math.exp(logarithm)))
            return {"verdict": f"faster from about {side}x{side} pixels on", "pixels": side}
    return {"verdict": "faster only at the smaller sizes", "pixels": None}


def best_linear_speedup(row: dict[str, Any], suffix: str = "") -> float | None:
    """The highest speedup over SDPA among the conversion's backends at one size; None where none ran."""
    speeds = [
        variant["speedup_over_sdpa"]
        for name, variant in row["variants"].items()
        if name.startswith(LINEAR) and name.endswith(COMPILED) == bool(suffix)
    ]
    return max((speed for speed in speeds if speed is not None), default=None)
