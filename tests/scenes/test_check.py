"""The renderer and its checker hold each other to account: true captions pass, altered ones fail, dirt is tolerated."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageFilter

from flatten_diffusion.scenes.check import check, fact_accuracy, find_objects
from flatten_diffusion.scenes.grammar import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, TEXTURES, parse, sample_captions
from flatten_diffusion.scenes.render import Placed, draw, render


@pytest.mark.parametrize("size", [96, 128, 200, 256, 512, (640, 384), (384, 640), 1024])
def test_real_renderings_hold_their_captions(size):
    shorter = size if isinstance(size, int) else min(size)
    captions = sample_captions(16 if shorter > 512 else 40, seed=shorter, different=False, size=shorter)
    held = [fact_accuracy(render(caption, size, seed), caption) for seed, caption in enumerate(captions)]
    assert sum(held) / len(held) >= 0.99


def _altered(spec, kind):
    """The same scene with one stated fact changed, and the changed fact's first word."""
    thing = spec.things[0]

    def other(names, name):
        names = list(names)
        return names[(names.index(name) + 1) % len(names)]

    if kind == "background":
        return dataclasses.replace(spec, background=other(BACKGROUNDS, spec.background))
    if kind == "colour":
        thing = dataclasses.replace(thing, colour=other(COLOURS, thing.colour))
    elif kind == "shape":
        thing = dataclasses.replace(thing, shape=other(SHAPES, thing.shape))
    elif kind == "texture":
        thing = dataclasses.replace(thing, texture=other(TEXTURES, thing.texture or "solid"))
    return dataclasses.replace(spec, things=(thing, *spec.things[1:]))


@pytest.mark.parametrize("kind", ["background", "colour", "shape", "texture"])
def test_a_changed_fact_is_the_one_that_fails(kind):
    for caption in ("a striped red circle on a white background", "three dotted blue stars on a dusk background"):
        picture = render(caption, 128, seed=4)
        failing = [fact.name for fact in check(picture, _altered(parse(caption), kind).caption) if not fact.holds]
        assert len(failing) == 1 and failing[0].startswith(kind)


def test_counts_relations_and_pairs_can_fail():
    picture = render("three red squares on a gray background", 128, seed=1)
    facts = {fact.name: fact.holds for fact in check(picture, "four red squares on a gray background")}
    assert facts == {"background gray": True, "count 4": False, "colour red": True, "shape square": True}

    said = "a red square left of a blue star on a gray background"
    picture = render(said, 128, seed=1)
    assert fact_accuracy(picture, said) == 1
    swapped = check(picture, "a blue star left of a red square on a gray background")
    assert [fact.name for fact in swapped if not fact.holds] == ["relation left of"]

    unlike = [Placed("star", "red", "solid", 0.3, 0.5, 0.15), Placed("star", "blue", "solid", 0.7, 0.5, 0.15)]
    failing = check(draw("white", unlike, 128, 128), "a matching pair of stars on a white background")
    assert [fact.name for fact in failing if not fact.holds] == ["matching"]

    unflipped = [Placed("crescent", "red", "solid", x, 0.5, 0.17) for x in (0.25, 0.75)]
    failing = check(draw("white", unflipped, 128, 128), "a mirrored pair of red crescents on a white background")
    assert [fact.name for fact in failing if not fact.holds] == ["mirrored"]


def test_all_four_relations_are_told_apart():
    for relation in RELATIONS:
        picture = render(f"a red ring {relation} a green cross on a navy background", 128, seed=2)
        holding = []
        for asked in RELATIONS:
            facts = check(picture, f"a red ring {asked} a green cross on a navy background")
            holding += [asked for fact in facts if fact.name.startswith("relation") and fact.holds]
        assert holding == [relation]


def test_an_empty_image_holds_only_its_background():
    picture = Image.new("RGB", (128, 128), BACKGROUNDS["white"][0])
    holding = [fact.name for fact in check(picture, "a red circle on a white background") if fact.holds]
    assert holding == ["background white"]


def test_blur_noise_and_small_dirt_do_not_change_what_is_seen():
    caption = "two striped purple triangles on a mist background"
    picture = render(caption, 128, seed=3)
    noise = np.random.default_rng(0).normal(0, 6, (128, 128, 3))
    noisy = Image.fromarray(np.clip(np.asarray(picture, np.float64) + noise, 0, 255).astype(np.uint8))
    noisy.paste((255, 0, 0), (2, 2, 6, 6))
    assert fact_accuracy(noisy, caption) == 1
    assert fact_accuracy(picture.filter(ImageFilter.GaussianBlur(1)), caption) == 1


def test_found_objects_are_where_they_were_drawn():
    item = Placed("diamond", "cyan", "checkered", 0.4, 0.6, 0.2)
    background, (seen,), silhouette = find_objects(draw("black", [item], 256, 256))
    assert (background, seen.shape, seen.colour, seen.texture) == ("black", "diamond", "cyan", "checkered")
    assert abs(seen.x - 0.4) < 0.01 and abs(seen.y - 0.6) < 0.01 and abs(seen.radius - 0.2) < 0.01
    assert silhouette.shape == (256, 256)


def test_rendering_is_reproducible_scales_and_refuses_specks():
    caption = "a mirrored pair of dotted green crescents on a white background"
    first, again, other = render(caption, 128, 7), render(caption, 128, 7), render(caption, 128, 8)
    assert first.tobytes() == again.tobytes() != other.tobytes()
    large = render(caption, 512, 7).resize((128, 128), Image.Resampling.BOX)
    assert np.abs(np.asarray(large, np.float64) - np.asarray(first, np.float64)).mean() < 1.5
    assert render(caption, (160, 96), 7).size == (160, 96)
    with pytest.raises(ValueError, match="too small"):
        render(caption, 8)


def _failing(items, caption, side=256):
    return [fact.name for fact in check(draw("white", items, side, side), caption) if not fact.holds]


def test_arrangements_of_many_small_things_can_fail():
    row = [Placed("star", "red", "solid", x, 0.5, 0.06) for x in (0.2, 0.4, 0.6, 0.8)]
    said = "a row of four red stars on a white background"
    assert _failing(row, said) == []
    assert _failing(row[:3], said) == ["count 4", "row 1 by 4"]
    assert _failing([*row[:3], dataclasses.replace(row[3], y=0.6)], said) == ["row 1 by 4"]
    grid = [Placed("ring", "blue", "solid", x, y, 0.08) for x in (0.2, 0.5, 0.8) for y in (0.3, 0.7)]
    assert _failing(grid, "a grid of two by three blue rings on a white background") == []
    assert _failing(grid, "a grid of three by two blue rings on a white background") == ["grid 3 by 2"]


def test_distant_pairs_must_match_and_be_distant():
    said = "a distant pair of circles on a white background"
    one, far = Placed("circle", "red", "solid", 0.15, 0.3, 0.09), Placed("circle", "red", "solid", 0.85, 0.6, 0.09)
    assert _failing([one, far], said) == []
    assert _failing([one, dataclasses.replace(far, x=0.5)], said) == ["distant"]
    assert _failing([one, dataclasses.replace(far, colour="blue")], said) == ["matching"]


@pytest.mark.parametrize("size", [256, 512, 1024])
def test_thin_lines_and_pinstripes_are_of_fixed_width_in_pixels(size):
    lines = "three thin green horizontal lines on a black background"
    picture = render(lines, size)
    assert fact_accuracy(picture, lines) == 1
    wrong = [fact.name for fact in check(picture, lines.replace("horizontal", "vertical")) if not fact.holds]
    assert wrong == ["lines vertical"]
    coloured = (np.asarray(picture).max(-1) > 60)[:, size // 2]
    assert 3 * 7 <= coloured.sum() <= 3 * 9
    for texture in ("striped", "checkered", "dotted", "solid"):
        said = "a pinstriped red square on a white background"
        failing = [f.name for f in check(render(said, size), said.replace("pinstriped", texture)) if not f.holds]
        assert failing == [f"texture {texture}"]
        other = said.replace("pinstriped", texture)
        assert [f.name for f in check(render(other, size), said) if not f.holds] == ["texture pinstriped"]
