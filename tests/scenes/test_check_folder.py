"""The share of stated facts that the images of a folder show."""

import json

import pytest

from flatten_diffusion.scenes import check, render
from flatten_diffusion.scenes.check import check_folder

RIGHT, WRONG = "a red circle on a white background", "two blue stars on a black background"


def folder_of(tmp_path, *pairs):
    rows = []
    for index, (drawn, stated) in enumerate(pairs):
        render(drawn, 128, index).save(tmp_path / f"{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "text": stated}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    return tmp_path


def test_it_is_the_mean_over_images(tmp_path):
    facts = check(render(WRONG, 128, 1), RIGHT)
    assert not any(fact.holds for fact in facts)
    folder = folder_of(tmp_path, (RIGHT, RIGHT), (WRONG, RIGHT), (WRONG, WRONG))
    assert check_folder(folder)["fact_accuracy"] == pytest.approx(2 / 3)


def test_a_caption_outside_the_grammar_names_its_image(tmp_path):
    with pytest.raises(ValueError, match="1.png"):
        check_folder(folder_of(tmp_path, (RIGHT, RIGHT), (RIGHT, "a photo of a cat")))
