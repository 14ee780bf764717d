"""Draws a scene with Pillow, at any size: everything is placed in unit coordinates, (0, 0) top left."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from .grammar import BACKGROUNDS, COLOURS, ORIENTATIONS, TEXTURES, SceneSpec, parse

_SUPERSAMPLING = 4
# The texture's ink is the object's colour halfway to white.
INK_TINT = 0.5
PINSTRIPE_PERIOD = 16.0
"""Pixels of the picture from one pinstripe to the next; the stripe is half as wide."""
LINE_WIDTH, LINE_LENGTH = 8.0, 0.8
"""A thin line's width in pixels of the picture, and its length in units of the side it runs along."""


@dataclass(frozen=True)
class Placed:
    """One drawn object: centre and radius in units of the image's shorter side (x, y of its width and height).

    A line's shape is its orientation, and it has no radius.
    """

    shape: str
    colour: str
    texture: str
    x: float
    y: float
    radius: float
    flipped: bool = False


def tint(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """The ink of a texture on `colour`."""
    red, green, blue = (round(channel + (255 - channel) * INK_TINT) for channel in colour)
    return red, green, blue


def layout(spec: SceneSpec, rng: random.Random) -> list[Placed]:
    """Choose everything the caption leaves open: places, sizes, and colours or textures that are not stated."""
    if spec.kind == "lines":
        return _lines(spec, rng)
    places = {
        "single": _single_places,
        "count": _count_places,
        "relation": _relation_places,
        "matching": _pair_places,
        "mirrored": _mirrored_places,
        "distant": _distant_places,
        "row": _grid_places,
        "grid": _grid_places,
    }[spec.kind](spec, rng)
    radii = {"single": (0.26, 0.36), "count": (0.155, 0.18), "distant": (0.08, 0.1), "row": (0.054, 0.062)}
    if spec.kind == "grid" and spec.grid:
        radii["grid"] = (0.3 / max(spec.grid), 0.34 / max(spec.grid))
    radius = rng.uniform(*radii.get(spec.kind, (0.17, 0.2)))
    placed = []
    open_colour = rng.choice(list(COLOURS))
    for index, (x, y) in enumerate(places):
        thing = spec.things[index] if spec.kind == "relation" else spec.things[0]
        colour, texture = thing.colour or open_colour, thing.texture or TEXTURES[0]
        flipped = spec.kind == "mirrored" and index == 1
        placed.append(Placed(thing.shape, colour, texture, x, y, radius, flipped))
    return placed


def _lines(spec: SceneSpec, rng: random.Random) -> list[Placed]:
    spread = 0.8 / spec.count
    middles = [0.5 + (index - (spec.count - 1) / 2) * spread + rng.uniform(-0.02, 0.02) for index in range(spec.count)]
    colour, upright = spec.things[0].colour or "", spec.orientation == "vertical"
    places = [(middle, 0.5) if upright else (0.5, middle) for middle in middles]
    return [Placed(spec.orientation or "", colour, TEXTURES[0], x, y, 0.0) for x, y in places]


def _grid_places(spec: SceneSpec, rng: random.Random) -> list[tuple[float, float]]:
    rows, columns = spec.grid or (1, spec.count)
    # Cells are as wide as the most of them in a row or column asks for, so that grids are square-celled.
    spread = 0.16 if spec.kind == "row" else 0.92 / max(rows, columns)
    x, y = (0.5 + rng.uniform(-0.01, 0.01) for _ in range(2))
    if spec.kind == "row":
        y = rng.uniform(0.25, 0.75)
    return [
        (x + (column - (columns - 1) / 2) * spread, y + (row - (rows - 1) / 2) * spread)
        for row in range(rows)
        for column in range(columns)
    ]


def _distant_places(spec: SceneSpec, rng: random.Random) -> list[tuple[float, float]]:
    # (low, high) of each axis; what the pair stands across from end to end, along the other axis it is free.
    x, y = ([rng.uniform(0.13, 0.17), rng.uniform(0.83, 0.87)] for _ in range(2))
    across = rng.choice(("width", "height", "both"))
    if across == "width":
        y = [rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8)]
    elif across == "height":
        x = [rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8)]
    elif rng.random() < 0.5:
        y.reverse()
    return list(zip(x, y, strict=True))


def _single_places(spec: SceneSpec, rng: random.Random) -> list[tuple[float, float]]:
    return [(rng.uniform(0.42, 0.58), rng.uniform(0.42, 0.58))]


def _count_places(spec: SceneSpec, rng: random.Random) -> list[tuple[float, float]]:
    corners = {
        2: [(0.265, 0.5), (0.735, 0.5)],
        3: [(0.265, 0.29), (0.735, 0.29), (0.5, 0.71)],
        4: [(0.265, 0.265), (0.735, 0.265), (0.265, 0.735), (0.735, 0.735)],
    }[spec.count]
    return [(x + rng.uniform(-0.02, 0.02), y + rng.uniform(-0.02, 0.02)) for x, y in corners]


def _relation_places(spec: SceneSpec, rng: random.Random) -> list[tuple[float, float]]:
    distance, drift = rng.uniform(0.235, 0.265), rng.uniform(-0.1, 0.1)
    sign = -1 if spec.relation in ("left of", "above") else 1
    near, far = 0.5 + sign * distance, 0.5 - sign * distance
    if spec.relation in ("left of", "right of"):
        return [(near, 0.5 + drift), (far, 0.5 - drift)]
    return [(0.5 + drift, near), (0.5 - drift, far)]


def _pair_places(spec: SceneSpec, rng: random.Random) -> list[tuple[float, float]]:
    angle, distance = rng.uniform(0, math.pi), rng.uniform(0.24, 0.265)
    dx, dy = distance * math.cos(angle), distance * math.sin(angle)
    return [(0.5 - dx, 0.5 - dy), (0.5 + dx, 0.5 + dy)]


def _mirrored_places(spec: SceneSpec, rng: random.Random) -> list[tuple[float, float]]:
    distance, y = rng.uniform(0.235, 0.265), rng.uniform(0.3, 0.7)
    return [(0.5 - distance, y), (0.5 + distance, y)]


def draw_background(name: str, width: int, height: int) -> Image.Image:
    """A background of BACKGROUNDS: a flat colour or a vertical gradient, RGB."""
    top, bottom = BACKGROUNDS[name]
    ramp = Image.new("RGB", (1, height))
    for row in range(height):
        share = row / max(height - 1, 1)
        ramp.putpixel((0, row), tuple(round(a + (b - a) * share) for a, b in zip(top, bottom, strict=True)))
    return ramp.resize((width, height), Image.Resampling.NEAREST)


def draw_mask(shape: str, size: int, x: float, y: float, radius: float, flipped: bool = False) -> Image.Image:
    """The silhouette, mode "L" (0 or 255), size × size; x, y and radius in pixels."""
    mask = Image.new("L", (size, size), 0)
    pen = ImageDraw.Draw(mask)

    def polygon(points: list[tuple[float, float]]) -> None:
        pen.polygon([(x + px * radius, y + py * radius) for px, py in points], fill=255)

    def disc(cx: float, cy: float, r: float, fill: int) -> None:
        pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill)

    if shape == "square":
        polygon([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)])
    elif shape == "triangle":
        polygon([(0, -1), (0.95, 0.75), (-0.95, 0.75)])
    elif shape == "diamond":
        polygon([(0, -1), (0.8, 0), (0, 1), (-0.8, 0)])
    elif shape == "cross":
        polygon([(-0.33, -1), (0.33, -1), (0.33, 1), (-0.33, 1)])
        polygon([(-1, -0.33), (1, -0.33), (1, 0.33), (-1, 0.33)])
    elif shape == "star":
        turns = [math.pi * (k / 5 - 0.5) for k in range(10)]
        reach = [1.08 if k % 2 == 0 else 0.5 for k in range(10)]
        polygon([(r * math.cos(t), r * math.sin(t)) for r, t in zip(reach, turns, strict=True)])
    else:
        disc(x, y, radius, 255)
    if shape == "ring":
        disc(x, y, radius * 0.52, 0)
    elif shape == "crescent":
        disc(x + radius * (-0.62 if flipped else 0.62), y, radius * 0.8, 0)
    return mask


def draw_pinstripes(size: int, x: float, period: float) -> Image.Image:
    """Upright stripes, mode "L" (255 ink), size × size, the edge of one at `x`; `period` in pixels."""
    columns = (np.arange(size) + 0.5 - x) / period
    row = np.where(columns - np.floor(columns) < 0.5, 255, 0).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(row, (size, size)).copy())


def draw_texture(texture: str, size: int, x: float, y: float, radius: float, pixel: float = 1.0) -> Image.Image:
    """Where the ink goes (255), mode "L", anchored to the object's centre; x, y and radius in pixels drawn here.

    `pixel` is how many of those make one of the picture, for textures of a fixed period.
    """
    if texture == "pinstriped":
        return draw_pinstripes(size, x, PINSTRIPE_PERIOD * pixel)
    ink = Image.new("L", (size, size), 0)
    pen = ImageDraw.Draw(ink)
    cell = radius * 0.5
    for row in range(-4, 4):
        top = y + row * cell
        if texture == "striped" and row % 2 == 0:
            pen.rectangle((x - 2 * radius, top, x + 2 * radius, top + cell), fill=255)
        for column in range(-4, 4):
            left = x + column * cell
            if texture == "checkered" and (row + column) % 2 == 0:
                pen.rectangle((left, top, left + cell, top + cell), fill=255)
            elif texture == "dotted":
                r = cell * 0.32
                cx, cy = left + cell / 2, top + cell / 2
                pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
    return ink


def _paint(canvas: Image.Image, item: Placed, pixel: float) -> None:
    width, height = canvas.size
    side = min(width, height)
    radius = item.radius * side
    box = int(2.5 * radius) + 2
    left, top = int(item.x * width - box / 2), int(item.y * height - box / 2)
    x, y = item.x * width - left, item.y * height - top
    base = COLOURS[item.colour]
    paint = Image.new("RGB", (box, box), base)
    paint.paste(tint(base), mask=draw_texture(item.texture, box, x, y, radius, pixel))
    canvas.paste(paint, (left, top), draw_mask(item.shape, box, x, y, radius, item.flipped))


def _paint_line(canvas: Image.Image, item: Placed, pixel: float) -> None:
    half = LINE_WIDTH * pixel / 2
    reach = (half, LINE_LENGTH / 2 * canvas.height)
    right, down = reach if item.shape == "vertical" else (LINE_LENGTH / 2 * canvas.width, half)
    x, y = item.x * canvas.width, item.y * canvas.height
    box = (round(x - right), round(y - down), round(x + right), round(y + down))
    canvas.paste(COLOURS[item.colour], box)


def draw(
    background: str, items: list[Placed], width: int, height: int, supersampling: int | None = None
) -> Image.Image:
    """Draw placed objects on a background, RGB, antialiased by `supersampling` times as many pixels a side."""
    scale = supersampling or (_SUPERSAMPLING if max(width, height) <= 1024 else 2)
    canvas = draw_background(background, width * scale, height * scale)
    for item in items:
        (_paint_line if item.shape in ORIENTATIONS else _paint)(canvas, item, float(scale))
    return canvas if scale == 1 else canvas.resize((width, height), Image.Resampling.BOX)


def render(
    caption: str, size: int | tuple[int, int] = 256, seed: int = 0, supersampling: int | None = None
) -> Image.Image:
    """Draw a caption.

    Args:
        caption: a caption of the grammar.
        size: pixels, one side of a square or (width, height).
        seed: chooses everything the caption leaves open.
        supersampling: pixels drawn a side for one of the picture; by default 4, for more than 1024 pixels 2.

    Raises:
        ValueError: the caption is not of the grammar, or the size is below 16 pixels.
    """
    width, height = (size, size) if isinstance(size, int) else size
    if min(width, height) < 16:
        raise ValueError(f"size {width}x{height} is too small to draw a scene: use at least 16 pixels a side")
    spec = parse(caption)
    items = layout(spec, random.Random(f"{spec.caption}|{seed}"))
    return draw(spec.background, items, width, height, supersampling)


def render_folder(captions: Sequence[str], folder: Path, size: int | tuple[int, int], seed: int = 0) -> None:
    """Draw each caption into `folder` (made if needed), with a metadata.jsonl (file_name, text) as data sets have it.

    Caption i is drawn with the seed `seed` + i. Raises ValueError for a caption that is not of the grammar, before the
    first image.
    """
    for caption in captions:
        parse(caption)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, caption in enumerate(tqdm(captions, desc="render")):
        name = f"{index:06d}-{seed}.png"
        render(caption, size, seed + index).save(folder / name)
        rows.append(json.dumps({"file_name": name, "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
