"""What a large picture is made with, and the sizes on the way to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, TypeGuard

Size = tuple[int, int]
"""(height, width) in pixels."""

UPSAMPLINGS = ("pixel", "latent")
_LARGEST = 65536
"""Pixels; the largest side that is taken: what is larger is a slip of the pen."""


@dataclass(frozen=True)
class HighRes:
    """Settings of `generate_large`. Everything that is switched on is off again when a stage ends.

    Args:
        sizes: (height, width) in pixels of every stage, the first at (or near) the size that the model was trained at,
            each at least as large as the one before. Or
        target: (height, width) of the last stage: the pipeline's native size at this shape is doubled until the target
            is reached, the last factor being what is left (see `staged_sizes`).
        steps: of the whole schedule, at every stage; a stage of strength s runs s times as many.
        strength: how far each later stage is noised again, as the share of the schedule that it runs, in (0, 1]; one
            for all, or one per later stage. Low keeps the composition and invents little (PixelRush, CVPR 2026, starts
            at t = 249 of 1,000), high invents detail and, beyond the native size, repeats objects.
        upsample: "pixel": the 8-bit picture (Lanczos) is encoded anew, which keeps edges sharp; "latent": latents are
            resized (bicubic) without an encoder's pass, which is blurrier and wants a strength of 0.6 and more.
        tiled_vae: encode and decode beyond the VAE's tile size in overlapping, blended tiles: bounded memory for a
            small error at the seams.
        tile: side of the tiles in pixels; None for the VAE's own.
        feed_forward_chunk: tokens that a feed-forward layer sees at a time, which bounds its hidden layer; 0 for all.
            Exact up to rounding.
        sequential_guidance: conditional and unconditional pass one after the other instead of as a batch of two: exact
            up to rounding, half the activations.
        proportional_attention: scores grow by sqrt(log N / log N_native) (Jin et al., NeurIPS 2023); see
            `flatten_diffusion.models.proportional_attention` for what it does to each mixer.
        time_shift: of flow-matching schedules. "auto": a later stage shifts sqrt(pixels / native pixels) times as far
            as the first, since noise of one level hides less of a larger picture (Esser et al., ICML 2024, eq. 23;
            schedulers that shift by the image's size themselves, Flux, extrapolate a line far beyond its two points, so
            their shift at the native size is grown instead). Schedules of other kinds have none and are left alone. A
            number: the shift of every later stage. None: as the pipeline does.
        rotary_scaling: "ntk": the base of rotary embeddings grows with the picture (NTK-aware scaling as in I-Max,
            arXiv 2410.07536); Flux only. None: as trained.

    Raises:
        ValueError: a setting out of range; at the call, what the pipeline cannot do.
    """

    sizes: Sequence[Size] | None = None
    target: Size | None = None
    steps: int = 30
    strength: float | Sequence[float] = 0.5
    upsample: Literal["pixel", "latent"] = "pixel"
    tiled_vae: bool = True
    tile: int | None = None
    feed_forward_chunk: int = 0
    sequential_guidance: bool = False
    proportional_attention: bool = False
    time_shift: Literal["auto"] | float | None = "auto"
    rotary_scaling: Literal["ntk"] | None = None

    def __post_init__(self) -> None:
        if (self.sizes is None) == (self.target is None):
            raise ValueError("Pass either sizes, such as [(512, 512), (1024, 1024)], or target, such as (2048, 2048).")
        if self.target is not None:
            object.__setattr__(self, "target", _size("target", self.target))
        else:
            object.__setattr__(self, "sizes", _sizes(self.sizes))
        _check_count("steps", self.steps, 1, 10_000)
        object.__setattr__(self, "strength", self._strengths())
        if self.upsample not in UPSAMPLINGS:
            raise ValueError(f"upsample is {self.upsample!r:.60}: choose one of {', '.join(UPSAMPLINGS)}.")
        _check_count("feed_forward_chunk", self.feed_forward_chunk, 0, 2**31)
        if self.tile is not None:
            _check_count("tile", self.tile, 1, _LARGEST)
            if not self.tiled_vae:
                raise ValueError("tile is given and tiled_vae is off: leave one of them out.")
        for name in ("tiled_vae", "sequential_guidance", "proportional_attention"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r:.60}: pass True or False.")
        shift = self.time_shift
        if not (shift is None or shift == "auto" or (_is_number(shift) and 0 < shift <= 1000)):
            raise ValueError(f"time_shift is {shift!r:.60}: pass 'auto', a positive number, or None.")
        if self.rotary_scaling not in (None, "ntk"):
            raise ValueError(f"rotary_scaling is {self.rotary_scaling!r:.60}: pass 'ntk', or None.")

    def _strengths(self) -> float | tuple[float, ...]:
        single = _is_number(self.strength)
        if not single and not isinstance(self.strength, (list, tuple)):
            raise ValueError(f"strength is {self.strength!r:.60}: pass a number in (0, 1], or one per later stage.")
        strengths: Sequence[Any] = [self.strength] if single else self.strength  # type: ignore[assignment]
        for value in strengths:
            if not _is_number(value) or not 0 < value <= 1:
                raise ValueError(f"strength is {value!r:.60}: pass numbers above 0, at most 1.")
            if int(self.steps * value) < 1:
                raise ValueError(f"strength {value:g} of {self.steps} steps is no step: raise one of them.")
        if not single and self.sizes is not None and len(strengths) != len(self.sizes) - 1:
            raise ValueError(
                f"strength has {len(strengths)} numbers for {len(self.sizes) - 1} later stages: pass one for each."
            )
        return float(strengths[0]) if single else tuple(float(value) for value in strengths)

    def strength_of(self, stage: int, stages: int) -> float:
        """Of the stage with this number from 1 to `stages`; 1 for the first. Raises ValueError where none is given."""
        if stage == 1:
            return 1.0
        if not isinstance(self.strength, tuple):
            assert isinstance(self.strength, float), "made so at the start"
            return self.strength
        if len(self.strength) != stages - 1:
            raise ValueError(
                f"strength has {len(self.strength)} numbers for {stages - 1} later stages: pass one for each."
            )
        return self.strength[stage - 2]

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types."""
        return {name: _plain(value) for name, value in asdict(self).items()}


def staged_sizes(target: Size, native: Size, multiple: int) -> list[Size]:
    """The sizes on the way to `target`: native area at the target's shape, doubled, then the target itself.

    A last factor below 1.25 is not worth a stage: the one before it then grows by up to 2.5 instead.

    Args:
        target: (height, width) in pixels.
        native: (height, width) that the model was trained at.
        multiple: pixels by which sides are divisible; the target's are taken as they are.

    Raises:
        ValueError: a target so narrow that its shorter side would be less than one token at the native area.
    """
    area, wanted = native[0] * native[1], target[0] * target[1]
    if math.sqrt(wanted / area) < 1.25:
        return [target]
    shrunk = math.sqrt(area / wanted)
    if min(target) * shrunk < multiple:
        raise ValueError(f"target {target[0]}x{target[1]} is too narrow for a native size of {native[0]}x{native[1]}.")
    height, width = (round(side * shrunk / multiple) * multiple for side in target)
    sizes = [(height, width)]
    while math.sqrt(wanted / (height * width)) >= 2.5:
        height, width = 2 * height, 2 * width
        sizes.append((height, width))
    return [*sizes, target]


def _sizes(sizes: object) -> tuple[Size, ...]:
    if not isinstance(sizes, (list, tuple)) or not sizes:
        raise ValueError(f"sizes is {sizes!r:.60}: pass a list of (height, width), such as [(512, 512), (1024, 1024)].")
    checked = tuple(_size("sizes", size) for size in sizes)
    for before, after in pairwise(checked):
        if after[0] < before[0] or after[1] < before[1] or after == before:
            raise ValueError(f"sizes goes from {before[0]}x{before[1]} to {after[0]}x{after[1]}: let every stage grow.")
    return checked


def _size(name: str, size: object) -> Size:
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        raise ValueError(f"{name} holds {size!r:.60}: pass (height, width) in pixels.")
    for side in size:
        if isinstance(side, bool) or not isinstance(side, int) or not 0 < side <= _LARGEST:
            raise ValueError(f"{name} holds {size!r:.60}: pass whole numbers of pixels up to {_LARGEST}.")
    return size[0], size[1]


def _check_count(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} is {value!r:.60}: pass a whole number from {least} to {most}.")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value
