"""The README's first command, at a small size."""

import importlib.util
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart.py"


def run(monkeypatch, *arguments):
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *map(str, arguments)])
    module.main()


def test_it_prints_one_table_and_writes_both_rows(monkeypatch, tmp_path, capsys):
    picture = tmp_path / "both.png"
    run(monkeypatch, "--output", picture, "--large", 160, "--num_inference_steps", 1, "--repeats", 1)
    printed = capsys.readouterr().out
    assert "128x128" in printed and "160x160" in printed and "ratio" in printed and str(picture) in printed
    sheet = Image.open(picture)
    assert sheet.width > 4 * 256 and sheet.height > 2 * 256
    # The two rows come from the same seeds but not from the same attention.
    half = sheet.height // 2
    assert (
        sheet.crop((0, 30, sheet.width, half)).tobytes()
        != sheet.crop((0, half + 26, sheet.width, sheet.height)).tobytes()
    )


@pytest.mark.parametrize("wrong", [["--large", 100], ["--output", "no-such-folder/x.png"]])
def test_wrong_use_is_refused_before_anything_is_drawn(monkeypatch, wrong, capsys):
    with pytest.raises(SystemExit) as raised:
        run(monkeypatch, *wrong)
    assert raised.value.code == 2
    assert wrong[0] in capsys.readouterr().err
