"""Captions: said and read back, split by hash, refused with a reason."""

import random

import pytest

from flatten_diffusion.scenes.grammar import (
    FINE_TEXTURES,
    KINDS,
    LARGE,
    LARGE_KINDS,
    SceneSpec,
    Thing,
    is_held_out,
    parse,
    sample_captions,
    sample_spec,
    vocabulary,
)


def test_every_sampled_scene_survives_being_said_and_read_back():
    rng = random.Random(3)
    for size, expected in ((LARGE - 1, set(KINDS)), (LARGE, set(KINDS + LARGE_KINDS))):
        kinds, textures = set(), set()
        for _ in range(2000):
            spec = sample_spec(rng, size)
            kinds.add(spec.kind)
            textures.update(thing.texture for thing in spec.things)
            assert parse(spec.caption) == spec
        assert kinds == expected
        assert textures.issuperset(FINE_TEXTURES) == (size >= LARGE)


def test_parse_reads_what_a_person_would_type():
    spec = parse("  An Orange crescent LEFT OF a striped blue star on a navy background. ")
    assert spec == SceneSpec(
        "relation",
        (Thing("crescent", "orange"), Thing("star", "blue", "striped")),
        "navy",
        2,
        "left of",
    )
    assert spec.caption == "an orange crescent left of a striped blue star on a navy background"


@pytest.mark.parametrize(
    ("caption", "spec"),
    [
        (
            "a row of six red stars on a gray background",
            SceneSpec("row", (Thing("star", "red"),), "gray", 6, grid=(1, 6)),
        ),
        (
            "a grid of two by four dotted pink rings on a mist background",
            SceneSpec("grid", (Thing("ring", "pink", "dotted"),), "mist", 8, grid=(2, 4)),
        ),
        (
            "five thin blue vertical lines on a white background",
            SceneSpec("lines", (Thing("line", "blue"),), "white", 5, orientation="vertical"),
        ),
        (
            "a distant pair of pinstriped squares on a dusk background",
            SceneSpec("distant", (Thing("square", None, "pinstriped"),), "dusk", 2),
        ),
    ],
)
def test_what_only_large_pictures_hold_is_read_and_said(caption, spec):
    assert parse(caption) == spec and spec.caption == caption


@pytest.mark.parametrize(
    ("caption", "complaint"),
    [
        ("a row of two red stars on a gray background", "'two' is no number of the 'row' kind; use three"),
        ("a row of stars on a gray background", "no number"),
        ("a grid of two red stars on a gray background", "ROWS by COLUMNS"),
        ("a grid of two by six red stars on a gray background", "'six'"),
        ("six thin red vertical lines on a gray background", "'six' is no number of the 'lines' kind"),
        ("two thin red slanted lines on a gray background", "horizontal|vertical"),
        ("a distant pair of red stars on a gray background", "red stars"),
        ("a red circle", "must end in"),
        ("a red circle on a plaid background", "must end in"),
        ("a red blob on a white background", "red blob"),
        ("a circle on a white background", "circle"),
        ("five red circles on a white background", "must begin with"),
        ("two red circle on a white background", "red circle"),
        ("a matching pair of red circles on a white background", "red circles"),
        ("a red circle near a blue star on a white background", "near"),
        ("", "must end in"),
    ],
)
def test_what_is_not_of_the_grammar_is_refused_in_one_line(caption, complaint):
    with pytest.raises(ValueError, match=complaint) as raised:
        parse(caption)
    assert "\n" not in str(raised.value)


def test_held_out_captions_are_a_tenth_and_never_mix():
    captions = sample_captions(2000, seed=1)
    share = sum(map(is_held_out, captions)) / len(captions)
    assert 0.07 < share < 0.13
    unseen = sample_captions(200, seed=2, held_out=True)
    trained = sample_captions(2000, seed=2, held_out=False)
    assert len(set(unseen)) == 200
    assert not set(unseen) & set(trained)
    assert sample_captions(50, seed=5) == sample_captions(50, seed=5) != sample_captions(50, seed=6)


def test_the_vocabulary_covers_every_caption():
    words = set(vocabulary())
    for caption in sample_captions(500, seed=8) + sample_captions(1000, seed=8, size=LARGE):
        assert set(caption.split()) <= words
