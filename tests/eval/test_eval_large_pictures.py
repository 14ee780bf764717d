"""The table of quality and speed by size, run whole at toy sizes: complete, resumable, and refused where it must be."""

import json

import pytest
from PIL import Image

from eval.experiments import large_pictures

SMALL = ["--steps", "4", "--device", "cpu", "--native", "64"]


def test_it_measures_every_size_and_variant_and_goes_on_where_it_stopped(tmp_path, capsys):
    arguments = ["--sizes", "64:2", "96x64:3", *SMALL, "--rounds", "1", "--output", str(tmp_path / "drawn")]
    written, sheet = tmp_path / "result.json", tmp_path / "rows.png"
    assert large_pictures.main([*arguments, "--json", str(written), "--picture", str(sheet)]) == 0
    printed = capsys.readouterr().out
    sizes = json.loads(written.read_text())["sizes"]
    assert list(sizes) == ["64x64", "96x64"]
    for name, count in (("64x64", 2), ("96x64", 3)):
        assert name in printed
        for variant in large_pictures.VARIANTS:
            row, timed = sizes[name]["quality"][variant], sizes[name]["speed"][variant]
            assert row["count"] == count and 0 <= row["fact_accuracy"] <= 1 and row["frechet_distance"] > 0
            assert timed["rounds"] == 1 and timed["median"] > 0 and timed["failure"] is None
            assert ("ssim" in row) == (variant != large_pictures.ORIGINAL)
    assert Image.open(tmp_path / "drawn" / "96x64" / "original" / "000000.png").size == (96, 64)
    assert Image.open(sheet).height > 3 * 384
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "drawn").rglob("*.png")}
    assert large_pictures.main([*arguments[:-4], "--rounds", "0", *arguments[-2:]]) == 0
    with pytest.raises(SystemExit, match="made with other settings: choose another --output"):
        large_pictures.main(["--sizes", "64:3", *arguments[3:-4], "--rounds", "0", *arguments[-2:]])
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "drawn").rglob("*.png")}


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (["--sizes", "100:2"], "multiples of 32"),
        (["--sizes", "128"], "WIDTH[xHEIGHT]:COUNT"),
        (["--sizes", "128:1"], "at least 2"),
        (["--sizes", "64:2", "--variants", "distilled"], "original"),
        (["--sizes", "64:2", "--adapter", "nowhere"], "no adapter there"),
        (["--sizes", "64:2", "--strength", "0"], "strength is 0"),
        (["--sizes", "64:2", "--steps", "1"], "is no step"),
        (["--sizes", "64:2", "--device", "abacus"], "abacus"),
        (["--sizes", "64:2", "--rounds", "-1"], "--rounds"),
        (["--sizes", "64:2", "--json", "nowhere/x.json"], "no folder"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_drawn(wrong, complaint, capsys):
    with pytest.raises(SystemExit) as raised:
        large_pictures.main(wrong)
    assert raised.value.code == 2 and complaint in capsys.readouterr().err
