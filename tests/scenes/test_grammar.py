"""Captions: said and read back, split by hash, refused with a reason."""

import random

import pytest

from flatten_diffusion.scenes.grammar import (
    KINDS,
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
    kinds = set()
    for _ in range(2000):
        spec = sample_spec(rng)
        kinds.add(spec.kind)
        assert parse(spec.caption) == spec
    assert kinds == set(KINDS)


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
    ("caption", "complaint"),
    [
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
    for caption in sample_captions(500, seed=8):
        assert set(caption.split()) <= words
