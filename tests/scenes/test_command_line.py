"""The scenes from a shell."""

import json

import pytest
from PIL import Image

from flatten_diffusion.scenes import is_held_out, render
from flatten_diffusion.scenes.__main__ import main


def lines_of(capsys, *arguments):
    assert main(["captions", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_captions_of_either_split(capsys):
    assert all(map(is_held_out, lines_of(capsys, "--count", "20", "--held-out")))
    training = lines_of(capsys, "--count", "300", "--training", "--repeat")
    assert not any(map(is_held_out, training)) and len(set(training)) < 300
    assert len(set(lines_of(capsys, "--count", "300"))) == 300


def test_rendered_folders_are_checked(tmp_path, capsys):
    captions = tmp_path / "captions.txt"
    captions.write_text("a red circle on a white background\n\ntwo blue stars on a black background\n")
    assert main(["render", str(captions), str(tmp_path / "real"), "--size", "128", "--seed", "7"]) == 0
    drawn = Image.open(tmp_path / "real" / "000001-7.png")
    assert drawn.tobytes() == render("two blue stars on a black background", 128, 8).tobytes()
    assert main(["check", str(tmp_path / "real"), "--json", str(tmp_path / "facts.json")]) == 0
    assert json.loads((tmp_path / "facts.json").read_text())["fact_accuracy"] == 1.0


@pytest.mark.parametrize("text", ["a photo of a cat\n", None])
def test_bad_captions_draw_nothing(tmp_path, capsys, text):
    captions = tmp_path / "captions.txt"
    if text is not None:
        captions.write_text("a red circle on a white background\n" + text)
    assert main(["render", str(captions), str(tmp_path / "real")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "real").exists()


def test_captions_that_cannot_be_read_are_named(tmp_path, capsys):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    for name, message in (("missing.txt", "no such file"), ("latin.txt", "not UTF-8 text")):
        assert main(["render", str(tmp_path / name), str(tmp_path / "real")]) == 2
        assert capsys.readouterr().err.startswith(f"error: {tmp_path / name}: {message}")
    (tmp_path / "file").write_text("")
    (tmp_path / "captions.txt").write_text("a red circle on a white background\n")
    assert main(["render", str(tmp_path / "captions.txt"), str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'file'}: file exists\n"


def test_a_folder_without_images(tmp_path, capsys):
    assert main(["check", str(tmp_path)]) == 2
    assert "holds no images" in capsys.readouterr().err
