"""Checks an image against its caption by analysis through synthesis: find the objects, redraw each, keep what fits.

Works on any size; the image is brought to 128 pixels first. No learned part, so that nothing can be gamed by
training: a fact holds when the pixels say so.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from .grammar import BACKGROUNDS, COLOURS, FINE_TEXTURES, LARGE, SHAPES, TEXTURES, SceneSpec, Thing, parse
from .render import PINSTRIPE_PERIOD, draw_background, draw_mask, draw_pinstripes, draw_texture, tint

SETTINGS_KEY = "flatten_eval"
"""Where `flatten-eval generate` keeps an image's prompt and settings in its PNG."""
# The shorter side that a picture is looked at with: the greatest of these that it has, so that fine detail stays.
_SIDES = (128, 256, 512)
# Pixels nearer than this to the background belong to it (RGB distance; the closest object tint is 46 away).
_BACKGROUND_DISTANCE = 32.0
# Smaller spots than this share of the image are dirt, not objects: the smallest drawn crescent covers 1.4 %, where
# there are small things 0.15 %.
_SMALLEST_OBJECT, _SMALLEST_SMALL_OBJECT = 0.005, 0.001
# A line is this much longer than it is wide, or more; everything else less than three times.
_ELONGATION = 6.0
# Things in a row are at one height, in a grid's column one above the other, to this share of the picture's side.
_ALIGNMENT = 0.06
# Two things are distant when their places differ by this share of the picture's width or height.
_DISTANT = 0.55
# Silhouettes of two stated mirror images overlap at least this much when one is flipped (IoU over the image).
_MIRROR_OVERLAP = 0.7


@dataclass(frozen=True)
class Fact:
    """One stated fact and whether the image bears it out."""

    name: str
    holds: bool


@dataclass(frozen=True)
class Found:
    """One object seen in the image; x and y in units of its width and height, the radius of its shorter side.

    The shape of a line is its orientation, its radius half its width.
    """

    shape: str
    colour: str
    texture: str
    x: float
    y: float
    radius: float


def _components(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """The 4-connected components of a mask, by union-find over horizontal runs."""
    runs: list[tuple[int, int, int]] = []
    parent: list[int] = []

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    above: list[int] = []
    for row, line in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate(([False], line, [False])).astype(np.int8)))
        current = []
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            index = len(runs)
            runs.append((row, start, stop))
            parent.append(index)
            current.append(index)
            for other in above:
                if runs[other][1] < stop and start < runs[other][2]:
                    parent[root(other)] = root(index)
        above = current
    parts: dict[int, NDArray[np.bool_]] = {}
    for index, (row, start, stop) in enumerate(runs):
        part = parts.setdefault(root(index), np.zeros_like(mask))
        part[row, start:stop] = True
    return list(parts.values())


@cache
def _backgrounds(width: int, height: int) -> dict[str, NDArray[np.float32]]:
    return {name: np.asarray(draw_background(name, width, height), np.float32) for name in BACKGROUNDS}


@cache
def _unit_boxes() -> dict[tuple[str, bool], tuple[float, float, float, float]]:
    """Bounding box (left, top, right, bottom) of each silhouette of radius 1 about its centre."""
    boxes = {}
    for shape in SHAPES:
        for flipped in (False, True):
            box = draw_mask(shape, 512, 256.0, 256.0, 200.0, flipped).getbbox()
            assert box is not None
            left, top, right, bottom = ((edge - 256.0) / 200.0 for edge in box)
            boxes[shape, flipped] = (left, top, right, bottom)
    return boxes


@cache
def _palette() -> tuple[NDArray[np.float32], list[str]]:
    """Every object colour and its tint, and the name each stands for."""
    rows = [rgb for base in COLOURS.values() for rgb in (base, tint(base))]
    return np.asarray(rows, np.float32), [name for name in COLOURS for _ in range(2)]


def _background_of(pixels: NDArray[np.float32]) -> str:
    height, width = pixels.shape[:2]
    shares = {
        name: float((np.linalg.norm(pixels - plain, axis=-1) < _BACKGROUND_DISTANCE).mean())
        for name, plain in _backgrounds(width, height).items()
    }
    return max(shares, key=lambda name: shares[name])


def _fit_shape(part: NDArray[np.bool_]) -> tuple[str, float, float, float]:
    """The silhouette that overlaps `part` best when redrawn in its bounding box: name, centre, radius in pixels."""
    rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    left, right, top, bottom = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
    side = max(part.shape)
    best, best_overlap = (SHAPES[0], 0.0, 0.0, 0.0), -1.0
    for (shape, flipped), (unit_left, unit_top, unit_right, unit_bottom) in _unit_boxes().items():
        radius = 0.5 * ((right - left) / (unit_right - unit_left) + (bottom - top) / (unit_bottom - unit_top))
        x = (left + right) / 2 - radius * (unit_left + unit_right) / 2
        y = (top + bottom) / 2 - radius * (unit_top + unit_bottom) / 2
        drawn = np.asarray(draw_mask(shape, side, x - 0.5, y - 0.5, radius, flipped))[: part.shape[0], : part.shape[1]]
        overlap = ((drawn > 0) & part).sum() / ((drawn > 0) | part).sum()
        if overlap > best_overlap:
            best, best_overlap = (shape, x, y, radius), float(overlap)
    return best


def _line_of(part: NDArray[np.bool_]) -> tuple[str, float, float, float] | None:
    """Orientation, centre and half the width in pixels of a part that is a line, else None."""
    rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    width, height = columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]
    if max(width, height) < _ELONGATION * min(width, height):
        return None
    x, y = (columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2
    return "horizontal" if width > height else "vertical", x, y, min(width, height) / 2


def _colour_of(pixels: NDArray[np.float32]) -> str:
    rows, names = _palette()
    nearest = np.linalg.norm(pixels[:, None] - rows[None], axis=-1).argmin(1)
    votes = np.bincount(nearest, minlength=len(rows)).reshape(-1, 2).sum(1)
    return names[2 * int(votes.argmax())]


def _texture_models(side: int, x: float, y: float, r: float, pixel: float) -> Iterator[tuple[str, Image.Image]]:
    """Each texture redrawn at twice the size, allowing for some drift; [2 * side, 2 * side]."""
    drift = max(2, round(r / 10))
    for texture in TEXTURES[1:]:
        for dx in (-drift, 0, drift):
            for dy in (-drift, 0, drift):
                yield texture, draw_texture(texture, side * 2, 2 * (x - 0.5) + dx, 2 * (y - 0.5) + dy, 2 * r)
    period = 2 * PINSTRIPE_PERIOD * pixel
    for phase in range(8):  # pixels of a fixed period need not be anchored to the object
        yield FINE_TEXTURES[0], draw_pinstripes(side * 2, 2 * (x - 0.5) + phase * period / 8, period)


def _texture_of(
    pixels: NDArray[np.float32],
    part: NDArray[np.bool_],
    colour: str,
    place: tuple[float, float, float],
    pixel: float,
) -> str:
    """Correlate the ink seen inside the object with each texture redrawn.

    `place` is centre and radius in pixels seen, `pixel` how many of those make one of the picture.
    """
    base = np.asarray(COLOURS[colour], np.float32)
    axis = np.asarray(tint(COLOURS[colour]), np.float32) - base
    ink = np.clip(((pixels - base) @ axis) / (axis @ axis), -0.5, 1.5)
    inside = part & np.roll(part, 1, 0) & np.roll(part, -1, 0) & np.roll(part, 1, 1) & np.roll(part, -1, 1)
    where = inside if inside.sum() > 20 else part
    seen = ink[where]
    if seen.std() < 0.16:
        return "solid"
    height, width = part.shape
    side = max(height, width)
    best, best_score = "solid", 0.2
    for texture, drawn in _texture_models(side, *place, pixel):
        model = np.asarray(drawn.resize((side, side), Image.Resampling.BOX), np.float32)[:height, :width][where]
        if model.std() == 0:
            continue
        score = float(np.mean((seen - seen.mean()) * (model - model.mean())) / (seen.std() * model.std()))
        if score > best_score:
            best, best_score = texture, score
    return best


def _window(part: NDArray[np.bool_], margin: int = 2) -> tuple[slice, slice]:
    """Rows and columns of a part with a margin, as far as the picture goes."""
    spans = (np.flatnonzero(part.any(axis)) for axis in (1, 0))
    rows, columns = (slice(max(int(span[0]) - margin, 0), int(span[-1]) + 1 + margin) for span in spans)
    return rows, columns


def _identify(pixels: NDArray[np.float32], part: NDArray[np.bool_], pixel: float) -> Found:
    """What one part of the foreground is; `pixel` is how many pixels seen make one of the picture."""
    height, width = part.shape
    side = min(height, width)
    rows, columns = _window(part)
    local, seen = part[rows, columns], pixels[rows, columns]
    line = _line_of(local)
    shape, x, y, radius = line or _fit_shape(local)
    colour = _colour_of(seen[local])
    texture = TEXTURES[0] if line else _texture_of(seen, local, colour, (x, y, radius), pixel)
    return Found(shape, colour, texture, (x + columns.start) / width, (y + rows.start) / height, radius / side)


def _seen_size(image: Image.Image) -> tuple[int, int]:
    """Width and height that a picture is looked at with."""
    shorter = min(image.size)
    side = max([side for side in _SIDES if side <= shorter], default=_SIDES[0])
    width, height = (round(length * side / shorter) for length in image.size)
    return width, height


def find_objects(image: Image.Image) -> tuple[str, list[Found], NDArray[np.bool_]]:
    """The background's name, the objects from left to right, and their joint silhouette.

    The picture is looked at with a shorter side of 128 pixels, from 256 with 256, from 512 with 512: that is the
    silhouette's size.
    """
    size = _seen_size(image)
    pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX), np.float32)
    background = _background_of(pixels)
    foreground = np.linalg.norm(pixels - _backgrounds(*size)[background], axis=-1) >= _BACKGROUND_DISTANCE
    smallest = _SMALLEST_SMALL_OBJECT if min(image.size) >= LARGE else _SMALLEST_OBJECT
    pixel = min(size) / min(image.size)
    parts = [part for part in _components(foreground) if part.mean() >= smallest]
    silhouette = np.logical_or.reduce(parts) if parts else np.zeros_like(foreground)
    found = [_identify(pixels, part, pixel) for part in parts]
    return background, sorted(found, key=lambda item: item.x), silhouette


def _colour_fact(label: str, colour: str, seen: list[Found]) -> Fact:
    return Fact(f"{label}colour {colour}", bool(seen) and all(item.colour == colour for item in seen))


def _thing_facts(label: str, thing: Thing, seen: list[Found]) -> list[Fact]:
    """Colour, shape and texture as far as stated; each must hold for every object in `seen`, and there must be one."""
    facts = [_colour_fact(label, thing.colour, seen)] if thing.colour else []
    facts.append(Fact(f"{label}shape {thing.shape}", bool(seen) and all(s.shape == thing.shape for s in seen)))
    if thing.texture:
        holds = bool(seen) and all(s.texture == thing.texture for s in seen)
        facts.append(Fact(f"{label}texture {thing.texture}", holds))
    return facts


def _relation_facts(spec: SceneSpec, seen: list[Found]) -> list[Fact]:
    """Match the two stated things to two objects so that most facts hold, then ask how those two stand."""

    def facts_of(pair: tuple[Found | None, Found | None]) -> list[Fact]:
        first, second = pair
        facts = _thing_facts("first: ", spec.things[0], [first] if first else [])
        facts += _thing_facts("second: ", spec.things[1], [second] if second else [])
        holds = False
        if first and second:
            dx, dy = second.x - first.x, second.y - first.y
            along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[spec.relation or ""]
            holds = along > 0.5 * max(abs(dx), abs(dy)) and along > 0
        return [*facts, Fact(f"relation {spec.relation}", holds)]

    candidates: list[Found | None] = [*seen[:6], None, None]
    options = [facts_of((pair[0], pair[1])) for pair in permutations(candidates, 2)]
    return max(options, key=lambda facts: sum(fact.holds for fact in facts))


def _is_mirrored(silhouette: NDArray[np.bool_], seen: list[Found]) -> bool:
    flipped = silhouette[:, ::-1]
    overlap = (silhouette & flipped).sum() / max(int((silhouette | flipped).sum()), 1)
    return len(seen) == 2 and overlap >= _MIRROR_OVERLAP and seen[0].colour == seen[1].colour


def _is_matching(seen: list[Found]) -> bool:
    if len(seen) != 2:
        return False
    first, second = seen
    alike = (first.shape, first.colour, first.texture) == (second.shape, second.colour, second.texture)
    return alike and 0.75 < first.radius / second.radius < 1.34


def _is_distant(seen: list[Found]) -> bool:
    return len(seen) == 2 and max(abs(seen[0].x - seen[1].x), abs(seen[0].y - seen[1].y)) > _DISTANT


def _is_grid(seen: list[Found], rows: int, columns: int) -> bool:
    """Whether things stand in so many straight rows and columns."""
    if len(seen) != rows * columns:
        return False
    ordered = sorted(seen, key=lambda item: item.y)
    lines = [
        sorted(ordered[start : start + columns], key=lambda item: item.x) for start in range(0, len(seen), columns)
    ]
    level = all(max(item.y for item in line) - min(item.y for item in line) < _ALIGNMENT for line in lines)
    upright = all(
        max(item.x for item in line) - min(item.x for item in line) < _ALIGNMENT for line in zip(*lines, strict=True)
    )
    return level and upright


def check(image: Image.Image, caption: str) -> list[Fact]:
    """Every fact a caption states, and whether the image bears it out.

    Args:
        image: any mode and size.
        caption: a caption of the scene grammar.

    Returns:
        Background and number of objects; colour, shape and texture as stated; relation, matching, mirrored, distant,
        row, grid, or which way lines run.

    Raises:
        ValueError: the caption is not of the grammar.
    """
    spec = parse(caption)
    background, seen, silhouette = find_objects(image)
    facts = [
        Fact(f"background {spec.background}", background == spec.background),
        Fact(f"count {spec.count}", len(seen) == spec.count),
    ]
    if spec.kind == "relation":
        return facts + _relation_facts(spec, seen)
    if spec.kind == "lines":
        return [
            *facts,
            _colour_fact("", spec.things[0].colour or "", seen),
            Fact(f"lines {spec.orientation}", bool(seen) and all(item.shape == spec.orientation for item in seen)),
        ]
    facts += _thing_facts("", spec.things[0], seen)
    if spec.kind in ("matching", "distant"):
        facts.append(Fact("matching", _is_matching(seen)))
    if spec.kind == "distant":
        facts.append(Fact("distant", _is_distant(seen)))
    elif spec.grid:
        rows, columns = spec.grid
        facts.append(Fact(f"{spec.kind} {rows} by {columns}", _is_grid(seen, rows, columns)))
    elif spec.kind == "mirrored":
        facts.append(Fact("mirrored", _is_mirrored(silhouette, seen)))
    return facts


def fact_accuracy(image: Image.Image, caption: str) -> float:
    """The share of a caption's stated facts that hold in the image, 0 to 1."""
    facts = check(image, caption)
    return sum(fact.holds for fact in facts) / len(facts)


def _captioned(folder: Path) -> list[tuple[Path, str]]:
    """(image, caption) from metadata.jsonl, or from the settings that `flatten-eval generate` leaves in its PNGs."""
    metadata = folder / "metadata.jsonl"
    if metadata.is_file():
        rows = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [(folder / row["file_name"], row["text"]) for row in rows]
    pairs = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            settings = json.loads(image.info.get(SETTINGS_KEY, "{}"))
        if not settings.get("prompt"):
            raise ValueError(f"{path} carries no caption: give a folder with metadata.jsonl (file_name, text)")
        pairs.append((path, settings["prompt"]))
    if not pairs:
        raise ValueError(f"{folder} holds no images: give a folder made by `render` or by `flatten-eval generate`")
    return pairs


def check_folder(folder: Path) -> dict[str, Any]:
    """Facts over a folder of captioned images, JSON-ready: `count`, `fact_accuracy` (the mean over images of
    `fact_accuracy`) and `by_kind` (the share of facts of each kind that hold).

    Captions are those of metadata.jsonl (file_name, text), or what `flatten-eval generate` leaves in its PNGs.

    Raises:
        ValueError: an image without caption, or a caption that is not of the grammar; names the image.
    """
    kinds: dict[str, list[bool]] = defaultdict(list)
    shares = []
    for path, caption in tqdm(_captioned(folder), desc="check"):
        try:
            with Image.open(path) as image:
                facts = check(image, caption)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
        shares.append(sum(fact.holds for fact in facts) / len(facts))
        for fact in facts:
            kinds[fact.name.split(": ")[-1].split()[0]].append(fact.holds)
    by_kind = {kind: sum(held) / len(held) for kind, held in sorted(kinds.items())}
    accuracy = sum(shares) / len(shares)
    return {"folder": folder.name, "count": len(shares), "fact_accuracy": accuracy, "by_kind": by_kind}
