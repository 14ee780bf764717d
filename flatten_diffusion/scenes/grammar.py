"""The caption grammar: what a scene states, how it is said, and how a caption is read back.

caption    := content " on a " background " background"
content    := "a " thing                                              ("an" before a vowel)
            | ("two" | "three" | "four") " " things
            | "a " thing " " relation " a " thing
            | "a matching pair of " [texture " "] shapes          (one colour for both, which one is free)
            | "a mirrored pair of " things                        (each the other's mirror image)
            | "a distant pair of " [texture " "] shapes           (as matching, small and at opposite ends)
            | "a row of " ("three" | ... | "six") " " things
            | "a grid of " ("two" | ... | "four") " by " ("two" | ... | "four") " " things    (rows by columns)
            | ("two" | ... | "five") " thin " colour " " ("horizontal" | "vertical") " lines"
thing      := [texture " "] colour " " shape
relation   := "left of" | "right of" | "above" | "below"

The last four kinds, and the texture "pinstriped", need pictures of `LARGE` pixels: many small things, and detail of a
fixed number of pixels. Smaller pictures are not asked for them, but every caption can be drawn at any size.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 50),
    "green": (40, 165, 70),
    "cyan": (50, 200, 215),
    "blue": (40, 80, 225),
    "purple": (140, 50, 190),
    "pink": (245, 120, 190),
}
# Top and bottom colour; neutral or nearly so, so that every object colour and its tint stand out.
BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "white": ((250, 250, 250), (250, 250, 250)),
    "gray": ((128, 128, 128), (128, 128, 128)),
    "black": ((12, 12, 14), (12, 12, 14)),
    "navy": ((20, 25, 70), (20, 25, 70)),
    "mist": ((250, 250, 250), (110, 110, 115)),
    "dusk": ((12, 12, 14), (150, 150, 155)),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "cross", "ring", "star", "crescent")
TEXTURES: tuple[str, ...] = ("solid", "striped", "dotted", "checkered")
FINE_TEXTURES: tuple[str, ...] = ("pinstriped",)
"""Of a fixed period in pixels, whatever the size of the picture."""
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
ORIENTATIONS: tuple[str, ...] = ("horizontal", "vertical")
NUMBERS: dict[str, int] = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
KINDS: tuple[str, ...] = ("single", "count", "relation", "matching", "mirrored")
LARGE_KINDS: tuple[str, ...] = ("distant", "row", "grid", "lines")
LARGE = 256
"""Shorter side in pixels from which pictures hold `LARGE_KINDS` and `FINE_TEXTURES`."""
# How often each kind is drawn: relations have by far the most captions.
_KIND_WEIGHTS = (2, 3, 4, 2, 2)
_LARGE_WEIGHTS = (2, 2, 2, 1)
# How many things each kind can hold; of a grid in each direction.
_COUNTS = {"count": (2, 3, 4), "row": (3, 4, 5, 6), "grid": (2, 3, 4), "lines": (2, 3, 4, 5)}
_PAIRS = ("matching", "mirrored", "distant")
_LINE = "line"
_PLURALS = {shape: "crosses" if shape == "cross" else shape + "s" for shape in SHAPES}
_SINGULARS = {plural: shape for shape, plural in _PLURALS.items()}


@dataclass(frozen=True)
class Thing:
    """One stated object. `colour` and `texture` are None where the caption leaves them open."""

    shape: str
    colour: str | None = None
    texture: str | None = None

    def phrase(self, plural: bool = False) -> str:
        """The words for it, without an article: `striped red circle`."""
        words = [self.texture, self.colour, _PLURALS[self.shape] if plural else self.shape]
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class SceneSpec:
    """What a caption states. `things` holds two entries for a relation, else one; `count` is the number of objects.

    `relation` belongs to the kind "relation", `grid` (rows, columns) to "row" and "grid", `orientation` to "lines".
    """

    kind: str
    things: tuple[Thing, ...]
    background: str
    count: int
    relation: str | None = None
    grid: tuple[int, int] | None = None
    orientation: str | None = None

    @property
    def caption(self) -> str:
        """The caption that states exactly this."""
        first = self.things[0]
        if self.kind == "single":
            content = _with_article(first.phrase())
        elif self.kind == "count":
            content = f"{_number(self.count)} {first.phrase(plural=True)}"
        elif self.kind == "row":
            content = f"a row of {_number(self.count)} {first.phrase(plural=True)}"
        elif self.grid:
            content = f"a grid of {_number(self.grid[0])} by {_number(self.grid[1])} {first.phrase(plural=True)}"
        elif self.kind == "lines":
            content = f"{_number(self.count)} thin {first.colour} {self.orientation} lines"
        elif self.kind == "relation":
            content = f"{_with_article(first.phrase())} {self.relation} {_with_article(self.things[1].phrase())}"
        else:
            content = f"a {self.kind} pair of {first.phrase(plural=True)}"
        return f"{content} on a {self.background} background"


def _number(value: int) -> str:
    return next(word for word, number in NUMBERS.items() if number == value)


def _with_article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _parse_thing(words: list[str], caption: str, *, plural: bool = False, colour: bool = True) -> Thing:
    rest = list(words)
    texture = rest.pop(0) if rest and rest[0] in TEXTURES + FINE_TEXTURES else None
    hue = rest.pop(0) if colour and rest and rest[0] in COLOURS else None
    shapes = _SINGULARS if plural else {shape: shape for shape in SHAPES}
    if len(rest) != 1 or rest[0] not in shapes or (colour and hue is None):
        raise ValueError(f"caption {caption!r}: {' '.join(words)!r} is not [texture] colour shape of the grammar")
    return Thing(shapes[rest[0]], hue, texture)


def parse(caption: str) -> SceneSpec:
    """Read a caption of the grammar.

    Raises:
        ValueError: the caption is not one of the grammar; names the part that is not.
    """
    text = " ".join("a" if word == "an" else word for word in caption.lower().strip().rstrip(".").split())
    content, separator, ending = text.partition(" on a ")
    words = ending.split()
    if not separator or len(words) != 2 or words[1] != "background" or words[0] not in BACKGROUNDS:
        raise ValueError(
            f"caption {caption!r}: it must end in 'on a COLOUR background', COLOUR one of {', '.join(BACKGROUNDS)}"
        )
    for read in (_parse_pair, _parse_relation, _parse_row, _parse_grid, _parse_lines, _parse_count):
        spec = read(content, words[0], caption)
        if spec is not None:
            return spec
    raise ValueError(
        f"caption {caption!r}: it must begin with 'a' or with a number that its kind allows; see the scene grammar"
    )


def _parse_pair(content: str, background: str, caption: str) -> SceneSpec | None:
    for kind in _PAIRS:
        prefix = f"a {kind} pair of "
        if content.startswith(prefix):
            thing = _parse_thing(content[len(prefix) :].split(), caption, plural=True, colour=kind == "mirrored")
            return SceneSpec(kind, (thing,), background, 2)
    return None


def _parse_relation(content: str, background: str, caption: str) -> SceneSpec | None:
    for relation in RELATIONS:
        left, found, right = content.partition(f" {relation} a ")
        if found and left.startswith("a "):
            things = (_parse_thing(left[2:].split(), caption), _parse_thing(right.split(), caption))
            return SceneSpec("relation", things, background, 2, relation)
    return None


def _parse_row(content: str, background: str, caption: str) -> SceneSpec | None:
    if not content.startswith("a row of "):
        return None
    number, *rest = content.removeprefix("a row of ").split() or [""]
    count = _parse_number(number, "row", caption)
    return SceneSpec("row", (_parse_thing(rest, caption, plural=True),), background, count, grid=(1, count))


def _parse_grid(content: str, background: str, caption: str) -> SceneSpec | None:
    if not content.startswith("a grid of "):
        return None
    words = content.removeprefix("a grid of ").split()
    if len(words) < 3 or words[1] != "by":
        raise ValueError(f"caption {caption!r}: a grid is told as 'a grid of ROWS by COLUMNS [texture] colour shapes'")
    rows, columns = (_parse_number(word, "grid", caption) for word in (words[0], words[2]))
    thing = _parse_thing(words[3:], caption, plural=True)
    return SceneSpec("grid", (thing,), background, rows * columns, grid=(rows, columns))


def _parse_lines(content: str, background: str, caption: str) -> SceneSpec | None:
    words = content.split()
    if len(words) != 5 or words[1] != "thin" or words[4] != "lines":
        return None
    count = _parse_number(words[0], "lines", caption)
    if words[2] not in COLOURS or words[3] not in ORIENTATIONS:
        raise ValueError(f"caption {caption!r}: lines are told as 'NUMBER thin COLOUR {'|'.join(ORIENTATIONS)} lines'")
    return SceneSpec("lines", (Thing(_LINE, words[2]),), background, count, orientation=words[3])


def _parse_count(content: str, background: str, caption: str) -> SceneSpec | None:
    first, _, rest = content.partition(" ")
    if NUMBERS.get(first) in _COUNTS["count"]:
        return SceneSpec("count", (_parse_thing(rest.split(), caption, plural=True),), background, NUMBERS[first])
    if first == "a":
        return SceneSpec("single", (_parse_thing(rest.split(), caption),), background, 1)
    return None


def _parse_number(word: str, kind: str, caption: str) -> int:
    if NUMBERS.get(word) not in _COUNTS[kind]:
        allowed = ", ".join(map(_number, _COUNTS[kind]))
        raise ValueError(f"caption {caption!r}: {word!r} is no number of the {kind!r} kind; use {allowed}")
    return NUMBERS[word]


def _sample_thing(
    rng: random.Random, *, colour: bool = True, avoid: str | None = None, fine: tuple[str, ...] = ()
) -> Thing:
    texture = rng.choice((None, None, "solid", "striped", "dotted", "checkered", *fine))
    hue = rng.choice([name for name in COLOURS if name != avoid]) if colour else None
    return Thing(rng.choice(SHAPES), hue, texture)


def sample_spec(rng: random.Random, size: int = 128) -> SceneSpec:
    """Draw one scene at random; the two things of a relation differ in colour.

    Args:
        rng: what draws.
        size: shorter side in pixels of the pictures meant; from `LARGE` on, `LARGE_KINDS` and `FINE_TEXTURES` join.
    """
    large = size >= LARGE
    kinds, weights = (KINDS + LARGE_KINDS, _KIND_WEIGHTS + _LARGE_WEIGHTS) if large else (KINDS, _KIND_WEIGHTS)
    kind = rng.choices(kinds, weights)[0]
    background = rng.choice(list(BACKGROUNDS))
    if kind == "lines":
        count, orientation = rng.choice(_COUNTS["lines"]), rng.choice(ORIENTATIONS)
        line = Thing(_LINE, rng.choice(list(COLOURS)))
        return SceneSpec(kind, (line,), background, count, orientation=orientation)
    fine = FINE_TEXTURES if large else ()
    thing = _sample_thing(rng, colour=kind not in ("matching", "distant"), fine=fine)
    if kind == "relation":
        other = _sample_thing(rng, avoid=thing.colour, fine=fine)
        return SceneSpec(kind, (thing, other), background, 2, rng.choice(RELATIONS))
    if kind in ("row", "grid"):
        rows = 1 if kind == "row" else rng.choice(_COUNTS["grid"])
        columns = rng.choice(_COUNTS[kind])
        return SceneSpec(kind, (thing,), background, rows * columns, grid=(rows, columns))
    count = {"single": 1, "count": rng.choice(_COUNTS["count"])}.get(kind, 2)
    return SceneSpec(kind, (thing,), background, count)


def is_held_out(caption: str) -> bool:
    """Whether a caption belongs to the tenth that training never sees (decided by its SHA-256)."""
    return hashlib.sha256(caption.encode()).digest()[0] % 10 == 0


def sample_captions(
    count: int, seed: int = 0, *, held_out: bool | None = None, different: bool = True, size: int = 128
) -> list[str]:
    """Draw `count` captions.

    Args:
        count: how many.
        seed: the same captions for the same seed.
        held_out: only unseen captions (True), only training ones (False), or any (None).
        different: no caption twice. Relations have most of the captions, so of many different ones nearly all are
            relations; with repetitions every kind keeps its share.
        size: shorter side in pixels of the pictures meant, see `sample_spec`.
    """
    rng = random.Random(seed)
    captions: list[str] = []
    seen: set[str] = set()
    while len(captions) < count:
        caption = sample_spec(rng, size).caption
        wanted = held_out is None or is_held_out(caption) == held_out
        if wanted and not (different and caption in seen):
            seen.add(caption)
            captions.append(caption)
    return captions


def vocabulary() -> list[str]:
    """Every word the grammar can say, sorted."""
    words = {"a", "an", "on", "of", "pair", "matching", "mirrored", "background"}
    words.update(("distant", "row", "grid", "by", "thin", "lines"))
    words.update(COLOURS, BACKGROUNDS, SHAPES, _PLURALS.values(), TEXTURES, FINE_TEXTURES, NUMBERS, ORIENTATIONS)
    for relation in RELATIONS:
        words.update(relation.split())
    return sorted(words)
