"""The caption grammar: what a scene states, how it is said, and how a caption is read back.

caption    := content " on a " background " background"
content    := "a " thing                                              ("an" before a vowel)
            | ("two" | "three" | "four") " " things
            | "a " thing " " relation " a " thing
            | "a matching pair of " [texture " "] shapes          (one colour for both, which one is free)
            | "a mirrored pair of " things                        (each the other's mirror image)
thing      := [texture " "] colour " " shape
relation   := "left of" | "right of" | "above" | "below"
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
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
NUMBERS: dict[str, int] = {"two": 2, "three": 3, "four": 4}
KINDS: tuple[str, ...] = ("single", "count", "relation", "matching", "mirrored")
# How often each kind is drawn: relations have by far the most captions.
_KIND_WEIGHTS = (2, 3, 4, 2, 2)
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
    """What a caption states. `things` holds two entries for a relation, else one; `count` is the number of objects."""

    kind: str
    things: tuple[Thing, ...]
    background: str
    count: int
    relation: str | None = None

    @property
    def caption(self) -> str:
        """The caption that states exactly this."""
        first = self.things[0]
        if self.kind == "single":
            content = _with_article(first.phrase())
        elif self.kind == "count":
            number = next(word for word, value in NUMBERS.items() if value == self.count)
            content = f"{number} {first.phrase(plural=True)}"
        elif self.kind == "relation":
            content = f"{_with_article(first.phrase())} {self.relation} {_with_article(self.things[1].phrase())}"
        else:
            content = f"a {self.kind} pair of {first.phrase(plural=True)}"
        return f"{content} on a {self.background} background"


def _with_article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _parse_thing(words: list[str], caption: str, *, plural: bool = False, colour: bool = True) -> Thing:
    rest = list(words)
    texture = rest.pop(0) if rest and rest[0] in TEXTURES else None
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
    background = words[0]
    for kind in ("matching", "mirrored"):
        prefix = f"a {kind} pair of "
        if content.startswith(prefix):
            thing = _parse_thing(content[len(prefix) :].split(), caption, plural=True, colour=kind == "mirrored")
            return SceneSpec(kind, (thing,), background, 2)
    for relation in RELATIONS:
        left, found, right = content.partition(f" {relation} a ")
        if found and left.startswith("a "):
            things = (_parse_thing(left[2:].split(), caption), _parse_thing(right.split(), caption))
            return SceneSpec("relation", things, background, 2, relation)
    first, _, rest = content.partition(" ")
    if first in NUMBERS:
        return SceneSpec("count", (_parse_thing(rest.split(), caption, plural=True),), background, NUMBERS[first])
    if first == "a":
        return SceneSpec("single", (_parse_thing(rest.split(), caption),), background, 1)
    raise ValueError(f"caption {caption!r}: it must begin with 'a', 'two', 'three' or 'four'; see the scene grammar")


def _sample_thing(rng: random.Random, *, colour: bool = True, avoid: str | None = None) -> Thing:
    texture = rng.choice((None, None, "solid", "striped", "dotted", "checkered"))
    hue = rng.choice([name for name in COLOURS if name != avoid]) if colour else None
    return Thing(rng.choice(SHAPES), hue, texture)


def sample_spec(rng: random.Random) -> SceneSpec:
    """Draw one scene at random; the two things of a relation differ in colour."""
    kind = rng.choices(KINDS, _KIND_WEIGHTS)[0]
    background = rng.choice(list(BACKGROUNDS))
    thing = _sample_thing(rng, colour=kind != "matching")
    if kind == "relation":
        other = _sample_thing(rng, avoid=thing.colour)
        return SceneSpec(kind, (thing, other), background, 2, rng.choice(RELATIONS))
    count = {"single": 1, "count": rng.choice((2, 3, 4))}.get(kind, 2)
    return SceneSpec(kind, (thing,), background, count)


def is_held_out(caption: str) -> bool:
    """Whether a caption belongs to the tenth that training never sees (decided by its SHA-256)."""
    return hashlib.sha256(caption.encode()).digest()[0] % 10 == 0


def sample_captions(count: int, seed: int = 0, *, held_out: bool | None = None, different: bool = True) -> list[str]:
    """Draw `count` captions.

    Args:
        count: how many.
        seed: the same captions for the same seed.
        held_out: only unseen captions (True), only training ones (False), or any (None).
        different: no caption twice. Relations have most of the captions, so of many different ones nearly all are
            relations; with repetitions every kind keeps its share.
    """
    rng = random.Random(seed)
    captions: list[str] = []
    seen: set[str] = set()
    while len(captions) < count:
        caption = sample_spec(rng).caption
        wanted = held_out is None or is_held_out(caption) == held_out
        if wanted and not (different and caption in seen):
            seen.add(caption)
            captions.append(caption)
    return captions


def vocabulary() -> list[str]:
    """Every word the grammar can say, sorted."""
    words = {"a", "an", "on", "of", "pair", "matching", "mirrored", "background"}
    words.update(COLOURS, BACKGROUNDS, SHAPES, _PLURALS.values(), TEXTURES, NUMBERS)
    for relation in RELATIONS:
        words.update(relation.split())
    return sorted(words)
